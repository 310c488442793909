"""Crops for images that have a label or depth map."""
import mmcv
from mmpretrain.datasets.transforms import RandomResizedCrop

from mmsinger.registry import TRANSFORMS


@TRANSFORMS.register_module()
class RandomResizedSegCrop(RandomResizedCrop):
    """mmpretrain's ``RandomResizedCrop`` that takes the maps along.

    The same region is cut out of ``img`` and of every map that
    ``seg_fields`` lists; maps are resized to the nearest pixel, so that
    neither labels nor depths across an edge are mixed.
    """

    def transform(self, results: dict) -> dict:
        """Cut and resize.

        Args:
            results (dict): With ``img`` (H, W, 3) and maps (H, W).

        Returns:
            dict: The same with all of them of size ``scale``.
        """
        top, left, height, width = self.rand_crop_params(results['img'])
        maps = dict.fromkeys(results.get('seg_fields', []), ('nearest', 'cv2'))
        for key, (interpolation, backend) in {
                'img': (self.interpolation, self.backend), **maps}.items():
            results[key] = mmcv.imresize(
                results[key][top:top + height, left:left + width],
                tuple(self.scale[::-1]), interpolation=interpolation,
                backend=backend)
        results['img_shape'] = results['img'].shape[:2]
        return results
