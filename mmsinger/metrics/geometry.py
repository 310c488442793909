"""How tokens lie to each other, and how alike two sets of them are.

Pure functions, in float32 or better whatever goes in, without a wait for the
device.
"""
import torch
from torch import Tensor


def cosine_gram(tokens: Tensor) -> Tensor:
    """The matrix of cosine similarities between an image's tokens.

    Args:
        tokens (Tensor): Shape (B, P, C).

    Returns:
        Tensor: Shape (B, P, P), float32, also under autocast.
    """
    with torch.autocast(tokens.device.type, enabled=False):
        unit = torch.nn.functional.normalize(tokens.float(), dim=-1)
        return unit @ unit.transpose(1, 2)


def gram_distance(a: Tensor, b: Tensor) -> Tensor:
    """D_G: Frobenius norm of the difference of two cosine Gram matrices
    (Table 5b).

    0 where the same patches point the same way relative to each other. It
    grows with the number of patches P, to at most 2 P.

    Args:
        a (Tensor): Patch tokens, shape (B, P, C).
        b (Tensor): Patch tokens of the same images, shape (B, P, C'); the
            channels may differ.

    Returns:
        Tensor: Shape (B, ).
    """
    difference = cosine_gram(a) - cosine_gram(b)  # (B, P, P)
    return torch.linalg.matrix_norm(difference)


def token_cosine(a: Tensor, b: Tensor) -> Tensor:
    """Mean cosine similarity of corresponding tokens (Table 3).

    Args:
        a (Tensor): Shape (B, P, C).
        b (Tensor): Shape (B, P, C).

    Returns:
        Tensor: Shape (B, ), in [-1, 1].
    """
    return torch.cosine_similarity(_precise(a), _precise(b), dim=-1
                                   ).mean(dim=1)


def relative_l2(original: Tensor, changed: Tensor) -> Tensor:
    """``||changed - original|| / ||original||`` over an image's tokens
    (Table 8).

    Args:
        original (Tensor): Shape (B, P, C).
        changed (Tensor): Shape (B, P, C).

    Returns:
        Tensor: Shape (B, ).
    """
    original, changed = _precise(original), _precise(changed)
    size = torch.linalg.vector_norm(original, dim=(1, 2))
    return torch.linalg.vector_norm(changed - original, dim=(1, 2)) / size


def linear_cka(a: Tensor, b: Tensor) -> Tensor:
    """Linear centred kernel alignment of an image's tokens (Table 8).

    ``<K, L> / (||K|| ||L||)`` of the Gram matrices of the centred tokens
    (Kornblith et al., arXiv 1905.00414). Rotating all tokens, scaling or
    shifting them changes nothing. With fewer tokens than channels it is
    biased upwards: compare values of the same P only.

    Args:
        a (Tensor): Shape (B, P, C).
        b (Tensor): Shape (B, P, C'); the channels may differ.

    Returns:
        Tensor: Shape (B, ), in [0, 1]; 0 if the tokens of one are all equal.
    """
    a, b = _precise(a), _precise(b)
    with torch.autocast(a.device.type, enabled=False):
        centred = [t - t.mean(dim=1, keepdim=True) for t in (a, b)]
        kernels = [t @ t.transpose(1, 2) for t in centred]  # (B, P, P)
    norms = [torch.linalg.matrix_norm(kernel) for kernel in kernels]
    inner = (kernels[0] * kernels[1]).sum(dim=(1, 2))
    product = norms[0] * norms[1]
    ratio = inner / product.clamp(min=torch.finfo(product.dtype).tiny)
    equal = torch.stack([
        norm <= (8 * torch.finfo(norm.dtype).eps)**2
        * tokens.square().sum(dim=(1, 2))
        for norm, tokens in zip(norms, (a, b))]).any(dim=0)
    return ratio.clamp(0, 1).masked_fill(equal, 0)


def _precise(tokens: Tensor) -> Tensor:
    return tokens.to(torch.promote_types(tokens.dtype, torch.float32))
