from mmsinger.models.adapters.nullspace import (SELECTIONS, Nullspace,
                                                left_nullspace,
                                                left_singular_directions,
                                                linearised_ffn)
from mmsinger.models.adapters.singer_adapter import INITS, SiNGERAdapter

__all__ = [
    'INITS', 'Nullspace', 'SELECTIONS', 'SiNGERAdapter', 'left_nullspace',
    'left_singular_directions', 'linearised_ffn'
]
