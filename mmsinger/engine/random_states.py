"""The random generators of a process: kept, put back, seeded for a while."""
import contextlib
import random
from typing import Any, Dict, Iterator

import numpy as np
import torch


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
    torch.set_rng_state(states['torch'].cpu())
    if 'cuda' in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states['cuda'].cpu())


@contextlib.contextmanager
def preserved_random_states(seed: int) -> Iterator[None]:
    """Seed all generators inside the context, and restore them after it."""
    states = random_states()
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        set_random_states(states)
