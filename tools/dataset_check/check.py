"""Is a data set complete, readable, and what its config says?

``tools/check_dataset.py`` prints what :func:`check_known` and
:func:`check_config` find.
"""
import copy
import dataclasses
import io
import os
import re
from typing import Any, Dict, Iterator, List, Optional, Set, Tuple

import cv2
import numpy as np
from mmengine.config import Config
from mmengine.fileio import get as read_bytes
from mmengine.registry import DATASETS, init_default_scope
from PIL import Image

from dataset_check.known import KNOWN, TEST, TRAIN, VAL, Known
from mmsinger import paths
from mmsinger.engine.prepare import load_config
from mmsinger.errors import ConfigError, check_choice, walk_config

SHOWN = 5  # files or values that a message lists


@dataclasses.dataclass
class Report:
    """What was found, in the order of the checks.

    Args:
        title (str): What was checked.
        facts (list[str]): What is there.
        problems (list[tuple[str, str]]): What is wrong, and how to fix it.
    """
    title: str
    facts: List[str] = dataclasses.field(default_factory=list)
    problems: List[Tuple[str, str]] = dataclasses.field(default_factory=list)

    def problem(self, what: str, fix: str) -> None:
        """Note something wrong."""
        self.problems.append((what, fix))

    def __str__(self) -> str:
        lines = [self.title, *(f'  {fact}' for fact in self.facts)]
        for what, fix in self.problems:
            lines += [f'PROBLEM {what}', f'    fix: {fix}']
        count = len(self.problems)
        lines.append('No problems.' if not count else
                     f'{count} problem{"s" if count > 1 else ""}.')
        return '\n'.join(lines)


def check_known(name: str, root: Optional[str] = None,
                samples: Optional[int] = 64) -> Report:
    """Check a data set of the linear evaluation against its published form.

    Args:
        name (str): One of ``KNOWN``.
        root (str, optional): Where it is. Defaults to None, what its base
            config says.
        samples (int, optional): How many images of a split to read, evenly
            spaced. Defaults to 64; None reads all.

    Returns:
        Report: Facts and problems.
    """
    check_choice('NAME', name, KNOWN)
    known = KNOWN[name]
    cfg = load_config(os.path.join(
        paths.configs(), '_base_', 'datasets', 'linear_eval', f'{name}.py'))
    cfg.default_scope = 'mmseg'  # the bases leave it to their recipe
    return check_config(cfg, name, root, samples, known)


def check_config(cfg: Config, title: str, root: Optional[str] = None,
                 samples: Optional[int] = 64,
                 known: Known = Known()) -> Report:
    """Check the data sets that a config's data loaders read.

    Args:
        cfg (Config): Any OpenMMLab config with data loaders; not changed.
        title (str): How the report calls it.
        root (str, optional): Replaces every ``data_root``. Defaults to None.
        samples (int, optional): How many images of a split to read, evenly
            spaced. Defaults to 64; None reads all.
        known (Known): What a complete copy has. Defaults to nothing known.

    Returns:
        Report: Facts and problems.

    Raises:
        ConfigError: If the config has no data loader.
    """
    init_default_scope(cfg.get('default_scope') or 'mmengine')
    report = Report(title)
    loaders = {}  # equal ones once
    for name in known.images or (TRAIN, VAL, TEST):
        found = (cfg.get(name) or {}).get('dataset')
        if found and found not in loaders.values():
            loaders[name] = found
    if not loaders:
        raise ConfigError(f'{title}: no {TRAIN}, {VAL} or {TEST} with a '
                          'dataset. Give a config of a whole recipe.')
    for loader, dataset_cfg in copy.deepcopy(loaders).items():
        if root is not None:
            for _, node in [('', dataset_cfg), *walk_config(dataset_cfg)]:
                if isinstance(node, dict) and 'data_root' in node:
                    node['data_root'] = root
        missing = _missing_files(known, dataset_cfg) if known.source else []
        for path in missing:
            report.problem(f'{path!r} is missing (working directory '
                           f'{os.getcwd()})', f'{known.fix} Or say where it '
                           'is with --root.')
        if missing:
            break
        try:
            built = DATASETS.build(dataset_cfg)
        except Exception as error:  # whatever a dataset class does not expect
            report.problem(f'{loader}: cannot be built: {_said(error)}',
                           known.fix or 'Make the folders as the class '
                           f'{dataset_cfg.type} documents them.')
            continue
        for dataset in _innermost(built):
            _Check(report, cfg, loader, dataset, samples, known).run()
    return report


def _missing_files(known: Known, dataset: dict) -> List[str]:
    root = dataset.get('data_root')
    return [path for path in (os.path.join(root, f) for f in known.files)
            if not os.path.exists(path)] if os.path.isdir(root) else [root]


def _said(error: Exception) -> str:
    return ' '.join((str(error) or type(error).__name__).split())


def _innermost(dataset) -> Iterator:
    """The data sets inside RepeatDataset, ConcatDataset, …"""
    inner = getattr(dataset, 'datasets', None) or [
        getattr(dataset, 'dataset', None)]
    if inner == [None]:
        yield dataset
        return
    for one in inner:
        yield from _innermost(one)


