"""Analysis of a teacher: measures, verdict, report, bad input."""
import base64
import html
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from make_digit_scenes import make_digit_scenes
from mmengine.config import Config
from mmengine.registry import init_default_scope

import forked
import tiny
from mmsinger import paths
from mmsinger.analysis import (Evidence, ImageFolder, analyse, load_subject,
                               natural_size, render)
from mmsinger.analysis.charts import (block_chart, photo_uri, ridge_chart,
                                      spectrum_chart)
from mmsinger.analysis.collect import LayerRecord, collect
from mmsinger.analysis.nullspace import (compare_with_jacobian,
                                         distilled_null_directions,
                                         ffn_spectra, nullspace_dimensions)
from mmsinger.analysis.report import shown_blocks
from mmsinger.analysis.separation import (excess, far_outliers, patch_contrast,
                                          ratio_histogram, ratio_spread,
                                          spanned_dimensions, tail_group,
                                          within_image_rank)
from mmsinger.analysis.verdict import judge, percent, snippet, suggest
from mmsinger.engine.loading import distilled_layers
from mmsinger.engine.prepare import load_config
from mmsinger.errors import ConfigError
from mmsinger.metrics import subspace_overlap
from mmsinger.models import SiNGERDistiller
from mmsinger.models.adapters import left_singular_directions, linearised_ffn
from mmsinger.models.features.tokens import Tokens
from mmsinger.models.teachers.frozen import Normalisation
from mmsinger.registry import MODELS

SECTIONS = ['verdict', 'norms', 'samples', 'nullspace', 'jacobian', 'blocks',
            'settings']
BROWSER = next(filter(None, map(shutil.which, (
    'chromium', 'chromium-browser', 'google-chrome'))), None)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# -- measures ----------------------------------------------------------------


@given(st.integers(0, 1000), st.integers(3, 40), st.floats(0., 0.5))
def test_far_outliers_by_brute_force(seed, count, spread):
    norms = torch.rand(3, count, generator=generator(seed)) + 0.1
    norms[0, 0] *= 30
    found = far_outliers(norms, spread, k=4.)
    for row, flags in zip(norms.double().numpy(), found.numpy()):
        middle = np.median(row)
        own = 1.4826 * np.median(np.abs(row - middle))
        expected = (row > middle + 4 * own) & (row > 2 * middle) & \
            (row > middle * (1 + 4 * spread))
        np.testing.assert_array_equal(flags, expected)


def test_hardly_a_token_of_an_exponential_distribution_is_far():
    uniform = torch.rand(64, 4096, generator=generator()) - 0.5
    norms = 20 - uniform.sign() * (1 - 2 * uniform.abs()).log()
    spread = ratio_spread(ratio_histogram(norms))
    assert far_outliers(norms, spread, ratio=0.).double().mean() < 1e-4


def test_plain_background_makes_no_object_far():
    usual = 10 + 3 * torch.randn(15, 256, generator=generator()).abs()
    plain = 10 + 0.01 * torch.randn(1, 256, generator=generator())
    plain[0, :10] = 22.
    norms = torch.cat([usual, plain])
    assert far_outliers(norms, 0.)[-1].sum() == 10
    spread = ratio_spread(ratio_histogram(norms))
    assert not far_outliers(norms, spread).any()


def test_histograms_count_every_token_and_add_up():
    norms = torch.rand(6, 50, generator=generator()).exp()
    whole = ratio_histogram(norms)
    assert whole.sum() == 300
    torch.testing.assert_close(whole, ratio_histogram(norms[:2])
                               + ratio_histogram(norms[2:]))
    ratios = (norms / norms.quantile(0.5, dim=1, keepdim=True)).double()
    edges = 2 ** (torch.arange(193, dtype=torch.float64) / 16 - 4)
    torch.testing.assert_close(whole, torch.histogram(
        ratios.flatten(), edges).hist)
    assert ratio_histogram(torch.tensor([[0., 1., 1., 1., 1e9]])).sum() == 5


def test_the_spread_is_the_robust_standard_deviation():
    norms = 10 + torch.randn(64, 1024, generator=generator())
    assert ratio_spread(ratio_histogram(norms)) == pytest.approx(0.1, rel=0.3)
    norms = 10 + 3 * torch.randn(64, 1024, generator=generator())
    assert ratio_spread(ratio_histogram(norms)) == pytest.approx(0.3, rel=0.1)


def lognormal(count, centre=1., sigma=0.2, seed=0):
    return centre * (sigma * torch.randn(
        1, count, generator=generator(seed))).exp()


def test_a_second_hill_is_found_where_it_is():
    bulk, hill = lognormal(9700), lognormal(300, 8., 0.1, seed=1)
    found = tail_group(ratio_histogram(torch.cat([bulk, hill], dim=1)))
    assert found.share == pytest.approx(0.03, abs=1e-3)
    assert found.ratio == pytest.approx(8., rel=0.05)
    assert found.depth == pytest.approx(1., abs=0.01)
    assert 2 < found.cut < 7


