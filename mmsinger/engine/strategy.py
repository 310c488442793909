"""FSDP for distillers: the student in parts, the teacher whole or in parts."""
import os
from functools import partial
from typing import Any, Dict, Literal, Optional

import torch
from mmengine._strategy import FSDPStrategy as MMEngineFSDPStrategy
from mmengine.device import get_device
from mmengine.optim import BaseOptimWrapper
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (FullOptimStateDictConfig,
                                    FullStateDictConfig)
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp.wrap import lambda_auto_wrap_policy

from mmsinger.errors import ConfigError
from mmsinger.models import FeatureDistiller, FrozenTeacher
from mmsinger.registry import STRATEGIES


@STRATEGIES.register_module()
class FSDPStrategy(MMEngineFSDPStrategy):
    """mmengine's ``FSDPStrategy`` for distillers, on recent versions of torch.

    Student, projectors and adapters, their gradients and the states of the
    optimizer are divided among the processes; each student block is a unit of
    its own. Beyond mmengine's:

    - The teacher, no submodule of the distiller, comes to the device; with
      ``shard_teacher`` its blocks are divided too.
    - ``optim_wrapper.clip_grad`` clips by the norm over all processes.
    - Checkpoints are whole, in the layout of any other run, and may be
      resumed with FSDP on another number of processes.
    - It runs on CPUs (gloo).

    Args:
        shard_teacher (bool): Divide the teacher's blocks too. Saves memory,
            not time: each block is gathered when it is needed. Defaults to
            False, a whole teacher on each GPU.
        model_wrapper (dict, optional): Arguments of
            ``MMFullyShardedDataParallel``. Only blocks of the student may be
            units of their own. Defaults to None.
        state_dict_cfg (str): ``'full'`` alone, its default: the student's
            file is cut from a whole checkpoint.
        skip_init_weights (bool): False alone, its default: a distiller has
            to load its teacher.
        **kwargs: See mmengine's ``FSDPStrategy``.

    Raises:
        ConfigError: If the teacher cannot be divided, or there are no
            processes to divide the model among.
    """

    def __init__(self,
                 *,
                 shard_teacher: bool = False,
                 model_wrapper: Optional[dict] = None,
                 state_dict_cfg: Literal['full'] = 'full',
                 skip_init_weights: Literal[False] = False,
                 **kwargs) -> None:
        # What is copied to a CPU it is on already shares freed memory
        offload = dict(rank0_only=True, offload_to_cpu=get_device() != 'cpu')
        super().__init__(
            model_wrapper=dict(model_wrapper or {}),
            state_dict_cfg=dict(
                state_dict_type='FULL_STATE_DICT',
                state_dict_config=FullStateDictConfig(**offload),
                optim_state_dict_config=FullOptimStateDictConfig(**offload)),
            **kwargs)
        if not torch.distributed.is_initialized():
            raise ConfigError(
                'strategy.type=mmsinger.FSDPStrategy needs processes to '
                'divide the model among. Start them with torchrun '
                '--nproc_per_node=N tools/train.py … --launcher pytorch, or '
                'leave strategy out.')
        self.shard_teacher = shard_teacher

    def _wrap_model(self, model: nn.Module) -> FSDP:
        kind = get_device()
        device = torch.device(kind) if kind == 'cpu' else \
            torch.device(kind, int(os.environ['LOCAL_RANK']))
        teacher = getattr(model, 'teacher', None)
        if teacher is not None:
            teacher.to(device)
        if self.shard_teacher:
            if getattr(teacher, 'feature_cache', 0):
                raise ConfigError(
                    'strategy.shard_teacher=True and '
                    'model.teacher.feature_cache do not go together: all '
                    'processes gather the blocks in each pass, and one that '
                    'knows its images makes none. Leave one of them out.')
            if not isinstance(teacher, FrozenTeacher):
                raise ConfigError(
                    'strategy.shard_teacher=True: this model has no vision '
                    'transformer as teacher. Set shard_teacher=False.')
            # Leaves the modules in place, so that taps and repeated passes
            # through a block work as before
            mesh = init_device_mesh(
                device.type, (torch.distributed.get_world_size(), ))
            for block in teacher.blocks.modules:
                fully_shard(block, mesh=mesh, reshard_after_forward=True)
        self.model_wrapper.setdefault('device_id', device)
        if isinstance(model, FeatureDistiller):
            blocks = set(model.student_features.modules)
            self.model_wrapper.setdefault('auto_wrap_policy', partial(
                lambda_auto_wrap_policy,
                lambda_fn=lambda module: module in blocks))
        wrapped = super()._wrap_model(model)
        if isinstance(model, FeatureDistiller):
            # Taps sit on the wrapped blocks: a pass that ends at the last of
            # them has left all of FSDP's units
            model.follow_wrapped_student()
        return wrapped

    def build_optim_wrapper(self, optim_wrapper: Any,
                            model: Optional[nn.Module] = None
                            ) -> BaseOptimWrapper:
        wrapper = super().build_optim_wrapper(optim_wrapper, model)
        if getattr(wrapper, 'grad_name', '') == 'grad_norm':
            # Over the parts of all processes; they all get the same norm
            wrapper.clip_func = lambda _, **kwargs: \
                model.clip_grad_norm_(**kwargs)
        return wrapper

    # mmengine 0.10 passes a wrapper where torch expects an optimizer, and
    # torch has changed the order of arguments since.

    def optim_state_dict(self) -> Dict[str, Any]:
        wrapper = self.optim_wrapper
        states = FSDP.optim_state_dict(self.model, wrapper.optimizer)
        if wrapper.base_param_settings is not None:
            states['base_param_settings'] = wrapper.base_param_settings
        return states

    def load_optim_state_dict(self, state_dict: Dict[str, Any]) -> None:
        wrapper = self.optim_wrapper
        settings = state_dict.pop('base_param_settings', None)
        if any(isinstance(key, int) for key in state_dict['state']):
            state_dict = self._by_name(state_dict)
        states = FSDP.optim_state_dict_to_load(
            self.model, wrapper.optimizer, state_dict)
        if settings is not None:
            states['base_param_settings'] = settings
        wrapper.load_state_dict(states)

    def _by_name(self, state_dict: Dict[str, Any]) -> Dict[str, Any]:
        """What a run without FSDP saved, with names instead of numbers."""
        own = {id(parameter): name.replace('_fsdp_wrapped_module.', '')
               for name, parameter in self.model.named_parameters()}
        names = [own[id(parameter)]
                 for group in self.optim_wrapper.optimizer.param_groups
                 for parameter in group['params']]
        return dict(
            state={names[i]: value
                   for i, value in state_dict['state'].items()},
            param_groups=[
                dict(group, params=[names[i] for i in group['params']])
                for group in state_dict['param_groups']])
