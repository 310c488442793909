from contextlib import contextmanager

import torch
from mmengine.optim import OptimWrapper
from torch import nn

from mmsinger.errors import check_choice
from mmsinger.registry import OPTIM_WRAPPERS


@OPTIM_WRAPPERS.register_module()
class CPUAmpOptimWrapper(OptimWrapper):
    """Mixed precision on a CPU, where mmengine's ``AmpOptimWrapper`` refuses
    to start. ``tools/train.py`` puts it in that one's place.

    bfloat16 has the range of float32, so that there is no loss scale.

    Args:
        dtype (str): ``'bfloat16'``, the only one. Defaults to that.
        **kwargs: See :class:`mmengine.optim.OptimWrapper`.

    Raises:
        ConfigError: If ``dtype`` is another.
    """

    def __init__(self, dtype: str = 'bfloat16', **kwargs) -> None:
        check_choice('optim_wrapper.dtype (on a CPU)', dtype, ('bfloat16', ))
        super().__init__(**kwargs)

    @contextmanager
    def optim_context(self, model: nn.Module):
        """Autocast, and what :class:`OptimWrapper` does."""
        with super().optim_context(model), torch.autocast(
                'cpu', dtype=torch.bfloat16):
            yield
