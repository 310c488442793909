from typing import Optional

from mmengine.dist import broadcast
from mmengine.hooks import Hook

from mmsinger.engine.unwrap import full_parameters, unwrap
from mmsinger.models import SiNGERDistiller
from mmsinger.models.distillers.step_record import StepRecord
from mmsinger.registry import HOOKS


@HOOKS.register_module()
class SiNGERAdapterHook(Hook):
    """Starts the adapters and watches that they do not collapse.

    Before the first step, when the teacher is loaded, the adapters are
    initialised on every process and made identical by a broadcast from the
    first. Adapters that came from a checkpoint (``--resume``, ``load_from``)
    are left as they are. For each layer it logs the singular values kept,
    E_safe and E_prob (Table 5a).

    During training it logs the variance of refined over original inlier
    tokens as ``distill.inlier_variance_L``. A ratio far below 1 means that
    the adapter shrinks legitimate features: the KD loss then falls while the
    student gets worse.

    With another model than :class:`SiNGERDistiller` it does nothing, so that
    recipes can share one list of hooks.

    Args:
        interval (int): Iterations between two measurements. Defaults to 50.
        min_variance_ratio (float): Warn below it. Defaults to 0.5.
    """

    priority = 'NORMAL'

    def __init__(self, interval: int = 50,
                 min_variance_ratio: float = 0.5) -> None:
        self.interval = interval
        self.min_variance_ratio = min_variance_ratio
        self._collapsed = set()
        self._record: Optional[StepRecord] = None

    def before_train(self, runner) -> None:
        model = unwrap(runner.model)
        if not isinstance(model, SiNGERDistiller):
            return
        if not model.needs_adapters:
            runner.logger.info('SiNGER adapters: kept as loaded from the '
                               'checkpoint')
            return
        with full_parameters(runner.model):
            infos = model.initialise_adapters()
            for parameter in model.adapters.parameters():
                broadcast(parameter.data)
        for info in infos:
            values = info['singular_values']
            kept = f'singular values kept {min(values):.3g} to ' \
                f'{max(values):.3g}, ' if values else ''
            runner.logger.info(
                f"SiNGER adapter of layer {info['layer']}: init="
                f"{info['init']!r} on the FFN of block {info['block']}, "
                f"rank {info['rank']}, {kept}{info['num_random']} random "
                f"directions, E_safe {info['e_safe']:.4f}, "
                f"E_prob {info['e_prob']:.4f}")

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        model = unwrap(runner.model)
        if isinstance(model, SiNGERDistiller) and \
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
        for layer, ratio in model.inlier_variance(record).items():
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
