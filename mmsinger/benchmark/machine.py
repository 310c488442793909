"""On what a benchmark ran."""
import datetime
import os
import platform
from typing import Any, Dict

import torch


def describe_machine(device: str) -> Dict[str, Any]:
    """Date, hardware and versions, for a benchmark's record.

    Args:
        device (str): ``'cpu'`` or ``'cuda'``.

    Returns:
        dict: ``date``, ``device`` (its name), ``cores``, ``threads``,
        ``instructions`` (of the CPU that matter here), ``torch``,
        ``python``.
    """
    name, flags = _processor()
    if device == 'cuda':
        name = torch.cuda.get_device_name()
    return dict(
        date=datetime.date.today().isoformat(), device=name,
        cores=os.cpu_count(), threads=torch.get_num_threads(),
        instructions=[flag for flag in (
            'avx2', 'avx512f', 'avx512_bf16', 'amx_bf16') if flag in flags],
        torch=torch.__version__, python=platform.python_version())


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