@given(st.integers(0, 1000), st.floats(0.05, 0.8))
def test_a_tail_that_only_falls_is_no_group(seed, sigma):
    group = tail_group(ratio_histogram(lognormal(10000, sigma=sigma,
                                                 seed=seed)))
    assert group is None or group.depth < 0.5


@pytest.mark.parametrize('count, centre', [
    (3000, 8.),  # too frequent: content
    (5, 8.),  # too rare
    (300, 1.6)  # too near
])
def test_what_is_no_artifact_group(count, centre):
    norms = torch.cat([lognormal(10000, sigma=0.05),
                       lognormal(count, centre, 0.05, seed=1)], dim=1)
    assert tail_group(ratio_histogram(norms)) is None


def test_contrast_and_ranks_by_brute_force():
    images = 255 * torch.rand(2, 3, 8, 12, generator=generator())
    contrast = patch_contrast(images, (2, 3)).reshape(2, 2, 3)
    for b in range(2):
        for row in range(2):
            for column in range(3):
                patch = images[b, :, 4 * row:4 * row + 4,
                               4 * column:4 * column + 4].double().numpy()
                expected = np.sqrt(np.mean([c.var() for c in patch]))
                assert contrast[b, row, column].item() == pytest.approx(
                    expected)
    values = torch.tensor([[3., 1., 2., 2.], [0., 0., 0., 0.]])
    torch.testing.assert_close(within_image_rank(values), torch.tensor(
        [[.875, .125, .5, .5], [.5, .5, .5, .5]], dtype=torch.float64))


def test_excess_and_the_dimensions_that_it_spans():
    patches = torch.randn(2, 30, 16, generator=generator())
    outliers = torch.zeros(2, 30, dtype=torch.bool)
    outliers[0, :5] = outliers[1, 7] = True
    basis = torch.linalg.qr(torch.randn(16, 2, generator=generator(1)))[0].T
    patches[outliers] += 100 * torch.randn(
        6, 2, generator=generator(2)) @ basis
    rows = excess(patches, outliers)
    expected = [patches[b, p] - patches[b][~outliers[b]].mean(dim=0)
                for b, p in outliers.nonzero().tolist()]
    torch.testing.assert_close(rows, torch.stack(expected))
    assert spanned_dimensions(rows) == 2
    assert spanned_dimensions(torch.eye(10), 0.95) == 10


def test_overlap_of_subspaces():
    rows = torch.linalg.qr(torch.randn(12, 6, generator=generator()))[0].T
    turned = torch.linalg.qr(torch.randn(3, 3, generator=generator(1)))[0]
    assert subspace_overlap(rows[:3], turned @ rows[:3]) == pytest.approx(1)
    assert subspace_overlap(rows[:3], rows[3:]) == pytest.approx(0, abs=1e-6)
    assert subspace_overlap(rows[:2], rows[1:3]) == pytest.approx(0.5)


# -- verdict on made-up norms ------------------------------------------------


