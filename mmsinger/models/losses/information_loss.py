from typing import Any, Callable, Literal, Optional, Tuple, Union

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mmsinger.models.losses.feature_loss import weighted_mean
from mmsinger.registry import MODELS
from mmsinger.schema import NonNegative


def gram_difference(pred: Tensor, target: Tensor,
                    weight: Optional[Tensor] = None) -> Tensor:
    """The mean squared difference of two cosine Gram matrices.

    What ``mse_loss(cosine_gram(pred), cosine_gram(target))`` is, with memory
    that grows with P, not with P x P: rows of the matrices are made a few at
    a time, and their gradient with them.

    Args:
        pred (Tensor): Shape (B, P, D).
        target (Tensor): Shape (B, P, E).
        weight (Tensor, optional): w, shape (B, P): a pair of tokens i, j
            counts ``w_i w_j`` in the mean. Defaults to None, all alike.

    Returns:
        Tensor: A scalar, float32; 0 if no token counts. Its gradient has no
        gradient itself.
    """
    with torch.autocast(pred.device.type, enabled=False):
        pred, target = (nn.functional.normalize(tokens.float(), dim=-1)
                        for tokens in (pred, target))
        if weight is None:
            pairs = pred.shape[0] * pred.shape[1]**2
        else:
            root = weight.float().sqrt().unsqueeze(-1)
            pred, target = root * pred, root * target
            pairs = weight.float().sum(dim=1).square().sum().clamp(min=1e-6)
        needed = torch.is_grad_enabled()
        return _GramDifference.apply(
            pred, target, 1 / pairs, needed and pred.requires_grad,
            needed and target.requires_grad)


class _GramDifference(torch.autograd.Function):
    """scale * sum((X X^T - Y Y^T)^2) of X (B, P, D) and Y (B, P, E).

    The loss is a scalar, so that its gradient is known in the forward pass up
    to a factor: with G = X X^T - Y Y^T, which is symmetric, 4 scale G X and
    -4 scale G Y. Rows of G serve both and are dropped.
    """

    @staticmethod
    def forward(ctx: Any, pred: Tensor, target: Tensor,
                scale: Union[float, Tensor], pred_needs: bool,
                target_needs: bool) -> Tensor:
        count, dim = pred.shape[1:]
        # Rows of G then take a quarter of what the tokens take
        rows = max(64, dim // 4)
        total = pred.new_zeros(())
        pred_grad = torch.empty_like(pred) if pred_needs else None
        target_grad = torch.empty_like(target) if target_needs else None
        for start in range(0, count, rows):
            part = slice(start, start + rows)
            difference = pred[:, part] @ pred.transpose(1, 2)
            difference -= target[:, part] @ target.transpose(1, 2)
            total += difference.square().sum()
            difference *= 4 * scale
            if pred_needs:
                pred_grad[:, part] = difference @ pred
            if target_needs:
                target_grad[:, part] = -difference @ target
        ctx.save_for_backward(pred_grad, target_grad)
        return total * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor
                 ) -> Tuple[Optional[Tensor], ...]:
        pred_grad, target_grad = ctx.saved_tensors
        return (None if pred_grad is None else grad * pred_grad,
                None if target_grad is None else grad * target_grad,
                None, None, None)


def loss_behind_block(block: Callable[[Tensor], Tensor],
                      loss: Callable[[Tensor], Tensor], tokens: Tensor,
                      at_once: bool = True) -> Tensor:
    """A loss of what a frozen block makes of tokens, with its gradient
    computed at once: nothing of the block's pass is kept until the backward
    pass.

    Args:
        block (Callable): The block; its output has any shape.
        loss (Callable): Of its output, a scalar.
        tokens (Tensor): Input of the block, shape (B, N, D).
        at_once (bool): False: in the backward pass, as any loss, for one that
            depends on more that needs a gradient. Defaults to True.

    Returns:
        Tensor: The scalar. Its gradient has no gradient itself.
    """
    if not at_once:
        return loss(block(tokens))
    leaf = tokens.detach().requires_grad_(tokens.requires_grad)
    output = block(leaf).float()
    value = loss(output)
    if not value.requires_grad:
        return value
    with torch.autocast(tokens.device.type, enabled=False):
        grad, = torch.autograd.grad(value, output)
        # A power of two, as a loss scale: half precision holds the gradient
        scale = grad.abs().amax().clamp(min=1e-30).log2().floor().exp2()
        # Not autograd.grad(): checkpointing refuses it
        output.backward(grad / scale)
    return _KnownGradient.apply(value.detach(), leaf.grad.float() * scale,
                                tokens)


class _KnownGradient(torch.autograd.Function):
    """A scalar whose gradient by a tensor is known."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradient: Tensor, tokens: Tensor
                ) -> Tensor:
        ctx.save_for_backward(gradient)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor
                 ) -> Tuple[None, None, Tensor]:
        gradient, = ctx.saved_tensors
        return None, None, grad * gradient


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

    def __init__(self, intermediate: Literal['gram', 'mse'] = 'gram',
                 last: Literal['self', 'previous'] = 'self',
                 loss_weight: NonNegative = 1.0) -> None:
        super().__init__()
        self.intermediate = intermediate
        self.last = last
        self.loss_weight = loss_weight

    def forward(self, pred: Tensor, target: Tensor, num_prefix: int = 0,
                is_last: bool = True, weight: Optional[Tensor] = None
                ) -> Tensor:
        """
        Args:
            pred (Tensor): Tokens that depend on the refinement, (B, N, D).
            target (Tensor): Tokens to agree with, (B, N, D).
            num_prefix (int): CLS and register tokens in front, which Gram
                matrices leave out. Defaults to 0.
            is_last (bool): False for an intermediate layer, where
                ``intermediate`` decides. Defaults to True.
            weight (Tensor, optional): Of each token in the mean, (B, N).
                Defaults to None, all the same.

        Returns:
            Tensor: A scalar, times ``loss_weight``; 0 if no token counts.
        """
        if not is_last and self.intermediate == 'mse':
            errors = nn.functional.mse_loss(
                pred.float(), target.float(), reduction='none').mean(dim=-1)
            error = weighted_mean(errors, weight)
        else:
            error = gram_difference(
                pred[:, num_prefix:], target[:, num_prefix:],
                None if weight is None else weight[:, num_prefix:])
        return self.loss_weight * error
