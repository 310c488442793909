"""A checkpoint of another library, for mmpretrain's VisionTransformer."""
import argparse
import contextlib
import copy
import hashlib
import os
from typing import Any, Dict, List, NamedTuple, Optional, Tuple, Union

import torch
from mmpretrain.models import VisionTransformer
from torch import Tensor

from mmsinger.checkpoint import load_checkpoint, load_strict, weights_of
from mmsinger.converters.describe import describe
from mmsinger.converters.layouts import LAYOUTS, Renamed, detect, rename
from mmsinger.converters.positions import place
from mmsinger.errors import ConfigError
from mmsinger.files import whole_file
from mmsinger.models.backbones.registers import VisionTransformerWithRegisters
from mmsinger.models.features.tokens import Grid
from mmsinger.registry import MODELS
from mmsinger.version import __version__


class Entry(NamedTuple):
    """A line of the report: one tensor of the source.

    Attributes:
        source (str): Its key.
        target (str): Its key in mmpretrain's layout, ``''`` if dropped.
        shape (tuple[int, ...]): Of the target, or of what was dropped.
        action (str): What was done with it.
    """
    source: str
    target: str
    shape: Tuple[int, ...]
    action: str


class Conversion(NamedTuple):
    """Converted weights.

    Attributes:
        family (str): Where they came from, a key of :data:`LAYOUTS`.
        weights (dict[str, Tensor]): State dict of the backbone.
        backbone (dict): Config that it loads into, strictly.
        entries (list[Entry]): What became of each source tensor.
        head (dict[str, Tensor]): State dict of a VisionTransformerClsHead, if
            one was asked for.
    """
    family: str
    weights: Dict[str, Tensor]
    backbone: dict
    entries: List[Entry]
    head: Dict[str, Tensor]

    def report(self) -> str:
        """The entries as a table."""
        rows = [('source', 'target', 'shape', 'done')] + [
            (e.source, e.target or '-', 'x'.join(map(str, e.shape)) or '1',
             e.action) for e in self.entries
        ]
        widths = [max(map(len, column)) for column in zip(*rows)]
        return '\n'.join(
            '  '.join(cell.ljust(width) for cell, width in zip(row, widths)
                      ).rstrip() for row in rows)


def convert(weights: Dict[str, Tensor],
            family: str = 'auto',
            backbone: Optional[dict] = None,
            arch: Optional[str] = None,
            num_heads: Optional[int] = None,
            act: Optional[str] = None,
            img_size: Union[int, Grid, None] = None,
            head: bool = False,
            path: str = 'The file') -> Conversion:
    """Convert a state dict, and load it strictly into its backbone.

    Args:
        weights (dict[str, Tensor]): Of the source library; not changed.
        family (str): A key of :data:`LAYOUTS`, or ``'auto'``: from the keys.
            Defaults to ``'auto'``.
        backbone (dict, optional): Config to convert for. Defaults to None,
            made from the shapes and the arguments below.
        arch (str, optional): See :func:`describe`.
        num_heads (int, optional): See :func:`describe`.
        act (str, optional): See :func:`describe`.
        img_size (int | tuple[int, int], optional): (H, W) to resample the
            position embeddings for. Defaults to None: the backbone config's,
            or else the source's.
        head (bool): Keep the classification head too. Defaults to False.
        path (str): Where the weights came from, for error messages.

    Returns:
        Conversion: Weights, config and report.

    Raises:
        ConfigError: If the family is not certain, a key is neither mapped
            nor dropped on purpose, the result does not fit the backbone, or
            there is no head of the wanted kind.
    """
    if family == 'auto':
        family = detect(weights, path)
    renamed = rename(weights, family)
    named = _by_target(renamed, weights)
    head_weights = _head(weights, family, path) if head else {}
    prefix = _prefix_rows(named, family)
    if backbone is None:
        backbone = describe(named, prefix, arch, num_heads, act, img_size)
    else:
        if (arch, num_heads, act) != (None, None, None):
            raise ConfigError('--arch, --num-heads and --act describe the '
                              'backbone, and so does --config. Give one.')
        backbone = copy.deepcopy(backbone)
        backbone.pop('init_cfg', None)
        if img_size is not None:
            backbone['img_size'] = img_size
    model = _build(backbone)

    actions = {}
    registers = 'register_tokens' in named
    if registers and 'cls_token' in named:
        named['cls_token'] = torch.cat(
            [named['cls_token'], named.pop('register_tokens')], dim=1)
        actions.update(cls_token='joined with the registers',
                       register_tokens='joined after CLS')
    if 'pos_embed' in named:
        named['pos_embed'], actions['pos_embed'] = place(
            named['pos_embed'], prefix, model.num_extra_tokens,
            model.patch_embed.init_out_size, family, registers)
    load_strict(
        model, named, what=f'{path}, converted from {LAYOUTS[family].title} '
        f'layout, does not fit {backbone["type"]}',
        fix='The file is incomplete, or --source or the backbone (--config) '
        'is not what it was saved from.')
    entries = [_entry(r, weights, named, actions) for r in renamed]
    if head:
        entries = [
            Entry(e.source, _HEAD[e.source], e.shape, "the classifier's")
            if e.source in _HEAD else e for e in entries]
    return Conversion(family, named, backbone, entries, head_weights)


# Of mmpretrain's VisionTransformerClsHead
_HEAD = {f'head.{leaf}': f'layers.head.{leaf}' for leaf in ('weight', 'bias')}


