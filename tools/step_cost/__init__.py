"""What a training step costs: time, FLOPs and memory, as ratios."""
from step_cost.cost import (AllocatedMemory, Step, count_flops, flop_counter,
                            interleaved, paired_ratio, peak_memory)
from step_cost.loading import ImageLoading
from step_cost.machine import describe_machine, fast_precisions
from step_cost.steps import Steps, vision_transformer

__all__ = ['AllocatedMemory', 'ImageLoading', 'Step', 'Steps', 'count_flops',
           'describe_machine', 'fast_precisions', 'flop_counter',
           'interleaved', 'paired_ratio', 'peak_memory', 'vision_transformer']
