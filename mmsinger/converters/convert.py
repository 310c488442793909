"""A checkpoint of another library, for mmpretrain's VisionTransformer."""
import argparse
import collections
import copy
import os
from typing import Any, Dict, List, NamedTuple, Optional, Tuple, Union

import torch
from mmpretrain.models import VisionTransformer
from torch import Tensor

from mmsinger.checkpoint import (load_checkpoint, load_strict, refuse_broken,
                                 sha256, weights_of)
from mmsinger.converters.describe import describe
from mmsinger.converters.layouts import LAYOUTS, Renamed, detect, rename
from mmsinger.converters.positions import place
from mmsinger.errors import ConfigError, check_choice
from mmsinger.files import atomic_save
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
    refuse_broken(weights, path)
    if family == 'auto':
        family = detect(weights, path)
    check_choice('--source', family, LAYOUTS)
    layout = LAYOUTS[family]
    if head:
        _check_head(weights, family, path)
    renamed = rename(weights, family, head)
    named = _by_target(renamed, weights)
    head_weights = {key: named.pop(key) for key in list(named)
                    if key.startswith('layers.head.')}
    cls = int('cls_token' in named)
    prefix = (cls, )  # how many rows of pos_embed are not patches'
    if layout.registers_have_positions:
        prefix = 0, cls + (named['register_tokens'].shape[1]
                           if 'register_tokens' in named else 0)
    if backbone is None:
        backbone = describe(named, prefix, arch, num_heads, act, img_size,
                            layout.backbone)
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
        model, named, what=f'{path}, converted from {layout.title} '
        f'layout, does not fit {backbone["type"]}',
        fix='The file is incomplete, or --source or the backbone (--config) '
        'is not what it was saved from.')
    shapes = {key: tuple(value.shape)
              for key, value in {**named, **head_weights}.items()}
    parts = collections.Counter(r.target for r in renamed)
    entries = []
    for source, target, _, why in renamed:
        if target is None:
            shape, action = tuple(weights[source].shape), f'dropped: {why}'
        else:
            action = actions.get(target) or (
                "the classifier's" if target in head_weights else
                'joined' if parts[target] > 1 else
                'kept' if target == source else 'renamed')
            target = target.replace('register_tokens', 'cls_token')
            shape = shapes[target]
        entries.append(Entry(source, target or '', shape, action))
    return Conversion(family, named, backbone, entries, head_weights)


def _check_head(weights: Dict[str, Tensor], family: str, path: str) -> None:
    """Raise ConfigError unless there is a linear head on the normalised class
    token."""
    name = LAYOUTS[family].head
    lacking = [key for key in ('cls_token', f'{name}.weight', f'{name}.bias')
               if not any(have.endswith(key) for have in weights)]
    between = [key for key in weights if key.startswith(
        ('fc_norm.', 'pre_logits.', 'head_dist.'))]
    if not name or lacking or between:
        reason = f'is of the family {family!r}' if not name else \
            f'has no {", ".join(lacking)}' if lacking else \
            f'has {", ".join(between)}'
        raise ConfigError(
            f'--head: {path} {reason}. What can be kept is the linear head on '
            "the class token of a timm model or of transformers' ViT, for "
            "mmpretrain's VisionTransformerClsHead.")


def _by_target(renamed: List[Renamed], weights: Dict[str, Tensor]
               ) -> Dict[str, Tensor]:
    parts: Dict[str, Dict[int, str]] = {}
    for source, target, part, _ in renamed:
        if target is None:
            continue
        found = parts.setdefault(target, {})
        if part in found:
            raise ConfigError(f'{found[part]!r} and {source!r} are both '
                              f'{target!r} in mmpretrain: which one counts '
                              'is not certain.')
        found[part] = source
    named = {}
    for target, found in parts.items():
        tensors = [weights[found[part]] for part in sorted(found)]
        shapes = {tuple(tensor.shape) for tensor in tensors}
        if len(shapes) > 1:
            raise ConfigError(f'{", ".join(map(repr, found.values()))} make '
                              f'one tensor in mmpretrain, {target!r}, but '
                              f'their shapes differ: {sorted(shapes)}.')
        named[target] = tensors[0] if len(found) == 1 else torch.cat(tensors)
    for key, value in named.items():
        if key in ('cls_token', 'pos_embed') and 0 < value.dim() < 3:
            named[key] = value.reshape(1, -1, value.shape[-1])
    return named


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


def convert_checkpoint(source: str, out: str, prefix: str = 'backbone.',
                       key: Optional[str] = None, **kwargs: Any
                       ) -> Conversion:
    """Convert a file; see :func:`convert`.

    Args:
        source (str): A local file, whatever :func:`load_checkpoint` reads.
        out (str): Where to write; complete or not at all.
        prefix (str): What the backbone's keys in it begin with; a head's
            begin with ``'head.'``. Defaults to ``'backbone.'``.
        key (str, optional): Which of a checkpoint's entries holds the
            weights, ``'teacher'`` for instance. Defaults to None, the usual
            ones.
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
    # UNIC keeps the parsed arguments beside the weights
    with torch.serialization.safe_globals([argparse.Namespace]):
        checkpoint = load_checkpoint(source, 'SOURCE')
    if os.path.exists(out) and os.path.samefile(source, out):
        raise ConfigError(f'OUT={out!r} is SOURCE, which would be lost.')
    result = convert(_chosen_weights(checkpoint, source, key),
                     path=repr(source), **kwargs)
    if prefix and not prefix.endswith('.'):
        prefix += '.'
    meta = dict(source=os.path.basename(source), sha256=sha256(source),
                family=result.family, backbone=result.backbone,
                mmsinger_version=__version__)
    state = {**{prefix + key: value for key, value in result.weights.items()},
             **{f'head.{key}': value for key, value in result.head.items()}}
    _write(dict(meta=meta, state_dict={
        # a copy: what was cut out of a larger tensor would bring it along
        key: value.detach().clone() for key, value in state.items()}), out)
    return result


def _chosen_weights(checkpoint: dict, source: str, key: Optional[str]
                    ) -> Dict[str, Tensor]:
    """The weights under a key, or where writers usually put them."""
    holding = [name for name, value in checkpoint.items()
               if isinstance(value, dict) and any(
                   map(torch.is_tensor, value.values()))]
    if key is not None:
        if not holding:
            raise ConfigError(f'--key={key!r}: {source!r} has its tensors at '
                              'the top, under no key. Leave --key out.')
        check_choice('--key', key, holding)
        return weights_of(checkpoint[key], source)
    try:
        return weights_of(checkpoint, source)
    except ConfigError:
        if not holding:
            raise
        raise ConfigError(
            f'{source!r} has weights under {", ".join(map(repr, holding))}. '
            f'Choose with --key, for instance --key {holding[0]}.') from None


def _write(content: dict, out: str) -> None:
    try:
        os.makedirs(os.path.dirname(os.path.abspath(out)), exist_ok=True)
        atomic_save(content, out)
    except OSError as error:
        raise ConfigError(f'OUT={out!r} cannot be written: {error}. Choose '
                          'another place.') from error
