#!/usr/bin/env bash
# Train on several GPUs of one or more machines:
#   tools/dist_train.sh CONFIG GPUS [options of tools/train.py]
# Also from the environment: NNODES (1), NODE_RANK (0), MASTER_ADDR
# (127.0.0.1), PORT (29500), PYTHON.
set -eu
if [ $# -lt 2 ]; then
    sed -n '2,5s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
CONFIG=$1
GPUS=$2
if ! [[ $GPUS =~ ^([1-9][0-9]*|gpu|auto)$ ]]; then
    echo "GPUS=$GPUS: how many GPUs of this machine, for instance 8." >&2
    exit 2
elif [ ! -f "$CONFIG" ]; then
    echo "CONFIG=$CONFIG: there is no such file (working directory $PWD)." >&2
    exit 2
fi
TOOLS=$(cd "$(dirname "$0")" && pwd)
export PYTHONPATH="$TOOLS/..${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes="${NNODES:-1}" --node_rank="${NODE_RANK:-0}" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="${PORT:-29500}" \
    --nproc_per_node="$GPUS" \
    "$TOOLS/train.py" "$CONFIG" --launcher pytorch "${@:3}"
