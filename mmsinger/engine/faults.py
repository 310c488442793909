"""What ends a run from outside: bad samples, data workers and processes that
died or hang. Each ends in one message."""
import contextlib
import multiprocessing
import os
import re
import signal
import threading
import time
from typing import Any, Callable, Iterator, List, Optional, Set, Type

import torch
from mmengine.dist import get_rank, get_world_size
from mmengine.runner import BaseLoop
from torch import distributed, nn
from torch.utils.data import DataLoader

from mmsinger.engine.samples import DataError, guard_samples
from mmsinger.engine.unwrap import unwrap
from mmsinger.errors import ConfigError, TrainingError
from mmsinger.models.features.anatomy import find_part

WAITED = 'mmsinger/waited/{}'
LATE = 'DataLoader timed out'  # as torch says it
GRACE = 5  # seconds, in which torch says it itself
SMALL = 32  # pixels; few networks take less


def guard_loops(runner: Any) -> None:
    """Let samples, data workers and other processes that fail end a runner's
    loops in one :class:`TrainingError`.

    Args:
        runner (Runner): Its loops are built. Guarding them again changes
            nothing.
    """
    for name in ('train', 'val', 'test'):
        loop = getattr(runner, f'_{name}_loop', None)
        if isinstance(loop, BaseLoop) and 'run_iter' not in vars(loop):
            _guard_loop(loop, runner, f'{name}_dataloader')


def _guard_loop(loop: BaseLoop, runner: Any, key: str) -> None:
    guard_samples(loop.dataloader.dataset, f'{key}.dataset')
    _limit_waiting(loop.dataloader)

    def why_run_ended(error: Exception, _: Any) -> Optional[str]:
        return (_loader_fault(error, loop.dataloader, key)
                or _gradient_fault(error)
                or _process_fault(error, runner)
                or _folder_fault(error, runner))

    def why_batch_failed(error: Exception, batch: Any) -> Optional[str]:
        return batch_fault(error, batch, unwrap(runner.model), key)

    run_iter = loop.run_iter

    def checked_iter(*args: Any) -> Any:
        # Metrics pass over labels that are out of range
        said = _wrong_labels(args[-1], unwrap(runner.model), key)
        if said:
            raise DataError(said)
        return run_iter(*args)

    loop.run = explained(loop.run, TrainingError, why_run_ended)
    loop.run_iter = explained(
        run_iter if key == 'train_dataloader' else checked_iter, DataError,
        why_batch_failed)


def explained(call: Callable, kind: Type[TrainingError], explain: Callable
              ) -> Callable:
    """A call whose errors are explained, where they can be.

    Args:
        call (Callable): Its last argument, if there is one, is a batch.
        kind (type): Of the error in its place.
        explain (Callable): Gets error and batch, returns what to say or None.
    """
    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            return call(*args, **kwargs)
        except (ConfigError, TrainingError):
            raise
        except Exception as error:
            said = explain(error, args[-1] if args else None)
            if said is None:
                raise
            raise kind(said) from error
    return guarded


# -- samples that a model cannot take ---------------------------------------


def batch_samples(batch: Any) -> List[Any]:
    """The annotations in a batch, one an image."""
    samples = batch.get('data_samples') if isinstance(batch, dict) else None
    return list(samples) if isinstance(samples, (list, tuple)) else []


def batch_paths(samples: List[Any]) -> str:
    """The files of a batch, in words; empty if it names none."""
    return ', '.join(str(path) for path in (
        getattr(sample, 'img_path', None) for sample in samples) if path)


def batch_fault(error: Exception, batch: Any, model: nn.Module, key: str
                ) -> Optional[str]:
    """What is wrong with a batch that ended in an error; None if nothing is
    seen.

    Args:
        error (Exception): What the model raised.
        batch (Any): As collated.
        model (nn.Module): What took it.
        key (str): Whose batch it is, such as ``'train_dataloader'``.
    """
    if isinstance(batch, dict) and 'inputs' not in batch and \
            isinstance(error, KeyError) and error.args == ('inputs', ):
        return (f'{key}: at the end of the pipeline samples have '
                f'{", ".join(batch) or "nothing"}, and no "inputs". End '
                f'{key}.dataset.pipeline with PackInputs, or with '
                'PackSegInputs in mmseg.')
    said = _wrong_labels(batch, model, key)
    images = batch.get('inputs') if isinstance(batch, dict) else None
    if said or not isinstance(images, (list, tuple)) or not all(
            map(torch.is_tensor, images)):
        return said
    sizes = [tuple(image.shape[-2:]) for image in images]
    samples = batch_samples(batch)
    known = {tuple(shape[:2]) for sample in samples
             if (shape := getattr(sample, 'img_shape', None))}
    if len(set(sizes)) == 1 and min(sizes[0]) >= SMALL or \
            known and not known & set(sizes):  # features in their place
        return None
    names = [str(getattr(sample, 'img_path', '')) for sample
             in samples] + [''] * len(sizes)
    listed = dict.fromkeys(
        f'{name} {size[0]}x{size[1]}' for size, name in sorted(
            zip(sizes, names)))
    first = (str(error) or type(error).__name__).splitlines()[0]
    return (f'{key}: the model cannot take a batch of these images (height x '
            f'width at the end of the pipeline): {", ".join(listed)}. Take '
            'the small ones out, or end the pipeline in one size (Resize, '
            f'RandomCrop, Pad). The model said: {first}')


