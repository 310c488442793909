"""Which recipes, models and evaluation tasks stand behind the tables."""
import os
from dataclasses import dataclass, field
from typing import Dict, Optional, Tuple

from mmsinger.errors import ConfigError
from mmsinger.paths import configs


@dataclass(frozen=True)
class Task:
    """A linear evaluation.

    Attributes:
        config (str): Below configs/.
        metric (str): Name among the logged metrics.
        head (str, optional): Another task whose trained head is tested
            instead of training one (distribution shift). Defaults to None.
        options (tuple[str]): What is changed in the config. Defaults to
            none.
        target (str, optional): A teacher's config, below configs/, whose
            features are predicted in place of labels
            (``tools/explained_variance.py``). Defaults to None.
    """
    config: str
    metric: str
    head: Optional[str] = None
    options: Tuple[str, ...] = ()
    target: Optional[str] = None


@dataclass(frozen=True)
class Model:
    """A model that is evaluated as it is.

    Attributes:
        config (str): Below configs/. A teacher's file or a recipe; or, if
            ``trained``, a plain config.
        trained (bool): Train it first. Defaults to False: it is a published
            checkpoint.
    """
    config: str
    trained: bool = False


@dataclass(frozen=True)
class Profile:
    """Recipes, models and data behind the tables.

    Attributes:
        name (str): As ``--profile`` takes it.
        recipe (str): Where ``{method}_{pair}`` recipes are, below configs/.
        needs (dict[str, str]): Paths that have to be there, and how they
            come there.
        data (str): For captions of the paper's tables, as all that follows
            is for these: empty for a profile that has none of them.
        ablation (str): The recipe of ablations, ``{method}`` and ``{pair}``
            in it.
        ablation_pair (str): Their pair.
        models (dict[str, Model]): By short name.
        tasks (dict[str, tuple[Task, ...]]): Members of each column.
        patch_pairs (dict[str, str]): Pairs of ViT-L that are also, or only,
            compared by patch tokens, and their student's label.
        patch_tasks (dict[str, tuple[Task, ...]]): As ``tasks``, for them.
        teacher_needs (dict[str, str]): Pairs whose teacher is a model that
            is trained here.
        layers (tuple[int, int]): Distilled blocks of ViT-L, an intermediate
            one and the last.
        ranks (tuple[int, ...]): Of the sweep.
        quantiles (tuple[float, ...]): Of the sweep.
        images (int): How many to measure the tables of geometry on.
        quick (tuple[str, ...]): ``--cfg-options`` of ``--quick`` for
            training.
        quick_task (tuple[str, ...]): The same for evaluation.
    """
    name: str
    recipe: str
    needs: Dict[str, str] = field(default_factory=dict)
    data: str = ''
    ablation: str = ''
    ablation_pair: str = ''
    models: Dict[str, Model] = field(default_factory=dict)
    tasks: Dict[str, Tuple[Task, ...]] = field(default_factory=dict)
    patch_pairs: Dict[str, str] = field(default_factory=dict)
    patch_tasks: Dict[str, Tuple[Task, ...]] = field(default_factory=dict)
    teacher_needs: Dict[str, str] = field(default_factory=dict)
    layers: Tuple[int, ...] = ()
    ranks: Tuple[int, ...] = ()
    quantiles: Tuple[float, ...] = ()
    images: int = 0
    quick: Tuple[str, ...] = ()
    quick_task: Tuple[str, ...] = ()

    def check_needs(self) -> None:
        """Raise :class:`ConfigError` if something has to be fetched first."""
        for path, how in self.needs.items():
            if not os.path.exists(path):
                raise ConfigError(f'--profile {self.name} needs {path!r}, '
                                  f'which is not there. Make it by `{how}`.')

    def path(self, config: str, **names: str) -> str:
        """Path of a config, relative to the working directory if that is
        shorter."""
        path = os.path.join(configs(), config.format(**names))
        if not os.path.isfile(path):
            raise ConfigError(f'--profile {self.name} needs {path}, which is '
                              'missing. Install mmsinger again.')
        return min(path, os.path.relpath(path), key=len)