class _Check:
    """The checks of one data set.

    Args:
        report (Report): Where findings go.
        cfg (Config): The config, for its model and evaluator.
        loader (str): The data loader that reads it.
        dataset: As built.
        samples (int, optional): How many items to read; None reads all.
        known (Known): What a complete copy has.
    """

    def __init__(self, report: Report, cfg: Config, loader: str, dataset: Any,
                 samples: Optional[int], known: Known) -> None:
        self.report, self.cfg, self.known = report, cfg, known
        self.dataset = dataset
        self.split = loader.split('_')[0]  # how the findings call it
        self.counts = known.images.get(loader, ())
        self.classes = dataset.metainfo.get('classes') or ()
        count = len(dataset)
        self.chosen = np.linspace(0, max(count - 1, 0), min(
            count, samples or count), dtype=int)
        self.faults: Dict[str, List[str]] = {}  # what is wrong: with which
        self.mask_values: Set[int] = set()
        self.depths: List[float] = []  # medians in metres

    def fact(self, what: str) -> None:
        self.report.facts.append(f'{self.split}: {what}')

    def problem(self, what: str, fix: str = '') -> None:
        self.report.problem(
            f'{self.split}: {what}',
            fix or self.known.fix or 'Mend these files, or remove them.')

    def run(self) -> None:
        """Make all checks."""
        count, name = len(self.dataset), type(self.dataset).__name__
        self.fact(f'{count:,} images, {len(self.chosen):,} of them read, '
                  f'{name}')
        if self.counts and count not in self.counts:
            self.problem(f'{count:,} images, but a complete copy has '
                         + ' or '.join(f'{c:,}' for c in self.counts))
        elif not count:
            self.problem('no images', 'Point data_root and data_prefix to '
                         'the images, and check img_suffix.')
        if not count:
            return
        self.check_folder_names()
        for key, number in walk_config(self.cfg.get('model'), 'model'):
            if self.classes and number != len(self.classes) and re.search(
                    r'\.(decode_)?head\.num_classes$', key) and \
                    '.teacher.' not in key:
                self.problem(f'{key}={number}, but {name} has '
                             f'{len(self.classes)} classes',
                             f'Set {key}={len(self.classes)}.')
        try:
            self.check_labels()
            for index in self.chosen:
                self.check_item(self.dataset.get_data_info(int(index)))
        except ConfigError as error:  # one file that holds all items
            self.problem(_said(error))
            return
        for fault, files in self.faults.items():
            self.problem(f'{len(files)} of {len(self.chosen)} {fault}: '
                         f'{_some(files)}')
        if self.mask_values:
            self.check_mask_values()
        if self.depths:
            self.check_depth_unit()
        if not self.faults:
            self.check_pipeline()

    def check_folder_names(self) -> None:
        """Class indices are positions in the sorted list of folders."""
        folders = getattr(self.dataset, 'folder_to_idx', None)
        if not (self.known.wnid_folders and folders):
            return
        from mmsinger.datasets.imagenet_variants import imagenet_wnids
        wrong = sorted(set(imagenet_wnids()) ^ set(folders))
        if wrong:
            self.problem(
                'the class folders are not the 1,000 WordNet ids of '
                f'ImageNet-1K; missing or left over: {_some(wrong)}')

    def check_labels(self) -> None:
        """Class indices of all images: in range, and each class there."""
        if 'gt_label' not in self.dataset.get_data_info(0):
            return
        present = np.unique(np.concatenate([
            np.atleast_1d(self.dataset.get_data_info(i)['gt_label'])
            for i in range(len(self.dataset))]))
        found = f'labels {present[0]} to {present[-1]}'
        self.fact(f'{found}, {len(present):,} classes')
        number = len(self.classes) or self.cfg.get('num_classes')
        if number and not 0 <= present[0] <= present[-1] < number:
            self.problem(
                f'{found}, but there are {number} classes, 0 to {number - 1}',
                'Count labels from 0, or set metainfo.classes to the right '
                'list.')
        expected = self.known.classes
        if expected and len(present) != expected:
            self.problem(f'images of {len(present):,} classes, but a '
                         f'complete copy has {expected:,}')

    def check_item(self, info: dict) -> None:
        """Read an image, and the mask or depth map that goes with it."""
        path = info.get('img_path', '')
        try:
            size = _image_size(info)
        except Exception:  # decoders raise nearly anything
            self.fault('images cannot be read', path)
            return
        if 'seg_map_path' in info:
            self.check_mask(info['seg_map_path'], size)
        if 'gt_depth_map' in info:  # in metres
            self.check_depth(path, info['gt_depth_map'], size, 1.)
        elif 'depth_map_path' in info:
            path = info['depth_map_path']
            self.check_depth(path, _read_map(path), size, self.depth_factor)

    def fault(self, what: str, path: str) -> None:
        self.faults.setdefault(what, []).append(path)

    def check_mask(self, path: str, size: Tuple[int, int]) -> None:
        """8 bits, one channel, as large as the image."""
        mask = _read_map(path)
        fault = _fault_of_map(mask, size)
        if fault:
            self.fault(f'masks {fault}', path)
        elif mask.dtype != np.uint8:
            self.fault(f'masks are {mask.dtype} instead of uint8', path)
        else:
            self.mask_values.update(np.unique(mask).tolist())

    def check_depth(self, path: str, depth: Optional[np.ndarray],
                    size: Tuple[int, int], factor: float) -> None:
        """One channel, as large as the image, with finite depths."""
        fault = _fault_of_map(depth, size)
        if fault:
            self.fault(f'depth maps {fault}', path)
        elif depth.dtype == np.uint8:
            self.fault('depth maps have 8 bits, too few for metres', path)
        elif not (np.isfinite(depth).all() and (depth > 0).any()):
            self.fault('depth maps hold no depth, or no finite one', path)
        else:
            self.depths.append(float(np.median(depth[depth > 0])) * factor)

    def check_mask_values(self) -> None:
        """Class indices are in range, and 0 means what the config says."""
        number = len(self.classes)
        reduce = bool(getattr(self.dataset, 'reduce_zero_label', False))
        ignored = {255, getattr(self.dataset, 'ignore_index', 255)}
        labels = sorted(self.mask_values - ignored)
        self.fact(f'masks hold {_some(labels)}'
                  f'{" and 255" if 255 in self.mask_values else ""}; '
                  f'reduce_zero_label={reduce}')
        if not labels or not number:
            return
        highest = labels[-1]
        too_high = f'masks go up to {highest}, but there are {number} classes'
        if highest > number:
            self.problem(too_high, self.known.fix or 'Set metainfo.classes to '
                         'the list of the masks.')
        elif highest == number and not reduce:
            self.problem(
                f'{too_high}, 0 to {number - 1}', 'If 0 means unlabelled, set '
                'reduce_zero_label=True in the dataset; if it is a class, '
                'add it to metainfo.classes.')
        elif highest < number and reduce and 255 in self.mask_values:
            self.problem(
                f'masks hold 255 and nothing above {highest}, as if 0 had '
                'been removed already; reduce_zero_label=True would remove '
                'the first class', 'Use the published masks (0 unlabelled, '
                f'1 to {number}), or set reduce_zero_label=False in the '
                'dataset.')

    @property
    def depth_factor(self) -> float:
        """``depth_rescale_factor`` of the pipeline."""
        return next((t.depth_rescale_factor
                     for t in self.dataset.pipeline.transforms
                     if hasattr(t, 'depth_rescale_factor')), 1.)

    def check_depth_unit(self) -> None:
        """Metres, after the pipeline's factor."""
        evaluators = self.cfg.get('val_evaluator') or []
        if isinstance(evaluators, dict):
            evaluators = [evaluators]
        limit = min((metric['max_depth_eval'] for metric in evaluators
                     if 'max_depth_eval' in metric), default=100.)
        median = float(np.median(self.depths))
        self.fact(f'median depth {median:.3g} m')
        if not limit / 100 <= median <= limit:
            self.problem(
                f'the median depth is {median:.3g} m, for depths of at most '
                f'{limit:g} m', 'Depths are in another unit. '
                'LoadDepthAnnotation.depth_rescale_factor is 1e-3 for '
                f'millimetres, 1 for metres; it is {self.depth_factor:g}.')

    def check_pipeline(self) -> None:
        """The first, middle and last item, as a model gets them."""
        for index in {*self.chosen[[0, len(self.chosen) // 2, -1]].tolist()}:
            try:
                item = self.dataset[index]
            except Exception as error:  # transforms raise nearly anything
                self.problem(f'item {index} does not pass the pipeline: '
                             f'{_said(error)}', 'Mend the transform that '
                             'fails, or its place in the pipeline.')
                return
            if not isinstance(item, dict) or 'inputs' not in item:
                self.problem('the pipeline does not give inputs', 'End it '
                             'with PackInputs (mmpretrain) or PackSegInputs '
                             '(mmseg).')
                return


def _fault_of_map(values: Optional[np.ndarray], size: Tuple[int, int]) -> str:
    """What no mask and no depth map may be; ``''`` if it is not."""
    if values is None:
        return 'are missing or cannot be read'
    if values.ndim != 2:
        return f'have {values.shape[2]} channels instead of one'
    return '' if values.shape == size else 'are not as large as their image'


def _some(values) -> str:
    values = list(values)
    text = ', '.join(str(value) for value in values[:SHOWN])
    return text if len(values) <= SHOWN else \
        f'{text}, … ({len(values)} in all)'


def _image_size(info: dict) -> Tuple[int, int]:
    """(H, W), after decoding the whole image, so that a truncated one
    fails."""
    if 'img' in info:
        return info['img'].shape[:2]
    with Image.open(io.BytesIO(read_bytes(info['img_path']))) as image:
        image.load()
        return image.size[::-1]


def _read_map(path: str) -> Optional[np.ndarray]:
    """A mask or a depth map as stored; None if it cannot be read."""
    try:
        content = np.frombuffer(read_bytes(path), np.uint8)
        return cv2.imdecode(content, cv2.IMREAD_UNCHANGED)
    except (OSError, cv2.error):
        return None
