"""Tokens of a vision transformer, with the layout that makes them an image."""
from typing import NamedTuple, Tuple

import torch
from torch import Tensor, nn

Grid = Tuple[int, int]


class Tokens(NamedTuple):
    """Output of one block.

    Attributes:
        values (Tensor): Prefix tokens (CLS, registers) followed by the patch
            tokens in row-major order, shape (B, N, C).
        grid (tuple[int, int]): Rows h and columns w of patches.
    """
    values: Tensor
    grid: Grid

    @property
    def num_prefix(self) -> int:
        """How many tokens precede the patches: CLS and registers."""
        return self.values.shape[1] - self.grid[0] * self.grid[1]

    @property
    def prefix(self) -> Tensor:
        """CLS and register tokens, shape (B, num_prefix, C)."""
        return self.values[:, :self.num_prefix]

    @property
    def patches(self) -> Tensor:
        """Patch tokens, shape (B, h * w, C)."""
        return self.values[:, self.num_prefix:]

    def with_patches(self, patches: Tensor) -> 'Tokens':
        """The same tokens with other patch tokens, shape (B, h * w, C)."""
        return Tokens(torch.cat([self.prefix, patches], dim=1), self.grid)


def resample_patches(patches: Tensor, grid: Grid, target: Grid) -> Tensor:
    """Interpolate patch tokens to another grid over the same image.

    Args:
        patches (Tensor): Shape (B, h * w, C).
        grid (tuple[int, int]): h and w.
        target (tuple[int, int]): The h' and w' wanted.

    Returns:
        Tensor: Shape (B, h' * w', C); the input itself if the grids agree.
    """
    if tuple(grid) == tuple(target):
        return patches
    batch, _, channels = patches.shape
    image = patches.transpose(1, 2).reshape(batch, channels, *grid)
    smaller = target[0] < grid[0] or target[1] < grid[1]
    # Antialiasing has no half precision on the CPU
    precise = torch.promote_types(patches.dtype, torch.float32)
    image = nn.functional.interpolate(  # (B, C, h, w) -> (B, C, h', w')
        image.to(precise), size=target, mode='bilinear', align_corners=False,
        antialias=smaller).to(patches.dtype)
    return image.flatten(2).transpose(1, 2)  # (B, C, h', w') -> (B, P', C)


def align_tokens(student: Tokens, teacher: Tokens) -> Tuple[Tokens, Tokens]:
    """Bring student tokens into the teacher's layout, token by token.

    Patch tokens are resampled to the teacher's grid. Prefix tokens are
    compared all if both have the same number of them, else CLS alone
    (registers of one model have no counterpart in the other), or none if one
    model has none.

    Args:
        student (Tokens): Values of shape (B, n + h w, C_S).
        teacher (Tokens): Values of shape (B, m + h' w', C_T).

    Returns:
        tuple[Tokens, Tokens]: Student and teacher tokens of shapes
        (B, k + h' w', C_S) and (B, k + h' w', C_T) that correspond.
    """
    patches = resample_patches(student.patches, student.grid, teacher.grid)
    if student.num_prefix == teacher.num_prefix:
        shared = teacher.num_prefix
    else:
        shared = min(student.num_prefix, teacher.num_prefix, 1)
    if shared != teacher.num_prefix:
        teacher = Tokens(
            torch.cat([teacher.prefix[:, :shared], teacher.patches], dim=1),
            teacher.grid)
    if shared == student.num_prefix and student.grid == teacher.grid:
        return student, teacher
    student = Tokens(
        torch.cat([student.prefix[:, :shared], patches], dim=1), teacher.grid)
    return student, teacher
