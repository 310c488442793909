import itertools
from typing import List, Set

import torch
from mmengine.dataset import InfiniteSampler
from mmengine.hooks import CheckpointHook, EarlyStoppingHook, Hook

from mmsinger.engine.faults import (batch_labels, batch_paths, batch_samples,
                                    guard_loops, head_of)
from mmsinger.engine.samples import sampler_of
from mmsinger.engine.unwrap import unwrap
from mmsinger.errors import ConfigError, TrainingError, check_choice
from mmsinger.registry import HOOKS

BATCHES = 50  # in which more than one class is expected


@HOOKS.register_module()
class RunGuardHook(Hook):
    """Stops a run that cannot succeed, before it costs a checkpoint.

    - No training images: an error before the first step.
    - A loss that is not finite: an error that names the losses and the files
      of the batch. It comes before CheckpointHook has its turn, so that the
      last checkpoint stays as it was.
    - Weights that are not finite when a checkpoint is due: the same.
    - ``save_best``, or a stop, by a metric that a validation does not give:
      an error.
    - No more than one class in the labels of the first batches: a warning.
    - A sample that cannot be read, labels out of range, a data worker or
      another process that died or hangs: one error that names it (see
      :mod:`mmsinger.engine.faults`). In validation and tests too.
    """

    priority = 'VERY_HIGH'  # before CheckpointHook

    def before_run(self, runner) -> None:
        guard_loops(runner)

    def before_train(self, runner) -> None:
        dataset = runner.train_dataloader.dataset
        if len(dataset) == 0:
            raise ConfigError(
                f'train_dataloader.dataset: the {type(dataset).__name__} '
                'found no images. Check data_root, data_prefix, ann_file and '
                'the file suffixes.')
        if len(runner.train_dataloader) == 0 and not isinstance(
                sampler_of(runner.train_dataloader), InfiniteSampler):
            raise ConfigError(
                f'train_dataloader: {len(dataset)} images make no batch. '
                'Lower batch_size, or set drop_last=False.')
        classes = (getattr(dataset, 'metainfo', None) or {}).get('classes')
        outputs = getattr(head_of(unwrap(runner.model)), 'num_classes', None)
        if classes and isinstance(outputs, int) and outputs > len(classes):
            runner.logger.warning(
                f'The head has num_classes={outputs}, and the training data '
                f'have {len(classes)} classes: the others are in no label '
                'and in no score.')
        self._first = runner.iter
        self._labels: Set[int] = set()
        self._savers = [
            hook for hook in runner.hooks
            if isinstance(hook, CheckpointHook) and not hook.by_epoch]

    def after_train_iter(self, runner, batch_idx, data_batch=None,
                         outputs=None) -> None:
        finite = {name: torch.isfinite(value).all()
                  for name, value in (outputs or {}).items()
                  if torch.is_tensor(value)}
        # A GPU is waited for once, not for each loss
        if finite and not torch.stack(list(finite.values())).all():
            bad = [name for name, is_finite in finite.items()
                   if not is_finite]
            paths = batch_paths(batch_samples(data_batch))
            raise TrainingError(
                f'Iteration {runner.iter + 1}: {", ".join(bad)} is not '
                'finite, so training was stopped. '
                f'The batch held {paths or "files that it does not name"}. '
                f'{self._advice(runner, data_batch)} '
                f'{_last_checkpoint(runner)}')
        self._look_at_labels(runner, data_batch)
        if any(self.every_n_train_iters(runner, hook.interval,
                                        hook.save_begin)
               or (hook.save_last and self.is_last_train_iter(runner))
               for hook in self._savers):
            self.check_weights(runner, runner.iter + 1)

    def _look_at_labels(self, runner, data_batch) -> None:
        done = runner.iter + 1 - self._first
        if len(self._labels) > 1 or done > BATCHES:
            return
        self._labels |= batch_labels(data_batch, unwrap(runner.model))
        if len(self._labels) == 1 and (
                done == BATCHES or self.is_last_train_iter(runner)):
            runner.logger.warning(
                f'The labels of the first {done} batches are all '
                f'{min(self._labels)}, or ignored. A map of two classes holds '
                '0 and 1, not 0 and 255.')

    def _advice(self, runner, data_batch) -> str:
        """What may be at fault, for a loss that is not finite."""
        images = data_batch.get('inputs', ()) \
            if isinstance(data_batch, dict) else ()
        images = [images] if torch.is_tensor(images) else images
        if any(torch.is_tensor(image) and image.is_floating_point()
               and not torch.isfinite(image).all() for image in images):
            return ('There are NaN or infinite values in its images, as the '
                    'pipeline gives them (train_dataloader.dataset): look '
                    'for the files, or the transform, that they come from.')
        if runner.iter == self._first:
            return ('This is the first step, so that no learning rate is at '
                    'fault: look at the labels, at the weights that the '
                    'student begins with (load_from, init_cfg, pretrained) '
                    'and those of the teacher, and at mean and std of the '
                    'data preprocessor; with float16, try bfloat16.')
        return ('Lower the learning rate or clip gradients '
                '(optim_wrapper.clip_grad); with float16, try bfloat16.')

    def after_train_epoch(self, runner) -> None:
        self.check_weights(runner, runner.iter)

    def after_val_epoch(self, runner, metrics=None) -> None:
        if not hasattr(self, '_savers'):
            return  # no part of a training run
        self.check_weights(runner, runner.iter)
        for hook in self._savers:
            for name in getattr(hook, 'key_indicators', None) or ():
                if name != 'auto' and metrics:
                    check_choice('default_hooks.checkpoint.save_best', name,
                                 metrics)
        for hook in runner.hooks:
            if isinstance(hook, EarlyStoppingHook) and metrics:
                check_choice('custom_hooks (EarlyStoppingHook).monitor',
                             hook.monitor, metrics)

    def check_weights(self, runner, iteration: int) -> None:
        """Raise :class:`TrainingError` unless all weights are finite."""
        model = unwrap(runner.model)
        bad: List[str] = [
            name for name, value in itertools.chain(
                model.named_parameters(), model.named_buffers())
            if value.is_floating_point() and not torch.isfinite(value).all()]
        if bad:
            raise TrainingError(
                f'Iteration {iteration}: the weights {bad[:3]} '
                f'({len(bad)} in all) are not finite, so training was '
                'stopped before they were saved. Lower the learning rate or '
                'clip gradients (optim_wrapper.clip_grad). '
                f'{_last_checkpoint(runner)}')


def _last_checkpoint(runner) -> str:
    info = runner.message_hub.runtime_info
    if 'last_ckpt' in info:
        return f"The last good checkpoint is {info['last_ckpt']}."
    return 'No checkpoint had been saved yet.'
