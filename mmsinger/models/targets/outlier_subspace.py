"""Outliers without what makes them such, found once and not trained."""
from functools import partial
from typing import Annotated, Any, Dict, List, Optional, Tuple

import torch
from torch import Tensor, nn

from mmsinger.metrics.norms import lower_median, robust_threshold, token_norms
from mmsinger.models.features.anatomy import change_patches, first_output
from mmsinger.models.features.tokens import Grid
from mmsinger.models.targets.step import (Look, Targets, TargetStep,
                                          TeacherOutputs)
from mmsinger.registry import MODELS
from mmsinger.schema import Count, Positive, Range


class OutlierSubspace(nn.Module):
    """The directions that set one layer's outliers apart.

    Args:
        dim (int): Channels D.
        rank (int): The most directions that are kept.
    """

    def __init__(self, dim: int, rank: int) -> None:
        super().__init__()
        self.register_buffer('centre', torch.zeros(dim))
        self.register_buffer('basis', torch.zeros(rank, dim))
        self.register_buffer('threshold', torch.full((), float('nan')))
        self._rank: Optional[int] = None

    def calibrate(self, patches: Tensor, far: Tensor, mad: float,
                  ratio: float) -> float:
        """Find the directions, and how far in them is too far.

        Args:
            patches (Tensor): Patch tokens of many images, shape (n, D).
            far (Tensor): Which are outliers by their norm, here or in another
                layer, bool, shape (n, ).
            mad (float): See :class:`RemoveOutlierSubspace`.
            ratio (float): See :class:`RemoveOutlierSubspace`.

        Returns:
            float: The share of tokens that are beyond the threshold.
        """
        patches = patches.double()
        for _ in range(2):  # by norm, then by what was found
            self._find_directions(patches, far, ratio)
            norms = token_norms((patches - self.centre) @ self.basis.T.double())
            _, threshold = robust_threshold(norms[~far], mad)
            self.threshold.copy_(threshold)
            if not self.rank:
                return 0.
            far = norms > threshold
        return far.float().mean().item()

    def _find_directions(self, patches: Tensor, far: Tensor, ratio: float
                         ) -> None:
        inliers, outliers = patches[~far], patches[far]
        self.centre.copy_(inliers.mean(dim=0))
        self.basis.zero_()
        self._rank = None
        if not len(outliers):
            return
        _, values, directions = torch.linalg.svd(
            outliers - self.centre, full_matrices=False)  # (k, ), (k, D)
        far_energy = values.square() / len(outliers)
        energy = ((inliers - self.centre) @ directions.T).square().mean(dim=0)
        excess = far_energy / energy.clamp(min=1e-12)
        count = min(len(self.basis), int((excess > ratio).sum()))
        self.basis[:count] = directions[excess.topk(count).indices].to(
            self.basis)

    @property
    def calibrated(self) -> bool:
        """Whether :meth:`calibrate` was called, here or in the run that a
        checkpoint comes from."""
        return bool(torch.isfinite(self.threshold))

    @property
    def rank(self) -> int:
        """How many directions were found."""
        if self._rank is None:  # counted once: it waits for the device
            self._rank = int(self.basis.any(dim=1).sum())
        return self._rank

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._rank = None

    def forward(self, patches: Tensor) -> Tensor:
        """Bring outliers' components in the subspace to the mean.

        Args:
            patches (Tensor): Shape (B, P, D).

        Returns:
            Tensor: Shape (B, P, D); other tokens are as they were.
        """
        excess = (patches - self.centre) @ self.basis.T  # (B, P, r)
        far = token_norms(excess) > self.threshold
        outlying = (excess * far.unsqueeze(-1)) @ self.basis
        return patches - outlying.to(patches.dtype)


