import os
import re
from typing import Dict, List, Optional, Set, Tuple

from mmengine.dist import is_main_process, master_only
from mmengine.hooks import Hook

from mmsinger.errors import ConfigError
from mmsinger.export import (SUFFIX, export_student, is_distiller,
                             save_student, student_config, student_path,
                             student_state_dict)
from mmsinger.registry import HOOKS


@HOOKS.register_module()
class StudentCheckpointHook(Hook):
    """Writes the student alone beside every checkpoint, the best one too.

    ``epoch_10.pth`` gets a sibling ``epoch_10_student.pth`` in the plain
    model's key layout, with the weights that the checkpoint holds (of the EMA
    model, if there is one). When CheckpointHook removes a checkpoint to make
    room (``max_keep_ckpts``, a better one), its sibling goes too; one whose
    checkpoint was removed by hand stays. The plain model's config goes to
    ``NAME_student.py`` in the work dir.
    """

    priority = 'LOWEST'  # after CheckpointHook, and after EMAHook's swap

    def __init__(self) -> None:
        self._pending: Optional[Tuple[dict, dict]] = None
        self._seen: Set[Tuple[str, int]] = set()
        self._written: Dict[str, str] = {}

    @master_only
    def before_train(self, runner) -> None:
        if not is_distiller(runner.cfg.model):
            return
        existing = self._checkpoints(runner)
        for path in existing:
            if not os.path.isfile(student_path(path)):  # it was cut off there
                try:
                    export_student(path)
                except ConfigError as error:  # no reason not to train
                    runner.logger.warning(str(error))
        self._seen = set(map(_version, existing))
        for folder in {os.path.dirname(path) for path in existing}:
            for name in os.listdir(folder):  # of the run that is resumed
                path = os.path.join(folder, name)
                if os.path.isfile(student_path(path)):
                    self._written[path] = student_path(path)
        name = os.path.basename(runner.cfg.filename or 'config.py')
        stem = os.path.splitext(name)[0]
        path = os.path.join(runner.work_dir, f'{stem}{SUFFIX}.py')
        student_config(runner.cfg).dump(path)

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        if is_main_process():
            weights = student_state_dict(checkpoint['state_dict'])
            if weights:  # none in a plain model's own training
                self._pending = weights, checkpoint.get('meta', {})

    def after_train_iter(self, runner, *args, **kwargs) -> None:
        self._write(runner)

    def after_train_epoch(self, runner) -> None:
        self._write(runner)

    def after_val_epoch(self, runner, metrics=None) -> None:
        self._write(runner)

    def _write(self, runner) -> None:
        if self._pending is None:
            return
        weights, meta = self._pending
        self._pending = None
        for path in self._checkpoints(runner):
            if _version(path) not in self._seen:
                self._seen.add(_version(path))
                self._written[path] = student_path(path)
                save_student(weights, meta, self._written[path])
        for path, student in list(self._written.items()):
            if not os.path.exists(path):
                del self._written[path]
                if _made_room(path, runner) and os.path.exists(student):
                    os.remove(student)

    @staticmethod
    def _checkpoints(runner) -> List[str]:
        """The checkpoints that CheckpointHook knows of and that exist."""
        info = runner.message_hub.runtime_info
        paths = [value for key, value in info.items()
                 if key == 'last_ckpt' or key.startswith('best_ckpt')]
        return [p for p in paths if isinstance(p, str) and os.path.isfile(p)]


def _made_room(path: str, runner) -> bool:
    """Whether CheckpointHook has given up a checkpoint that is gone."""
    info = runner.message_hub.runtime_info
    name = os.path.basename(path)
    if name.startswith('best_'):
        return path not in [value for key, value in info.items()
                            if key.startswith('best_ckpt')]
    step = re.search(r'(\d+)\.pth$', name)
    return step is not None and 'keep_ckpt_ids' in info and \
        int(step[1]) not in info['keep_ckpt_ids']


def _version(path: str) -> Tuple[str, int]:
    return path, os.stat(path).st_mtime_ns
