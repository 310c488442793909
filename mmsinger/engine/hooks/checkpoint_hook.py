import contextlib
import functools
import os
import signal
import sys
import threading
import time
from typing import Any, Callable, List, Optional

import torch
from mmengine.dist import (all_reduce, barrier, broadcast_object_list,
                           is_distributed, is_main_process, master_only)
from mmengine.hooks import CheckpointHook, EMAHook, Hook
from mmengine.runner import BaseLoop, EpochBasedTrainLoop

from mmsinger.checkpoint import safe_loading
from mmsinger.engine.hooks.random_state_hook import RandomStateHook
from mmsinger.engine.hooks.run_guard_hook import RunGuardHook
from mmsinger.engine.resume import is_intact, optimizer_names, take_up
from mmsinger.errors import TrainingError
from mmsinger.files import (atomic_write, lock_folder, remove_leftovers,
                            unlock_folder, write_text)
from mmsinger.registry import HOOKS

SUPERSEDED = 'superseded_ckpts'
VALIDATED = 'last_validation'
STOPS = (signal.SIGTERM, signal.SIGHUP) if hasattr(signal, 'SIGHUP') \
    else (signal.SIGTERM, )
SAME_SIGNAL = 10  # seconds; Slurm and torchrun send SIGTERM both


@HOOKS.register_module()
class SafeCheckpointHook(Hook):
    """Lets no end of a run cost more than the work since its last checkpoint.

    It stands beside mmengine's ``CheckpointHook``, a stock config's own too:

    - A checkpoint is written under another name, synced and renamed; only
      then is removed what it replaces. There has to be room for one more
      than ``max_keep_ckpts``. What a kill left behind goes at the next start.
    - A checkpoint to go on from is checked against the model, and learning
      rates and schedule that the config has changed are taken from it (see
      :mod:`mmsinger.engine.resume`).
    - A validation that a kill cut off is made up for on resume.
    - SIGTERM, which Slurm sends before it takes the machine away, and SIGHUP
      of a terminal that is closed, lead to a checkpoint after the current
      iteration, and to exit status 143 or 129; to any of several processes,
      in all of them. After Ctrl-C the log says what is left.
    - A second run in the same work dir is refused.
    - No file that the run loads can run code (see
      :func:`mmsinger.checkpoint.safe_loading`).

    It works with :class:`RunGuardHook` and :class:`RandomStateHook`, which it
    adds where a config does not list them.

    Other hooks may have ``before_gather(runner)``, which is called in all
    processes when a checkpoint is due, and ``after_save_checkpoint(runner,
    path)`` and ``after_remove_checkpoint(runner, path)``, which are called in
    the main process.
    """

    priority = 'LOWEST'  # after CheckpointHook

    def __init__(self) -> None:
        self._exit = contextlib.ExitStack()
        self._training = self._iterating = False
        self._terminated: Optional[float] = None  # when; in this process
        self._signal = signal.SIGTERM
        self._process = os.getpid()
        self._stopping = False  # in all of them
        # To be removed once the next checkpoint is there, and now
        self._superseded: List[str] = []
        self._removable: List[str] = []

    # -- set up and down ---------------------------------------------------

    def before_run(self, runner) -> None:
        self._closing(self._set_up, runner)(runner)

    def _set_up(self, runner) -> None:
        self._exit.enter_context(safe_loading())
        missing = [kind() for kind in (RunGuardHook, RandomStateHook) if not
                   any(isinstance(hook, kind) for hook in runner.hooks)]
        # Another list: the one that is gone through now stays as it is
        runner._hooks = [*missing, *runner.hooks]
        for hook in missing:
            hook.before_run(runner)
        # A run that fails leaves the process as it was, too
        loops = [loop for loop in (runner._train_loop, runner._val_loop,
                                   runner._test_loop)
                 if isinstance(loop, BaseLoop)]
        for owner, name in (*((loop, 'run') for loop in loops),
                            (runner, '_init_model_weights'),
                            (runner, 'load_or_resume')):
            if hasattr(owner, name):  # a FlexibleRunner has not all
                setattr(owner, name,
                        self._closing(getattr(owner, name), runner))
        if not isinstance(runner._train_loop, BaseLoop):
            return  # validation or a test alone
        self._training = True
        self._claim(runner.work_dir)
        # Shadows the method; DeepSpeed and others write folders on their own
        if type(getattr(runner, 'strategy', None)).__name__ not in (
                'DeepSpeedStrategy', 'ColossalAIStrategy'):
            runner.save_checkpoint = functools.partial(
                self._save, runner, runner.save_checkpoint)
            self._exit.callback(runner.__dict__.pop, 'save_checkpoint', None)
        if threading.current_thread() is threading.main_thread():
            for number in STOPS:
                if signal.getsignal(number) != signal.SIG_IGN:  # by nohup
                    self._exit.callback(signal.signal, number, signal.signal(
                        number, self._on_signal))

    def before_train(self, runner) -> None:
        own = os.path.realpath(runner.work_dir)
        for folder in {hook.out_dir for hook in _savers(runner)}:
            if '://' not in folder and os.path.realpath(folder) != own:
                self._claim(folder)
        self._clean(runner)
        resumed = runner.message_hub.runtime_info.get('last_ckpt') \
            if runner._resume else None
        for hook in _savers(runner):
            if '://' not in hook.out_dir:
                hook.file_backend = _LateRemoval(
                    hook.file_backend,
                    functools.partial(self._supersede, runner))
            if resumed:  # a better validation than ever writes it again
                hook.last_ckpt = os.path.join(
                    hook.out_dir, os.path.basename(resumed))
                _forget_other_metric(runner, hook)
                _own_best(hook)
        if _done_of_epoch(runner):
            # Of SIGTERM within an epoch: not among those that are counted
            self._superseded += [hook.last_ckpt for hook in _savers(runner)
                                 if hook.by_epoch]
        self._validate_late(runner)
        self._iterating = True

    def _claim(self, folder: str) -> None:
        if is_main_process():
            os.makedirs(folder, exist_ok=True)
            lock_folder(folder)
            self._exit.callback(unlock_folder, folder)

    def after_run(self, runner) -> None:
        self._close()

    def _close(self) -> None:
        self._training = self._iterating = False
        self._exit.close()

    def _closing(self, call: Callable, runner: Any) -> Callable:
        def closing(*args: Any, **kwargs: Any) -> Any:
            try:
                return call(*args, **kwargs)
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt) and self._iterating:
                    runner.logger.warning(
                        f'Interrupted in iteration {runner.iter + 1}. '
                        f'{_what_is_left(runner)}')
                self._close()
                raise
        return closing

    # -- writing -----------------------------------------------------------

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        names = optimizer_names(runner)
        if 'optimizer' in checkpoint and names:
            checkpoint['optimizer_names'] = names
        if isinstance(runner.train_loop, EpochBasedTrainLoop):
            checkpoint['epoch_length'] = len(runner.train_dataloader)

    def _save(self, runner, save: Callable, out_dir: str, filename: str,
              *args: Any, **kwargs: Any) -> None:
        """In place of ``runner.save_checkpoint``."""
        runner.call_hook('before_gather')
        if not is_main_process() or '://' in out_dir:
            save(out_dir, filename, *args, **kwargs)
            return
        path = os.path.join(out_dir, filename)
        try:
            os.makedirs(out_dir, exist_ok=True)
            with atomic_write(path) as temporary:
                save(*os.path.split(temporary), *args, **kwargs)
            runner.call_hook('after_save_checkpoint', path=path)
        except OSError as error:
            raise TrainingError(
                f'{error.filename or path} cannot be written: '
                f'{error.strerror or error}. Earlier checkpoints are as they '
                'were. Make room, then go on with --resume.') from error
        self._removable += [old for old in self._superseded if old != path]
        self._superseded.clear()

    def _supersede(self, runner, path: str) -> None:
        """In place of the removal; the next checkpoint carries the names, in
        case that the process does not live to remove the files."""
        self._superseded.append(str(path))
        runner.message_hub.update_info(SUPERSEDED, [
            os.path.basename(old) for old in self._superseded])

    def _remove(self, runner) -> None:
        if not self._removable:
            return
        while self._removable:
            path = self._removable.pop()
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            runner.call_hook('after_remove_checkpoint', path=path)
        runner.message_hub.update_info(SUPERSEDED, [])

    def after_train_iter(self, runner, *args, **kwargs) -> None:
        self._remove(runner)
        loop = runner.train_loop
        # The last of an epoch is left to after_train_epoch
        if self._agree() and (
                not isinstance(loop, EpochBasedTrainLoop)
                or _done_of_epoch(runner, runner.iter + 1)):
            self._stop(runner, runner.epoch, runner.iter + 1)

    def after_train_epoch(self, runner) -> None:
        self._remove(runner)
        if self._agree():
            self._stop(runner, runner.epoch + 1, runner.iter)

    def after_val_epoch(self, runner, metrics=None) -> None:
        if not self._training:
            return
        self._remove(runner)
        if is_main_process():
            write_text(str(runner.iter),
                       os.path.join(runner.work_dir, VALIDATED))

    # -- the next start ----------------------------------------------------

    @master_only
    def _clean(self, runner) -> None:
        """Finish what a kill interrupted."""
        info = runner.message_hub.runtime_info
        for folder in {hook.out_dir for hook in _savers(runner)}:
            if not os.path.isdir(folder):
                continue
            left = remove_leftovers(folder)
            if left:
                runner.logger.info('Half-written files of an earlier run '
                                   f'removed: {", ".join(left)}')
            source = str(runner._load_from or '')
            if runner._resume and os.path.dirname(
                    os.path.abspath(source)) == os.path.abspath(folder):
                self._removable += [
                    os.path.join(folder, name)
                    for name in info.get(SUPERSEDED, ())
                    if name != os.path.basename(source)]
        self._remove(runner)
        for key in [key for key in info if key.startswith('best_ckpt')]:
            path = info[key]
            if not path or not os.path.isfile(path) or is_intact(path):
                continue
            runner.logger.warning(
                f'{path!r} was cut off or damaged: the next validation writes '
                'the best checkpoint anew.')
            _forget_best(runner, key)

    def _validate_late(self, runner) -> None:
        """Validate the resumed weights if the run was due to and did not."""
        loop, val_loop = runner.train_loop, runner.val_loop
        by_epoch = isinstance(loop, EpochBasedTrainLoop)
        now, last = (loop.epoch, loop.max_epochs) if by_epoch else \
            (loop.iter, loop.max_iters)
        if now >= last:
            runner.logger.info(
                f'Nothing is left to train: the checkpoint is of '
                f'{"epoch" if by_epoch else "iteration"} {now}, and train_cfg '
                f'ends at {last}.')
        if val_loop is None or _done_of_epoch(runner) or \
                now < max(loop.val_begin, 1) or \
                (now % loop.val_interval and now != last):
            return
        missing = [True]
        if is_main_process() and now != last:
            with contextlib.suppress(OSError, ValueError):
                with open(os.path.join(runner.work_dir, VALIDATED)) as file:
                    missing = [int(file.read()) != runner.iter]
        broadcast_object_list(missing)
        if missing[0]:
            runner.logger.info('Validation of the resumed weights' + (
                '' if now == last else ', which was not recorded'))
            val_loop.run()

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        if isinstance(runner._train_loop, BaseLoop):
            take_up(runner, checkpoint)

    # -- signals -----------------------------------------------------------

    def _on_signal(self, number: int, _: Any) -> None:
        if os.getpid() != self._process:
            return  # a data worker's, which ends with its training
        now = time.monotonic()
        self._signal = signal.Signals(number)
        if self._iterating and now - (self._terminated or now) < SAME_SIGNAL:
            self._terminated = self._terminated or now
            return
        print(f'\n{self._signal.name}' + (
            ', again: ended at once.' if self._iterating
            else ': ended before the first step.'), file=sys.stderr)
        sys.exit(128 + number)

    def _agree(self) -> bool:
        """Whether to stop. All processes get the same answer, at the same
        iteration."""
        self._stopping = self._stopping or self._terminated is not None
        if is_distributed():
            flag = torch.tensor(int(self._stopping))
            all_reduce(flag, 'max')
            self._stopping = bool(flag)
        return self._stopping

    def before_val_epoch(self, runner) -> None:
        # Iterations that all processes have
        self._shared = torch.tensor(len(runner.val_loop.dataloader))
        all_reduce(self._shared, 'min')

    def after_val_iter(self, runner, batch_idx, *args, **kwargs) -> None:
        if self._training and batch_idx < self._shared and self._agree():
            for hook in runner.hooks:
                if isinstance(hook, EMAHook):  # takes its weights back
                    hook.after_val_epoch(runner)
            self._stop(runner, runner.epoch, runner.iter)

    def _stop(self, runner, epoch: int, done: int) -> None:
        """Write a checkpoint of the iterations that are done, and end."""
        by_epochs = isinstance(runner.train_loop, EpochBasedTrainLoop)
        for hook in runner.hooks:
            if isinstance(hook, RunGuardHook):
                hook.check_weights(runner, done)
        for hook in _savers(runner)[:1]:
            meta = dict(epoch=epoch, iter=done)
            step = epoch if hook.by_epoch else done
            name = os.path.basename(str(hook.last_ckpt))
            if hook.by_epoch and (
                    not by_epochs or _done_of_epoch(runner, done)):
                self._save_within_epoch(runner, hook, meta)
            elif name != hook.filename_tmpl.format(step):
                hook._save_checkpoint_with_step(runner, step, meta)
            self._remove(runner)
        runner.logger.warning(f'{self._signal.name} after iteration {done}: '
                              f'ended. {_what_is_left(runner)}')
        barrier()  # torchrun ends the others when the first one ends
        sys.exit(128 + self._signal)

    def _save_within_epoch(self, runner, hook: CheckpointHook, meta: dict
                           ) -> None:
        name = f"iter_{meta['iter']}.pth"
        path = os.path.join(hook.out_dir, name)
        runner.message_hub.update_info('last_ckpt', path)
        runner.save_checkpoint(hook.out_dir, name, meta=meta, by_epoch=False)
        if is_main_process():
            write_text(path, os.path.join(runner.work_dir, 'last_checkpoint'))


