"""What the data sets of the linear evaluation must look like on disk.

A name here is also a base config in ``configs/_base_/datasets/linear_eval``
and a page in ``docs/datasets``.
"""
from dataclasses import dataclass, field
from typing import Dict, Tuple

TRAIN, VAL, TEST = 'train_dataloader', 'val_dataloader', 'test_dataloader'


@dataclass(frozen=True)
class Known:
    """A data set as its authors published it.

    Args:
        source (str): Where to get it, and what to unpack. Defaults to ``''``,
            as what follows to none: nothing is known of the data set.
        files (tuple[str]): What must be in the data root.
        images (dict[str, tuple[int]]): By data loader, the numbers of images
            that a complete copy has; other loaders are not checked.
        classes (int): Number of classes that have images; 0 where images
            have no class.
        wnid_folders (bool): Whether folders are named by the WordNet ids of
            ImageNet-1K, all of them.
    """
    source: str = ''
    files: Tuple[str, ...] = ()
    images: Dict[str, Tuple[int, ...]] = field(default_factory=dict)
    classes: int = 0
    wnid_folders: bool = False

    @property
    def fix(self) -> str:
        """What to do for a complete copy."""
        return f'Get it from {self.source}.' if self.source else ''


KNOWN: Dict[str, Known] = dict(
    imagenet=Known(
        source='image-net.org, after registration: ILSVRC2012_img_train.tar '
        'and ILSVRC2012_img_val.tar, one folder per class in both',
        files=('train', 'val'),
        images={TRAIN: (1281167, ), VAL: (50000, )},
        classes=1000,
        wnid_folders=True),
    imagenet_r=Known(
        source='github.com/hendrycks/imagenet-r: imagenet-r.tar',
        images={VAL: (30000, )},
        classes=200),
    imagenet_v2=Known(
        source='github.com/modestyachts/ImageNetV2: '
        'imagenetv2-matched-frequency.tar.gz',
        images={VAL: (10000, )},
        classes=1000),
    inat2019=Known(
        source='github.com/visipedia/inat_comp (2019): train_val2019.tar.gz, '
        'whose folder train_val2019 is renamed to 2019',
        files=('2019', ),
        images={TRAIN: (214594, ), VAL: (53649, )},
        classes=1010),
    aircraft=Known(
        source='www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft: '
        'fgvc-aircraft-2013b.tar.gz',
        files=('data/images', 'data/images_variant_train.txt',
               'data/images_variant_val.txt', 'data/images_variant_test.txt'),
        images={TRAIN: (3334, ), VAL: (3333, )},
        classes=100),
    pets=Known(
        source='www.robots.ox.ac.uk/~vgg/data/pets: images.tar.gz and '
        'annotations.tar.gz',
        files=('images', 'annotations/trainval.txt', 'annotations/test.txt'),
        images={TRAIN: (3680, ), VAL: (3669, )},
        classes=37),
    food101=Known(
        source='data.vision.ee.ethz.ch/cvl/datasets_extra/food-101: '
        'food-101.tar.gz',
        files=('images', 'meta/train.txt', 'meta/test.txt'),
        images={TRAIN: (75750, ), VAL: (25250, )},
        classes=101),
    flowers102=Known(
        source='www.robots.ox.ac.uk/~vgg/data/flowers/102: 102flowers.tgz '
        '(the folder jpg), imagelabels.mat and setid.mat',
        files=('jpg', 'imagelabels.mat', 'setid.mat'),
        images={TRAIN: (1020, ), VAL: (1020, )},
        classes=102),
    ade20k=Known(
        source='data.csail.mit.edu/places/ADEchallenge: '
        'ADEChallengeData2016.zip (the 150-class set, not full ADE20K)',
        files=('images/training', 'images/validation',
               'annotations/training', 'annotations/validation'),
        images={TRAIN: (20210, ), VAL: (2000, )}),
    nyu_folder=Known(
        source="cs.nyu.edu/~fergus/datasets/nyu_depth_v2.html, in mmseg's "
        'layout: 795 labelled, or 24,231 frames for training',
        files=('images/train', 'images/test', 'annotations/train',
               'annotations/test'),
        images={TRAIN: (795, 24231), VAL: (654, )}),
    nyu_mat=Known(
        source='cs.nyu.edu/~fergus/datasets/nyu_depth_v2.html: '
        'nyu_depth_v2_labeled.mat, and splits.mat of indoor_seg_sup',
        files=('nyu_depth_v2_labeled.mat', 'splits.mat'),
        images={TRAIN: (795, ), VAL: (654, )}),
)
