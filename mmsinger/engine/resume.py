"""What a run goes on from: intact files, of the same model, with the
settings that the config has now."""
import ast
import contextlib
import glob
import itertools
import os
import re
import warnings
import zipfile
from typing import Any, Dict, Iterator, List, Tuple

import torch
from mmengine.config import Config
from mmengine.hooks import CheckpointHook, EMAHook
from mmengine.logging import print_log
from mmengine.optim import OptimWrapper
from mmengine.runner import EpochBasedTrainLoop

from mmsinger.checkpoint import (STUDENT, check_there, load_checkpoint,
                                 refuse_foreign, student_state_dict,
                                 weights_of)
from mmsinger.engine.options import evaluate
from mmsinger.engine.unwrap import is_sharded, unwrap
from mmsinger.errors import ConfigError, walk_config
from mmsinger.models.distillers import BaseDistiller


def resume_from_intact_checkpoint(cfg: Config) -> None:
    """Choose what ``--resume`` without a path goes on from: the newest
    checkpoint in the work dir that was written to its end.

    mmengine follows the path in ``last_checkpoint``, which leads elsewhere
    after the folder was moved or copied, and fails on a file that was cut off.

    Raises:
        ConfigError: If there are checkpoints and none is intact.
    """
    if cfg.get('resume') not in (None, True, False):
        raise ConfigError(
            f'resume={cfg.resume!r} is neither True nor False. Give the path '
            'as --resume PATH, or as load_from beside resume=True.')
    if not cfg.get('resume') or cfg.get('load_from') is not None:
        return
    found = _saved(cfg)
    pointer = os.path.join(cfg.work_dir, 'last_checkpoint')
    last = ''
    if os.path.isfile(pointer):
        with open(pointer, errors='replace') as file:
            last = os.path.basename(file.read().strip())
    found.sort(key=lambda path: (os.path.basename(path) == last,
                                 os.path.getmtime(path)), reverse=True)
    for path in found:
        if is_intact(path):
            cfg.load_from = path
            return
        print_log(f'--resume: {path!r} was not written to its end, it is '
                  'passed over', logger='current', level=30)
    if found:
        raise ConfigError(
            f'--resume: none of the checkpoints of {cfg.work_dir!r} was '
            f'written to its end: {", ".join(map(os.path.basename, found))}. '
            'Remove them to begin anew.')


def refuse_to_overwrite(cfg: Config) -> None:
    """Raise :class:`ConfigError` where a run that begins anew would write
    over the checkpoints of an earlier one, which mmengine does without a
    word."""
    found = [] if cfg.get('resume') else _saved(cfg)
    if found:
        newest = max(found, key=os.path.getmtime)
        raise ConfigError(
            f'work_dir={cfg.work_dir!r} holds the checkpoints of an earlier '
            f'run, which this one would write over ({len(found)}, the newest '
            f'is {newest!r}). Go on from it with --resume, choose another '
            'folder with --work-dir, or remove them.')


def _saved(cfg: Config) -> List[str]:
    """A run's checkpoints, where and as CheckpointHook names them."""
    hook = (cfg.get('default_hooks') or {}).get('checkpoint') or {}
    folders, kinds = [cfg.work_dir], ['iter_*.pth', 'epoch_*.pth']
    out_dir = hook.get('out_dir') or '://'
    if '://' not in out_dir:
        folders.append(os.path.join(out_dir, os.path.basename(
            cfg.work_dir.rstrip(os.sep))))
    if hook.get('filename_tmpl'):
        kinds.append('*'.join(map(glob.escape, re.split(
            r'\{[^}]*\}', hook.filename_tmpl))))
    return [path for folder, kind in itertools.product(folders, kinds)
            for path in glob.glob(os.path.join(glob.escape(folder), kind))
            if '_student' not in os.path.basename(path)]  # exports


def is_intact(path: str) -> bool:
    """Whether a file of torch.save is there to its end, and as its checksums
    say."""
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except Exception:  # damaged names and lengths raise nearly anything
        return False


