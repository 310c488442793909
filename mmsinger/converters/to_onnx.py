"""A student as an ONNX graph."""
import functools
import warnings
from importlib import import_module
from typing import Any, Optional, Tuple

import torch
from mmengine.config import Config
from mmengine.utils import to_2tuple
from torch import nn

from mmsinger.checkpoint import load_strict
from mmsinger.errors import ConfigError
from mmsinger.export import (check_not_itself, load_student, student_config,
                             student_path)
from mmsinger.files import atomic_write
from mmsinger.models.features.anatomy import image_channels, image_size
from mmsinger.registry import MODELS


class _FirstTensor(nn.Module):
    """A model whose output is its first tensor, of features the last."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        output = self.model(image)
        while isinstance(output, (tuple, list)):
            output = output[-1]
        return output


def export_onnx(checkpoint: str, cfg: Config, out: Optional[str] = None,
                size: Optional[Tuple[int, int]] = None
                ) -> Tuple[str, Tuple[int, ...]]:
    """Write the student as an ONNX graph, for batches of any size.

    Its input is ``image``, normalised images (N, C, H, W); its output is
    ``output``, what the plain model's ``forward`` gives: logits, for
    segmentation at the decode head's resolution, or the last features where
    there is no head.

    Args:
        checkpoint (str): A training checkpoint or a student file.
        cfg (Config): The recipe or the plain config.
        out (str, optional): Where to write. Defaults to ``CHECKPOINT.onnx``
            beside it, with ``_student`` in its name.
        size (tuple[int, int], optional): (H, W). Defaults to None: the
            backbone's, or 224.

    Returns:
        tuple[str, tuple[int, int, int]]: The path written, and (C, H, W).

    Raises:
        ConfigError: If onnx, onnxscript or onnxruntime is missing, the
            weights do not fit, or the graph does not compute what the model
            does.
    """
    try:
        onnxruntime, _ = map(import_module, ('onnxruntime', 'onnxscript'))
    except ImportError as error:
        raise ConfigError(
            f'--onnx needs the package {error.name}: '
            "`pip install 'mmsinger[onnx]'`.") from error
    out = out or student_path(checkpoint, '.onnx')
    check_not_itself(out, checkpoint)
    model = MODELS.build(student_config(cfg).model)
    load_strict(
        model, load_student(checkpoint),
        what=f'The student of {checkpoint!r} and the config',
        fix='Give the config that the checkpoint was trained with.')
    model = _FirstTensor(model).eval()
    shape = (image_channels(model),
             *(size or to_2tuple(image_size(model) or 224)))
    with atomic_write(out) as temporary:
        _write_graph(model, shape, temporary)
        _check_graph(onnxruntime, temporary, model, shape)
    return out, shape


def _write_graph(model: nn.Module, shape: Tuple[int, ...], path: str) -> None:
    for module in model.modules():
        if hasattr(module, 'window_reverse'):
            # Its own takes the number of images for a constant
            module.window_reverse = functools.partial(
                _join_windows, module.window_size)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter('ignore')  # of torch's exporter, about itself
        try:
            program = torch.onnx.export(
                model, (torch.randn(2, *shape), ), dynamo=True, verbose=False,
                input_names=['image'], output_names=['output'],
                dynamic_shapes=dict(image={0: torch.export.Dim('batch')}))
        except torch.onnx.errors.OnnxExporterError as error:
            raise ConfigError(
                f'torch.onnx cannot follow the code of this '
                f'{type(model.model).__name__}: {error}') from error
        program.save(path, external_data=False)


def _join_windows(side: int, windows: torch.Tensor, height: int, width: int,
                  *_: Any) -> torch.Tensor:
    """Windows (B * n, side, side, C) of shifted-window attention as maps
    (B, height, width, C)."""
    maps = windows.unflatten(
        0, (-1, height // side, width // side)).transpose(2, 3)
    return maps.reshape(-1, height, width, windows.shape[-1])


@torch.no_grad()
def _check_graph(onnxruntime: Any, path: str, model: nn.Module,
                 shape: Tuple[int, ...]) -> None:
    """Raise ConfigError unless the graph gives what the model does, for
    numbers of images that it was not made with."""
    session = onnxruntime.InferenceSession(
        path, providers=['CPUExecutionProvider'])
    for count in (1, 3):
        images = torch.randn(count, *shape)
        expected = model(images)
        try:
            found = torch.from_numpy(
                session.run(None, dict(image=images.numpy()))[0])
        except Exception:  # onnxruntime's are no classes of its own
            found = expected[:0]
        if found.shape != expected.shape or not torch.allclose(
                found, expected, rtol=1e-3,
                atol=1e-4 * expected.abs().max().item()):
            raise ConfigError(
                f'The ONNX graph of this {type(model.model).__name__} '
                f'computes something else for {count} image(s) than the model '
                'does: its code makes constants of what depends on the '
                'images. It cannot be exported for batches of any size.')
