"""Time, FLOPs and memory of a step."""
import contextlib
import ctypes
import gc
import math
import statistics
import time
import weakref
from typing import Any, Callable, Dict, List, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import (FlopCounterMode,
                                      sdpa_backward_flop_count,
                                      sdpa_flop_count)

SHORTEST = 0.1  # s, what is timed at once


class Step(NamedTuple):
    """Something to measure.

    Attributes:
        run (Callable): What is measured.
        setting (Callable): Gives a context manager that it runs in; entering
            and leaving are not measured.
    """
    run: Callable[[], None]
    setting: Callable[[], Any] = contextlib.nullcontext


def interleaved(steps: Dict[str, Step], rounds: int, device: str
                ) -> Dict[str, List[float]]:
    """Time steps in turn, so that a busy machine slows all alike; a step that
    is shorter than :data:`SHORTEST` is run as often as it takes to last so
    long.

    Args:
        steps (dict[str, Step]): By name.
        rounds (int): How often each is timed, after two to warm up.
        device (str): ``'cpu'`` or ``'cuda'``.

    Returns:
        dict[str, list[float]]: Seconds of a step, by name, round by round.
    """
    times: Dict[str, List[float]] = {name: [] for name in steps}
    for name, step in steps.items():  # to warm up, compilation included
        _seconds(step, 1, device)
    counts = {
        name: max(1, math.ceil(SHORTEST / _seconds(step, 1, device)))
        for name, step in steps.items()}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(_seconds(step, counts[name], device))
    return times


def _seconds(step: Step, count: int, device: str) -> float:
    """Mean time of a step that is run so many times."""
    with step.setting():
        _wait(device)
        start = time.perf_counter()
        for _ in range(count):
            step.run()
        _wait(device)
        return (time.perf_counter() - start) / count


def paired_ratio(times: Dict[str, List[float]], name: str, base: str
                 ) -> float:
    """Median over rounds of what one step takes over another: both of a round
    see the same machine."""
    return statistics.median(
        a / b for a, b in zip(times[name], times[base]))


def flop_counter() -> FlopCounterMode:
    """Torch's counter of floating point operations, with the CPU's fused
    attention, which its table lacks."""
    aten = torch.ops.aten
    forward = aten._scaled_dot_product_flash_attention_for_cpu
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
    return FlopCounterMode(display=False, custom_mapping={
        forward: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        backward: lambda grad, q, k, v, *_, **__:
            sdpa_backward_flop_count(grad, q, k, v)})


def count_flops(step: Step) -> int:
    """Floating point operations of a step: of matrix products, convolutions
    and attention, as :func:`flop_counter` counts them."""
    with step.setting(), flop_counter() as flops:
        step.run()
    return flops.get_total_flops()


class AllocatedMemory(TorchDispatchMode):
    """Follows the bytes of tensors that operators inside it allocate.

    Attributes:
        now (int): Those alive.
        peak (int): The most at one time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: Dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # An operator that returns what it was given allocates nothing
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves(
            (args, kwargs)) if isinstance(leaf, Tensor)}
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in given:
                    self._allocate(storage)
        return output

    def _allocate(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._alive:
            return
        self._alive[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.now -= self._alive.pop(key, 0)


def peak_memory(step: Step, device: str) -> Dict[str, int]:
    """The memory that a step needs beyond what is there before it.

    Args:
        step (Step): The step.
        device (str): ``'cpu'`` or ``'cuda'``.

    Returns:
        dict[str, int]: Bytes: ``tensors``, the most that its tensors take at
        one time; ``process``, the growth of the process (CPU, Linux) or of
        the device's allocations; 0 where that is not known.
    """
    with step.setting():
        gc.collect()
        with AllocatedMemory() as memory:
            step.run()
        gc.collect()
        if device == 'cuda':
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step.run()
            torch.cuda.synchronize()
            process = torch.cuda.max_memory_allocated() - before
        else:
            process = _process_growth(step.run)
    return dict(tensors=memory.peak, process=process)


def _process_growth(run: Callable[[], None]) -> int:
    # What the allocator keeps for later would hide a step's growth; C
    # libraries other than glibc cannot
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        with open('/proc/self/clear_refs', 'w') as file:
            file.write('5')  # the peak starts anew
    except OSError:  # not Linux, or not allowed
        run()
        return 0
    before = _status('VmRSS')
    run()
    return max(0, _status('VmHWM') - before)


def _status(key: str) -> int:
    with open('/proc/self/status') as file:
        for line in file:
            if line.startswith(key + ':'):
                return 1024 * int(line.split()[1])
    return 0


def _wait(device: str) -> None:
    if device == 'cuda':
        torch.cuda.synchronize()
