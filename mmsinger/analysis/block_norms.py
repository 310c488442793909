"""Token norms inside transformer blocks, read during a forward pass."""
from typing import Any, Dict, List, NamedTuple, Sequence

from torch import Tensor, nn

from mmsinger.metrics.norms import norm_gain, norm_growth, token_norms
from mmsinger.models.features.taps import Blocks


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
        delta_sa (Tensor): The same over self-attention.
    """
    g_ffn1: Tensor
    g_ffn2: Tensor
    delta_ffn: Tensor
    delta_sa: Tensor


class BlockNorms:
    """Record token norms at five places of transformer blocks.

    A context manager; its hooks live only inside it, and keep norms, not
    tokens. Works on every kind of block that
    :func:`mmsinger.models.features.taps.find_blocks` finds, whether its norms stand
    before or after attention and FFN::

        with BlockNorms(blocks, [18]) as norms:
            backbone(images)
        norms.inflation(18).delta_ffn  # (B, N)

    Args:
        blocks (Blocks): Of the backbone.
        layers (Sequence[int]): Indices of the blocks to watch.
    """

    def __init__(self, blocks: Blocks, layers: Sequence[int]) -> None:
        self.blocks = blocks
        self.layers = layers
        self._norms: Dict[int, Dict[str, Tensor]] = {}
        self._handles: List[Any] = []

    def __enter__(self) -> 'BlockNorms':
        for layer in self.layers:
            self._watch(layer, self.blocks.modules[layer])
        return self

    def __exit__(self, *_) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _watch(self, layer: int, block: nn.Module) -> None:
        norms = self._norms[layer] = {}
        ffn = getattr(block, 'ffn', None) or block.mlp
        norm = getattr(block, 'ln2', None) or getattr(block, 'norm2', None)
        last = [m for m in ffn.modules() if isinstance(m, nn.Linear)][-1]

        def on_input(*names: str):

            def hook(module, args):
                for name in names:
                    # Whichever of norm and FFN is first has the sum in hand
                    if name != 'middle' or name not in norms:
                        norms[name] = token_norms(args[0])

            return hook

        def on_output(name: str):

            def hook(module, args, output):
                if isinstance(output, (tuple, list)):
                    output = output[0]
                norms[name] = token_norms(output)

            return hook

        def on_start(module, args):
            norms.clear()
            norms['before'] = token_norms(args[0])

        self._handles += [
            block.register_forward_pre_hook(on_start),
            ffn.register_forward_pre_hook(on_input('middle', 'ffn_input')),
            last.register_forward_pre_hook(on_input('hidden')),
            last.register_forward_hook(on_output('ffn_output')),
            block.register_forward_hook(on_output('after')),
        ]
        if norm is not None:
            self._handles.append(
                norm.register_forward_pre_hook(on_input('middle')))

    def inflation(self, layer: int) -> Inflation:
        """Norm growth in a block during the last pass.

        Args:
            layer (int): Index of the block.

        Returns:
            Inflation: Its fields have shape (B, N).
        """
        norms = self._norms[layer]
        return Inflation(
            g_ffn1=norm_gain(norms['ffn_input'], norms['hidden']),
            g_ffn2=norm_gain(norms['hidden'], norms['ffn_output']),
            delta_ffn=norm_growth(norms['middle'], norms['after']),
            delta_sa=norm_growth(norms['before'], norms['middle']))
