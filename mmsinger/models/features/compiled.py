"""``torch.compile`` for transformer blocks."""
from typing import Any

import numpy as np
import torch
from torch import nn

from mmsinger.errors import ConfigError
from mmsinger.models.features.anatomy import Blocks


def compile_blocks(blocks: Blocks, **options: Any) -> None:
    """Compile the forward pass of each block, in place.

    Blocks alone: they are where the time goes, all have the same code, so
    that one compilation serves many, and the hooks that tap them stay outside,
    where they break no graph. Keys of the state dict do not change.

    Args:
        blocks (Blocks): Of a backbone.
        **options: Of ``torch.compile``, such as ``mode`` or ``backend``.

    Raises:
        ConfigError: If torch does not take the options.
    """
    try:
        torch.compile(nn.Identity(), **options)
    except Exception as error:
        raise ConfigError(
            f'model.compile={options}: '
            f'{(str(error) or type(error).__name__).splitlines()[0]} Backends '
            f'are {", ".join(torch.compiler.list_backends())}.') from error
    compiled = {}
    for block in blocks.modules:
        cls = type(block)
        if cls not in compiled:
            # A class and not an attribute of the block: a copied block (an
            # EMA model) then runs its own weights
            compiled[cls] = type(cls.__name__, (cls, ), dict(
                forward=torch.compile(cls.forward, **options),
                __module__=cls.__module__))
        block.__class__ = compiled[cls]
        _make_numbers_plain(block)


def _make_numbers_plain(block: nn.Module) -> None:
    # mmpretrain keeps NumPy drop path rates, which Dynamo takes for tensors
    for module in block.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, np.generic):
                setattr(module, name, value.item())