def seen(ratios_by_block, images=64, patches=196):
    """Evidence of blocks whose outputs have made-up norms."""
    records = [LayerRecord() for _ in ratios_by_block]
    previous = None
    for i, (record, norms) in enumerate(zip(records, ratios_by_block)):
        direction = torch.nn.functional.one_hot(torch.tensor(1), 8)
        values = norms[..., None] * direction
        tokens = Tokens(values, (14, patches // 14))
        ranks = torch.full(norms.shape, 0.5, dtype=torch.float64)
        _, previous = record.add(i, tokens, ranks, previous)
    return [record.evidence() for record in records]


def blocks(depth, onset=None, share=0.02, low=4., high=8., sigma=0.15,
           growth=0, end=None):
    """Lognormal norms; from a block on a share of them longer by a factor,
    which takes some blocks to grow."""
    bulk = (sigma * torch.randn(64, 196, generator=generator(1))).exp()
    chosen = torch.rand(64, 196, generator=generator(2)) < share
    factor = low + (high - low) * torch.rand(64, 196,
                                             generator=generator(3))
    result = []
    for block in range(depth):
        norms = bulk * (10 + block)
        if onset is not None and onset <= block < (end or depth):
            part = min(1., (block - onset + 1) / (growth + 1))
            norms = torch.where(chosen, norms * factor**part, norms)
        result.append(norms)
    return result


def test_a_clean_teacher():
    verdict = judge(seen(blocks(12)), 64)
    assert verdict.status == 'clean' and verdict.onset is None
    assert 'There is nothing to suppress' in verdict.headline
    assert not any('Only' in reason for reason in verdict.reasons)
    few = judge([Evidence(0.0005, 0.05, 2.)] * 6, 64)
    assert few.status == 'clean'
    assert '0.05 % of the tokens' in few.reasons[1]
    assert 'its own measure finds outliers' in few.reasons[2]


@pytest.mark.parametrize('sigma', [0.1, 0.3, 0.5])
def test_wide_norms_that_grow_are_no_artifacts(sigma):
    teacher = [blocks(1, sigma=sigma * (i + 1) / 12)[0] for i in range(12)]
    assert judge(seen(teacher), 64).status == 'clean'


@pytest.mark.parametrize('depth, onset', [(6, 0), (12, 3), (24, 11),
                                          (24, 23)])
def test_sudden_artifacts_and_where_they_begin(depth, onset):
    evidence = seen(blocks(depth, onset))
    verdict = judge(evidence, 64)
    assert verdict.status == 'artifacts'
    assert verdict.onset == onset
    assert verdict.affected == list(range(onset, depth))
    assert f'from block {onset} on' in verdict.headline
    assert any(f'Block {onset}: 2' in reason for reason in verdict.reasons)


def test_artifacts_that_grow_over_some_blocks_as_in_large_teachers():
    verdict = judge(seen(blocks(40, 15, growth=5)), 64)
    assert verdict.status == 'artifacts'
    assert 15 <= verdict.onset <= 18


def test_artifacts_that_a_later_block_removes():
    verdict = judge(seen(blocks(12, 4, end=9)), 64)
    assert verdict.affected == [4, 5, 6, 7, 8]
    assert 'in blocks 4 to 8 of 12' in verdict.headline
    assert any('is neither far nor separate any more' in reason
               for reason in verdict.reasons)


def test_one_odd_image_is_no_verdict_on_a_teacher():
    teacher = blocks(6)
    for norms in teacher[3:]:
        norms[5, :40] *= 6
    assert judge(seen(teacher), 64).status != 'artifacts'


def test_one_sign_alone_is_unclear():
    far = Evidence(0.004, 0.5, 4., None)
    assert judge([far] * 4, 64).status == 'unclear'
    assert 'Block 2' in judge([Evidence(0, 0, 3.)] * 2 + [far], 64).reasons[0]


def test_few_images_are_said():
    assert 'Only 1 image was' in judge(seen(blocks(6)), 1).reasons[-1]


@pytest.mark.parametrize('depth, onset, layers', [
    (24, 11, [17, 23]), (12, 3, [8, 11]), (24, 20, [20, 23]),
    (24, 23, [23]), (1, 0, [0])
])
def test_suggested_layers(depth, onset, layers):
    evidence = seen(blocks(depth, onset))
    verdict = judge(evidence, 64)
    assert suggest(verdict, evidence, 1024).layers == layers


@pytest.mark.parametrize('busiest, quantile', [
    (0.005, 0.99), (0.02, 0.97), (0.047, 0.95), (0.1, 0.9), (0.13, 0.85)])
def test_suggested_quantile_leaves_room_for_the_artifacts(busiest, quantile):
    clean = Evidence(0., 0., 2.)
    evidence = [clean, Evidence(0.02, 1., 8., None, busiest, 3)]
    verdict = judge(evidence, 64)
    assert verdict.onset == 1
    assert suggest(verdict, evidence, 1024).quantile == quantile
    assert 1 - quantile >= busiest - 1e-9


@pytest.mark.parametrize('dimensions, dim, rank', [
    (1, 1024, 16), (17, 1024, 32), (500, 1024, 64), (40, 48, 48)])
def test_suggested_rank_holds_the_artifacts(dimensions, dim, rank):
    evidence = [Evidence(0., 0., 2.),
                Evidence(0.02, 1., 8., None, 0.03, dimensions)]
    assert suggest(judge(evidence, 64), evidence, dim).rank == rank


# -- the demo's teacher, clean and planted -----------------------------------


@pytest.fixture(scope='module')
def scenes(tmp_path_factory):
    root = str(tmp_path_factory.mktemp('scenes') / 'digits')
    make_digit_scenes(root, num_train=1, num_val=64)
    return os.path.join(root, 'images', 'validation')


def teacher_config(name):
    return os.path.join(paths.configs(), '_base_', 'teachers', f'{name}.py')


def analysed(config, scenes, **kwargs):
    subject = load_subject(load_config(config))
    folder = ImageFolder(scenes, natural_size(subject.teacher), (4, 4), 64)
    return analyse(subject, folder, config, num_samples=2, **kwargs)


def test_a_teacher_of_grey_images(scenes, tmp_path):
    config = tmp_path / 'grey.py'
    config.write_text(f'teacher = dict(backbone={tiny.vit(in_channels=1)})')
    found = analysed(str(config), scenes)
    assert len(found.collection.layers) == 4


def test_a_teacher_of_other_channels_is_refused(scenes, tmp_path):
    config = tmp_path / 'five.py'
    config.write_text(f'teacher = dict(backbone={tiny.vit(in_channels=5)})')
    with pytest.raises(ConfigError, match='images of 5 channels'):
        analysed(str(config), scenes)


def test_an_extreme_photo_can_be_shown():
    assert photo_uri(torch.zeros(3, 2, 1200, dtype=torch.uint8))


@pytest.fixture(scope='module')
def clean(scenes):
    config = os.path.join(paths.configs(), 'demo', 'singer_digits.py')
    return analysed(config, scenes)


@pytest.fixture(scope='module')
def planted(scenes):
    return analysed(teacher_config('digits_planted'), scenes,
                    jacobian_images=1, jacobian_products=16)


def test_the_clean_teacher_is_called_clean(clean):
    assert clean.verdict.status == 'clean'
    assert 'nothing to suppress' in clean.verdict.headline
    page = html.unescape(render(clean))
    assert 'try SiNGER all the same' in clean.verdict.introduction
    assert clean.verdict.introduction in page
    assert 'depends on their number alone' in page
    share = clean.collection.layers[0].mean('quantile_share')
    assert share == pytest.approx(0.0625, abs=1e-3)


def test_the_planted_block_is_named(planted):
    assert planted.verdict.status == 'artifacts'
    assert planted.verdict.onset == 1
    assert planted.verdict.affected == [1, 2, 3, 4, 5]
    assert planted.verdict.headline == 'Artifacts from block 1 on.'
    record = planted.collection.layers[1]
    assert record.mean('far_share') == pytest.approx(0.03, abs=0.005)
    assert 7 < record.evidence().group.ratio < 10
    assert record.evidence().dimensions == 1  # as planted
    assert record.mean('contrast_rank') < 0.45  # into plain patches
    assert planted.collection.layers[2].stayed > 0.95


def test_far_outliers_are_the_planted_patches(scenes):
    subject = load_subject(load_config(teacher_config('digits_planted')))
    folder = ImageFolder(scenes, (32, 32), (4, 4), 64)
    found = collect(subject, folder, batch_size=64, num_samples=64)
    images = subject.feed(torch.stack([s.image for s in found.samples]))
    subject.teacher(images, [1], subject.normalisation)
    truth = subject.teacher.backbone.planted_mask
    flags = torch.stack([s.far[1] for s in found.samples]).flatten(1)
    assert truth.any()
    assert (flags == truth).double().mean() > 0.999


def test_the_suggestion_is_a_recipe_that_builds(clean, tmp_path):
    path = tmp_path / 'pasted.py'
    assert "_base_ = ['./singer_digits.py']" in clean.snippet
    path.write_text(clean.snippet.replace('./', os.path.join(
        paths.configs(), 'demo', '')))
    cfg = load_config(str(path))
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model)
    assert isinstance(model, SiNGERDistiller)
    assert model.layers == clean.suggestion.layers == [3, 5]
    assert model.adapters['3'].rank == clean.suggestion.rank
    assert model.loss_outlier.quantile == clean.suggestion.quantile


def test_the_suggestion_fits_the_papers_recipe(tmp_path):
    evidence = seen(blocks(24, 11))
    suggestion = suggest(judge(evidence, 64), evidence, 1024)
    folder = os.path.join(paths.configs(), 'classification')
    recipe = os.path.join(folder, 'singer_vitl_to_vits_8xb64_in1k.py')
    path = tmp_path / 'pasted.py'
    path.write_text(snippet(suggestion, recipe).replace(
        './', os.path.join(folder, '')))
    cfg = load_config(str(path))
    assert cfg.model.layers == [17, 23]
    cfg.model.teacher.checkpoint = None
    init_default_scope(cfg.default_scope)
    with torch.device('meta'):  # a ViT-L
        model = MODELS.build(cfg.model)
    assert model.layers == [17, 23]
    assert model.loss_outlier.quantile == suggestion.quantile


def test_jacobian_of_blocks_that_cannot_run_alone_is_left_out(planted):
    assert 'skipped' in planted.jacobian[0]
    for layer, result in enumerate(planted.jacobian[1:], 1):
        assert result['block'] == layer + 1
        assert 0 < result['overlap'] < 1
        assert 0 < result['jacobian']['relative_l2']
    assert 'Layer 0 is left out' in render(planted)


def test_the_comparison_finds_what_measure_finds():
    small = tiny.vit(arch=dict(embed_dims=16, num_layers=3, num_heads=2,
                               feedforward_channels=32))
    model = SiNGERDistiller(
        teacher=dict(backbone=small), student=small,
        layers=(1, 2), adapter=dict(rank=4), task_loss_weight=0)
    model.init_weights()
    with torch.no_grad():
        for parameter in model.teacher.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.refinement.init_weights(model.teacher)
    images = torch.randn(2, 3, 32, 32, generator=generator())
    expected = distilled_null_directions(model, [images], 2)[1]
    result = compare_with_jacobian(
        model.teacher, list(images.split(1)), Normalisation(None, None),
        rank=4, products=16)[1]
    assert result['overlap'] == pytest.approx(subspace_overlap(
        expected.ffn, expected.jacobian), rel=1e-3)
    assert result['jacobian']['relative_l2'] < result['random']['relative_l2']


def test_spectra_and_where_the_artifacts_lie():
    torch.manual_seed(0)
    teacher = MODELS.build(dict(type='mmsinger.SiNGERDistiller',
                                teacher=dict(backbone=tiny.vit()),
                                student=tiny.vit(), layers=(1, 3),
                                task_loss_weight=0)).teacher
    weights = [linearised_ffn(b) for b in teacher.blocks.modules]
    directions, values = left_singular_directions(weights[2])
    safe = directions[:, -3:].T  # in the output of block 1
    spectra = ffn_spectra(teacher, [None, safe, None, None])
    torch.testing.assert_close(
        torch.tensor(spectra[2]['singular_values'], dtype=torch.float64),
        values)
    assert spectra[2]['e_safe'] == pytest.approx(1)
    assert spectra[2]['e_prob'] == pytest.approx(0, abs=1e-9)
    assert all(spectra[i]['e_safe'] is None for i in (0, 1, 3))
    assert nullspace_dimensions(torch.tensor([2., 1., 0.09, 0.04])) == dict(
        absolute=1, relative=2)


def test_the_result_does_not_depend_on_the_batch_size(scenes):
    subject = load_subject(load_config(teacher_config('digits')))
    folder = ImageFolder(scenes, (32, 32), (4, 4), 10)
    one, many = (collect(subject, folder, size).layers[-1]
                 for size in (1, 10))
    assert torch.equal(one.histogram, many.histogram)
    for name in ('median', 'kurtosis', 'robust_share'):
        assert one.mean(name) == pytest.approx(many.mean(name), rel=1e-5)


# -- kinds of configs --------------------------------------------------------


def config(tmp_path, **content):
    path = str(tmp_path / 'config.py')
    Config(content).dump(path)
    return load_config(path)


def test_a_plain_models_own_checkpoint_and_normalisation(tmp_path):
    backbone = tiny.vit()
    path = str(tmp_path / 'model.pth')
    tiny.write_teacher(path, backbone)
    weights = torch.load(path)
    weights['state_dict']['head.fc.weight'] = torch.zeros(2, 32)
    torch.save(weights, path)
    cfg = config(tmp_path, model=dict(
        type='ImageClassifier', backbone=backbone), data_preprocessor=dict(
            mean=[10., 20., 30.], std=[2., 2., 2.], to_rgb=True))
    subject = load_subject(cfg, path)
    own = subject.teacher.backbone.state_dict()['layers.0.attn.qkv.weight']
    torch.testing.assert_close(
        own, weights['state_dict']['backbone.layers.0.attn.qkv.weight'])
    fed = subject.feed(torch.full((1, 3, 2, 2), 30))
    assert fed[0, :, 0, 0].tolist() == [10., 5., 0.]
    assert not subject.notes
    cfg.data_preprocessor.to_rgb = False  # mean and std are in their order
    image = torch.arange(3)[None, :, None, None] * 10.
    assert load_subject(cfg, path).feed(image)[0, :, 0, 0].tolist() == [
        5., -5., -15.]


def test_what_had_to_be_assumed_is_said(tmp_path):
    cfg = config(tmp_path, teacher=dict(backbone=tiny.vit()))
    notes = load_subject(cfg).notes
    assert 'weights are random' in notes[0]
    assert '--mean and --std' in notes[1]
    notes = load_subject(cfg, mean=[0.] * 3, std=[255.] * 3).notes
    assert len(notes) == 1


def test_a_classifier_teacher_is_read_by_its_backbone(tmp_path):
    path = str(tmp_path / 'model.pth')
    tiny.write_teacher(path, tiny.vit())
    cfg = config(tmp_path, teacher=dict(
        model=dict(type='mmpretrain.ImageClassifier', backbone=tiny.vit()),
        checkpoint=path, mean=[0.] * 3, std=[1.] * 3))
    assert load_subject(cfg).teacher.loaded


# -- the report --------------------------------------------------------------


class Page(HTMLParser):
    """What a page holds and refers to."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.sections, self.references = [], [], []
        self.images = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        if tag == 'section':
            self.sections.append(attrs['id'])
        if tag == 'img':
            assert attrs['alt']
            self.images.append(attrs['src'])
        self.references += [attrs[k] for k in ('src', 'href', 'srcset',
                                               'action', 'data')
                            if attrs.get(k)]


@pytest.mark.parametrize('which', ['clean', 'planted'])
def test_the_report_is_one_file(which, request):
    analysis = request.getfixturevalue(which)
    text = render(analysis)
    page = Page(text)
    assert page.sections == SECTIONS
    assert all(r.startswith('data:') for r in page.references)
    assert not re.search(r'(https?|wss?|ftp)://|@import|url\((?!#)', text)
    assert not {'script', 'iframe', 'object', 'embed'} & set(page.tags)
    for uri in page.images:
        kind, content = uri.split(',', 1)
        assert kind == 'data:image/png;base64'
        pixels = cv2.imdecode(np.frombuffer(
            base64.b64decode(content, validate=True), np.uint8), 1)
        assert pixels is not None and pixels.size
    maps = len(analysis.collection.samples) * (
        1 + len(shown_blocks(analysis)))  # the image and its norm maps
    assert len(page.images) == maps + (which == 'planted')  # and positions
    assert page.tags.count('svg') == 4
    assert not re.search('NaN|None|nan', re.sub('base64,[^"]*', '', text))


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('depth', [1, 40])
def test_charts_of_shallow_and_deep_teachers(depth):
    values = [None] + [2.] * (depth - 1) + [3.]
    histogram = ratio_histogram(torch.ones(1, 4))
    charts = (block_chart({'norm': values[-depth:]}, 'x', depth - 1),
              ridge_chart([histogram] * depth, [0]),
              spectrum_chart([[0.]] * depth, [depth - 1]))
    assert all(chart.startswith('<svg class="chart" ') for chart in charts)
    assert f'>block {depth - 1}<' in charts[2]


def test_the_report_of_an_unclear_teacher_without_pictures(clean):
    verdict = judge([Evidence(0.004, 0.5, 4.)] * 6, 64)
    text = render(clean._replace(
        verdict=verdict, collection=clean.collection._replace(samples=[])))
    assert verdict.headline in text and 'try SiNGER all the same' in text
    assert not Page(text).images


def test_names_are_escaped(planted):
    evil = '<img src=x onerror=alert(1)>.png'
    sample = planted.collection.samples[0]._replace(name=evil)
    changed = planted._replace(
        collection=planted.collection._replace(samples=[sample]))
    text = render(changed)
    assert evil not in text and html.escape(evil) in text


def test_the_json_has_all_numbers(planted):
    content = json.loads(json.dumps(planted.numbers(), allow_nan=False))
    assert content['verdict']['onset'] == 1
    assert len(content['layers']) == 6
    for layer in content['layers']:
        assert len(layer['ffn']['singular_values']) == 96
        assert sum(layer['histogram']) == 64 * 64
        for name in ('median', 'p95', 'p99', 'max_over_median', 'kurtosis',
                     'quantile_share', 'robust_share', 'far_share'):
            assert layer['norms'][name]['std'] >= 0
    assert np.shape(content['layers'][1]['positions']) == (8, 8)


PROBE = '''<script>
addEventListener('load', () => {
  const look = frame => {
    const view = frame.contentWindow, page = frame.contentDocument
    return {
      width: view.innerWidth,
      scroll: page.documentElement.scrollWidth,
      sections: [...page.querySelectorAll('section')].map(s => s.id),
      images: [...page.images].map(i => i.complete && i.naturalWidth),
      charts: [...page.querySelectorAll('svg.chart')].map(
        s => s.getBoundingClientRect().width),
      smallest: Math.min(...[...page.querySelectorAll('p, li, td, pre')].map(
        e => parseFloat(view.getComputedStyle(e).fontSize))),
      fetched: view.performance.getEntriesByType('resource').map(
        e => e.name).filter(n => !n.startsWith('data:'))
    }
  }
  const result = document.createElement('pre')
  result.id = 'result'
  result.textContent = JSON.stringify(
    [...document.querySelectorAll('iframe')].map(look))
  document.body.replaceChildren(result)
})</script>'''


@pytest.mark.skipif(BROWSER is None, reason='no Chromium on PATH: install '
                    'chromium to test the report in a real browser')
def test_the_report_in_a_browser(planted, tmp_path):
    """In a frame of a phone's width; beside it the same page with all the
    mistakes that are looked for."""
    good = render(planted)
    policy = re.search('<meta http-equiv="Content-Security-Policy"[^>]*>',
                       good)[0]
    broken = good.replace(policy, '').replace('</main>', (
        '<img src="http://127.0.0.1:9/far.png"><img src="data:,none">'
        '<script>throw Error("planted")</script>'
        '<div style="width:900px">wide</div></main>'))
    frames = ''.join(
        f'<iframe style="width:390px;height:844px;border:0" '
        f'srcdoc="{html.escape(text)}"></iframe>' for text in (good, broken))
    (tmp_path / 'page.html').write_text(
        f'<!DOCTYPE html><meta charset="utf-8"><body>{frames}{PROBE}')
    run = subprocess.run(
        [BROWSER, '--headless', '--no-sandbox', '--disable-gpu',
         '--disable-dev-shm-usage', '--no-first-run',
         '--disable-background-networking', '--disable-extensions',
         f'--user-data-dir={tmp_path}/profile', '--window-size=900,900',
         '--enable-logging=stderr', '--dump-dom',
         (tmp_path / 'page.html').as_uri()],
        capture_output=True, text=True, timeout=300)
    found = re.search('<pre id="result">(.*)</pre>', run.stdout)
    assert found, run.stderr[-3000:]
    page, bad = json.loads(html.unescape(found[1]))
    console = [line for line in run.stderr.splitlines() if 'CONSOLE' in line]

    assert page['width'] == bad['width'] == 390
    assert page['scroll'] <= 390 < bad['scroll']
    assert page['sections'] == SECTIONS
    assert len(page['images']) == len(Page(good).images)
    assert all(page['images']) and not all(bad['images'])
    assert page['charts'] and all(300 < w <= 390 for w in page['charts'])
    assert page['smallest'] >= 13
    assert page['fetched'] == []
    assert bad['fetched'] == ['http://127.0.0.1:9/far.png']
    assert any('planted' in line for line in console)
    assert not [line for line in console
                if 'planted' not in line and 'far.png' not in line]


# -- the tool, and bad input -------------------------------------------------


def write_images(folder, *shapes, seed=0):
    rng = np.random.default_rng(seed)
    os.makedirs(folder, exist_ok=True)
    for i, shape in enumerate(shapes):
        cv2.imwrite(os.path.join(folder, f'{i}.png'), rng.integers(
            0, 256, shape, dtype=np.uint8))
    return str(folder)


def test_the_tool_skips_what_it_cannot_use(tmp_path):
    folder = write_images(tmp_path / 'images', (40, 50, 3), (33, 20), (3, 3),
                          (64, 64, 3))
    (tmp_path / 'images' / 'broken.jpg').write_bytes(b'\xff\xd8 no image')
    (tmp_path / 'images' / 'empty.png').write_bytes(b'')
    (tmp_path / 'images' / 'notes.txt').write_text('no image')
    result = forked.run('analyze_teacher.py', teacher_config('digits'),
                        '--images', folder, '--out', 'out', '--num', 6,
                        cwd=tmp_path)
    assert '2 cannot be read' in result.stdout
    assert 'try SiNGER all the same' in result.stdout
    assert '1 smaller than a patch of 4 x 4 px' in result.stdout
    with open(tmp_path / 'out' / 'report.json') as file:
        meta = json.load(file)['meta']
    assert (meta['images'], meta['unreadable'], meta['too_small']) == (
        3, 2, 1)
    text = (tmp_path / 'out' / 'report.html').read_text()
    assert 'broken.jpg' in text or 'empty.png' in text
    assert 'Only 3 images were seen' in text

    result = forked.run('analyze_teacher.py', teacher_config('digits'),
                        '--images', 'nowhere', cwd=tmp_path, check=False)
    assert result.returncode == 1
    assert "--images 'nowhere': no such folder" in result.stdout
    assert 'Traceback' not in result.stdout

    result = forked.run('analyze_teacher.py', teacher_config('digits'),
                        '--images', folder, '--size', 32, 3, cwd=tmp_path,
                        check=False)
    assert result.returncode == 1
    bad(result.stdout, '--size 32 3', 'patch', '4x4')
    assert 'Traceback' not in result.stdout


def test_grey_images_become_colour(tmp_path):
    folder = write_images(tmp_path, (32, 32))
    (name, image), = ImageFolder(folder, (32, 32), (4, 4), 5)
    assert name == '0.png' and image.shape == (3, 32, 32)
    assert torch.equal(image[0], image[1])
    written = cv2.imread(os.path.join(folder, '0.png'), 0)
    np.testing.assert_array_equal(image[0].numpy(), written)


def test_images_cover_the_size_and_are_cropped_in_the_middle(tmp_path):
    image = np.zeros((20, 60, 3), np.uint8)
    image[:, 20:40] = (0, 0, 255)  # red, for OpenCV
    cv2.imwrite(str(tmp_path / 'a.PNG'), image)
    (_, found), = ImageFolder(str(tmp_path), (20, 20), (4, 4), 5)
    assert found[0].float().mean() == 255 and found[1:].float().mean() == 0
    (_, found), = ImageFolder(str(tmp_path), (40, 24), (4, 4), 5)
    assert found.shape == (3, 40, 24)


def test_the_choice_of_images_is_seeded(tmp_path):
    folder = write_images(tmp_path, *[(8, 8, 3)] * 12)

    def names(seed):
        return [n for n, _ in ImageFolder(folder, (8, 8), (4, 4), 6, seed)]

    assert names(1) == names(1) != names(2)
    assert len(set(names(1))) == 6


def bad(message, *texts):
    for text in texts:
        assert text in message


def test_folders_without_images(tmp_path):
    with pytest.raises(ConfigError) as error:
        ImageFolder(str(tmp_path), (8, 8), (4, 4), 5)
    bad(str(error.value), '--images', 'holds no image', '.jpg')
    (tmp_path / 'a.jpg').write_bytes(b'no image')
    with pytest.raises(ConfigError) as error:
        list(ImageFolder(str(tmp_path), (8, 8), (4, 4), 5))
    bad(str(error.value), 'none of its 1 images', '1 cannot be read', 'a.jpg')
    write_images(tmp_path, (2, 9, 3))
    with pytest.raises(ConfigError) as error:
        list(ImageFolder(str(tmp_path), (8, 8), (4, 4), 5))
    bad(str(error.value), '1 smaller than a patch of 4 x 4 px', '0.png')
    with pytest.raises(ConfigError, match='a file, not folder'):
        ImageFolder(str(tmp_path / 'a.jpg'), (8, 8), (4, 4), 5)
    with pytest.raises(ConfigError, match='--num=0'):
        ImageFolder(str(tmp_path), (8, 8), (4, 4), 0)


def test_models_without_transformer_blocks(tmp_path):
    cfg = config(tmp_path, model=dict(
        type='ImageClassifier', backbone=dict(
            type='mmpretrain.ResNet', depth=18)))
    with pytest.raises(ConfigError, match='no list of blocks'):
        load_subject(cfg)
    with pytest.raises(ConfigError) as error:
        load_subject(config(tmp_path, train_cfg=dict()))
    bad(str(error.value), 'no teacher to look at', 'Give a recipe')


@pytest.mark.parametrize('recipe, options, layers', [
    ('singer_vitl_to_vits_ade20k', {}, [17, 23]),
    ('singer_vitl_to_vits_ade20k', {'model.layers': [5, 9]}, [5, 9]),
    ('classification/vitkd_vitl_to_vits_8xb64_in1k', {}, None),
    ('classification/logit_kd_deit3s_to_deit3t_8xb64_in1k', {}, None),
    ('_base_/teachers/deit3_s16_in1k', {}, [8, 11]),
    ('_base_/teachers/deit3_s16_in1k_cls', {}, None)])
def test_layers_that_a_config_distils(monkeypatch, recipe, options, layers):
    cfg = load_config(os.path.join(paths.configs(), f'{recipe}.py'), options)
    source = 'model.teacher' if 'model' in cfg else 'teacher'
    assert distilled_layers(cfg, source) == layers


def test_misspelt_teacher_keys(tmp_path):
    with pytest.raises(ConfigError, match="chekpoint.*'checkpoint'"):
        load_subject(config(tmp_path, teacher=dict(
            backbone=tiny.vit(), chekpoint='x.pth')))


def test_file_names_that_are_no_utf8(tmp_path):
    folder = write_images(tmp_path / 'images', *[(40, 40, 3)] * 3)
    for i in range(3):
        os.rename(os.path.join(folder, f'{i}.png').encode(),
                  os.path.join(folder, '').encode() + b'caf\xe9%d.png' % i)
    forked.run('analyze_teacher.py', teacher_config('digits'), '--images',
               folder, '--out', 'out', cwd=tmp_path)
    text = (tmp_path / 'out' / 'report.html').read_text(encoding='utf-8')
    assert r'caf\udce9' in text
    assert json.loads((tmp_path / 'out' / 'report.json').read_text())


def test_a_share_in_words():
    assert [percent(share) for share in (1., 0.996, 0.5, 0.0312)] == [
        '100 %', '100 %', '50 %', '3.1 %']


def test_checkpoints_that_do_not_fit(tmp_path):
    path = str(tmp_path / 'wider.pth')
    tiny.write_teacher(path, tiny.vit(arch=dict(
        embed_dims=48, num_layers=4, num_heads=4, feedforward_channels=64)))
    cfg = config(tmp_path, teacher=dict(backbone=tiny.vit(),
                                        prefix='backbone.'))
    with pytest.raises(ConfigError, match='does not fit'):
        load_subject(cfg, path)
    with pytest.raises(ConfigError, match='no such file'):
        load_subject(cfg, 'nowhere.pth')


def test_numbers_that_are_not_valid(scenes):
    subject = load_subject(load_config(teacher_config('digits')))
    folder = ImageFolder(scenes, (32, 32), (4, 4), 2)
    with pytest.raises(ConfigError, match='--batch-size=0'):
        analyse(subject, folder, 'x.py', batch_size=0)
    with pytest.raises(ConfigError, match='belong together'):
        load_subject(load_config(teacher_config('digits')), mean=[0.] * 3)


def test_tokens_that_are_not_finite(scenes):
    subject = load_subject(load_config(teacher_config('digits')))
    with torch.no_grad():
        subject.teacher.blocks.modules[2].ffn.layers[1].bias.fill_(
            float('nan'))
    with pytest.raises(ConfigError, match='Block 2 gives .* not finite'):
        collect(subject, ImageFolder(scenes, (32, 32), (4, 4), 2))
