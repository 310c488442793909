"""Artifacts planted into a clean teacher, to judge methods against."""
from typing import Annotated, Literal, NamedTuple, Optional, Tuple

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn

from mmsinger.errors import ConfigError
from mmsinger.metrics.norms import lower_median
from mmsinger.models.adapters import left_singular_directions, linearised_ffn
from mmsinger.models.features.anatomy import (Layer, change_patches,
                                              find_blocks, first_output,
                                              patch_grid, patch_stride,
                                              resolve_layer, unmasked)
from mmsinger.models.features.tokens import Grid
from mmsinger.registry import MODELS
from mmsinger.schema import Count, Natural, Positive, Range


@MODELS.register_module()
class PlantedArtifacts(BaseModule):
    """A backbone with a few patch tokens of abnormally high norm.

    Real artifacts appear only in large teachers trained at scale. This
    wrapper adds their likeness to any vision transformer: after one block, a
    few patches of little content get a long vector each, which the residual
    stream then carries to all later blocks. Which patches, and how long, is a
    hash of the pixels: the same image always gets the same artifacts, in any
    batch and on any machine (lengths up to rounding), in one precision.

    Goes wherever the backbone itself would, with the same checkpoint::

        teacher=dict(backbone=dict(type='mmsinger.PlantedArtifacts',
                                   backbone=dict(...)), checkpoint=...)

    Args:
        backbone (dict): Config of the clean backbone.
        after (int | str): The block after which to plant. Defaults to 1.
        share (float): Share of the patch tokens, at most a third; the number
            varies from image to image, by up to a half of it, and is at least
            one. 0 plants nothing: the clean teacher. Defaults to 0.03.
        norm (tuple[float, float]): Length of a planted vector, smallest and
            largest, in units of the image's median patch norm. Defaults to
            (7.0, 9.0).
        dims (int): 1: the same direction everywhere. More: a random direction
            for each image, in a subspace of so many dimensions. Defaults
            to 1.
        on (str): ``'plain'``: patches of the half whose pixels vary least,
            as in real teachers; ``'content'``: of the half that varies most.
            Defaults to ``'plain'``.
        direction (str): Where the directions come from. ``'null'``: the left
            singular directions of the following block's linearised FFN with
            the smallest singular values. ``'random'``: anywhere. Defaults to
            ``'random'``.
        seed (int): Of the random directions. Defaults to 0.

    Raises:
        ConfigError: If a value is not valid.
    """

    def __init__(self,
                 backbone: dict,
                 after: Layer = 1,
                 share: Annotated[float, Range(0, 1 / 3)] = 0.03,
                 norm: Tuple[Positive, Positive] = (7.0, 9.0),
                 dims: Count = 1,
                 direction: Literal['null', 'random'] = 'random',
                 on: Literal['plain', 'content'] = 'plain',
                 seed: Natural = 0) -> None:
        super().__init__()
        if norm[0] > norm[1]:
            raise ConfigError(f'norm={norm} must be the smallest and the '
                              'largest length, for instance (7.0, 9.0).')
        self.backbone = MODELS.build(backbone)
        blocks = find_blocks(self.backbone, 'PlantedArtifacts.backbone')
        self.after = resolve_layer(after, blocks, 'after')
        if self.after == len(blocks) - 1:
            raise ConfigError(f'after={after} is the last block: there is no '
                              'following block to plant for.')
        if dims > blocks.dim:
            raise ConfigError(f'dims={dims} must be an integer between 1 and '
                              f"the tokens' {blocks.dim} channels.")
        self.share = share
        self.norm = tuple(norm)
        self.dims = dims
        self.direction = direction
        self.on = on
        self.seed = seed
        self.planted_mask: Optional[Tensor] = None
        self._images: Optional[Tensor] = None
        self._basis: Optional[Tensor] = None
        blocks.patch_embed.register_forward_hook(self._record_patches)
        blocks.modules[self.after].register_forward_hook(self._plant)
        blocks.modules[self.after + 1]._register_load_state_dict_pre_hook(
            self._forget_basis)
        self._register_load_state_dict_pre_hook(self._accept_clean_backbone)

    def forward(self, images: Tensor, *args, **kwargs):
        """Run the backbone. :attr:`planted_mask` then tells which patch tokens
        of this batch are artifacts, bool, shape (B, P)."""
        if not args:
            kwargs = {**unmasked(self.backbone, images), **kwargs}
        return self.backbone(images, *args, **kwargs)

    @property
    def timm_model(self) -> nn.Module:
        """The timm model of a TIMMBackbone inside, for timm's checkpoints."""
        return self.backbone.timm_model

    def basis(self) -> Tensor:
        """The directions that artifacts are combined from, orthonormal rows,
        shape (dims, D), float32 on the CPU."""
        blocks = find_blocks(self.backbone, 'PlantedArtifacts.backbone')
        if self.direction == 'null':
            weight = linearised_ffn(blocks.modules[self.after + 1])
            directions, _ = left_singular_directions(weight)
            return directions[:, -self.dims:].T.float().cpu().contiguous()
        generator = torch.Generator().manual_seed(self.seed)
        columns = torch.randn(blocks.dim, self.dims, generator=generator)
        return torch.linalg.qr(columns).Q.T.contiguous()

    def _accept_clean_backbone(self, state_dict, prefix, *_) -> None:
        own = f'{prefix}backbone.'
        for key in list(state_dict):
            if key.startswith(prefix) and not key.startswith(own):
                state_dict[own + key[len(prefix):]] = state_dict.pop(key)

    def _forget_basis(self, *_) -> None:
        self._basis = None  # of other weights

    def _record_patches(self, module: nn.Module, args: tuple, output) -> None:
        self._images = args[0].detach()
        self._grid = patch_grid(module, args[0], output)
        self._cell = patch_stride(module)

    def _plant(self, module: nn.Module, args: tuple, output):
        if self.share == 0:
            tokens = first_output(output)
            self.planted_mask = tokens.new_zeros(
                len(tokens), self._grid[0] * self._grid[1], dtype=torch.bool)
            return output
        if self._images is None:
            raise ConfigError(
                f'PlantedArtifacts.after={self.after}: block {self.after} was '
                'run on its own, where the image that its artifacts depend '
                f'on is not known. Distil block {self.after} or later ones, '
                'or plant after a later block.')
        vectors = self._artifacts(first_output(output), self._images)
        self._images = None
        return change_patches(output, vectors.shape[1],
                              lambda patches: patches + vectors)

    @torch.no_grad()
    def _artifacts(self, tokens: Tensor, images: Tensor) -> Tensor:
        """What is added to the patch tokens, shape (B, P, D)."""
        chosen = choose_patches(images, self._grid, self._cell, self.share,
                                self.on)
        self.planted_mask = chosen.mask
        if self._basis is None:
            self._basis = self.basis()
        patches = tokens[:, -chosen.mask.shape[1]:]
        patches = patches.to(
            torch.promote_types(patches.dtype, torch.float32))
        self._basis = basis = self._basis.to(patches)
        if self.dims > 1:
            # A standard normal vector for each image, from its hash
            angles = 1e4 * chosen.of_image.double() * torch.arange(
                1, self.dims + 1, device=patches.device)
            mixture = torch.special.ndtri(
                _fraction(angles).clamp(1e-6, 1 - 1e-6)).to(patches)
            with torch.autocast(patches.device.type, enabled=False):
                direction = nn.functional.normalize(mixture @ basis, dim=-1)
        else:
            direction = basis
        median = lower_median(patches.norm(dim=-1), dim=1)
        low, high = self.norm
        length = (low + (high - low) * _fraction(1e3 * chosen.of_patch)
                  ) * median
        vectors = (chosen.mask * length).unsqueeze(-1) * \
            direction.unsqueeze(1)  # (B, P, 1) x (B, 1, D)
        return vectors.to(tokens.dtype)


