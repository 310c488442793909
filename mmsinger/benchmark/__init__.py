"""What a training step costs: time, FLOPs and memory, as ratios."""
from mmsinger.benchmark.cost import (AllocatedMemory, Step, count_flops,
                                     interleaved, paired_ratio, peak_memory)
from mmsinger.benchmark.machine import describe_machine, fast_precisions
from mmsinger.benchmark.steps import Steps, vision_transformer

__all__ = ['AllocatedMemory', 'Step', 'Steps', 'count_flops',
           'describe_machine', 'fast_precisions', 'interleaved',
           'paired_ratio', 'peak_memory', 'vision_transformer']
