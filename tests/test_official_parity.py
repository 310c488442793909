"""Agreement with the official research code on its recorded outputs.

``pytest tests/test_official_parity.py --parity-dir DIR`` checks further
files, which may have other sizes, depths, ranks, quantiles or LayerScale.
"""
import json
import os
from collections import defaultdict

import numpy as np
import pytest
import torch

import tiny
from mmsinger.models import FitNetDistiller, SiNGERDistiller
from mmsinger.models.adapters import (left_nullspace, left_singular_directions,
                                      linearised_ffn)
from mmsinger.models.distillers.layer_map import map_layers
from mmsinger.models.features.taps import BlockTaps
from mmsinger.models.teachers.frozen import Normalisation

DATA = os.path.join(os.path.dirname(__file__), 'data')


def pytest_generate_tests(metafunc):
    if 'reference' in metafunc.fixturenames:
        folders = [DATA, *metafunc.config.getoption('--parity-dir')]
        paths = [
            os.path.join(folder, name) for folder in folders
            for name in sorted(os.listdir(folder))
            if name.startswith('official_') and name.endswith('.npz')
        ]
        metafunc.parametrize(
            'reference', paths, indirect=True,
            ids=[os.path.splitext(os.path.basename(p))[0] for p in paths])


class Reference:
    """One recorded run of the official code."""

    def __init__(self, path):
        self.arrays = np.load(path)
        self.meta = json.loads(bytes(self.arrays['meta']))
        self.layers = self.meta['teacher_layers']
        self.student_layers = self.meta['student_layers']

    def __getitem__(self, key):
        return torch.from_numpy(self.arrays[key])

    def group(self, prefix):
        """Arrays below ``prefix/``, by what follows it."""
        return {key[len(prefix) + 1:]: self[key] for key in self.arrays.files
                if key.startswith(f'{prefix}/')}

    def backbone(self, role):
        size = self.meta[role]
        hidden = self[f'{role}/blocks.0.mlp.fc1.weight'].shape[0]
        return dict(
            type='mmpretrain.VisionTransformer',
            arch=dict(embed_dims=size['embed_dim'], num_layers=size['depth'],
                      num_heads=size['num_heads'],
                      feedforward_channels=hidden),
            img_size=size['img_size'], patch_size=size['patch_size'],
            layer_scale_init_value=size.get('layer_scale') or 0.)

    def build(self, distiller, **kwargs):
        model = distiller(
            student=self.backbone('student'),
            teacher=dict(backbone=self.backbone('teacher')),
            layers=self.layers, student_layers=self.student_layers,
            task_loss_weight=0, **kwargs)
        for backbone, role in ((model.teacher.backbone, 'teacher'),
                               (model.student, 'student')):
            backbone.load_state_dict(tiny.renamed_timm(self.group(role)))
        with torch.no_grad():
            for layer, ours in zip(self.layers, self.student_layers):
                for name in ('weight', 'bias'):
                    getattr(model.projectors[str(layer)], name).copy_(
                        self[f'projection/adapter_{ours:03d}.fc1.{name}'])
        return model

    def singer(self):
        weights = self.meta['weights']
        model = self.build(
            SiNGERDistiller, last_layer='listed',
            adapter=dict(rank=self.meta['rank'], selection='threshold',
                         threshold=self.meta['null_threshold']),
            loss_kd=dict(type='mmsinger.FeatureMSELoss',
                         loss_weight=weights['kd']),
            loss_outlier=dict(quantile=self.meta['outlier_quantile'],
                              loss_weight=weights['outlier']),
            loss_info=dict(intermediate='mse', last='previous',
                           loss_weight=weights['info']))
        with torch.no_grad():
            for layer in self.layers:
                adapter = model.adapters[str(layer)]
                adapter.down.copy_(self[f'adapter/{layer:03d}.W_d'])
                adapter.up.copy_(self[f'adapter/{layer:03d}.W_u'])
        return model


@pytest.fixture
def reference(request):
    return Reference(request.param)


