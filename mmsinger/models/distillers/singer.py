"""SiNGER: distil refined teacher features (arXiv 2509.20986)."""
from typing import Any, Literal, Optional

from mmsinger.models.distillers.feature import StepConfigs
from mmsinger.models.distillers.fitnet import FitNetDistiller
from mmsinger.models.targets.refine import (Adapter, Gate, InfoConfig,
                                            LastLayer, OutlierConfig)
from mmsinger.registry import MODELS
from mmsinger.schema import Share


@MODELS.register_module()
class SiNGERDistiller(FitNetDistiller):
    """Singular Nullspace-Guided Energy Reallocation (sections 3.1 to 3.3).

    Feature distillation from refined targets: :class:`Refine` with the
    settings given here, then the steps in ``targets``. Losses are means over
    the distilled layers, named ``distill.loss_kd``, ``distill.loss_outlier``,
    ``distill.loss_info``. For steps before the refinement, or another method
    on refined targets, put ``dict(type='mmsinger.Refine', ...)`` into a
    method's ``targets``.

    The adapters are called ``adapters`` in ``paramwise_cfg``::

        optim_wrapper = dict(paramwise_cfg=dict(custom_keys={
            'adapters': dict(lr_mult=0.1)}))

    Args:
        adapter (dict): ``rank``, ``init`` and more, see
            :class:`Refine`, as for all that follow.
        loss_outlier (dict): ``quantile`` (0.95) and
            ``loss_weight`` (0.01).
        loss_info (dict): ``loss_weight`` (1.0) and more.
        last_layer (str): ``'final'`` (default) or ``'listed'``.
        info_fraction (float): Defaults to 1.0.
        gate (dict, optional): ``dict(mad=k)``. Defaults to None.
        cap (bool): Defaults to False.
        kd_gradient (bool): Defaults to True.
        targets (Sequence[dict] | dict[str, dict]): Steps after the
            refinement, see :class:`FeatureDistiller`. Defaults to none.
        over_layers (str): ``'mean'`` or ``'sum'`` of the layers' L_KD.
            Defaults to ``'mean'``.
        **kwargs: See :class:`FeatureDistiller`.

    Raises:
        ConfigError: If a value is not valid or the models do not fit
            together.
    """

    def __init__(self,
                 adapter: Adapter = Adapter(),
                 loss_outlier: OutlierConfig = dict(),
                 loss_info: InfoConfig = dict(),
                 last_layer: LastLayer = 'final',
                 info_fraction: Share = 1.0,
                 gate: Optional[Gate] = None,
                 cap: bool = False,
                 kd_gradient: bool = True,
                 targets: StepConfigs = (),
                 over_layers: Literal['sum', 'mean'] = 'mean',
                 **kwargs: Any) -> None:
        refine = dict(
            type='mmsinger.Refine', adapter=adapter,
            loss_outlier=loss_outlier, loss_info=loss_info,
            last_layer=last_layer, info_fraction=info_fraction, gate=gate,
            cap=cap, kd_gradient=kd_gradient)
        if isinstance(targets, (list, tuple)):
            targets = dict(enumerate(targets))
        if isinstance(targets, dict):  # whose names or numbers stay
            targets = {'': refine, **targets}
        super().__init__(targets=targets, over_layers=over_layers, **kwargs)