def _what_is_left(runner) -> str:
    saved = runner.message_hub.runtime_info.get('last_ckpt')
    return f'--resume goes on from {saved}.' \
        if saved and os.path.exists(saved) else \
        'No checkpoint had been written.'


class _LateRemoval:
    """A file backend whose removals are passed on instead of carried out."""

    def __init__(self, backend: Any, remove: Callable[[str], None]) -> None:
        self._backend, self._remove_later = backend, remove

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def remove(self, path: str) -> None:
        self._remove_later(path)


def _forget_best(runner, key: str = 'best_ckpt') -> None:
    """Let the next validation write the best checkpoint anew, whatever its
    score."""
    info = runner.message_hub.runtime_info
    del info[key]
    info.pop(key.replace('best_ckpt', 'best_score'), None)
    for hook in _savers(runner):
        if key == 'best_ckpt':
            hook.best_ckpt_path = None
        else:
            hook.best_ckpt_path_dict[key[len('best_ckpt_'):]] = None


def _forget_other_metric(runner, hook: CheckpointHook) -> None:
    """Let no score be compared with one of another metric: mmengine stores
    the best without its metric's name."""
    name = os.path.basename(
        runner.message_hub.runtime_info.get('best_ckpt') or '')
    if name and hook.save_best not in (None, ['auto']) and not name.startswith(
            f'best_{hook.save_best[0]}_'.replace('/', '_')):
        _forget_best(runner)


def _own_best(hook: CheckpointHook) -> None:
    """Let a hook know the best checkpoints of its own folder alone: the run
    that is resumed may lie, and be kept, elsewhere. It would remove them."""
    def here(path: Optional[str]) -> Optional[str]:
        if path is None or '://' in path:
            return path
        own = os.path.join(hook.out_dir, os.path.basename(path))
        return own if os.path.exists(own) else None

    if hasattr(hook, 'best_ckpt_path'):
        hook.best_ckpt_path = here(hook.best_ckpt_path)
    for name, path in getattr(hook, 'best_ckpt_path_dict', {}).items():
        hook.best_ckpt_path_dict[name] = here(path)


def _savers(runner) -> List[CheckpointHook]:
    return [hook for hook in runner.hooks if isinstance(hook, CheckpointHook)]


def _done_of_epoch(runner, done: int = 0) -> int:
    """Iterations of the current epoch that are done; 0 between epochs and
    where epochs do not count."""
    loop = runner.train_loop
    if not isinstance(loop, EpochBasedTrainLoop):
        return 0
    return ((done or loop.iter) - loop.epoch * len(loop.dataloader)) % \
        len(loop.dataloader)