def check_checkpoint_files(cfg: Config) -> None:
    """Check the files that a run is to start from, before anything is built.

    Args:
        cfg (Config): Its ``load_from``, and the weights that ``model`` names.

    Raises:
        ConfigError: If a local file is not there; if that of ``load_from``
            cannot be read. Whether it fits shows when it is loaded.
    """
    named = [(place, path) for place, path in walk_config(cfg.model, 'model')
             if place.endswith(('.checkpoint', '.pretrained'))]
    key = 'load_from (or --resume)' if cfg.get('resume') else 'load_from'
    for key, path in [(key, cfg.get('load_from')), *named]:
        if isinstance(path, str):
            check_there(path, key)
            if key == 'load_from' and os.path.isfile(path):
                load_checkpoint(path, key)


# -- what is in it, once it is loaded ---------------------------------------


def take_up(runner: Any, checkpoint: Dict[str, Any]) -> None:
    """Check that a checkpoint is one of this run's model, and let the config
    hold where it differs from the one that it was made with.

    mmengine loads what fits and warns of the rest, so that adapters would
    begin anew, or the optimizer's moments go to other tensors; and it goes on
    with the checkpoint's learning rates, weight decay and schedule. Here the
    moments come from the checkpoint, each to the parameter of its name; what
    the config has changed comes from the config, as if it had been so from
    the beginning, and is logged. Without changes nothing is touched.

    A run goes on from its own checkpoints only. ``load_from`` takes those
    and, for a distiller, any of the plain student.

    Args:
        runner (Runner): About to load it; in training, with optimizer and
            schedulers built where it resumes.
        checkpoint (dict): Changed in place.

    Raises:
        ConfigError: If tensors are missing, left over or of other shapes; it
            names the settings that differ. If the moments belong to another
            optimizer or to other parameters; or if the checkpoint was written
            within an epoch of another length: which images were seen does not
            say what to go on with.
    """
    changed = _changed_settings(checkpoint, runner.cfg)
    _check_fit(runner, checkpoint, changed)
    start_only = {f'{step.place}.{name}'
                  for step in getattr(unwrap(runner.model), 'steps', ())
                  for name in step.start_only}
    begun = [line for line in changed if line.split(':')[0] in start_only]
    no_effect = ('\nThese have no effect any more: what came of them before '
                 'the first step is in the checkpoint.' + _listed(begun)
                 if begun else '')
    if not runner._resume:
        weights = checkpoint.get('state_dict', checkpoint)
        if begun and any(STUDENT in key for key in weights):
            runner.logger.warning(
                f'load_from={runner._load_from!r}{no_effect}')
        return
    _fit_epochs(runner, checkpoint)
    if changed:
        runner.logger.warning(
            'The config differs from the one that the checkpoint was made '
            'with; the values of now hold.'
            + _listed([line for line in changed if line not in begun])
            + no_effect)
    _take_over_settings(runner, checkpoint, changed)


def _check_fit(runner: Any, checkpoint: Dict[str, Any], changed: List[str]
               ) -> None:
    resume, source = runner._resume, runner._load_from
    name = f'--resume {source!r}' if resume else f'load_from={source!r}'
    if resume:
        wanted = ['meta', 'message_hub', 'optimizer']
        if not any(getattr(hook, 'save_optimizer', True)
                   for hook in runner.hooks
                   if isinstance(hook, CheckpointHook)):
            wanted.remove('optimizer')
        missing = [key for key in wanted if key not in checkpoint]
        if missing:
            raise ConfigError(
                f'{name} cannot be gone on from: it has no '
                f'{", ".join(missing)}, so it holds weights alone (a student, '
                'a teacher, a best or a published checkpoint). Give an '
                'iter_*.pth or epoch_*.pth of this run, or begin anew from '
                f'these weights with --cfg-options load_from={source}.')
        if 'ema_state_dict' in checkpoint and not any(
                isinstance(hook, EMAHook) for hook in runner.hooks):
            raise ConfigError(
                f'{name} is of a run with an EMAHook: its weights are '
                'averages, its optimizer is that of others. Put the hook back '
                'into custom_hooks, or begin anew from the averages with '
                f'--cfg-options load_from={source}.')
    if is_sharded(runner.model):
        return
    weights = weights_of(checkpoint, source)
    if not isinstance(checkpoint.get('state_dict'), dict):
        checkpoint['state_dict'] = weights
    found = {key: tuple(value.shape) for key, value in weights.items()}
    model = unwrap(runner.model)
    expected = {key: tuple(value.shape)
                for key, value in model.state_dict().items()}
    if not (resume or isinstance(model, BaseDistiller)):
        refuse_foreign(
            f'{name} fits next to nothing of the model', found, expected,
            len(found.keys() & expected.keys()),
            'It is a checkpoint of a distillation: give the student that '
            'lies beside it (*_student.pth).'
            if any(key.startswith(STUDENT) for key in found) else
            'Convert it with tools/convert_checkpoint.py, or name it in '
            'init_cfg of the part that it belongs to.')
        return
    strict = resume or any(key.startswith(STUDENT) for key in found)
    if not strict:  # a plain student's, whose head may be left out
        expected = student_state_dict(expected)
    wrong = [f'{key}: {found[key]} in the file, {shape} in the model'
             for key, shape in expected.items()
             if found.get(key, shape) != shape]
    anew = tuple(f'{name}.' for step in getattr(model, 'steps', ())
                 for name in step.found_anew)
    missing = [key for key in expected
               if key not in found and not key.startswith(anew)]
    extra = [key for key in found if key not in expected]
    other_type = [line for line in changed if line.startswith('model.type:')]
    if not (wrong or strict and (missing or extra or other_type)
            or len(missing) == len(expected)):
        return
    problems = [f'{len(keys)} tensors {title}: {", ".join(keys[:4])}'
                + (', …' if len(keys) > 4 else '')
                for title, keys in (
                    ('differ', wrong), ('are missing', missing),
                    ('are left over', extra)) if keys]
    raise ConfigError(
        f'{name} is not a checkpoint of this model.\n  '
        + '\n  '.join(problems)
        + _listed([line for line in changed if line.startswith('model.')])
        + '\nGive the config that it was made with (it is dumped in its work '
        'dir), or a checkpoint of this one.')


