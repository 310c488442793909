import random
from typing import Any, Dict, Optional

import numpy as np
import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.runner import EpochBasedTrainLoop

from mmsinger.registry import HOOKS


@HOOKS.register_module()
class RandomStateHook(Hook):
    """Makes a resumed run go on as if it had not been interrupted.

    Keeps the states of the random generators in each checkpoint and takes
    them up on resume, so that augmentation and dropout continue where they
    were. Validation does not count: it leaves the states as it found them.

    Exact in one process that loads its own data (``num_workers=0``). Data
    workers start their generators anew on resume, so that with them images
    and order are the same, but not the augmentation. In a distributed run
    all processes take up the states of the first, unless
    ``randomness.diff_rank_seed`` is set.
    """

    priority = 'VERY_HIGH'

    def __init__(self) -> None:
        self._resumed: Optional[Dict[str, Any]] = None
        self._before_val: Optional[Dict[str, Any]] = None

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        checkpoint['random_states'] = self._before_val or random_states()

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        self._resumed = checkpoint.get('random_states')

    def before_train(self, runner) -> None:
        seeds_differ = runner._randomness_cfg.get('diff_rank_seed', False)
        if runner.iter == 0 or (seeds_differ and get_rank() > 0):
            self._resumed = None

    def before_train_epoch(self, runner) -> None:
        if self._resumed is None:
            return
        loop = runner.train_loop
        if isinstance(loop, EpochBasedTrainLoop):
            set_random_states(self._resumed)
            if loop.iter == loop.epoch * len(loop.dataloader):
                self._resumed = None
        elif hasattr(loop, 'fast_forward_on_resume'):
            set_random_states(self._resumed)
        # Else an older mmengine loads the data of all past iterations again,
        # which brings the generators of the augmentation there by itself.

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        if self._resumed is not None:  # starting the data loader drew a seed
            set_torch_states(self._resumed)
            self._resumed = None

    def before_val(self, runner) -> None:
        self._before_val = self._resumed or random_states()

    def after_val(self, runner) -> None:
        set_random_states(self._before_val)
        self._before_val = None


def random_states() -> Dict[str, Any]:
    """The states of all generators, as ``torch.load(weights_only=True)``
    reads them."""
    name, keys, *rest = np.random.get_state()
    states = dict(
        python=random.getstate(),
        numpy=(name, torch.from_numpy(keys.astype(np.int64)), *rest),
        torch=torch.get_rng_state())
    if torch.cuda.is_available():
        states['cuda'] = torch.cuda.get_rng_state()
    return states


def set_random_states(states: Dict[str, Any]) -> None:
    """Put all generators into the states of :func:`random_states`."""
    version, numbers, gauss = states['python']
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = states['numpy']
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), *rest))
    set_torch_states(states)


def set_torch_states(states: Dict[str, Any]) -> None:
    """Put torch's generators alone into the states."""
    torch.set_rng_state(states['torch'].cpu())
    if 'cuda' in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states['cuda'].cpu())
