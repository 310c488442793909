"""Decompositions of teacher matrices, kept from one run to the next."""
import os
from typing import Optional, Tuple

import torch
from mmengine.logging import print_log
from torch import Tensor

from mmsinger.files import cache_folder, content_hash, whole_file
from mmsinger.models.adapters.nullspace import left_singular_directions

# Raise it when left_singular_directions() would give something else for the
# same matrix
VERSION = 1
SMALLEST = 256  # channels; narrower matrices take no time to decompose


def cached_singular_directions(weight: Tensor) -> Tuple[Tensor, Tensor]:
    """:func:`left_singular_directions`, from a file if there is one.

    Files are in ``nullspaces`` of :func:`mmsinger.files.cache_folder` and are
    named by a hash of the matrix itself, so another teacher, layer or setting
    is another file. One that is damaged is computed anew and replaced; where
    none can be written, nothing is kept.

    Args:
        weight (Tensor): W, shape (D, M) with M >= D.

    Returns:
        tuple[Tensor, Tensor]: Directions as columns (D, D) and singular
        values (D, ) in descending order, float64 on the CPU.

    Raises:
        ConfigError: See :func:`left_singular_directions`.
    """
    folder = cache_folder()
    if folder is None or len(weight) < SMALLEST:
        return left_singular_directions(weight)
    name = content_hash(VERSION, dict(weight=weight)).hexdigest()
    path = os.path.join(folder, 'nullspaces', f'{name}.pth')
    decomposition = _read(path, len(weight))
    if decomposition is None:
        decomposition = left_singular_directions(weight)
        _write(path, *decomposition)
    return decomposition


def _read(path: str, dim: int) -> Optional[Tuple[Tensor, Tensor]]:
    try:
        content = torch.load(path, map_location='cpu', weights_only=True)
        directions, values = content['directions'], content['values']
        shapes = (directions.shape, values.shape)
        whole = shapes == ((dim, dim), (dim, )) and \
            content['check'] == _check(directions, values)
    except FileNotFoundError:
        return None
    except Exception:  # damaged bytes make the unpickler raise nearly anything
        whole = False
    if not whole:
        print_log(f'{path} is damaged or cannot be read: computing it anew',
                  logger='current')
        return None
    return directions, values


def _write(path: str, directions: Tensor, values: Tensor) -> None:
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with whole_file(path) as temporary:
            torch.save(dict(directions=directions, values=values,
                            check=_check(directions, values)), temporary)
    except (OSError, RuntimeError) as error:  # torch.save: either
        print_log(f'The nullspace is not kept for other runs: {error}. '
                  'Set MMSINGER_CACHE to a folder that can be written, or to '
                  'nothing to keep none.', logger='current')


def _check(directions: Tensor, values: Tensor) -> str:
    return content_hash(VERSION, dict(
        directions=directions, values=values)).hexdigest()
