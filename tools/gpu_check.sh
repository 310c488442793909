#!/usr/bin/env bash
# Measure on a GPU, the most valuable first and in nine minutes at most: tests,
# steps of several pairs, sizes and precisions, a distillation of the demo:
#   tools/gpu_check.sh [--cpu]
# Leaves gpu_check.json, gpu_check.md (with what was left out) and .log in OUT,
# and installs nothing. --cpu shows, on small models, that it works. From the
# environment: OUT (docs/benchmarks/gpu; with --cpu work_dirs/gpu_check), LIMIT
# (540 seconds), PYTHON (python).
set -u
SECONDS=0
case "$#,${1-}" in
0,) MODE=cuda ;;
1,--cpu) MODE=cpu ;;
*) sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
TOOLS=$(cd "$(dirname "$0")" && pwd)
ROOT=$(cd "$TOOLS/.." && pwd)
[ -f "$ROOT/tests/test_gpu.py" ] || {
    echo "$ROOT has no tests: run it in a checkout of the source." >&2
    exit 2; }
PYTHON=$(command -v "${PYTHON:-python}") || {
    echo "PYTHON=${PYTHON:-python} cannot be run." >&2; exit 2; }
LIMIT=${LIMIT:-540}
[[ $LIMIT =~ ^[1-9][0-9]*$ ]] || {
    echo "LIMIT=$LIMIT: a number of seconds, for instance 540." >&2; exit 2; }
if [ $MODE = cuda ]; then
    OUT=${OUT:-$ROOT/docs/benchmarks/gpu}
    export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES-0}
else
    OUT=${OUT:-work_dirs/gpu_check}
    export CUDA_VISIBLE_DEVICES=
fi
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd) && : > "$OUT/gpu_check.log" || {
    echo "OUT=$OUT cannot be written." >&2; exit 2; }
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

WORK=$(mktemp -d)
CHILD=
FAILED=0
trap 'rm -rf "$WORK"' EXIT
trap '[ -z "$CHILD" ] || kill "$CHILD"; exit 130' INT TERM HUP
cd "$WORK" || exit

# run SECONDS COMMAND...: at most that long; its output goes to the log
run() {
    timeout -k 3 "$@" > output 2>&1 &
    CHILD=$!
    wait $CHILD
    local code=$?
    CHILD=
    cat output >> "$OUT/gpu_check.log"
    return $code
}

# job NAME SECONDS COMMAND...: at most that long, and within LIMIT
job() {
    local name=$1 most=$2 start=$SECONDS left=$((LIMIT - 5 - SECONDS)) state
    shift 2
    ((most = most < left ? most : left))
    printf '\n== %s: %s\n' "$name" "$*" >> "$OUT/gpu_check.log"
    if ((most < 5)); then
        state="left out: $((left > 0 ? left : 0)) s were left"
    else
        run "$most" "$@"
        case $? in
        0) state=done ;;
        124 | 137) state="stopped after $most s" ;;
        *) state=failed; FAILED=1; tail -n 25 output ;;
        esac
    fi
    echo "$name: $state ($((SECONDS - start)) s)"
    printf '%s\t%s\t%s\n' "$name" "$state" $((SECONDS - start)) >> jobs.tsv
    "$PYTHON" "$TOOLS/gpu_report.py" "$WORK" "$OUT" || FAILED=1
}

# steps NAME SECONDS OPTIONS...: tools/benchmark_step.py
steps() {
    local name=$1 most=$2
    shift 2
    job "$name" "$most" "$PYTHON" "$TOOLS/benchmark_step.py" \
        --out "steps/$name.json" "$@"
}

# distil NAME SECONDS OPTIONS...: tools/train.py, the demo's recipe
distil() {
    local name=$1 most=$2
    shift 2
    job "$name" "$most" "$PYTHON" "$TOOLS/train.py" \
        "$ROOT/configs/demo/singer_digits.py" --work-dir "$name" "$@"
}

mkdir steps
run 120 "$PYTHON" "$TOOLS/check_env.py" || { cat output; exit 1; }
run 60 "$PYTHON" "$TOOLS/step_cost/machine.py" $MODE || {
    tail -n 1 output
    echo "torch sees no CUDA device that it can use; --cpu needs none." >&2
    exit 1; }
mv output machine.json

TEST=("$PYTHON" -m pytest "$ROOT/tests/test_gpu.py" -p no:cacheprovider
      -o junit_family=xunit1 --junitxml tests.xml)
SCENES=("$PYTHON" "$TOOLS/make_digit_scenes.py" --num-train)
if [ $MODE = cpu ]; then
    job tests 100 "${TEST[@]}"
    steps vitt_vitt_32 90 --teacher vit_t16 --student vit_t16 --size 32 \
        --batch-size 1 --rounds 2 --compile eager
    job scenes 40 "${SCENES[@]}" 64 --num-val 16
    distil distil 60 --cfg-options train_cfg.max_iters=4 \
        train_cfg.val_interval=4 default_hooks.logger.interval=1 \
        train_dataloader.batch_size=4
else
    L_T=(--teacher vit_l16 --student vit_t16 --rounds 10)
    L_S=(--teacher vit_l16 --student vit_s16 --rounds 10)
    PX_224=(--size 224 --batch-size 32)
    PX_512=(--size 512 --batch-size 8)
    BESIDE=('robust preset' info_fraction=0.5)
    TRAIN=(train_cfg.max_iters=200 train_cfg.val_interval=200)
    job tests 120 "${TEST[@]}"
    steps vitl_vitt_224 100 "${L_T[@]}" "${PX_224[@]}" --precision fast
    steps vitl_vits_224 70 "${L_S[@]}" "${PX_224[@]}" --precision fast \
        --steps "${BESIDE[@]}"
    steps vitl_vitt_512 70 "${L_T[@]}" "${PX_512[@]}" --precision fast \
        --steps "${BESIDE[@]}"
    steps vitl_vits_512 70 "${L_S[@]}" "${PX_512[@]}" --precision fast \
        --steps "${BESIDE[@]}"
    job scenes 40 "${SCENES[@]}" 2000 --num-val 200
    distil distil_amp 60 --amp --cfg-options "${TRAIN[@]}"
    steps vitl_vitt_224_compiled 120 "${L_T[@]}" "${PX_224[@]}" \
        --precision bf16 --steps "robust preset" --compile
    distil distil 45 --cfg-options "${TRAIN[@]}"
    steps vitl_vits_512_compiled 120 "${L_S[@]}" "${PX_512[@]}" \
        --precision bf16 --steps "robust preset" --compile
    steps vitl_vitt_224_compiled_tf32 120 "${L_T[@]}" "${PX_224[@]}" \
        --precision tf32 --steps "robust preset" --compile
    steps vitl_vitt_224_levers 60 "${L_T[@]}" "${PX_224[@]}" \
        --precision bf16 --levers
fi
echo "$OUT/gpu_check.md ($SECONDS s)"
exit $FAILED
