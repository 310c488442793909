"""Small data sets, teachers and runs for end-to-end tests."""
import os
import subprocess
import sys

import cv2
import numpy as np
import torch

from mmsinger.converters.layouts import rename
from mmsinger.engine.prepare import load_config
from mmsinger.models.adapters import left_nullspace, left_singular_directions
from mmsinger.registry import MODELS

TESTS = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(TESTS)
SEG_CONFIG = os.path.join(TESTS, 'configs', 'tiny_seg.py')


def write_scenes(root, count=8, size=32, seed=0):
    """Colour images and their class maps, three classes."""
    rng = np.random.default_rng(seed)
    for folder in ('images', 'annotations'):
        os.makedirs(os.path.join(root, folder), exist_ok=True)
    for i in range(count):
        classes = rng.integers(0, 3, (size // 8, size // 8))
        classes = classes.repeat(8, 0).repeat(8, 1).astype(np.uint8)
        image = rng.integers(0, 60, (size, size, 3)) + \
            classes[..., None] * 80
        cv2.imwrite(os.path.join(root, 'images', f'{i}.png'),
                    image.astype(np.uint8))
        cv2.imwrite(os.path.join(root, 'annotations', f'{i}.png'), classes)


def write_teacher(path, backbone, prefix='backbone.', seed=0):
    """Random weights of a backbone config, as a checkpoint."""
    torch.manual_seed(seed)
    model = MODELS.build(dict(backbone))
    weights = {prefix + k: v + 0.05 * torch.randn_like(v)
               for k, v in model.state_dict().items()}
    torch.save(dict(state_dict=weights), path)


def workplace(folder):
    """A folder in which tests/configs/tiny_seg.py can be run."""
    write_scenes(os.path.join(folder, 'scenes'))
    cfg = load_config(SEG_CONFIG)
    write_teacher(os.path.join(folder, 'teacher.pth'),
                  cfg.model.teacher.backbone)
    return str(folder)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def nullspace_of(weight, *args, **kwargs):
    return left_nullspace(left_singular_directions(weight), *args, **kwargs)


def command(tool, *args):
    return [sys.executable, os.path.join(ROOT, 'tools', tool),
            *map(str, args)]


def run_tool(tool, *args, cwd, check=True, **kwargs):
    """Run a tool to its end; its output is in the assertion if it fails."""
    env = dict(os.environ, PYTHONPATH=ROOT, OMP_NUM_THREADS='1')
    result = subprocess.run(
        command(tool, *args), cwd=cwd, env=env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **kwargs)
    if check:
        assert result.returncode == 0, result.stdout[-6000:]
    return result


def vit(name='VisionTransformer', **kwargs):
    """A small backbone of mmpretrain's ViT family: 4 blocks of width 32."""
    arch = dict(embed_dims=32, num_layers=4, num_heads=4,
                feedforward_channels=64)
    return {**dict(type=f'mmpretrain.{name}', arch=arch, img_size=32,
                   patch_size=8), **kwargs}


def seg_vit(**kwargs):
    """The same of mmseg's VisionTransformer."""
    return {**dict(type='mmseg.VisionTransformer', img_size=32, patch_size=8,
                   embed_dims=32, num_layers=4, num_heads=4, mlp_ratio=2),
            **kwargs}


def timm_vit(model_name, **kwargs):
    """The same of timm, in mmpretrain's TIMMBackbone."""
    return {**dict(type='mmpretrain.TIMMBackbone', model_name=model_name,
                   embed_dim=32, depth=4, num_heads=4, img_size=32,
                   patch_size=8), **kwargs}


def renamed_timm(weights):
    """A timm ViT's weights by mmpretrain's names."""
    return {r.target: weights[r.source] for r in rename(weights, 'timm')
            if r.target}


def build(cfg):
    """A model, in evaluation mode, whose parameters are no special case: no
    zero biases, unit norms or LayerScales that hide an effect."""
    model = MODELS.build(dict(cfg))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.eval()
    return model