@MODELS.register_module()
class RemoveOutlierSubspace(TargetStep):
    """Outliers lose their component in the directions that set them apart.

    Nothing is trained. The calibration pass before the first step takes patch
    tokens of many training images. Those whose norm in one of the layers is
    above ``median + mad * 1.4826 * MAD`` are outliers in all of them: the
    residual stream carries what makes them such on, where it may no longer
    show in the norm. Of their principal directions about the others' mean,
    those are kept in which they have more than ``ratio`` times the others'
    energy. In each step, tokens that are above a threshold made likewise in
    these directions get the others' mean there, and keep the rest: what they
    say about the image. Where there are no outliers, targets are those of the
    teacher, bit by bit.

    Args:
        mad (float): Distance of the threshold from the median in robust
            standard deviations. Defaults to 6.0.
        rank (int): The most directions to remove. Defaults to 32.
        ratio (float): Least energy of a direction. Defaults to 4.0.
        inside (bool): Those tokens lose that component in the teacher itself,
            after the block where they begin to stand out, so that later
            blocks do not read it and targets need no more. What stands out in
            other blocks and not in the targets stays. Defaults to False: the
            teacher stays as it is.
    """

    start_only = ('mad', 'rank', 'ratio')

    def __init__(self, mad: Positive = 6.0, rank: Count = 32,
                 ratio: Annotated[float, Range(1)] = 4.0,
                 inside: bool = False) -> None:
        super().__init__()
        self.mad = mad
        self.rank = rank
        self.ratio = ratio
        self.inside = inside
        self.keeps_values = inside
        self._grid: Grid = (0, 0)

    def prepare(self, teacher: nn.Module, layers: List[int]) -> None:
        """Make a subspace a layer, see :meth:`TargetStep.prepare`."""
        dim = teacher.blocks.dim
        self.subspaces = nn.ModuleDict({
            str(layer): OutlierSubspace(dim, min(self.rank, dim))
            for layer in (range(layers[-1] + 1) if self.inside else layers)
        })
        if self.inside:
            self._distilled = layers
            self._num_prefix: Optional[int] = None  # of the teacher's tokens
            self.__dict__['_teacher'] = teacher  # no submodule
            teacher.blocks.watch_input(self._record_grid)
            for layer, part in self.subspaces.items():
                teacher.blocks.modules[int(layer)].register_forward_hook(
                    partial(self._remove, part))

    def _record_grid(self, grid: Grid) -> None:
        self._grid = grid

    def _remove(self, part: OutlierSubspace, block: nn.Module, args: tuple,
                output: Any) -> Any:
        """What a block of the teacher returns instead."""
        if not part.rank:
            return output
        count = first_output(output).shape[1]
        if self._num_prefix is None:  # then these are of the last grid
            self._num_prefix = count - self._grid[0] * self._grid[1]
        return change_patches(output, count - self._num_prefix, part)

    def calibrate_teacher(self, look: Look) -> str:
        """Find where the outliers of the targets arise, again until none is
        left, see :meth:`TargetStep.calibrate_teacher`."""
        if not self.inside:
            return ''
        found: Dict[int, str] = {}
        while True:
            patches = look(list(map(int, self.subspaces)))
            far = {layer: self._far(tokens - lower_median(tokens, dim=0))
                   for layer, tokens in patches.items()}
            wrong = torch.stack([far[i] for i in self._distilled]).any(dim=0)
            block = next((i for i in far if i not in found and _are_those(
                far[i], wrong)), None)
            if block is None:
                break
            found[block] = self._calibrate_layer(block, patches[block], wrong)
            self._teacher.forget_images()
        for layer, tokens in patches.items():
            if layer not in found:  # nothing there
                self._calibrate_layer(layer, tokens, far[layer] & False)
        left = f'; {100 * wrong.float().mean().item():.2g} % of the tokens ' \
            'stay outliers' if wrong.any() else ''
        return ('outliers removed after teacher block '
                + ', '.join(found.values()) if found
                else 'no outliers to remove from the teacher') + left

    def calibrate(self, patches: Dict[int, Tensor]) -> str:
        """Find the subspaces, see :meth:`TargetStep.calibrate`."""
        patches = {layer: patches[layer] for layer in map(int, self.subspaces)}
        far = torch.stack([self._far(tokens)
                           for tokens in patches.values()]).any(dim=0)
        return 'outliers by teacher layer: ' + ', '.join(
            self._calibrate_layer(layer, tokens, far)
            for layer, tokens in patches.items())

    def _far(self, patches: Tensor) -> Tensor:
        norms = token_norms(patches)
        return norms > robust_threshold(norms, self.mad)[1]

    def _calibrate_layer(self, layer: int, patches: Tensor, far: Tensor
                         ) -> str:
        part = self.subspaces[str(layer)]
        share = part.calibrate(patches, far, self.mad, self.ratio)
        return f'{layer}: {100 * share:.2g} % of the tokens in ' \
            f'{part.rank} directions'

    def forward(self, targets: Targets, outputs: TeacherOutputs
                ) -> Tuple[Targets, Dict[str, Tensor]]:
        """Treat all layers, see :meth:`TargetStep.forward`."""
        if self.inside:
            return targets, {}
        return {layer: tokens.with_patches(
            self.subspaces[str(layer)](tokens.patches))
                for layer, tokens in targets.items()}, {}


def _are_those(far: Tensor, wrong: Tensor) -> bool:
    """Whether what stands out in one block is, by more than half, what stands
    out in the targets, and no less than a tenth of it."""
    both = (far & wrong).sum()
    return bool((2 * both > far.sum()) & (10 * both >= wrong.sum())
                & (both > 0))
