import torch
from torch import Tensor, nn

from mmsinger.errors import check_choice
from mmsinger.registry import MODELS


def cosine_gram(tokens: Tensor) -> Tensor:
    """The matrix of cosine similarities between tokens.

    Args:
        tokens (Tensor): Shape (B, P, D).

    Returns:
        Tensor: Shape (B, P, P), float32.
    """
    with torch.autocast(tokens.device.type, enabled=False):
        unit = nn.functional.normalize(tokens.float(), dim=-1)
        return unit @ unit.transpose(1, 2)


@MODELS.register_module()
class GramInformationLoss(nn.Module):
    """L_info: refinement must keep how patches relate (section 3.3).

    The mean squared difference of two cosine Gram matrices, in float32. In
    :class:`SiNGERDistiller` an intermediate layer compares the outputs of the
    next teacher block, fed with refined and with original tokens; the last
    layer compares the refined tokens with the original ones. Alone, it
    compares any two sets of patch tokens.

    Args:
        intermediate (str): What intermediate layers compare: ``'gram'``, the
            paper; ``'mse'``, all tokens of the block outputs directly, the
            official code. Defaults to ``'gram'``.
        last (str): What the last layer is compared with: ``'self'``, its
            original tokens, the paper; ``'previous'``, the refined tokens of
            the distilled layer before it, the official code. Defaults to
            ``'self'``.
        loss_weight (float): Defaults to 1.0.
    """

    def __init__(self, intermediate: str = 'gram', last: str = 'self',
                 loss_weight: float = 1.0) -> None:
        super().__init__()
        check_choice('loss_info.intermediate', intermediate, ('gram', 'mse'))
        check_choice('loss_info.last', last, ('self', 'previous'))
        self.intermediate = intermediate
        self.last = last
        self.loss_weight = loss_weight

    def forward(self, pred: Tensor, target: Tensor, num_prefix: int = 0,
                is_last: bool = True) -> Tensor:
        """
        Args:
            pred (Tensor): Tokens that depend on the refinement, (B, N, D).
            target (Tensor): Tokens to agree with, (B, N, D).
            num_prefix (int): CLS and register tokens in front, which Gram
                matrices leave out. Defaults to 0.
            is_last (bool): False for an intermediate layer, where
                ``intermediate`` decides. Defaults to True.

        Returns:
            Tensor: A scalar, times ``loss_weight``.
        """
        if not is_last and self.intermediate == 'mse':
            error = nn.functional.mse_loss(pred.float(), target.float())
        else:
            error = nn.functional.mse_loss(
                cosine_gram(pred[:, num_prefix:]),
                cosine_gram(target[:, num_prefix:]))
        return self.loss_weight * error