def assert_close(ours, official, rtol):
    """Relative to the size of the whole tensor, not entry by entry."""
    error = (ours - official).norm() / official.norm().clamp(min=1e-12)
    assert error < rtol, f'relative error {error:.2e}'


def test_features_and_refined_tokens(reference):
    model = reference.singer()
    taps = model.teacher(reference['image'], reference.layers,
                         Normalisation(None, None))
    with torch.no_grad(), BlockTaps(
            model.student_features, reference.student_layers) as student:
        student.run(model.student, reference['image'])
    for layer, ours in zip(reference.layers, reference.student_layers):
        tokens = taps.tokens(layer)
        assert_close(tokens.values, reference[f'feat_t/{layer:03d}'], 1e-5)
        assert_close(student.tokens(ours).values,
                     reference[f'feat_s/{ours:03d}'], 1e-5)
        with torch.no_grad():
            refined = model.adapters[str(layer)](tokens.patches)
        assert_close(refined, reference[f'refined/{layer:03d}'], 1e-5)


def test_losses_and_gradients(reference):
    model = reference.singer()
    losses = model.loss(reference['image'], None)
    for name in ('loss_kd', 'loss_outlier', 'loss_info'):
        assert_close(losses[f'distill.{name}'], reference[f'loss/{name}'],
                     1e-5)
    total = sum(losses.values())
    assert_close(total, reference['loss/total'], 1e-5)

    total.backward()
    ours = gradients_by_official_name(model, reference)
    official = reference.group('grad')
    assert official
    for name, gradient in official.items():
        assert_close(ours[name], gradient, 1e-4)


def gradients_by_official_name(model, reference):
    named = defaultdict(int)
    for layer, ours in zip(reference.layers, reference.student_layers):
        for name in ('weight', 'bias'):  # one projection per student layer
            named[f'adapter_dict.adapter_{ours:03d}.fc1.{name}'] += getattr(
                model.projectors[str(layer)], name).grad
        adapter = model.adapters[str(layer)]
        named[f'singer_dict.{layer:03d}.W_d'] = adapter.down.grad
        named[f'singer_dict.{layer:03d}.W_u'] = adapter.up.grad
    parameters = dict(model.student.named_parameters())
    for key in reference.group('student'):
        name, = tiny.renamed_timm({key: torch.zeros(())})
        named[f'student.{key}'] = parameters[name].grad
    return named


def test_fitnet_loss(reference):
    model = reference.build(FitNetDistiller)
    losses = model.loss(reference['image'], None)
    assert list(losses) == ['distill.loss_kd']
    assert_close(losses['distill.loss_kd'], reference['fitnet/loss_kd'], 1e-5)


def test_linearised_ffn_and_initial_basis(reference):
    model = reference.singer()
    for layer in reference.layers:
        block = layer if layer == model.refinement.last_layer else layer + 1
        weight = linearised_ffn(model.teacher.blocks.modules[block])
        assert_close(weight.float(), reference[f'linearised_ffn/{layer:03d}'],
                     1e-5)
        singular = left_singular_directions(weight)
        directions, values = singular
        official = reference[f'singular_values/{layer:03d}']
        assert torch.allclose(values.float(), official, atol=1e-5)

        meta = reference.meta
        basis = left_nullspace(
            singular, meta['rank'], 'threshold',
            meta['null_threshold']).basis.float()
        # Equal singular values leave the basis free inside their subspace,
        # so the test is that both lie in the span that the rule selects from.
        below = directions[:, values < meta['null_threshold']].float()
        projector = reference[f'basis_projector/{layer:03d}']
        if below.shape[1] >= meta['rank']:
            for rows in (basis, projector):
                assert torch.allclose(rows @ below @ below.T, rows, atol=1e-4)


def test_official_layer_map():
    with open(os.path.join(DATA, 'layer_mapping.json')) as file:
        cases = json.load(file)
    assert cases
    for case in cases:
        assert map_layers(case['teacher_layers'], case['teacher_depth'],
                          case['student_depth'],
                          'official') == case['student_layers']
