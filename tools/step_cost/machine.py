"""On what a benchmark ran."""
import datetime
import json
import os
import platform
import sys
from typing import Any, Dict, List

import torch


def describe_machine(device: str) -> Dict[str, Any]:
    """Date, hardware and versions, for a benchmark's record.

    Args:
        device (str): ``'cpu'`` or ``'cuda'``.

    Returns:
        dict: ``date``, ``device`` (its name), ``cores``, ``threads``,
        ``instructions`` (of the CPU that matter here), ``torch``,
        ``python``; of a GPU also ``cuda`` (torch's), ``capability`` and
        ``memory_bytes``.
    """
    name, flags = _processor()
    machine = dict(
        date=datetime.date.today().isoformat(), device=name,
        cores=os.cpu_count(), threads=torch.get_num_threads(),
        instructions=[flag for flag in (
            'avx2', 'avx512f', 'avx512_bf16', 'amx_bf16') if flag in flags],
        torch=torch.__version__, python=platform.python_version())
    if device == 'cuda':
        gpu = torch.cuda.get_device_properties(0)
        machine.update(device=gpu.name, cuda=torch.version.cuda,
                       capability=f'{gpu.major}.{gpu.minor}',
                       memory_bytes=gpu.total_memory)
    return machine


def fast_precisions() -> List[str]:
    """Which of ``'fp32'``, ``'tf32'`` and ``'bf16'`` this machine computes at
    full speed. CPUs without bfloat16 instructions are a hundred times slower
    in it, and ratios of such times say nothing."""
    if torch.cuda.is_available():
        ampere = torch.cuda.get_device_capability() >= (8, 0)
        return ['fp32', 'tf32', 'bf16'] if ampere else ['fp32']
    fast = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return ['fp32', 'bf16'] if fast else ['fp32']


def _processor():
    name, flags = platform.processor() or platform.machine(), []
    try:
        with open('/proc/cpuinfo') as file:
            for line in file:
                key, _, value = line.partition(':')
                if key.strip() == 'model name':
                    name = value.strip()
                elif key.strip() == 'flags':
                    flags = value.split()
                    break
    except OSError:
        pass  # not Linux
    return name, flags


if __name__ == '__main__':
    print(json.dumps(describe_machine(sys.argv[1])))