def _fit_epochs(runner: Any, checkpoint: Dict[str, Any]) -> None:
    """Count iterations anew where an epoch has another number of them than in
    the run so far: with other images, batches or processes."""
    before, loop = checkpoint.get('epoch_length'), runner.train_loop
    if not isinstance(loop, EpochBasedTrainLoop) or \
            before in (None, len(loop.dataloader)):
        return
    meta, now = checkpoint['meta'], len(loop.dataloader)
    if meta['iter'] != meta['epoch'] * before:
        raise ConfigError(
            f'--resume {runner._load_from!r} was written within an epoch of '
            f'{before} iterations, and an epoch has {now} now (other images, '
            'batch_size or processes). Set them back, resume from an '
            'epoch_*.pth, or begin anew from these weights with load_from.')
    runner.logger.warning(
        f'An epoch has {now} iterations, and had {before} in the run so far '
        f'(other images, batch_size or processes): after {meta["epoch"]} '
        f'epochs it goes on as iteration {meta["epoch"] * now + 1}.')
    meta['iter'] = meta['epoch'] * now


def _changed_settings(checkpoint: Dict[str, Any], cfg: Config) -> List[str]:
    """``'model.adapter.rank: 4 then, 8 now'`` for each setting of model,
    optimizer, schedule and length that differs from those that a checkpoint
    was made with; none if it does not say. Its config is read, not
    executed."""
    parts = ('model', 'optim_wrapper', 'param_scheduler', 'train_cfg')
    meta = checkpoint.get('meta')
    then = _literals(meta.get('cfg') if isinstance(meta, dict) else None)
    now = _literals(cfg.pretty_text)
    if not then:
        return []
    then, now = ({key: value for part in parts
                  for key, value in _flat(settings.get(part), part)}
                 for settings in (then, now))
    return [f'{key}: {then.get(key, "not set")!r} then, '
            f'{now.get(key, "not set")!r} now'
            for key in dict.fromkeys([*then, *now])
            if then.get(key, _UNSET) != now.get(key, _UNSET)]


_UNSET = object()


def _literals(text: Any) -> Dict[str, Any]:
    """The plain values that a config's text assigns, without running it."""
    try:
        statements = ast.parse(text).body
    except (SyntaxError, TypeError, ValueError, RecursionError):
        return {}
    values = {}
    for statement in statements:
        if isinstance(statement, ast.Assign):
            with contextlib.suppress(Exception):  # no plain value
                values[statement.targets[0].id] = evaluate(statement.value)
    return values


def _flat(value: Any, key: str) -> Iterator[Tuple[str, Any]]:
    items = value.items() if isinstance(value, dict) else \
        enumerate(value) if isinstance(value, (list, tuple)) and any(
            isinstance(item, dict) for item in value) else None
    if items is None:
        yield key, list(value) if isinstance(value, tuple) else value
    else:
        for name, inner in items:
            yield from _flat(inner, f'{key}.{name}')