def _head(weights: Dict[str, Tensor], family: str, path: str
          ) -> Dict[str, Tensor]:
    """A linear head on the normalised class token."""
    lacking = [key for key in ('cls_token', *_HEAD) if key not in weights]
    between = [key for key in weights if key.startswith(
        ('fc_norm.', 'pre_logits.', 'head_dist.'))]
    if family != 'timm' or lacking or between:
        reason = f'is of the family {family!r}' if family != 'timm' else \
            f'has no {", ".join(lacking)}' if lacking else \
            f'has {", ".join(between)}'
        raise ConfigError(
            f'--head: {path} {reason}. What can be kept is the linear head of '
            "a timm model on the class token, for mmpretrain's "
            'VisionTransformerClsHead.')
    return {target: weights[source] for source, target in _HEAD.items()}


def _by_target(renamed: List[Renamed], weights: Dict[str, Tensor]
               ) -> Dict[str, Tensor]:
    named, sources = {}, {}
    for source, target, _ in renamed:
        if target in named:
            raise ConfigError(f'{sources[target]!r} and {source!r} are both '
                              f'{target!r} in mmpretrain: which one counts '
                              'is not certain.')
        if target is not None:
            named[target], sources[target] = weights[source], source
    return named


def _prefix_rows(named: Dict[str, Tensor], family: str) -> Tuple[int, ...]:
    """How many rows of pos_embed may belong to class and register tokens."""
    cls = int('cls_token' in named)
    if family in ('dinov2', 'unic'):
        return (cls, )
    registers = named['register_tokens'].shape[1] \
        if 'register_tokens' in named else 0
    return (0, cls + registers)


def _build(backbone: dict) -> VisionTransformer:
    model = MODELS.build(dict(backbone))
    name = type(model).__name__
    if name == 'DeiT3':
        raise ConfigError(
            "mmpretrain's DeiT3 normalises the input of the FFN with the "
            "attention's norm (ln1 twice), so it computes something else "
            "than DeiT-III. Use 'mmpretrain.VisionTransformer' with "
            'layer_scale_init_value=1e-5, which is the same as DeiT-III once '
            'converted; without --config it is chosen.')
    if type(model) not in (VisionTransformer, VisionTransformerWithRegisters):
        raise ConfigError(
            f'The backbone is a {name}. Weights can be converted for '
            "'mmpretrain.VisionTransformer' and "
            "'mmsinger.VisionTransformerWithRegisters'.")
    return model


def _entry(renamed: Renamed, weights: Dict[str, Tensor],
           named: Dict[str, Tensor], actions: Dict[str, Optional[str]]
           ) -> Entry:
    source, target, why = renamed
    if target is None:
        return Entry(source, '', tuple(weights[source].shape),
                     f'dropped: {why}')
    action = actions.get(target) or (
        'kept' if target == source else 'renamed')
    if target == 'register_tokens':
        target = 'cls_token'
    return Entry(source, target, tuple(named[target].shape), action)


def convert_checkpoint(source: str, out: str, prefix: str = 'backbone.',
                       **kwargs: Any) -> Conversion:
    """Convert a file; see :func:`convert`.

    Args:
        source (str): A local file, whatever :func:`load_checkpoint` reads.
        out (str): Where to write; complete or not at all.
        prefix (str): What the backbone's keys in it begin with; a head's
            begin with ``'head.'``. Defaults to ``'backbone.'``.
        **kwargs: Of :func:`convert`.

    Returns:
        Conversion: What was written. The file's ``meta`` says where it came
        from: ``source``, ``sha256``, ``family``, ``backbone``.

    Raises:
        ConfigError: If the file cannot be read, converted or written.
    """
    if out.lower().endswith('.safetensors'):
        raise ConfigError(f'OUT={out!r}: the file is written by torch.save. '
                          'Name it ….pth.')
    if '://' in source:
        raise ConfigError(f'SOURCE={source!r} is not a local file. Download '
                          'it first.')
    with _namespaces():
        checkpoint = load_checkpoint(source, 'SOURCE')
    if os.path.exists(out) and os.path.samefile(source, out):
        raise ConfigError(f'OUT={out!r} is SOURCE, which would be lost.')
    result = convert(weights_of(checkpoint, source), path=repr(source),
                     **kwargs)
    if prefix and not prefix.endswith('.'):
        prefix += '.'
    meta = dict(source=os.path.basename(source), sha256=_sha256(source),
                family=result.family, backbone=result.backbone,
                mmsinger_version=__version__)
    state = {**{prefix + key: value for key, value in result.weights.items()},
             **{f'head.{key}': value for key, value in result.head.items()}}
    _write(dict(meta=meta, state_dict={
        # a copy: what was cut out of a larger tensor would bring it along
        key: value.detach().clone() for key, value in state.items()}), out)
    return result


def _namespaces() -> contextlib.AbstractContextManager:
    """Allow the parsed arguments that UNIC keeps beside the weights."""
    return torch.serialization.safe_globals([argparse.Namespace])


def _sha256(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        for block in iter(lambda: file.read(1 << 20), b''):
            digest.update(block)
    return digest.hexdigest()


def _write(content: dict, out: str) -> None:
    try:
        os.makedirs(os.path.dirname(os.path.abspath(out)), exist_ok=True)
        with whole_file(out) as temporary:
            torch.save(content, temporary)
    except (OSError, RuntimeError) as error:
        raise ConfigError(f'OUT={out!r} cannot be written: {error}. Choose '
                          'another place.') from error
