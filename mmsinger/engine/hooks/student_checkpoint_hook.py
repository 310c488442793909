import contextlib
import os
from typing import Optional, Tuple

from mmengine.dist import is_main_process, master_only
from mmengine.hooks import Hook

from mmsinger.checkpoint import student_state_dict
from mmsinger.engine.hooks.checkpoint_hook import SafeCheckpointHook
from mmsinger.errors import ConfigError
from mmsinger.export import (SUFFIX, export_student, save_student,
                             student_config, student_path)
from mmsinger.files import write_text
from mmsinger.models.distillers import is_distiller
from mmsinger.registry import HOOKS


@HOOKS.register_module()
class StudentCheckpointHook(Hook):
    """Writes the student alone beside every checkpoint, the best one too.

    ``epoch_10.pth`` gets a sibling ``epoch_10_student.pth`` in the plain
    model's key layout, with the weights that the checkpoint holds (of the EMA
    model, if there is one). When a checkpoint is removed to make room
    (``max_keep_ckpts``, a better one), its sibling goes too; one whose
    checkpoint was removed by hand stays. The plain model's config goes to
    ``NAME_student.py`` in the work dir.

    It works with :class:`SafeCheckpointHook`, which it adds where a config
    does not list it.
    """

    priority = 'LOWEST'  # after EMAHook's swap

    def __init__(self) -> None:
        self._pending: Optional[Tuple[dict, dict]] = None

    def before_run(self, runner) -> None:
        if not any(isinstance(hook, SafeCheckpointHook)
                   for hook in runner.hooks):
            runner.register_hook(SafeCheckpointHook())

    @master_only
    def before_train(self, runner) -> None:
        if not is_distiller(runner.cfg.model):
            return
        for key, path in runner.message_hub.runtime_info.items():
            if not key.startswith(('last_ckpt', 'best_ckpt')) or \
                    not path or not os.path.isfile(path):
                continue
            if not os.path.isfile(student_path(path)):  # it was cut off there
                try:
                    export_student(path)
                except ConfigError as error:  # no reason not to train
                    runner.logger.warning(str(error))
        name = os.path.basename(runner.cfg.filename or 'config.py')
        stem = os.path.splitext(name)[0]
        path = os.path.join(runner.work_dir, f'{stem}{SUFFIX}.py')
        plain = student_config(runner.cfg)
        # Its own runs do not write over these checkpoints
        folder = runner.cfg.get('work_dir') or runner.work_dir
        plain.work_dir = f'{folder.rstrip(os.sep)}{SUFFIX}'
        write_text(plain.pretty_text, path)

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        if is_main_process():
            weights = student_state_dict(checkpoint['state_dict'])
            if weights:  # none in a plain model's own training
                self._pending = weights, checkpoint.get('meta', {})

    def after_save_checkpoint(self, runner, path: str) -> None:
        """The checkpoint is complete, and what it replaces still there."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            save_student(*pending, student_path(path))

    def after_remove_checkpoint(self, runner, path: str) -> None:
        """The checkpoint was removed to make room."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(student_path(path))
