"""Depth by classification into bins, with one linear layer."""
from typing import Annotated, Dict, List, Optional, Tuple

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn

from mmsinger.registry import MODELS
from mmsinger.schema import Count, Positive, Range

IGNORED = -1


@MODELS.register_module()
class LinearDepthHead(BaseModule):
    """A linear layer to depth bins, trained as a classifier.

    A ``decode_head`` for mmseg's DepthEstimator. Bin i of n stands for a
    depth of ``max_depth * i / (n - 1)``. The target is the nearest bin, the
    loss cross-entropy over valid pixels, and the prediction the mean depth
    under ``softmax(logits / temperature)``. The official evaluation upsamples
    features before the layer; a linear layer and bilinear interpolation
    commute, so logits are upsampled instead: the same result for less.

    Args:
        in_channels (int): Channels of the feature map: 2C with
            ``output='featmap_cls'``.
        num_bins (int): Defaults to 256.
        max_depth (float): Depth of the last bin; what is farther belongs to
            it too. Defaults to 10.0 metres.
        temperature (float): Of the soft-argmax. Defaults to 0.03; the
            official test command has 0.6.
        align_corners (bool): Of the upsampling. Defaults to False.
        init_cfg (dict, optional): Defaults to a normal distribution of
            standard deviation 0.01, as in mmseg's heads.

    Raises:
        ConfigError: If a value is out of range.
    """

    out_channels = 1  # of a prediction

    def __init__(self,
                 in_channels: Count,
                 num_bins: Annotated[int, Range(2)] = 256,
                 max_depth: Positive = 10.0,
                 temperature: Positive = 0.03,
                 align_corners: bool = False,
                 init_cfg: Optional[dict] = dict(
                     type='Normal', layer='Conv2d', std=0.01)) -> None:
        super().__init__(init_cfg)
        self.num_classes = num_bins
        self.max_depth = max_depth
        self.temperature = temperature
        self.align_corners = align_corners
        self.conv = nn.Conv2d(in_channels, num_bins, 1)
        self.register_buffer('bins', torch.linspace(0, max_depth, num_bins),
                             persistent=False)

    def forward(self, inputs: Tuple[Tensor]) -> Tensor:
        """Logits (B, num_bins, h, w) of the last feature map
        (B, C, h, w)."""
        return self.conv(inputs[-1])

    def loss(self, inputs: Tuple[Tensor], batch_data_samples: list,
             train_cfg: Optional[dict] = None) -> Dict[str, Tensor]:
        """Cross-entropy between upsampled logits and binned depths.

        Args:
            inputs (tuple[Tensor]): Feature maps, the last (B, C, h, w).
            batch_data_samples (list[SegDataSample]): With ``gt_depth_map``
                of shape (1, H, W), in metres; 0 is unknown.
            train_cfg (dict, optional): Not used.

        Returns:
            dict[str, Tensor]: ``loss_ce``.
        """
        depth = torch.cat([sample.gt_depth_map.data
                           for sample in batch_data_samples])
        target = self.binned(depth)
        logits = self._upsample(self(inputs), depth.shape[1:])
        total = nn.functional.cross_entropy(
            logits.flatten(0, 2), target.flatten(), ignore_index=IGNORED,
            reduction='sum')
        return dict(loss_ce=total / (target != IGNORED).sum().clamp(min=1))

    def predict(self, inputs: Tuple[Tensor], batch_img_metas: List[dict],
                test_cfg: Optional[dict] = None) -> Tensor:
        """Depth of shape (B, 1, H, W) at the size of the padded images, or of
        the window that slides over them.

        Args:
            inputs (tuple[Tensor]): Feature maps, the last (B, C, h, w).
            batch_img_metas (list[dict]): Of the images, all of one size.
            test_cfg (dict, optional): Not used.
        """
        metas = batch_img_metas[0]
        size = metas['img_shape']
        if not isinstance(size, torch.Size):  # else of a slide, by mmseg
            size = metas.get('pad_shape', size)[:2]
        return self.depth(self._upsample(self(inputs), size))

    def binned(self, depth: Tensor) -> Tensor:
        """The nearest bins of depths in metres, same shape, int64; -1 where
        the depth is unknown (zero, negative or not finite)."""
        valid = torch.isfinite(depth) & (depth > 0)
        share = depth.clamp(0, self.max_depth) / self.max_depth
        bins = (share * (self.num_classes - 1)).round()
        return torch.where(valid, bins, IGNORED).long()

    def depth(self, logits: Tensor) -> Tensor:
        """Soft-argmax of logits (B, H, W, num_bins) in metres,
        (B, 1, H, W)."""
        shares = (logits / self.temperature).softmax(dim=-1)
        return (shares @ self.bins.to(shares)).unsqueeze(1)

    def _upsample(self, logits: Tensor, size: Tuple[int, int]) -> Tensor:
        """(B, num_bins, h, w) -> (B, H, W, num_bins), bins side by side in
        memory, which makes a softmax over them several times faster."""
        logits = nn.functional.interpolate(
            logits.contiguous(memory_format=torch.channels_last),
            size=tuple(size), mode='bilinear',
            align_corners=self.align_corners)
        return logits.permute(0, 2, 3, 1).contiguous()
