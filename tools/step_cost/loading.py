"""What loading images costs."""
import os
import tempfile
from typing import Any, Dict, List

import cv2
import numpy as np
import torch
from mmengine.dataset import Compose, pseudo_collate

from mmsinger.registry import TRANSFORMS


class ImageLoading:
    """A recipe's training pipeline, on one core, fed with a JPEG of 500 x 375
    px and 105 kB, about the mean of ImageNet-1K.

    A context manager, which holds the file.

    Args:
        pipeline (list[dict]): Transforms, from LoadImageFromFile on. The
            default scope must be initialised.
        size (int): The side to give the images, as RandomResizedCrop's.
    """

    def __init__(self, pipeline: List[Dict[str, Any]], size: int) -> None:
        self.transform = Compose([
            TRANSFORMS.build(
                dict(cfg, scale=size) if cfg['type'] == 'RandomResizedCrop'
                else cfg) for cfg in pipeline])

    def __enter__(self) -> 'ImageLoading':
        self._folder = tempfile.TemporaryDirectory()
        self._path = os.path.join(self._folder.name, 'image.jpg')
        rng = np.random.default_rng(0)
        noise = cv2.resize(rng.integers(0, 256, (94, 125, 3)).astype(np.uint8),
                           (500, 375), interpolation=cv2.INTER_CUBIC)
        noise = np.clip(noise + rng.normal(0, 6, noise.shape), 0, 255)
        cv2.imwrite(self._path, noise.astype(np.uint8),
                    [cv2.IMWRITE_JPEG_QUALITY, 90])
        self._threads = cv2.getNumThreads()
        cv2.setNumThreads(0)
        return self

    def __exit__(self, *_: Any) -> None:
        cv2.setNumThreads(self._threads)
        self._folder.cleanup()

    def load(self, count: int) -> Dict[str, Any]:
        """Load a batch, as a worker of the data loader does: in one thread.

        Args:
            count (int): Images.

        Returns:
            dict: The collated batch.
        """
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return pseudo_collate([self.transform(dict(
                img_path=self._path, gt_label=0)) for _ in range(count)])
        finally:
            torch.set_num_threads(threads)
