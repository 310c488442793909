"""What a training step costs: time, FLOPs and memory, as ratios."""
from mmsinger.benchmark.cost import (AllocatedMemory, Step, count_flops,
                                     flop_counter, interleaved, paired_ratio,
                                     peak_memory)
from mmsinger.benchmark.loading import ImageLoading
from mmsinger.benchmark.machine import describe_machine, fast_precisions
from mmsinger.benchmark.steps import Steps, vision_transformer

__all__ = ['AllocatedMemory', 'ImageLoading', 'Step', 'Steps', 'count_flops',
           'describe_machine', 'fast_precisions', 'flop_counter',
           'interleaved', 'paired_ratio', 'peak_memory', 'vision_transformer']