def _listed(lines: List[str]) -> str:
    if not lines:
        return ''
    more = [f'… and {len(lines) - 10} more'] if len(lines) > 10 else []
    return '\nSettings that differ:\n  ' + '\n  '.join(lines[:10] + more)


# -- optimizer and schedule --------------------------------------------------


def optimizer_names(runner: Any) -> List[str]:
    """Names of the parameters in the optimizer's order, which tell later
    whose moments a checkpoint holds.

    Args:
        runner (Runner): In training.

    Returns:
        list[str]: Empty for several optimizers, and where the optimizer
        holds parts of parameters (FSDP).
    """
    if not isinstance(runner.optim_wrapper, OptimWrapper) or \
            is_sharded(runner.model):
        return []
    names = {id(parameter): name for name, parameter
             in unwrap(runner.model).named_parameters()}
    found = [names.get(id(parameter))
             for group in runner.optim_wrapper.optimizer.param_groups
             for parameter in group['params']]
    return [] if None in found else found


def _take_over_settings(runner: Any, checkpoint: Dict[str, Any],
                        changed: List[str]) -> None:
    """Let learning rates, weight decay and schedule of the config hold, see
    :func:`take_up`."""
    names, saved = optimizer_names(runner), checkpoint.get('optimizer', {})
    if not names or 'param_groups' not in saved:
        return
    if any(line.startswith('optim_wrapper.optimizer.type:')
           for line in changed):
        raise ConfigError(
            f'--resume {runner._load_from!r}: the optimizer is another one.'
            + _listed([line for line in changed if '.type' in line])
            + '\nSet it back, or begin anew from the weights with load_from.')
    wrapper = runner.optim_wrapper
    parameters = [parameter for group in wrapper.optimizer.param_groups
                  for parameter in group['params']]
    ids = [one for group in saved['param_groups'] for one in group['params']]
    # With FSDP torch saves names in place of numbers
    before = ids if ids and isinstance(ids[0], str) else \
        checkpoint.get('optimizer_names', names)
    own = dict(zip(before, ids))
    state = {i: saved['state'][own[name]] for i, name in enumerate(names)
             if own.get(name) in saved['state']}
    strangers = set(before) ^ set(names) or [
        name for i, name in enumerate(names) for value
        in state.get(i, {}).values() if torch.is_tensor(value)
        and value.dim() and value.shape != parameters[i].shape]
    if strangers or len(ids) != len(names):
        raise ConfigError(
            f'--resume {runner._load_from!r}: the optimizer in it has '
            f'{len(ids)} parameters, this one {len(names)}'
            + (f'; {sorted(strangers)[:3]} differ' if strangers else '')
            + '. Set optim_wrapper back, or begin anew from the weights with '
            'load_from.')
    schedules = runner.param_schedulers or []
    if ids != names and before == names and \
            _settings(saved['param_groups']) == _settings(
                wrapper.state_dict()['param_groups']) and \
            _settings(checkpoint.get('param_schedulers') or []) == _settings(
                [schedule.state_dict() for schedule in schedules]):
        return
    _replay(schedules, runner, checkpoint['meta'])
    checkpoint['param_schedulers'] = [
        schedule.state_dict() for schedule in schedules]
    checkpoint['optimizer'] = {**saved, **wrapper.state_dict(),
                               'state': state}
    runner.logger.info(
        'Learning rates, weight decay and schedule are the config\'s, as if '
        'they had been from the beginning; the moments are the checkpoint\'s.')


def _settings(states: List[dict]) -> List[dict]:
    """Groups of an optimizer, or schedules, without what schedules move."""
    moving = ('last_step', '_global_step', '_last_value', 'base_values')
    return [{key: value for key, value in state.items()
             if key not in moving and f'initial_{key}' not in state}
            for state in states]


def _replay(schedules: list, runner: Any, meta: Dict[str, Any]) -> None:
    """Bring fresh schedules to where the checkpoint was written."""
    length = len(runner.train_loop.dataloader) if isinstance(
        runner.train_loop, EpochBasedTrainLoop) else 0
    with warnings.catch_warnings():  # of steps without the optimizer's
        warnings.simplefilter('ignore')
        for step in range(1, meta['iter'] + 1):
            for schedule in schedules:
                if not schedule.by_epoch or length and step % length == 0:
                    schedule.step()
