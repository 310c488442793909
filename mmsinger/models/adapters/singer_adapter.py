"""The low-rank adapter that refines a teacher's patch tokens."""
import math
from typing import Dict, Literal

import torch
from torch import Tensor, nn

from mmsinger.metrics.subspaces import random_rows
from mmsinger.models.adapters.nullspace import (Selection, SingularDirections,
                                                check_rank, left_nullspace)
from mmsinger.schema import check_value

Init = Literal['nullspace', 'random', 'zero']


class SiNGERAdapter(nn.Module):
    """``F_hat = F + gain * (F down) up`` on patch tokens (section 3.2).

    As built, the adapter does nothing (``up`` is zero); :meth:`initialise`
    gives it its starting point once the teacher's weights are known. Its
    state dict is its two matrices. They stay in float32 and take part in
    autocast like any linear layer.

    Args:
        dim (int): Channels D of the teacher.
        rank (int): Directions that the adapter can change. More than the
            dimension of the artifacts' subspace costs little; fewer cannot
            suppress them. Defaults to 16.
        gain (float): Factor of the update. As initialised in the nullspace
            with gain 1 the adapter doubles that component, the paper's sign;
            -1 removes it. Defaults to 1.
        train_up (bool): False leaves the up-projection as it was initialised:
            refinement stays in the nullspace. Defaults to True.

    Raises:
        ConfigError: If the rank is not in [1, D].
    """

    def __init__(self, dim: int, rank: int = 16, gain: float = 1.0,
                 train_up: bool = True) -> None:
        super().__init__()
        check_rank(rank, dim)
        self.gain = gain
        self.down = nn.Parameter(torch.empty(dim, rank))
        self.up = nn.Parameter(torch.zeros(rank, dim), train_up)
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    @property
    def rank(self) -> int:
        return self.down.shape[1]

    def forward(self, patches: Tensor) -> Tensor:
        """Refine patch tokens.

        Args:
            patches (Tensor): F, shape (B, P, D), without CLS or registers.

        Returns:
            Tensor: F_hat, shape (B, P, D).
        """
        return patches + self.gain * ((patches @ self.down) @ self.up)

    @torch.no_grad()
    def initialise(self,
                   singular: SingularDirections,
                   init: Init = 'nullspace',
                   selection: Selection = 'smallest',
                   threshold: float = 0.05,
                   seed: int = 0) -> Dict[str, object]:
        """Set both matrices (section 3.2; Table 4 compares the first two).

        Args:
            singular (SingularDirections): Of the linearised FFN.
            init (str): ``'nullspace'``: ``down = N^T, up = N`` with N the
                nullspace basis. ``'random'``: the same with random unit rows.
                ``'zero'``: up zero, down random, LoRA's way; refinement
                starts as the identity. Defaults to ``'nullspace'``.
            selection (str): See :func:`left_nullspace`.
            threshold (float): See :func:`left_nullspace`.
            seed (int): Of whatever is random. Defaults to 0.

        Returns:
            dict: For the log: ``init``, ``rank``, ``singular_values`` kept
            (a list, empty unless ``init='nullspace'``), ``num_random``.
        """
        check_value('adapter.init', init, Init)
        dim, rank = self.down.shape
        info: Dict[str, object] = dict(
            init=init, rank=rank, singular_values=[], num_random=0)
        if init == 'nullspace':
            nullspace = left_nullspace(
                singular, rank, selection, threshold, seed)
            rows = nullspace.basis
            info.update(singular_values=nullspace.singular_values.tolist(),
                        num_random=nullspace.num_random)
        else:
            rows = random_rows(rank, dim, seed)
            info.update(num_random=rank)
        self.down.copy_(rows.T)
        if init == 'zero':
            self.up.zero_()
        else:
            self.up.copy_(rows)
        return info

    def extra_repr(self) -> str:
        return f'dim={self.down.shape[0]}, rank={self.rank}, gain={self.gain}'
