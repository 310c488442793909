"""Block outputs, recorded while a backbone runs.

The models are not edited; every hook is removed again.
"""
import contextlib
from functools import partial
from typing import Any, Dict, Iterator, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from mmsinger.errors import ConfigError
from mmsinger.models.features.anatomy import Features, first_output, unmasked
from mmsinger.models.features.tokens import Grid, Tokens


class _StopForward(Exception):
    """Ends a forward pass after the last block that is needed."""


class BlockTaps(contextlib.ExitStack):
    """Record what blocks, or stages, of a backbone give in a forward pass.

    A context manager; its hooks live only inside it::

        with BlockTaps(blocks, [17, 18, 23]) as taps:
            taps.run(backbone, images)
        tokens = taps.tokens(17)

    Args:
        blocks (Blocks | Maps): Of the backbone.
        layers (Sequence[int]): Indices of those to record.
        stop (bool): End the pass after the deepest of them. Only for a pass
            started by :meth:`run`. Defaults to False.
        dtype (torch.dtype, optional): The precision that the backbone was
            cast to: it is kept under autocast too, and tokens are float32
            outside. Defaults to None: that of the surroundings.
    """

    def __init__(self, blocks: Features, layers: Sequence[int],
                 stop: bool = False,
                 dtype: Optional[torch.dtype] = None) -> None:
        super().__init__()
        self.blocks = blocks
        self.layers = sorted(set(layers))
        self.stop = stop
        self.dtype = dtype
        self._outputs: Dict[int, Any] = {}
        # What blocks received beside the tokens: rotary embeddings, relative
        # position bias, patch resolution, …
        self._extras: Dict[int, Tuple[tuple, Dict[str, Any]]] = {}
        self._grid: Optional[Grid] = None

    def __enter__(self) -> 'BlockTaps':
        hold = self.enter_context
        hold(self.blocks.watch_input(self._record_grid))
        for layer in self.layers:
            block = self.blocks.modules[layer]
            hold(block.register_forward_pre_hook(
                partial(self._record_extras, layer), with_kwargs=True))
            hold(block.register_forward_hook(
                partial(self._record_output, layer)))
        return self

    def run(self, backbone: nn.Module, images: Tensor) -> None:
        """Forward images of shape (B, 3, H, W), up to the last tap if
        ``stop`` is set."""
        try:
            with own_precision(images, self.dtype) as images:
                backbone(images, **unmasked(backbone, images))
        except _StopForward:
            pass

    def tokens(self, layer: int) -> Tokens:
        """The recorded output of a block, before any final norm.

        Args:
            layer (int): Index of the block.

        Returns:
            Tokens: Values of shape (B, N, C).

        Raises:
            ConfigError: If the block's output is not tokens on a grid, or
                the pass did not reach it.
        """
        if layer not in self._outputs or self._grid is None:
            raise ConfigError(
                f'{self.blocks.paths[layer]} was not reached by the forward '
                'pass. Its backbone skips it, or does not call its '
                'patch_embed.')
        tokens = self.blocks.read(layer, self._outputs[layer], self._grid)
        if self.dtype is not None:
            tokens = tokens._replace(values=tokens.values.float())
        return tokens

    def rerun(self, layer: int, values: Tensor) -> Tensor:
        """Run a recorded block again on other tokens, with the same extra
        arguments that it received in the pass.

        Args:
            layer (int): Index of the block.
            values (Tensor): Its input, shape (B, N, C).

        Returns:
            Tensor: Its output, shape (B, N, C).
        """
        args, kwargs = self._extras[layer]
        with own_precision(values, self.dtype) as values:
            output = self.blocks.modules[layer](values, *args, **kwargs)
        output = first_output(output)
        return output if self.dtype is None else output.float()

    def with_outputs(self, outputs: Dict[int, Tensor]) -> 'BlockTaps':
        """The record of a like pass over other images.

        Args:
            outputs (dict[int, Tensor]): Block outputs (B, N, C) by index.

        Returns:
            BlockTaps: With the same grid and extra arguments.
        """
        taps = BlockTaps(self.blocks, self.layers, dtype=self.dtype)
        taps._outputs = outputs
        taps._extras, taps._grid = self._extras, self._grid
        return taps

    def _record_grid(self, grid: Grid) -> None:
        self._grid = grid

    def _record_extras(self, layer: int, module: nn.Module, args: tuple,
                       kwargs: Dict[str, Any]) -> None:
        self._extras[layer] = args[1:], dict(kwargs)

    def _record_output(self, layer: int, module: nn.Module, args: tuple,
                       output: Any) -> None:
        self._outputs[layer] = output
        if self.stop and layer == self.layers[-1]:
            raise _StopForward


@contextlib.contextmanager
def own_precision(values: Tensor, dtype: Optional[torch.dtype]
                  ) -> Iterator[Tensor]:
    """Work in another precision than the surroundings.

    Args:
        values (Tensor): What goes in.
        dtype (torch.dtype, optional): The precision; None leaves all as it
            is.

    Yields:
        Tensor: The values in that precision, with autocast off.
    """
    if dtype is None:
        yield values
    else:
        with torch.autocast(values.device.type, enabled=False):
            yield values.to(dtype)
