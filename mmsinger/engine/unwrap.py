import contextlib
from typing import Iterator

from mmengine.model import is_model_wrapper
from torch import nn


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside a DistributedDataParallel or similar wrapper."""
    return model.module if is_model_wrapper(model) else model


def is_sharded(model: nn.Module) -> bool:
    """Whether each process holds parts of the parameters only (FSDP)."""
    return is_model_wrapper(model) and hasattr(model, 'summon_full_params')


@contextlib.contextmanager
def full_parameters(model: nn.Module) -> Iterator[None]:
    """Whole parameters inside the context, also of the teacher, where FSDP
    keeps parts; what is changed is kept. Without FSDP nothing happens.

    All processes have to enter it together.

    Args:
        model (nn.Module): ``runner.model``.
    """
    if not is_sharded(model):
        yield
        return
    teacher = getattr(unwrap(model), 'teacher', None)
    divided = [module for module in (teacher.modules() if teacher is not None
                                     else ()) if hasattr(module, 'unshard')]
    for module in divided:
        module.unshard()
    try:
        with model.summon_full_params(model):
            yield
    finally:
        for module in divided:
            module.reshard()
