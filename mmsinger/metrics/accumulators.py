"""Statistics of a stream in constant memory."""
from typing import Dict, Optional

import torch
from torch import Tensor


class Moments:
    """Mean and standard deviation of all values so far, on their device."""

    def __init__(self) -> None:
        self.count = 0
        self._total = 0.
        self._squares = 0.

    def add(self, values: Tensor) -> None:
        """Take in values of any shape."""
        values = values.detach().double()
        self.count += values.numel()
        self._total = self._total + values.sum()
        self._squares = self._squares + values.square().sum()

    def summary(self) -> Dict[str, float]:
        """``mean`` and ``std`` (of the population: 0 for one value)."""
        mean = float(self._total) / self.count
        variance = float(self._squares) / self.count - mean**2
        return dict(mean=mean, std=max(0., variance)**0.5)


class Sample:
    """A uniform random sample of the rows of a stream.

    Holds all rows while there are no more than ``size``, and every row with
    the same probability after that: each gets a random number, and the
    largest stay.

    Args:
        size (int): The most rows to hold. Defaults to 65536.
        seed (int): Seeds the random numbers. Defaults to 0.
    """

    def __init__(self, size: int = 65536, seed: int = 0) -> None:
        self.size = size
        self.seed = seed
        self._generator: Optional[torch.Generator] = None
        self._keys: Optional[Tensor] = None
        #: The sample, shape (at most size, k); None before the first row
        self.rows: Optional[Tensor] = None

    def add(self, rows: Tensor) -> None:
        """Take in rows, shape (n, k), of the same k and device each time."""
        rows = rows.detach()
        if self._generator is None:
            self._generator = torch.Generator(rows.device)
            self._generator.manual_seed(self.seed)
        keys = torch.rand(len(rows), generator=self._generator,
                          device=rows.device, dtype=torch.float64)
        if self.rows is not None:
            keys = torch.cat([self._keys, keys])
            rows = torch.cat([self.rows, rows])
        if len(keys) > self.size:
            keys, chosen = keys.topk(self.size)
            rows = rows[chosen]
        self._keys, self.rows = keys, rows