FULL = Profile(
    name='full',
    data='Linear evaluation of frozen students: ImageNet-1K, ADE20K, '
    'NYUd-v2, iNaturalist-2019; DS: mean of ImageNet-R and -v2; FG: mean of '
    'Aircraft, Pets, Food-101, Flowers.',
    recipe='classification/{method}_{pair}_8xb64_in1k.py',
    ablation='classification/{method}_{pair}_8xb64_in1k-tenth.py',
    ablation_pair='vitl_to_vitt',
    models=dict(
        vitl=Model('_base_/teachers/vit_l16_in21k.py'),
        vits=Model('_base_/teachers/vit_s16_in21k.py'),
        vitt=Model('_base_/teachers/vit_t16_in21k.py'),
        deit3l=Model('_base_/teachers/deit3_l16_in1k.py'),
        deit3b=Model('_base_/teachers/deit3_b16_in1k.py'),
        deit3s=Model('_base_/teachers/deit3_s16_in1k.py')),
    tasks=dict(
        IN=(Task('linear_eval/cls_in1k.py', 'accuracy/top1'), ),
        ADE=(Task('linear_eval/seg_ade20k.py', 'mIoU'), ),
        NYU=(Task('linear_eval/depth_nyu.py', 'rmse'), ),
        iNat=(Task('linear_eval/cls_inat2019.py', 'accuracy/top1'), ),
        DS=tuple(Task(f'linear_eval/cls_{name}.py', 'accuracy/top1',
                      head='linear_eval/cls_in1k.py')
                 for name in ('imagenet_r', 'imagenet_v2')),
        FG=tuple(Task(f'linear_eval/cls_{name}.py', 'accuracy/top1')
                 for name in ('aircraft', 'pets', 'food101', 'flowers102'))),
    layers=(17, 23),
    ranks=(8, 16, 32, 64),
    quantiles=(0.90, 0.95, 0.97, 0.99),
    images=1024)

DIGITS = Profile(
    name='digits',
    data='Small models on the built-in digit scenes, a rehearsal of the whole '
    'plan: these figures say nothing about the paper\'s. IN: digit in front '
    '(CLS token); ADE: segmentation; NYU: depth; iNat: the same digits from '
    'long-tailed data; DS: mean over inverted and over blurred scenes; FG: '
    'from 300 scenes, mean patch token.',
    recipe='digits/{method}_{pair}.py',
    ablation='digits/{method}_{pair}.py',
    ablation_pair='vitl_to_vits',
    models=dict(
        vitl=Model('_base_/teachers/digits_planted.py'),
        vits=Model('digits/supervised_vits.py', trained=True),
        vits_cls=Model('digits/supervised_vits_cls.py', trained=True),
        vitt=Model('digits/supervised_vitt.py', trained=True),
        deit3l=Model('digits/supervised_deit3l.py', trained=True),
        deit3b=Model('digits/supervised_deit3b.py', trained=True),
        deit3s=Model('digits/supervised_deit3s.py', trained=True)),
    tasks=dict(
        IN=(Task('linear_eval/cls_digits.py', 'accuracy/top1'), ),
        ADE=(Task('linear_eval/seg_digits.py', 'mIoU'), ),
        NYU=(Task('linear_eval/depth_digits.py', 'rmse'), ),
        iNat=(Task('linear_eval/cls_digits_longtail.py', 'accuracy/top1'), ),
        DS=tuple(Task(f'linear_eval/cls_digits_{name}.py', 'accuracy/top1',
                      head='linear_eval/cls_digits.py')
                 for name in ('inverted', 'blurred')),
        FG=(Task('linear_eval/cls_mean_digits_few.py', 'accuracy/top1'), )),
    patch_pairs=dict(vitl_to_vits='S', vitl_to_convnext='ConvNeXt',
                     vitl_to_pyramid='Swin'),
    patch_tasks=dict(
        IN=(Task('linear_eval/cls_mean_digits.py', 'accuracy/top1'), ),
        ADE=(Task('linear_eval/seg_digits.py', 'mIoU'), ),
        NYU=(Task('linear_eval/depth_patch_digits.py', 'rmse'), ),
        iNat=(Task('linear_eval/cls_mean_digits_longtail.py',
                   'accuracy/top1'), ),
        DS=tuple(Task(f'linear_eval/cls_mean_digits_{name}.py',
                      'accuracy/top1',
                      head='linear_eval/cls_mean_digits.py')
                 for name in ('inverted', 'blurred')),
        FG=(Task('linear_eval/cls_mean_digits_few.py', 'accuracy/top1'), )),
    teacher_needs=dict(deit3l_to_deit3b='deit3l', deit3s_to_deit3t='deit3s'),
    layers=(2, 5),
    ranks=(4, 16),
    quantiles=(0.90, 0.95, 0.99),
    images=256,
    quick=('train_cfg.max_iters=4', 'train_cfg.val_interval=1000',
           'train_dataloader.batch_size=4',
           'train_dataloader.dataset.indices=32'),
    quick_task=('train_cfg.max_iters=4', 'train_cfg.val_interval=4',
                'train_dataloader.dataset.indices=32',
                'val_dataloader.dataset.indices=32'))

PHOTOS = Profile(
    name='photos', recipe='photos/{method}_{pair}.py',
    needs={
        'data/photos/train': 'python tools/cut_photos.py PICTURES data/photos '
        '--classes 189 --train 28 --tune 4 --test 8',
        'checkpoints/dinov2_s14_84px.pth': 'python tools/convert_checkpoint.'
        'py DINOV2_S14 checkpoints/dinov2_s14_84px.pth --img-size 84'})

PROFILES = {profile.name: profile for profile in (FULL, DIGITS, PHOTOS)}
