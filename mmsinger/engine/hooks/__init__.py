from mmsinger.engine.hooks.adapter_hook import SiNGERAdapterHook
from mmsinger.engine.hooks.cache_features_hook import CacheFeaturesHook
from mmsinger.engine.hooks.checkpoint_hook import SafeCheckpointHook
from mmsinger.engine.hooks.clip_apart_hook import ClipApartHook
from mmsinger.engine.hooks.diagnostics_hook import DiagnosticsHook
from mmsinger.engine.hooks.knn_bank_hook import KNNBankHook
from mmsinger.engine.hooks.random_state_hook import RandomStateHook
from mmsinger.engine.hooks.run_guard_hook import RunGuardHook
from mmsinger.engine.hooks.student_checkpoint_hook import StudentCheckpointHook
from mmsinger.engine.hooks.calibration_hook import CalibrationHook

__all__ = [
    'CacheFeaturesHook', 'CalibrationHook', 'ClipApartHook',
    'DiagnosticsHook', 'KNNBankHook', 'RandomStateHook', 'RunGuardHook',
    'SafeCheckpointHook', 'SiNGERAdapterHook', 'StudentCheckpointHook'
]
