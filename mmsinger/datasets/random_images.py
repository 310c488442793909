from typing import Any, Dict, Sequence, Tuple

import numpy as np
from mmcv.transforms import Compose
from torch.utils.data import Dataset

from mmsinger.registry import DATASETS
from mmsinger.schema import Count


@DATASETS.register_module()
class RandomImages(Dataset):
    """Random pixels through the pipeline of a data set that is not there, for
    ``tools/train.py --dry-run``. All labels are the first class.

    Args:
        pipeline (Sequence[dict]): The data set's; what loads files is left
            out, but says whether images are grey.
        size (tuple[int, int]): Height and width of an image before the
            pipeline, in pixels.
        length (int): How many images. Defaults to 1024.
    """

    metainfo: Dict[str, Any] = {}

    def __init__(self, pipeline: Sequence[dict], size: Tuple[Count, Count],
                 length: Count = 1024) -> None:
        self.shape = tuple(size)
        self.length = length
        grey = any(step.get('color_type') == 'grayscale' for step in pipeline)
        self.pixels = self.shape if grey else (*self.shape, 3)
        self.pipeline = Compose([
            step for step in pipeline
            if not str(step['type']).split('.')[-1].startswith('Load')])

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        random = np.random.default_rng(index)
        return self.pipeline(dict(
            img=random.integers(0, 256, self.pixels, dtype=np.uint8),
            img_shape=self.shape, ori_shape=self.shape, scale_factor=1.0,
            img_path=f'random image {index}', sample_idx=index, gt_label=0,
            gt_seg_map=np.zeros(self.shape, dtype=np.uint8),
            gt_depth_map=random.uniform(1, 9, self.shape).astype(np.float32),
            seg_fields=['gt_seg_map', 'gt_depth_map'],
            seg_map_path=None, reduce_zero_label=False))
