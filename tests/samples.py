"""One small random batch for each kind of model, and one step on it."""
import torch
from mmengine.runner import Runner
from mmengine.structures import PixelData

from mmsinger.registry import MODELS


def batch(cfg, size=64, count=2):
    """What a data loader of the config's task would give."""
    generator = torch.Generator().manual_seed(0)
    images = [torch.randint(0, 256, (3, size, size), dtype=torch.uint8,
                            generator=generator) for _ in range(count)]
    student = cfg.model.get('student', cfg.model)
    if cfg.default_scope == 'mmpretrain':
        from mmpretrain.structures import DataSample
        samples = [DataSample().set_gt_label(i) for i in range(count)]
    else:
        from mmseg.structures import SegDataSample
        samples = []
        for _ in range(count):
            sample = SegDataSample(metainfo=dict(
                img_shape=(size, size), ori_shape=(size, size)))
            if student.type == 'DepthEstimator':
                depth = torch.rand(1, size, size, generator=generator)
                sample.gt_depth_map = PixelData(data=0.5 + 9 * depth)
            else:
                classes = torch.randint(
                    0, student.decode_head.num_classes, (1, size, size),
                    generator=generator)
                sample.gt_sem_seg = PixelData(data=classes)
            samples.append(sample)
    return dict(inputs=images, data_samples=samples)


def build(cfg):
    """The distiller of a config, ready for its first step."""
    model_cfg = cfg.model.copy()
    if cfg.get('data_preprocessor') is not None:
        model_cfg.setdefault('data_preprocessor', cfg.data_preprocessor)
    model = MODELS.build(model_cfg)
    model.init_weights()
    return model.train()


def optimizer_of(model, cfg):
    """The optimizer wrapper that a runner would build."""
    runner = Runner.__new__(Runner)
    runner.model = model
    return runner.build_optim_wrapper(cfg.optim_wrapper)


def one_step(model, cfg, size=64):
    """Take one optimisation step; the losses, and how much each part of the
    model moved."""
    optimizer = optimizer_of(model, cfg)
    if getattr(model, 'needs_calibration', False):
        model.calibrate([model.data_preprocessor(batch(cfg, size))])
    before = {k: v.detach().clone() for k, v in model.named_parameters()}
    losses = model.train_step(batch(cfg, size), optimizer)
    moved = {}
    for name, value in model.named_parameters():
        part = name.split('.')[0]
        change = (value.detach() - before[name]).abs().max().item()
        moved[part] = max(moved.get(part, 0.), change)
    return losses, moved, optimizer