def _wrong_maps(batch: Any, key: str) -> Optional[str]:
    """Label or depth maps of another size than their images."""
    samples = batch_samples(batch)
    images = batch.get('inputs', ()) if samples else ()
    for sample, image in zip(samples, images):
        sizes = [tuple(size)[:2] for size in (
            getattr(sample, 'ori_shape', ()), getattr(sample, 'img_shape', ()),
            image.shape[-2:] if torch.is_tensor(image) else ()) if size]
        for name, path in (('gt_sem_seg', 'seg_map_path'),
                           ('gt_depth_map', 'depth_map_path')):
            data = getattr(getattr(sample, name, None), 'data', None)
            if torch.is_tensor(data) and sizes and not (
                    data.dim() == 3 and len(data) == 1
                    and tuple(data.shape[1:]) in sizes):
                shape, *known = ('x'.join(map(str, size)) for size in (
                    data.shape, *dict.fromkeys(sizes)))
                return (
                    f'{key}: {getattr(sample, path, "a map")!r} has the shape '
                    f'{shape} at the end of the pipeline, its image '
                    f'{getattr(sample, "img_path", "")!r} '
                    f'{" or ".join(known)}. A map has one channel and the '
                    'height and width of its image' + (
                        ': turn colours into indices of classes.'
                        if data.shape[-1] in (2, 3, 4) else '.'))
    return None


def head_of(model: nn.Module) -> Any:
    """The head of a model, or of a distiller's student, the last of several;
    None if it has none."""
    head = find_part(getattr(model, 'student', model), 'head')
    return head[-1] if isinstance(head, nn.ModuleList) else head


def batch_labels(batch: Any, model: nn.Module) -> Set[int]:
    """The classes in a batch's label maps that the model's head does not
    ignore."""
    ignored = getattr(head_of(model), 'ignore_index', None)
    maps = [getattr(getattr(sample, 'gt_sem_seg', None), 'data', None)
            for sample in batch_samples(batch)]
    return {label for data in maps if torch.is_tensor(data)
            for label in data.unique().tolist()} - {ignored}


def _wrong_labels(batch: Any, model: nn.Module, key: str) -> Optional[str]:
    said = _wrong_maps(batch, key)
    if said:
        return said
    head = head_of(model)
    classes = getattr(head, 'num_classes', None)
    ignored = getattr(head, 'ignore_index', None)
    if not isinstance(classes, int):
        return None
    if getattr(head, 'out_channels', None) == 1:
        classes = max(classes, 2)  # mmseg's binary heads, of one logit
    for sample in batch_samples(batch):
        for name, path in (('gt_sem_seg', 'seg_map_path'),
                           ('gt_label', 'img_path')):
            labels = getattr(sample, name, None)
            labels = getattr(labels, 'data', labels)
            if not torch.is_tensor(labels) or labels.is_floating_point() or \
                    not labels.numel() or labels.max() < classes:
                continue
            wrong = labels[(labels >= classes) & (labels != ignored)]
            if len(wrong):
                found = ', '.join(map(str, wrong.unique().tolist()[:5]))
                return (
                    f'{key}: {getattr(sample, path, "a sample")!r} has the '
                    f'label {found}; the model has the classes 0 to '
                    f'{classes - 1}' + (f', and {ignored} is ignored'
                                        if ignored is not None else '')
                    + '. Mend the labels, or set num_classes, '
                    'reduce_zero_label or label_map.')
    return None


# -- processes ---------------------------------------------------------------


def _limit_waiting(loader: DataLoader) -> None:
    """Let ``timeout`` hold for all of the way of a batch. Torch's own ends
    when the first byte is there, and a stopped worker sends no more."""
    get_iterator, wait = loader._get_iterator, loader.timeout + GRACE
    if not loader.timeout or not hasattr(signal, 'setitimer'):
        return

    def too_late(*_: Any) -> None:
        raise RuntimeError(LATE)

    def limited() -> Iterator:
        iterator = get_iterator()
        cls = type(iterator)

        class OnTime(cls):

            def _next_data(self) -> Any:
                if threading.current_thread() is not threading.main_thread():
                    return cls._next_data(self)
                before = signal.signal(signal.SIGALRM, too_late)
                signal.setitimer(signal.ITIMER_REAL, wait)
                try:
                    return cls._next_data(self)
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
                    signal.signal(signal.SIGALRM, before)

        iterator.__class__ = OnTime
        return iterator

    loader._get_iterator = limited


