"""Tokens of a backbone, with the layout that makes them an image."""
from functools import lru_cache
from typing import Any, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

Grid = Tuple[int, int]


class Tokens(NamedTuple):
    """Output of one block.

    Attributes:
        values (Tensor): Prefix tokens (CLS, registers) followed by the patch
            tokens in row-major order, shape (B, N, C).
        grid (tuple[int, int]): Rows h and columns w of patches.
        weight (Tensor, optional): How much each token counts in losses, means
            and thresholds, shape (B, N), without gradient: 0 for padding and
            for what is masked. None: all count alike.
        has_cls (bool): Whether the first prefix token, if there is one, is a
            class token; otherwise all are registers.
    """
    values: Tensor
    grid: Grid
    weight: Optional[Tensor] = None
    has_cls: bool = True

    @property
    def num_prefix(self) -> int:
        """How many tokens precede the patches: CLS and registers."""
        return self.values.shape[1] - self.grid[0] * self.grid[1]

    @property
    def prefix(self) -> Tensor:
        """CLS and register tokens, shape (B, num_prefix, C)."""
        return self.values[:, :-self.grid[0] * self.grid[1]]

    @property
    def patches(self) -> Tensor:
        """Patch tokens, shape (B, h * w, C)."""
        return self.values[:, -self.grid[0] * self.grid[1]:]

    @property
    def patch_weight(self) -> Optional[Tensor]:
        """Weights of the patch tokens, shape (B, h * w), or None."""
        return None if self.weight is None else \
            self.weight[:, -self.grid[0] * self.grid[1]:]

    def with_patches(self, patches: Tensor) -> 'Tokens':
        """These tokens with other patch tokens, shape (B, h * w, C)."""
        return self._replace(values=torch.cat([self.prefix, patches], dim=1))

    def weighed(self, patch_weight: Tensor) -> 'Tokens':
        """These tokens with their patches' weights times a factor, shape
        (B, h * w)."""
        return self._weighed(nn.functional.pad(
            patch_weight.float(), (self.num_prefix, 0), value=1.))

    def weighed_by_image(self, weight: Tensor) -> 'Tokens':
        """These tokens, prefix too, with weights times a factor of their
        image, shape (B, )."""
        return self._weighed(
            weight.float()[:, None].expand(self.values.shape[:2]))

    def _weighed(self, weight: Tensor) -> 'Tokens':
        return self._replace(
            weight=weight if self.weight is None else self.weight * weight)


class Padding(NamedTuple):
    """Where the images of a batch really are, in pixels of the batch.

    Attributes:
        boxes (list[tuple]): For each image first and last row, first and last
            column, the last ones excluded.
        size (tuple[int, int]): H and W of the batch.
    """
    boxes: List[Tuple[int, int, int, int]]
    size: Grid

    def weigh(self, tokens: Tokens) -> Tokens:
        """Weigh patch tokens, values of shape (B, N, C), see
        :meth:`shares`."""
        return tokens.weighed(self.shares(tokens.grid).flatten(1).to(
            tokens.values.device, non_blocking=True))

    def shares(self, grid: Grid) -> Tensor:
        """How much of each cell of a grid h x w is no padding, (B, h, w)."""
        return _shares(tuple(self.boxes), self.size, tuple(grid))


def find_padding(inputs: Tensor, data_samples: Optional[Sequence[Any]]
                 ) -> Optional[Padding]:
    """What data preprocessors say about padding.

    Args:
        inputs (Tensor): The batch, (B, C, H, W).
        data_samples (list, optional): Its annotations: mmseg's have
            ``padding_size`` (left, right, top, bottom), mmdet's
            ``batch_input_shape`` beside each image's own ``img_shape``.

    Returns:
        Padding: None if nothing is padded, as far as they tell.
    """
    height, width = inputs.shape[-2:]
    boxes = []
    for sample in data_samples or ():
        meta = getattr(sample, 'metainfo', {})
        if 'padding_size' in meta:
            left, right, top, bottom = meta['padding_size']
            boxes.append((top, height - bottom, left, width - right))
        elif 'batch_input_shape' in meta and 'img_shape' in meta:
            boxes.append((0, meta['img_shape'][0], 0, meta['img_shape'][1]))
        else:
            boxes.append((0, height, 0, width))
    if all(box == (0, height, 0, width) for box in boxes):
        return None
    return Padding(boxes, (height, width))


