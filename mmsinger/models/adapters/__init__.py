from mmsinger.models.adapters.nullspace import (Nullspace, left_nullspace,
                                                left_singular_directions,
                                                linearised_ffn)
from mmsinger.models.adapters.nullspace_cache import cached_singular_directions
from mmsinger.models.adapters.singer_adapter import SiNGERAdapter

__all__ = [
    'Nullspace', 'SiNGERAdapter', 'cached_singular_directions',
    'left_nullspace', 'left_singular_directions', 'linearised_ffn'
]