def _loader_fault(error: Exception, loader: Any, key: str) -> Optional[str]:
    died = re.search(r'DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)(.*)',
                     str(error))
    late = LATE in str(error)
    if not died and not late:
        return None
    workers = multiprocessing.active_children()
    hung = [worker.pid for worker in workers if _is_stopped(worker.pid)]
    _kill(workers)
    if late:
        which = f'process {", ".join(map(str, hung))} is stopped' if hung \
            else f'{len(workers)} processes'
        return (
            f'{key}: no batch came within {loader.timeout} s, the data '
            f'workers hang ({which}). Look for a disk that does not answer, '
            f'a stopped process or a deadlock in the pipeline; {key}.timeout '
            'is how long to wait, 0 for ever. Checkpoints are as they were: '
            'go on with --resume.')
    return (
        f'{key}: a data worker (process {died[1]}) {died[2].strip(" .")}. '
        'Killed means mostly that memory ran out: lower num_workers, '
        'prefetch_factor or batch_size of the loader; a bus error, that '
        '/dev/shm is full. Checkpoints are as they were: go on with '
        '--resume.')


def _is_stopped(pid: int) -> bool:
    with contextlib.suppress(OSError, IndexError):
        with open(f'/proc/{pid}/stat') as file:
            return file.read().rpartition(')')[2].split()[0] in 'Tt'
    return False


def _kill(workers: List[Any]) -> None:
    """End data workers, stopped ones too, for which Python would wait."""
    if threading.current_thread() is threading.main_thread():
        # Torch's handler would raise once more
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in workers:
        worker.kill()
        worker.join(5)


def _gradient_fault(error: Exception) -> Optional[str]:
    """Parameters that no loss reaches, for which processes would wait."""
    return (
        'Some parameters have no part in the losses, and processes wait for '
        "each other's gradients of them (a head without a loss, blocks behind "
        'the last one that is distilled). Freeze them, or set '
        '--cfg-options find_unused_parameters=True.'
    ) if 'find_unused_parameters=True' in str(error) else None


def _process_fault(error: Exception, runner: Any) -> Optional[str]:
    """A process of a distributed run that hangs or has gone."""
    if get_world_size() == 1 or not re.search(
            'gloo|NCCL|Timed out waiting|Connection (closed|reset) by peer',
            str(error)):
        return None
    env = (getattr(runner, 'cfg', None) or {}).get('env_cfg') or {}
    seconds = float((env.get('dist_cfg') or {}).get('timeout') or 1800)
    late = re.search('[Tt]imed? ?out', str(error))
    missing = _absent(min(5., seconds))
    which = 'process ' + ', '.join(map(str, missing)) if missing else \
        'another process'
    return (
        f'Process {get_rank()} of {get_world_size()}, iteration '
        f'{runner.iter + 1}: {which} '
        + (f'hangs or has gone: nothing came within {seconds:g} s '
           '(env_cfg.dist_cfg.timeout)' if late else 'has gone')
        + '. Look at its output and its machine (stopped, out of memory, a '
        'disk or network that does not answer). Checkpoints are as they '
        'were: go on with --resume. Said: ' + str(error).splitlines()[0])


def _folder_fault(error: Exception, runner: Any) -> Optional[str]:
    """A work dir that cannot be written any more."""
    folder = os.path.abspath(runner.work_dir)
    path = os.path.abspath(str(getattr(error, 'filename', None) or os.sep))
    if not isinstance(error, OSError) or \
            os.path.commonpath([folder, path]) != folder:
        return None
    return (
        f'{path!r} cannot be written: {error.strerror}. Was the work dir '
        'moved, or its drive taken away? Bring it back, with its checkpoints, '
        'and go on with --resume.')


def _absent(patience: float) -> List[int]:
    """Processes that do not say within some seconds that they waited too."""
    absent = [0]  # has the store, mostly, which does not answer then

    def ask() -> None:
        with contextlib.suppress(Exception):  # it has gone
            store = distributed.distributed_c10d._get_default_store()
            store.set(WAITED.format(get_rank()), '')
            time.sleep(patience)
            absent[:] = [rank for rank in range(get_world_size())
                         if not store.check([WAITED.format(rank)])]

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(2 * patience)
    return absent