@lru_cache(maxsize=8)  # a step asks for the same ones at each layer
def _shares(boxes: Tuple[Tuple[int, int, int, int], ...], size: Grid,
            grid: Grid) -> Tensor:
    """See :meth:`Padding.shares`."""
    ends = torch.tensor(boxes)  # (B, 4)
    rows, columns = (
        _covered(ends[:, start:start + 1], ends[:, start + 1:start + 2],
                 length, cells)
        for start, length, cells in zip((0, 2), size, grid))
    return rows.unsqueeze(2) * columns.unsqueeze(1)


def _covered(first: Tensor, last: Tensor, length: int, cells: int) -> Tensor:
    """How much of each of some cells of equal length lies in some ranges,
    (B, 1) each; (B, cells)."""
    edges = torch.linspace(0, length, cells + 1)
    covered = torch.minimum(edges[1:], last) - torch.maximum(
        edges[:-1], first)
    return covered.clamp(min=0) * cells / length


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


def align_tokens(student: Tokens, teacher: Tokens,
                 resample: str = 'student') -> Tuple[Tokens, Tokens]:
    """Bring tokens of student and teacher into one layout.

    Prefix tokens are compared all if both have the same number of them, else
    CLS alone (registers of one model have no counterpart in the other), or
    none if one model has no class token.

    Args:
        student (Tokens): Values of shape (B, n + h w, C_S).
        teacher (Tokens): Values of shape (B, m + h' w', C_T).
        resample (str): Whose patch tokens are resampled to the other's grid:
            ``'student'`` or ``'teacher'``. Defaults to ``'student'``.

    Returns:
        tuple[Tokens, Tokens]: Student and teacher tokens of shapes
        (B, k + P, C_S) and (B, k + P, C_T) that correspond. The weights of
        the comparison are the teacher's, or the student's where it has none;
        what has no weight in the student has none.
    """
    ours, theirs = student.num_prefix, teacher.num_prefix
    if student.has_cls != teacher.has_cls:
        shared = 0
    else:
        shared = theirs if ours == theirs else min(
            ours, theirs, int(student.has_cls))
    grid = teacher.grid if resample == 'student' else student.grid
    if shared != theirs or teacher.grid != grid:
        teacher = _rearranged(teacher, shared, grid)
    if shared != ours or student.grid != grid:
        student = _rearranged(student, shared, grid)
    if student.weight is not None:
        teacher = teacher._replace(
            weight=student.weight if teacher.weight is None
            else teacher.weight * (student.weight > 0))
    return student, teacher


def _rearranged(tokens: Tokens, num_prefix: int, grid: Grid) -> Tokens:
    """Tokens with the first prefix tokens alone, on another grid."""
    old = tokens.num_prefix

    def rearrange(values: Tensor) -> Tensor:  # (B, N, C)
        return torch.cat([values[:, :num_prefix], resample_patches(
            values[:, old:], tokens.grid, grid)], dim=1)

    if tokens.weight is None:
        return tokens._replace(values=rearrange(tokens.values), grid=grid)
    # A mean by weight: what does not count must not leak into its neighbours
    weight = tokens.weight.unsqueeze(-1)
    total = rearrange(weight)  # (B, N', 1)
    values = rearrange(weight * tokens.values) / total.clamp(min=1e-6)
    return tokens._replace(values=values.to(tokens.values.dtype), grid=grid,
                           weight=total.squeeze(-1))
