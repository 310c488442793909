from typing import Optional

from mmengine.hooks import Hook

from mmsinger.engine.diagnostics import inlier_variances
from mmsinger.engine.unwrap import unwrap
from mmsinger.models import FeatureDistiller
from mmsinger.models.distillers.step_record import StepRecord
from mmsinger.registry import HOOKS
from mmsinger.schema import Count, NonNegative


@HOOKS.register_module()
class SiNGERAdapterHook(Hook):
    """Watches that the adapters of a :class:`Refine` step do not collapse.

    During training it logs the variance of refined over original inlier
    tokens as ``distill.inlier_variance_L``. A ratio far below 1 means that
    the adapter shrinks legitimate features: the KD loss then falls while the
    student gets worse.

    With a model that refines nothing it does nothing, so that recipes can
    share one list of hooks.

    Args:
        interval (int): Iterations between two measurements. Defaults to 50.
        min_variance_ratio (float): Warn below it. Defaults to 0.5.
    """

    priority = 'NORMAL'

    def __init__(self, interval: Count = 50,
                 min_variance_ratio: NonNegative = 0.5) -> None:
        self.interval = interval
        self.min_variance_ratio = min_variance_ratio
        self._collapsed = set()
        self._record: Optional[StepRecord] = None

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        model = unwrap(runner.model)
        if isinstance(model, FeatureDistiller) and model.refinement and \
                self.every_n_train_iters(runner, self.interval):
            self._record = StepRecord()
            model.records.append(self._record)

    def after_train_iter(self, runner, batch_idx, data_batch=None,
                         outputs=None) -> None:
        if self._record is None:
            return
        model = unwrap(runner.model)
        record, self._record = self._record, None
        model.records.remove(record)
        quantile = getattr(model.refinement.loss_outlier, 'quantile', 0.95)
        for layer, ratio in inlier_variances(record, quantile).items():
            value = ratio.item()
            runner.message_hub.update_scalar(
                f'train/distill.inlier_variance_{layer}', value)
            collapsed = value < self.min_variance_ratio
            if collapsed and layer not in self._collapsed:
                runner.logger.warning(
                    f'Iteration {runner.iter + 1}: the adapter of layer '
                    f'{layer} shrinks ordinary tokens: their variance after '
                    f'over before refinement is {value:.2f}, expected about '
                    f'1 and at least {self.min_variance_ratio}. The teacher '
                    'may have no artifacts there. Lower the adapters\' '
                    'learning rate (paramwise_cfg=dict(custom_keys='
                    "{'adapters': dict(lr_mult=0.1)})) or "
                    'loss_outlier.loss_weight, and do not judge by the KD '
                    'loss.')
            (self._collapsed.add if collapsed else
             self._collapsed.discard)(layer)
