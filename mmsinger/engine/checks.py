"""Folders that a run needs, looked at before anything is built."""
import os
import tempfile
from typing import Iterator, Tuple

from mmengine.config import Config

from mmsinger.errors import ConfigError


def check_work_dir(work_dir: str) -> None:
    """Raise :class:`ConfigError` unless files can be written there."""
    try:
        os.makedirs(work_dir, exist_ok=True)
        with tempfile.TemporaryFile(dir=work_dir):
            pass
    except OSError as error:
        raise ConfigError(
            f'work_dir={work_dir!r} is not writable: {error.strerror}. '
            'Choose another one with --work-dir, or mend its permissions.'
        ) from error


def check_data_folders(cfg: Config, loaders: Tuple[str, ...]) -> None:
    """Raise :class:`ConfigError` for a data folder that is missing or empty.

    Only local folders that the config names are looked at; what a dataset
    makes of them is the dataset's business.
    """
    for name in loaders:
        loader = cfg.get(name)
        if not isinstance(loader, dict) or 'dataset' not in loader:
            continue
        for key, dataset in _datasets(loader['dataset'], f'{name}.dataset'):
            for path_key, path in _folders(dataset):
                _check_folder(f'{key}.{path_key}', path)
                if path_key == 'data_prefix.img_path':
                    _check_suffix(key, path, dataset)


def _datasets(dataset: dict, key: str) -> Iterator[Tuple[str, dict]]:
    """The innermost dataset configs (inside Repeat-, ConcatDataset, …)."""
    inner = dataset.get('dataset')
    if isinstance(inner, dict):
        yield from _datasets(inner, f'{key}.dataset')
    elif isinstance(dataset.get('datasets'), (list, tuple)):
        for i, one in enumerate(dataset['datasets']):
            yield from _datasets(one, f'{key}.datasets[{i}]')
    else:
        yield key, dataset


def _folders(dataset: dict) -> Iterator[Tuple[str, str]]:
    root = dataset.get('data_root') or ''
    if root:
        yield 'data_root', root
    prefix = dataset.get('data_prefix') or {}
    prefixes = prefix.items() if isinstance(prefix, dict) else [('', prefix)]
    for name, folder in prefixes:
        if isinstance(folder, str) and folder:
            key = f'data_prefix.{name}' if name else 'data_prefix'
            yield key, os.path.join(root, folder)


def _check_suffix(key: str, path: str, dataset: dict) -> None:
    """mmengine ends in "need at least one array to concatenate" where no
    image has the suffix that a dataset lists."""
    suffix = dataset.get('img_suffix')
    if not suffix or '://' in path or dataset.get('ann_file'):
        return
    if not any(name.endswith(suffix) for _, _, names
               in os.walk(path, followlinks=True) for name in names):
        raise ConfigError(
            f'{key}: no file in {path!r} ends with img_suffix={suffix!r}. '
            f'Set {key}.img_suffix to what the images end with, or point '
            'data_root to your data set.')


def _check_folder(key: str, path: str) -> None:
    if '://' in path:
        return
    if not os.path.isdir(path):
        raise ConfigError(
            f'{key}: no folder {path!r} (working directory {os.getcwd()}). '
            'Point data_root to your data set.')
    if not any(files for _, _, files in os.walk(path, followlinks=True)):
        raise ConfigError(f'{key}: the folder {path!r} holds no files. '
                          'Point data_root to your data set.')
