"""Plan a distillation on many GPUs: hours, data loading, memory.

    python tools/plan_scale.py

Nothing is trained and no GPU is needed. The distiller of the ImageNet-1K
recipe runs one step on fake tensors, which have shapes and no contents; torch
counts its FLOP and the bytes that are alive. Hours follow from an assumed
utilisation: they are estimates. Prints the Markdown tables of docs/scale.md.
"""
import contextlib
import copy
import os
import sys
import time
import weakref
from typing import Annotated, NamedTuple

import mmsinger  # noqa: F401  (before torchvision: see mmsinger.compat)
import torch
from mmengine.registry import init_default_scope
from torch._subclasses.fake_tensor import FakeTensorMode

from mmsinger import paths
from mmsinger.command_line import ToolParser
from mmsinger.engine.prepare import load_config
from mmsinger.errors import readable_errors
from mmsinger.registry import MODELS
from mmsinger.schema import Count, Positive, Range, Share, reader
from step_cost import AllocatedMemory, ImageLoading, flop_counter

RECIPE = os.path.join(paths.configs(), 'classification',
                      'singer_vitl_to_vits_8xb64_in1k.py')
# name: mmpretrain's VisionTransformer: arch, patch size; distilled blocks; FFN
TEACHERS = {'ViT-L/16': ('large', 16, (17, 23), {}),
            'ViT-g/14': ('dinov2-giant', 14, (29, 39),
                         dict(ffn_type='swiglu_fused'))}
STUDENTS = {'ViT-S/16': 'deit-small', 'ViT-T/16': 'deit-tiny'}
Side = Annotated[int, Range(32, 4096)]  # patches have 14 and 16 px
PEAKS = {'A100': 312, 'H100': 989}  # dense bf16 TFLOP/s


class Cost(NamedTuple):
    """One step; FLOP of one image, bytes of the whole batch."""
    teacher_flop: float
    rest_flop: float
    teacher_parameters: int
    trained_parameters: int
    saved: int
    peak: int

    @property
    def flop(self) -> float:
        return self.teacher_flop + self.rest_flop


def step_cost(teacher: str, student: str, size: int, batch: int) -> Cost:
    """Run one step of the recipe in bf16 autocast on fake tensors.

    Args:
        teacher (str): Of :data:`TEACHERS`; stored in bf16.
        student (str): Of :data:`STUDENTS`.
        size (int): Side of the images.
        batch (int): Images.

    Returns:
        Cost: What torch counted.
    """
    arch, patch, layers, layer_cfgs = TEACHERS[teacher]
    model_cfg = copy.deepcopy(load_config(RECIPE).model)
    model_cfg.teacher_dtype = 'bf16'
    model_cfg.teacher = dict(
        backbone=dict(type='mmpretrain.VisionTransformer', arch=arch,
                      patch_size=patch, img_size=size, out_type='raw',
                      layer_cfgs=layer_cfgs),
        checkpoint=None, layers=layers)
    model_cfg.student.backbone.update(arch=STUDENTS[student], img_size=size)
    del model_cfg.student.data_preprocessor  # fake numbers cannot be read
    init_default_scope('mmpretrain')
    with torch.device('meta'):
        model = MODELS.build(model_cfg)
        model.teacher.cast(torch.bfloat16)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device='cpu')
        model.train()
        trained = [p for p in model.parameters() if p.requires_grad]
        own = {p.untyped_storage()._cdata
               for m in (model, model.teacher) for p in m.parameters()}
        images = torch.randn(batch, 3, size, size)
        saved = {}

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage._cdata not in own and storage._cdata not in saved:
                saved[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, saved.pop, storage._cdata, None)
            return tensor

        with autocast(), flop_counter() as teacher_flop:
            model.run_teacher(images)
        # Gradients are there in any step but the first
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        with AllocatedMemory() as memory, flop_counter() as flop:
            with autocast(), torch.autograd.graph.saved_tensors_hooks(
                    keep, lambda tensor: tensor):
                total = sum(model.loss(images, None).values())
            kept = sum(saved.values())
            total.backward()
    teacher_flop = teacher_flop.get_total_flops() / batch
    return Cost(
        teacher_flop, flop.get_total_flops() / batch - teacher_flop,
        sum(p.numel() for p in model.teacher.parameters()),
        sum(p.numel() for p in trained), kept, memory.peak)


