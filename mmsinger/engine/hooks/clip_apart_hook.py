from typing import Any, Dict, List, Optional

from mmengine.hooks import Hook
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from mmsinger.engine.unwrap import unwrap
from mmsinger.errors import ConfigError, near_matches
from mmsinger.registry import HOOKS
from mmsinger.schema import Positive


@HOOKS.register_module()
class ClipApartHook(Hook):
    """Clips the gradients of some parameters by a norm of their own, and
    leaves them out of ``optim_wrapper.clip_grad``, which clips all others::

        custom_hooks = [dict(type='mmsinger.ClipApartHook',
                             max_norms=dict(adapters=1.0))]

    The log has their norm before clipping as ``grad_norm_adapters``.

    Args:
        max_norms (dict[str, float]): By what is in the parameters' names
            (``adapters``, ``projectors``, ``student.backbone``); a parameter
            belongs to the longest that is in its own.

    Raises:
        ConfigError: If one is in no parameter's name; if the others are not
            clipped by their norm too; or if it takes several processes to
            know a norm (FSDP).
    """

    def __init__(self, max_norms: Dict[str, Positive]) -> None:
        self.max_norms = dict(sorted(max_norms.items(),
                                     key=lambda item: -len(item[0])))

    def before_train(self, runner) -> None:
        wrapper = runner.optim_wrapper
        if not getattr(wrapper, 'clip_grad_kwargs', None) or \
                wrapper.clip_func is not clip_grad_norm_:
            raise ConfigError(
                'ClipApartHook needs optim_wrapper.clip_grad=dict(max_norm='
                '...) for all other parameters, and a strategy that leaves '
                'gradients whole (not FSDP). Set that, or take the hook out '
                'of custom_hooks.')
        names = {id(parameter): name for name, parameter
                 in unwrap(runner.model).named_parameters()}
        keys = {one: next((key for key in self.max_norms if key in name), None)
                for one, name in names.items()}
        for key in self.max_norms:
            if key not in keys.values():
                raise ConfigError(
                    f'ClipApartHook.max_norms[{key!r}] is in the name of no '
                    'parameter.' + near_matches(key, {
                        part for name in names.values()
                        for part in name.split('.') if not part.isdigit()}))

        def clip(parameters: List[nn.Parameter], **kwargs: Any) -> Tensor:
            apart: Dict[Optional[str], List[nn.Parameter]] = {
                key: [] for key in (*self.max_norms, None)}
            for parameter in parameters:
                apart[keys.get(id(parameter))].append(parameter)
            for key, max_norm in self.max_norms.items():
                norm = clip_grad_norm_(apart[key],
                                       **dict(kwargs, max_norm=max_norm))
                runner.message_hub.update_scalar(f'train/grad_norm_{key}',
                                                 float(norm))
            return clip_grad_norm_(apart[None], **kwargs)

        wrapper.clip_func = clip
