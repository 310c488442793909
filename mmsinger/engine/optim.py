"""How parameters get their learning rates: mixed precision on a CPU, and the
host toolboxes' own ways for the student."""
import copy
from contextlib import contextmanager
from typing import Any, Dict, List, Literal, Optional, Sequence

import torch
from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from torch import nn

from mmsinger.engine.unwrap import unwrap
from mmsinger.errors import ConfigError, check_spelling
from mmsinger.models.features.anatomy import find_blocks
from mmsinger.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS


@OPTIM_WRAPPERS.register_module()
class CPUAmpOptimWrapper(OptimWrapper):
    """Mixed precision on a CPU, where mmengine's ``AmpOptimWrapper`` refuses
    to start. ``tools/train.py`` puts it in that one's place.

    bfloat16 has the range of float32, so that there is no loss scale.

    Args:
        dtype (str): ``'bfloat16'``, the only one. Defaults to that.
        **kwargs: See :class:`mmengine.optim.OptimWrapper`.

    Raises:
        ConfigError: If ``dtype`` is another.
    """

    def __init__(self, dtype: Literal['bfloat16'] = 'bfloat16', **kwargs
                 ) -> None:
        super().__init__(**kwargs)

    @contextmanager
    def optim_context(self, model: nn.Module):
        """Autocast, and what :class:`OptimWrapper` does."""
        with super().optim_context(model), torch.autocast(
                'cpu', dtype=torch.bfloat16):
            yield


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class StudentFirstConstructor(DefaultOptimWrapperConstructor):
    """A toolbox's own optimizer constructor for the student, such as one with
    layer-wise learning rate decay, and mmengine's default for the rest of a
    distiller (adapters, projectors).

    The student's parameter groups are those of the plain model. What the
    others get follows ``paramwise_cfg`` without a decay by layer.
    ``prepare_training`` puts it in place of ``optim_wrapper.constructor``.

    Args:
        optim_wrapper_cfg (dict): Config of the optimizer wrapper.
        paramwise_cfg (dict): What the student's constructor reads, and its
            type as ``student_constructor``.

    Raises:
        ConfigError: If the student's constructor makes several optimizers,
            or does not know a backbone without blocks.
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict) -> None:
        paramwise_cfg = dict(paramwise_cfg)
        if not paramwise_cfg.get('student_constructor'):
            raise ConfigError(
                "optim_wrapper.constructor='mmsinger.StudentFirstConstructor' "
                "needs the student's own: optim_wrapper.paramwise_cfg."
                "student_constructor='LearningRateDecayOptimWrapper"
                "Constructor', or another. Without one, remove "
                'optim_wrapper.constructor.')
        self.student_constructor = paramwise_cfg.pop('student_constructor')
        super().__init__(optim_wrapper_cfg, paramwise_cfg)
        # Of the student alone, whose parameters have no such prefix there
        self._of_student = dict(paramwise_cfg, custom_keys={
            key.removeprefix('student.'): settings for key, settings
            in paramwise_cfg.get('custom_keys', {}).items()})
        self._given = copy.deepcopy(optim_wrapper_cfg)

    def __call__(self, model: nn.Module) -> OptimWrapper:
        """Build the optimizer wrapper.

        Args:
            model (nn.Module): A distiller, or one in a
                DistributedDataParallel.

        Returns:
            OptimWrapper: Its first groups are the student's.
        """
        model = unwrap(model)
        self._compare_depth(model)
        build = OPTIM_WRAPPER_CONSTRUCTORS.build(dict(
            type=self.student_constructor,
            optim_wrapper_cfg=copy.deepcopy(self._given),
            paramwise_cfg=copy.deepcopy(self._of_student)))
        try:
            wrapper = build(model.student)
        except NotImplementedError:  # a backbone that it does not know
            wrapper = self._decay_by_block(model)
        except (TypeError, UnboundLocalError) as error:
            # mmseg's and mmdet's, of a setting that is missing or unknown
            raise ConfigError(
                f'optim_wrapper.constructor={self.student_constructor!r} '
                f'cannot use optim_wrapper.paramwise_cfg='
                f'{dict(self.paramwise_cfg)}: {error}. It needs '
                "num_layers, decay_rate, and decay_type='layer_wise' or "
                "'stage_wise'.") from error
        if not isinstance(wrapper, OptimWrapper):
            raise ConfigError(
                f'optim_wrapper.constructor={self.student_constructor!r} '
                'makes several optimizers, and a distiller trains with one. '
                'Choose a constructor that makes one.')
        names = {id(parameter): name
                 for name, parameter in model.named_parameters()}
        groups: List[dict] = []
        for name, part in model.named_children():
            if part is not model.student and name != 'data_preprocessor':
                self.add_params(groups, part, prefix=name)
        own = [p for p in model.parameters(recurse=False) if p.requires_grad]
        if own:
            groups.append(dict(params=own))
        for group in groups:
            # torch wants names in all groups or in none
            if 'param_names' in wrapper.optimizer.param_groups[0]:
                group['param_names'] = [names[id(p)] for p in group['params']]
            wrapper.optimizer.add_param_group(group)
        return wrapper

    def _compare_depth(self, model: nn.Module) -> None:
        """Warn of a ``num_layers``, which mmseg's and mmdet's constructors
        believe, that is not the number of the student's blocks: learning
        rates would be those of another layer, or above the recipe's."""
        given = self.paramwise_cfg.get('num_layers')
        blocks = blocks_of(model.student_backbone)
        if given is None or blocks is None or given == len(blocks):
            return
        print_log(
            f'optim_wrapper.paramwise_cfg.num_layers={given}, but the student '
            f'({type(model.student_backbone).__name__}) has {len(blocks)} '
            f'blocks. Set num_layers={len(blocks)}.',
            logger='current', level=30)

    def _decay_by_block(self, model: nn.Module) -> OptimWrapper:
        """Decay by the student's blocks, as the toolboxes do it for ViTs:
        embeddings are layer 0, block i is i + 1, the rest comes last."""
        options: Dict[str, Any] = dict(self._of_student)
        rate = options.get('layer_decay_rate', options.get('decay_rate', 1.))
        if 'num_layers' in options:  # mmseg's, whose biases do not decay
            options = dict(options, norm_decay_mult=0., bias_decay_mult=0.,
                           flat_decay_mult=0.)
        backbone = model.student_backbone
        unknown = f'optim_wrapper.constructor={self.student_constructor!r} ' \
            f'does not know a {type(backbone).__name__}'
        blocks = blocks_of(backbone)
        if blocks is None:
            raise ConfigError(
                f'{unknown}, and it has no blocks of one width over which '
                'the learning rate could decay. Remove optim_wrapper.'
                'constructor and its settings in paramwise_cfg.')
        print_log(f'{unknown}: the learning rate decays over its '
                  f'{len(blocks)} blocks', logger='current')
        depth = {id(parameter): i + 1 for i, block in enumerate(blocks)
                 for parameter in block.parameters()}
        depth.update({
            id(parameter): 0 for name, parameter in backbone.named_parameters()
            if id(parameter) not in depth
            and ('embed' in name or 'token' in name)})
        builder = DefaultOptimWrapperConstructor(self._given, options)
        groups: List[dict] = []
        builder.add_params(groups, model.student)
        for group in groups:
            layer = depth.get(id(group['params'][0]), len(blocks) + 1)
            group['lr_scale'] = rate**(len(blocks) + 1 - layer)
            group['lr'] = group.get('lr', self.base_lr) * group['lr_scale']
        builder.add_params = lambda params, module: params.extend(groups)
        return builder(model.student)