class Chosen(NamedTuple):
    """Patches to plant artifacts into, and numbers to shape these by.

    Attributes:
        mask (Tensor): Which patches, bool, shape (B, P).
        of_patch (Tensor): A number in [0, 1) for each patch, that depends on
            its content and its place, float32, shape (B, P).
        of_image (Tensor): One for each image, shape (B, 1).
    """
    mask: Tensor
    of_patch: Tensor
    of_image: Tensor


def choose_patches(images: Tensor, grid: Grid, cell: Grid, share: float,
                   on: str = 'plain') -> Chosen:
    """Patches to plant artifacts into.

    Of the half of an image's patches whose pixels vary least (or most), those
    with the smallest hash are taken.

    Args:
        images (Tensor): Shape (B, C, H, W).
        grid (tuple[int, int]): Rows and columns of patches.
        cell (tuple[int, int]): Pixels from one patch to the next, by rows and
            by columns.
        share (float): Mean share of the patches; an image has between a half
            and one and a half times as many, at least one.
        on (str): ``'plain'`` or ``'content'``, which half. Defaults to
            ``'plain'``.

    Returns:
        Chosen: Patches and hashes.
    """
    (rows, columns), (height, width) = grid, cell
    # What the patches cover: a rest is cut off, what is missing is padded
    cells = nn.functional.pad(images.double(), (
        0, columns * width - images.shape[-1],
        0, rows * height - images.shape[-2]))
    cells = cells.reshape(len(images), -1, rows, height, columns, width)
    # (B, C, rows, h, columns, w) -> (B, P, C h w)
    cells = cells.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    # Sums in float64, rounded to float32: their order does not show, and a
    # constant patch has no variance at all
    mean = cells.mean(dim=-1).float()
    variance = (cells - cells[..., :1]).var(dim=-1, correction=0).float()
    median = lower_median(variance, dim=1)
    half = variance <= median if on == 'plain' else variance > median
    place = torch.arange(rows * columns, device=images.device)
    uniform = _fraction(mean.double() * 977.13 + place * 0.6180339887)
    factor = 0.5 + uniform.mean(dim=1, keepdim=True).mul(1e4).frac()
    count = (share * rows * columns * factor).round().clamp(min=1)
    order = uniform.masked_fill(~half, 2).argsort(
        dim=1, stable=True).argsort(dim=1)
    # Many images begin with the same blank patch
    first = (variance > 0).int().argmax(dim=1, keepdim=True)
    return Chosen((order < count) & half, uniform.float(),
                  uniform.float().gather(1, first))


def _fraction(values: Tensor) -> Tensor:
    """A well-mixed number in [0, 1) from any."""
    return (torch.sin(values * 12.9898 + 4.1414) * 43758.5453).frac().abs()
