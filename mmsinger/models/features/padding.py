"""Which part of each image of a batch is padding."""
from typing import Any, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from mmsinger.models.features.tokens import Grid, Tokens


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
        rows, columns = (torch.stack([
            _covered(box[start], box[start + 1], length, cells)
            for box in self.boxes])
            for start, length, cells in zip((0, 2), self.size, grid))
        return rows.unsqueeze(2) * columns.unsqueeze(1)


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


def _covered(first: int, last: int, length: int, cells: int) -> Tensor:
    """How much of each of some cells of equal length lies in a range."""
    edges = torch.linspace(0, length, cells + 1)
    covered = edges[1:].clamp(max=last) - edges[:-1].clamp(min=first)
    return covered.clamp(min=0) * cells / length