def autocast():
    return torch.autocast('cpu', torch.bfloat16)


def decode_rate(size: int, count: int) -> float:
    """Images that the recipe's pipeline loads in a second of one core."""
    init_default_scope('mmpretrain')
    pipeline = load_config(RECIPE).train_dataloader.dataset.pipeline
    with ImageLoading(pipeline, size) as loading:
        loading.load(5)  # to warm up
        start = time.process_time()
        loading.load(count)
        return count / (time.process_time() - start)


def parse_args():
    parser = ToolParser(__doc__)
    parser.add_argument('--sizes', nargs='+', type=reader(Side),
                        default=[224, 518],
                        help='sides of the images')
    parser.add_argument('--gpus', nargs='+', type=reader(Count),
                        default=[8, 64],
                        help='numbers of GPUs')
    parser.add_argument('--batch', type=reader(Count), default=64,
                        help='images a GPU, for the memory')
    parser.add_argument('--utilisation', type=reader(Share), default=0.4,
                        help='share of the peak that is reached')
    parser.add_argument('--epochs', type=reader(Positive), default=100)
    parser.add_argument('--images', type=reader(Positive), default=1281167,
                        help='in an epoch')
    parser.add_argument('--decode-images', type=reader(Count), default=200,
                        help='how many to time the data loading with')
    return parser.parse_args()


def main():
    args = parse_args()
    with contextlib.redirect_stdout(sys.stderr):  # what models log
        costs = {(teacher, student, size):
                 step_cost(teacher, student, size, args.batch)
                 for teacher in TEACHERS for student in STUDENTS
                 for size in args.sizes}
        rates = {size: decode_rate(size, args.decode_images)
                 for size in args.sizes}

    print('| teacher -> student | px | GFLOP an image: teacher | student, '
          'adapters, losses | together |\n|---|---|---|---|---|')
    for (teacher, student, size), cost in costs.items():
        print(f'| {teacher} -> {student} | {size} | '
              f'{cost.teacher_flop / 1e9:.0f} | {cost.rest_flop / 1e9:.0f} | '
              f'{cost.flop / 1e9:.0f} |')

    print('\nData loading, images a second of CPU time of one core: '
          + ', '.join(f'{rate:.0f} at {size} px'
                      for size, rate in rates.items()) + '.')
    print(f'\n**Estimates**: {args.epochs:g} epochs of {args.images:,.0f} '
          f'images at {args.utilisation:.0%} of the dense bf16 peak ('
          + ', '.join(f'{k} {v} TFLOP/s' for k, v in PEAKS.items()) + ').\n')
    print('| teacher -> student | px | GPU | images/s a GPU | cores for data '
          'loading a GPU | '
          + ' | '.join(f'{n} GPUs: hours | images/s' for n in args.gpus)
          + ' |\n' + '|---' * (5 + 2 * len(args.gpus)) + '|')
    for (teacher, student, size), cost in costs.items():
        for kind, peak in PEAKS.items():
            each = peak * 1e12 * args.utilisation / cost.flop
            totals = ' | '.join(
                f'{args.epochs * args.images / (each * n) / 3600:,.1f} | '
                f'{each * n:,.0f}' for n in args.gpus)
            print(f'| {teacher} -> {student} | {size} | {kind} | {each:,.0f} '
                  f'| {each / rates[size]:.1f} | {totals} |')

    print(f'\nMemory a GPU in GiB, {args.batch} images, bf16 autocast, '
          'without CUDA context and fragmentation.\n')
    print('| teacher -> student | px | teacher, bf16 | weights, gradients, '
          'AdamW, DDP | saved for backward | peak of the step | together |\n'
          '|---|---|---|---|---|---|---|')
    for (teacher, student, size), cost in costs.items():
        # float32: weights, gradients, two moments, DDP's buckets
        parts = (2 * cost.teacher_parameters, 20 * cost.trained_parameters,
                 cost.peak)
        fixed, states, peak = (part / 2**30 for part in parts)
        print(f'| {teacher} -> {student} | {size} | {fixed:.2f} | '
              f'{states:.2f} | {cost.saved / 2**30:.1f} | {peak:.1f} | '
              f'{fixed + states + peak:.1f} |')


if __name__ == '__main__':
    with readable_errors():
        main()
