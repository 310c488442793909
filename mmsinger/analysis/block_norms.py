"""Token norms inside transformer blocks, read during a forward pass."""
import contextlib
from typing import Dict, NamedTuple, Sequence

from torch import Tensor, nn

from mmsinger.metrics import token_norms
from mmsinger.models.features.anatomy import (Blocks, find_part,
                                              first_output)


class Inflation(NamedTuple):
    """How token norms grow inside one block (appendix A, Table 7).

    Every field has shape (B, N), prefix tokens first.

    Attributes:
        g_ffn1 (Tensor): ``||h|| / ||x||``, x what the FFN receives (after the
            norm in front of it) and h its hidden activations, after the
            nonlinearity or the gate.
        g_ffn2 (Tensor): ``||fc2(h)|| / ||h||``, fc2 the FFN's last linear
            layer; ``g_ffn1 * g_ffn2`` is the gain of the whole FFN.
        delta_ffn (Tensor): Relative growth of the residual stream's norm over
            the FFN, LayerScale and skip connection included.
        delta_sa (Tensor): Its relative growth over self-attention.
    """
    g_ffn1: Tensor
    g_ffn2: Tensor
    delta_ffn: Tensor
    delta_sa: Tensor


class BlockNorms(contextlib.ExitStack):
    """Record token norms at five places of transformer blocks.

    A context manager; its hooks live only inside it, and keep norms, not
    tokens. Norms of a block may stand before or after attention and FFN::

        with BlockNorms(blocks, [18]) as norms:
            backbone(images)
        norms.inflation(18).delta_ffn  # (B, N)

    Args:
        blocks (Blocks): The backbone's blocks.
        layers (Sequence[int]): Indices of the blocks to watch.
    """

    def __init__(self, blocks: Blocks, layers: Sequence[int]) -> None:
        super().__init__()
        self.blocks = blocks
        self.layers = layers
        self._norms: Dict[int, Dict[str, Tensor]] = {}

    def __enter__(self) -> 'BlockNorms':
        for layer in self.layers:
            self._watch(layer, self.blocks.modules[layer])
        return super().__enter__()

    def _watch(self, layer: int, block: nn.Module) -> None:
        norms = self._norms[layer] = {}
        ffn, norm = find_part(block, 'ffn'), find_part(block, 'ffn_norm')
        last = [m for m in ffn.modules() if isinstance(m, nn.Linear)][-1]

        def at_input(module: nn.Module, name: str) -> None:
            self.enter_context(module.register_forward_pre_hook(
                lambda _, args: keep(name, args[0])))

        def at_output(module: nn.Module, name: str) -> None:
            self.enter_context(module.register_forward_hook(
                lambda _, args, output: keep(name, first_output(output))))

        def keep(name: str, tokens: Tensor) -> None:
            if name == 'before':
                norms.clear()
            norms.setdefault(name, token_norms(tokens))

        at_input(block, 'before')
        if norm is not None:
            at_input(norm, 'middle')
        at_input(ffn, 'middle')  # whichever runs first has the sum in hand
        at_input(ffn, 'ffn_input')
        at_input(last, 'hidden')
        at_output(last, 'ffn_output')
        at_output(block, 'after')

    def inflation(self, layer: int) -> Inflation:
        """Norm growth in a block during the last pass.

        Args:
            layer (int): Index of the block.

        Returns:
            Inflation: Its fields have shape (B, N).
        """
        norms = self._norms[layer]
        return Inflation(
            g_ffn1=norms['hidden'] / norms['ffn_input'],
            g_ffn2=norms['ffn_output'] / norms['hidden'],
            delta_ffn=norms['after'] / norms['middle'] - 1,
            delta_sa=norms['middle'] / norms['before'] - 1)
