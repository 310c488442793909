from mmsinger.models.adapters.nullspace import (Nullspace, Selection,
                                                SingularDirections,
                                                left_nullspace,
                                                left_singular_directions,
                                                linearised_ffn)
from mmsinger.models.adapters.singer_adapter import Init, SiNGERAdapter

__all__ = [
    'Init', 'Nullspace', 'Selection', 'SiNGERAdapter', 'SingularDirections',
    'left_nullspace', 'left_singular_directions', 'linearised_ffn'
]
