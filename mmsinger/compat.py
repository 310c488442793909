"""What differs between the stacks that mmsinger runs on.

Each function changes as little as possible, only where it is needed, and
nothing when the stack is complete.
"""
import contextlib
import importlib.metadata
import importlib.util
import io
import os
import re
import warnings
from typing import Iterator, Optional

import torch

# Keeps the operator schemas alive: they vanish with the library object.
_TORCHVISION_SCHEMAS: Optional[torch.library.Library] = None


def define_missing_torchvision_operators() -> None:
    """Make ``import torchvision`` work beside a CPU-only torch.

    The registry's torchvision is compiled against CUDA torch. Next to a CPU
    wheel its compiled part does not load, and its import fails with
    ``operator torchvision::nms does not exist``; mmpretrain and mmseg fail
    with it. Declaring the two operators that the import refers to is enough
    for transforms, mmpretrain and mmseg; calling them still raises. Nothing
    is declared if torchvision is not installed, or its operators are there.
    """
    global _TORCHVISION_SCHEMAS
    if _TORCHVISION_SCHEMAS is not None or \
            torchvision_operators_present() is not False:
        return
    library = torch.library.Library('torchvision', 'DEF')
    boxes = '(Tensor dets, Tensor scores, float iou_threshold) -> Tensor'
    library.define('nms' + boxes)
    library.define('qnms' + boxes)
    _TORCHVISION_SCHEMAS = library


# Module that warns, how the warning begins: all harmless here, and of no use
# to a user
HARMLESS_WARNINGS = (
    ('mmcv.cnn.bricks.transformer', 'Fail to import ``MultiScaleDeformable'),
    ('mmseg.engine.hooks.visualization_hook', 'The draw is False'),
    ('mmengine.utils.package_utils', 'pkg_resources is deprecated'),
    ('timm.models.layers', 'Importing from timm.models.layers'),
    ('torchvision.io.image', 'Failed to load image Python extension'),
)


def ignore_known_warnings() -> None:
    """Ignore :data:`HARMLESS_WARNINGS`, each of its own module alone."""
    for module, text in HARMLESS_WARNINGS:
        warnings.filterwarnings('ignore', re.escape(text),
                                module=re.escape(module) + '$')


def torchvision_operators_present() -> Optional[bool]:
    """Whether torchvision's compiled operators can be used.

    Returns:
        bool | None: True, False, or None if torchvision is not installed.
    """
    spec = importlib.util.find_spec('torchvision')
    if spec is None or not spec.submodule_search_locations:
        return None
    if _TORCHVISION_SCHEMAS is not None:
        return False
    if hasattr(torch.ops.torchvision, 'nms'):
        return True
    folder = list(spec.submodule_search_locations)[0]
    libraries = [
        os.path.join(folder, name) for name in sorted(os.listdir(folder))
        if name.startswith('_C') and name.endswith(('.so', '.pyd'))
    ]
    for library in libraries:
        with contextlib.suppress(OSError):
            torch.ops.load_library(library)
    return hasattr(torch.ops.torchvision, 'nms')


@contextlib.contextmanager
def onedl_config_packages() -> Iterator[None]:
    """Let ``_base_ = ['mmseg::…']`` find the configs of OneDL's mmseg.

    mmengine looks for the distribution ``mmsegmentation``; OneDL's is called
    ``onedl-mmsegmentation``. The mapping is changed only inside the context,
    and only where OneDL's distribution is the one installed.
    """
    from mmengine.config.utils import MODULE2PACKAGE
    original = MODULE2PACKAGE.get('mmseg')
    if _installed('onedl-mmsegmentation') and not _installed('mmsegmentation'):
        MODULE2PACKAGE['mmseg'] = 'onedl-mmsegmentation'
    try:
        yield
    finally:
        MODULE2PACKAGE['mmseg'] = original


def import_datasets(scope: str) -> None:
    """Import a toolbox's datasets without what OneDL's print meanwhile.

    Args:
        scope (str): ``'mmseg'``, ``'mmpretrain'``; others are left alone.
    """
    if scope not in ('mmpretrain', 'mmseg'):
        return
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), \
            contextlib.suppress(ImportError):  # said where it is used
        importlib.import_module(f'{scope}.datasets')
    for line in printed.getvalue().splitlines():
        if line != 'Could not import OneDL':
            print(line)


def _installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
