from typing import Any, Dict, Optional

from mmengine.dist import all_gather_object, get_rank
from mmengine.hooks import Hook
from mmengine.runner import EpochBasedTrainLoop

from mmsinger.engine.random_states import random_states, set_random_states
from mmsinger.engine.samples import sampler_of, seed_samples, start_epoch
from mmsinger.registry import HOOKS


@HOOKS.register_module()
class RandomStateHook(Hook):
    """Makes a resumed run go on as if it had not been interrupted.

    Keeps the states of the random generators of all processes in each
    checkpoint and takes them up on resume, so that dropout continues where it
    was; validation leaves them as it found them. What is random about a
    training sample has a seed of its own (see
    :func:`~mmsinger.engine.samples.seed_samples`), whichever process reads
    it.

    A run resumed on more processes takes up the states of the first in those
    that are new, unless ``randomness.diff_rank_seed`` is set. Transforms that
    keep a random generator of their own, or samples from one call to the
    next, are not covered.
    """

    priority = 'VERY_HIGH'

    def __init__(self) -> None:
        self._saved: Any = None
        self._resumed: Optional[Dict[str, Any]] = None
        self._before_val: Optional[Dict[str, Any]] = None
        self._seed: Optional[int] = None

    def before_gather(self, runner) -> None:
        """Called in all processes when a checkpoint is due."""
        self._saved = all_gather_object(self._before_val or random_states())

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        checkpoint['random_states'] = self._saved or [
            self._before_val or random_states()]
        checkpoint['sampler_seed'] = self._seed
        self._saved = None

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        states = checkpoint.get('random_states', [])
        states = [states] if isinstance(states, dict) else states
        if get_rank() < len(states):
            self._resumed = states[get_rank()]
        elif states and not runner._randomness_cfg.get('diff_rank_seed'):
            self._resumed = states[0]
        self._seed = checkpoint.get('sampler_seed')

    def before_train(self, runner) -> None:
        loader = runner.train_dataloader
        sampler = sampler_of(loader)
        if runner.iter == 0:  # only its weights were loaded
            self._resumed = self._seed = None
        if self._seed is None:
            self._seed = getattr(sampler, 'seed', runner.seed)
        elif hasattr(sampler, 'seed'):
            sampler.seed = self._seed
        seed_samples(loader, self._seed)
        iterator = getattr(runner.train_loop, 'dataloader_iterator', None)
        if getattr(iterator, '_iterator', None) is not None:
            # mmengine 0.10.7 has begun to read
            loader._iterator = None
            if hasattr(sampler, '_indices_of_rank'):
                sampler.indices = sampler._indices_of_rank()
            runner.train_loop.dataloader_iterator = type(iterator)(loader)

    def before_train_epoch(self, runner) -> None:
        loop = runner.train_loop
        if isinstance(loop, EpochBasedTrainLoop):
            done = loop.iter - loop.epoch * len(loop.dataloader)
            start_epoch(loop.dataloader, loop.epoch, done)

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        if self._resumed is not None:
            set_random_states(self._resumed)
            self._resumed = None

    def before_val(self, runner) -> None:
        self._before_val = self._resumed or random_states()

    def after_val(self, runner) -> None:
        set_random_states(self._before_val)
        self._before_val = None