def blocks_of(backbone: nn.Module) -> Optional[Sequence[nn.Module]]:
    """A transformer's blocks of one width; None if it has none."""
    try:
        return find_blocks(backbone, 'student').modules
    except ConfigError:
        return None


def check_custom_keys(model: nn.Module, custom_keys: Dict[str, dict]) -> None:
    """Hold ``custom_keys`` of a config against the names of parameters.

    Stock schedules list keys for several backbones: those that match nothing
    are said in one warning, but for ``'adapters'``: our schedules serve
    methods with and without.

    Args:
        model (nn.Module): A distiller or a plain model.
        custom_keys (dict): Of ``optim_wrapper.paramwise_cfg``.

    Raises:
        ConfigError: If a key that matches nothing is a misspelt part of the
            model.
    """
    names = [name if '.' in name else f'.{name}'  # as mmengine has them
             for name, _ in model.named_parameters()]
    parts = [name for name, _ in model.named_children()]
    unused = [key for key in custom_keys
              if key != 'adapters' and not any(key in name for name in names)]
    for key in unused:
        check_spelling(f'optim_wrapper.paramwise_cfg.custom_keys[{key!r}]',
                       key.split('.')[0], parts, 0.75)
    if unused:
        print_log('optim_wrapper.paramwise_cfg.custom_keys: '
                  f'{", ".join(map(repr, unused))} are in the name of no '
                  'parameter and have no effect', logger='current', level=30)
