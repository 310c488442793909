"""Figures: the maps behind them by hand, files that can be read, bad input."""
import json
import re
from types import SimpleNamespace

import cv2
import forked
import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from plot import choose_keys, read_images, run_names
from reproduction.figures import draw_radar, draw_sweep, read_table

from mmsinger.errors import ConfigError
from mmsinger.figures import (draw_maps, extract_features, norm_map, patch_at,
                              pca_map, pictures_of, principal_components,
                              read_curves, similarity_map, to_array)
from mmsinger.figures.curves import draw_curves
from mmsinger.figures.style import COLOURS, line_style, save_figure
from mmsinger.models import FitNetDistiller, SiNGERDistiller
from mmsinger.models.features.tokens import Tokens
from mmsinger.models.teachers.frozen import Normalisation

PLAIN = dict(type='mmpretrain.ImageClassifier', backbone=tiny.vit(),
             data_preprocessor=dict(
                 type='mmpretrain.ClsDataPreprocessor', to_rgb=True,
                 mean=[10., 20., 30.], std=[2., 4., 8.]))


def distiller(cls=SiNGERDistiller, **kwargs):
    torch.manual_seed(0)
    model = cls(student=PLAIN, teacher=dict(backbone=tiny.vit()),
                layers=(1, 3), task_loss_weight=0, **kwargs)
    with torch.no_grad():
        for parameter in (*model.teacher.parameters(), *model.parameters()):
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def tokens(batch=2, grid=(3, 4), dim=6, prefix=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Tokens(torch.randn(batch, prefix + grid[0] * grid[1], dim,
                              generator=generator), grid)


def raises(function, *words):
    with pytest.raises(ConfigError) as error:
        function()
    for word in words:
        assert word in str(error.value), (word, str(error.value))


# -- maps --------------------------------------------------------------------


def test_norm_map_by_hand():
    some = tokens()
    maps = norm_map(some)
    assert maps.shape == (2, 3, 4)
    for row in range(3):
        for column in range(4):
            assert maps[1, row, column].item() == pytest.approx(
                np.linalg.norm(some.values[1, 1 + 4 * row + column]), rel=1e-5)


def test_similarity_map_by_hand():
    some = tokens()
    maps = similarity_map(some, (1, 2))
    marked = some.values[0, 1 + 4 + 2]
    other = some.values[0, 1 + 8 + 3]
    assert maps[0, 2, 3].item() == pytest.approx(
        (marked @ other / marked.norm() / other.norm()).item(), abs=1e-5)
    assert maps[:, 1, 2].tolist() == pytest.approx([1, 1])
    assert maps.max() <= 1 + 1e-5 and maps.min() >= -1 - 1e-5


@given(st.integers(1, 9), st.integers(1, 9), st.floats(0, 1, exclude_max=True),
       st.floats(0, 1, exclude_max=True))
def test_patch_at_holds_the_point(rows, columns, down, right):
    row, column = patch_at((rows, columns), (down, right))
    assert row <= down * rows < row + 1
    assert column <= right * columns < column + 1


@pytest.mark.parametrize('point', [(1., 0.5), (-0.1, 0.5), (0.5, 7)])
def test_a_point_outside_the_image(point):
    raises(lambda: patch_at((2, 2), point), 'patch.', '0 or more and below 1')


def test_components_are_those_of_the_covariance():
    some = tokens(grid=(5, 5))
    found = principal_components(some)
    for image in range(2):
        values = np.cov(some.patches[image].numpy().T)
        strengths, vectors = np.linalg.eigh(values)
        for i in range(3):
            cosine = found.directions[image, :, i].numpy() @ \
                vectors[:, -1 - i]
            assert abs(cosine) == pytest.approx(1, abs=1e-3)


def test_pca_maps_in_one_basis_can_be_compared():
    some = tokens(grid=(4, 4))
    basis = principal_components(some)
    colours = pca_map(some, basis)
    assert colours.shape == (2, 4, 4, 3)
    assert colours.min() == 0 and colours.max() == 1
    moved = some.patches.clone()
    moved[0, 5] += 3 * basis.directions[0, :, 0]
    changed = pca_map(some.with_patches(moved), basis)
    differs = (changed != colours).any(dim=-1)
    assert differs.nonzero().tolist() == [[0, 1, 1]]
    assert changed[0, 1, 1, 0] > colours[0, 1, 1, 0]


@pytest.mark.parametrize('scale', [-1., 5.])
def test_colours_do_not_depend_on_sign_or_scale(scale):
    some = tokens(grid=(4, 4))
    other = some.with_patches(scale * some.patches)
    same = pca_map(other, principal_components(other))
    colours = pca_map(some, principal_components(some))
    if scale < 0:  # the directions are the same, the tokens lie opposite
        colours = 1 - colours
    assert torch.allclose(same, colours, atol=2e-2)


@pytest.mark.parametrize('grid, dim', [((1, 1), 6), ((1, 2), 6), ((3, 3), 2)])
def test_components_of_few_patches_or_channels(grid, dim):
    few = tokens(grid=grid, dim=dim)
    colours = pca_map(few, principal_components(few))
    assert colours.shape == (2, *grid, 3)
    assert torch.isfinite(colours).all()


# -- features ----------------------------------------------------------------


def test_features_are_those_of_the_methods():
    model = distiller(target_norm='standardise').train()
    images = torch.randn(3, 3, 32, 32)
    model.calibrate([images])
    features = extract_features(model, images)
    assert model.training and model.student.training
    assert not any(tokens.values.requires_grad
                   for views in features.values() for tokens in views[:3])
    for layer in (1, 3):
        teacher, target, student, standardised = features[layer]
        assert standardised
        assert torch.allclose(
            target.patches, model.adapters[str(layer)](teacher.patches))
        assert torch.equal(target.prefix, teacher.prefix)
        assert student.grid == (4, 4)
    figure = draw_maps('norm', pictures_of(model, images), features)
    assert any('target are standardised' in text.replace('\n', ' ')
               for text in texts(figure))


def test_gated_maps_show_the_gate():
    model = distiller(gate=dict(mad=1e6))
    for views in extract_features(
            model, torch.randn(2, 3, 32, 32)).values():
        assert torch.equal(norm_map(views.teacher), norm_map(views.target))


def test_maps_show_any_step():
    model = distiller(FitNetDistiller, targets=[
        dict(type='mmsinger.ClipNorms', quantile=0.5)])
    for views in extract_features(
            model, torch.randn(2, 3, 32, 32)).values():
        norms, clipped = norm_map(views.teacher), norm_map(views.target)
        assert (clipped <= norms + 1e-5).all() and (clipped < norms).any()


def test_methods_without_steps_have_no_targets_of_their_own():
    features = extract_features(distiller(FitNetDistiller),
                                torch.randn(2, 3, 32, 32))
    assert all(views.target is None for views in features.values())
    picture = np.zeros((2, 32, 32, 3), np.uint8)
    titles = texts(draw_maps('norm', picture, features))
    assert 'teacher\nblock 1' in titles and 'target\nblock 1' not in titles


# -- figures -----------------------------------------------------------------


def texts(figure):
    from matplotlib.text import Text
    return [text.get_text() for text in figure.findobj(Text)]


def panels(figure):
    """What is drawn in each axis: its images."""
    return [axis.images[0].get_array() for axis in figure.axes if axis.images]


def test_figures_show_the_maps():
    model = distiller()
    inputs = torch.randn(2, 3, 32, 32)
    features = extract_features(model, inputs)
    pictures = pictures_of(model, inputs)
    figure = draw_maps('norm', pictures, features, 'Two images.')
    drawn = panels(figure)
    assert np.array_equal(drawn[0], pictures[0])
    assert np.allclose(drawn[1], norm_map(features[1].teacher)[0])
    assert np.allclose(drawn[2], norm_map(features[1].target)[0])
    assert np.allclose(drawn[3], norm_map(features[1].student)[0])
    assert np.allclose(drawn[7 + 4], norm_map(features[3].teacher)[1])
    first, second = (axis.images[0].get_clim() for axis in figure.axes[1:3])
    assert first == second  # before and after on one scale
    caption = next(text for text in texts(figure) if 'Two images.' in text)
    assert 'before and after' in caption.replace('\n', ' ')
    assert 'standardised' not in caption

    to_array(figure)
    for axis in figure.axes:  # no title is cut off
        box = axis.get_tightbbox()
        assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1
    rows = [axis.get_position().y0 for axis in figure.axes[:7]]
    assert max(rows) - min(rows) < 0.01  # maps stand beside their image

    figure = draw_maps('similarity', pictures, features, point=(0.9, 0.1))
    drawn = panels(figure)
    assert np.allclose(drawn[1],
                       similarity_map(features[1].teacher, (3, 0))[0])
    maps = [axis for axis in figure.axes if axis.images]
    scales = {axis.images[0].get_clim() for axis in maps
              if axis.images[0].get_array().ndim == 2}
    assert len(scales) == 1  # of all blocks
    assert len(figure.axes) == len(maps) + 1  # one colour bar
    frames = figure.axes[1].patches
    assert [frame.get_xy() for frame in frames] == [(-0.5, 2.5)] * 2

    figure = draw_maps('pca', pictures, features)
    drawn = panels(figure)
    assert len(figure.axes) == len(drawn)  # and no room for colour bars
    basis = principal_components(features[1].teacher)
    assert np.allclose(drawn[2], pca_map(features[1].target, basis)[0])
    pixels = to_array(figure)
    assert pixels.dtype == np.uint8 and pixels.shape[2] == 3
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20


@pytest.mark.parametrize('suffix, start', [
    ('.png', b'\x89PNG'), ('.svg', b'<?xml'), ('.PDF', b'%PDF')])
def test_the_suffix_chooses_the_format(tmp_path, suffix, start):
    from mmsinger.figures.style import new_figure
    figure = new_figure((2, 2))
    figure.subplots().set_title('a title')
    path = str(tmp_path / f'figure{suffix}')
    save_figure(figure, path)
    with open(path, 'rb') as file:
        content = file.read()
    assert content.startswith(start)
    assert suffix != '.svg' or b'a title' in content  # not outlines


def test_bad_output(tmp_path):
    raises(lambda: save_figure(None, 'figure.jpg'), "--out='figure.jpg'",
           '.png, .svg, .pdf')
    raises(lambda: save_figure(None, str(tmp_path / 'no' / 'figure.png')),
           'no folder')


def test_lines_differ_in_more_than_colour():
    styles = [line_style(i) for i in range(len(COLOURS))]
    for key in ('color', 'linestyle', 'marker'):
        assert len({str(style[key]) for style in styles}) == len(COLOURS)
    many = {str(line_style(i)) for i in range(49)}
    assert len(many) == 49
    grey = sorted(np.dot([int(c[i:i + 2], 16) for i in (1, 3, 5)],
                         [0.299, 0.587, 0.114]) for c in COLOURS)
    assert grey[-1] < 200  # none is lost on white paper


# -- images ------------------------------------------------------------------


def write_image(path, size=(40, 60), colour=(1, 2, 3)):
    cv2.imwrite(str(path), np.full((*size, 3), colour, np.uint8))
    return str(path)


def test_images_are_read_as_in_training(tmp_path):
    model = distiller()
    wide = write_image(tmp_path / 'a.png')
    grey = str(tmp_path / 'grey.png')
    cv2.imwrite(grey, np.full((32, 32), 7, np.uint8))
    inputs = read_images([wide, grey], model)
    assert inputs.shape == (2, 3, 32, 32)
    # (R, G, B) = (3, 2, 1), normalised
    assert inputs[0, :, 0, 0].tolist() == pytest.approx(
        [(3 - 10) / 2, (2 - 20) / 4, (1 - 30) / 8])
    pictures = pictures_of(model, inputs)
    assert (pictures[0] == [3, 2, 1]).all() and (pictures[1] == 7).all()
    assert read_images([wide], model, (16, 48)).shape == (1, 3, 16, 48)


def test_students_that_are_no_vits_have_maps(tmp_path):
    model = FitNetDistiller(
        student=dict(PLAIN, backbone=dict(
            type='mmpretrain.ResNet', depth=18, out_indices=(3, ))),
        teacher=dict(backbone=tiny.vit()), layers=(1, 3), task_loss_weight=0)
    inputs = read_images([write_image(tmp_path / 'a.png')], model, (64, 96))
    assert extract_features(model, inputs)[3].student.grid == (2, 3)


def test_grey_students_and_teachers_have_maps(tmp_path):
    backbone = tiny.vit(in_channels=1)
    model = FitNetDistiller(
        student=dict(PLAIN, backbone=backbone, data_preprocessor=dict(
            type='mmpretrain.ClsDataPreprocessor', mean=[10.], std=[2.])),
        teacher=dict(backbone=backbone), layers=(1, 3), task_loss_weight=0)
    inputs = read_images([write_image(tmp_path / 'a.png')], model)
    assert inputs.shape == (1, 1, 32, 32)
    pictures = pictures_of(model, inputs)
    assert pictures.shape == (1, 32, 32, 3)
    assert (pictures == 2).all()  # 0.299 * 3 + 0.587 * 2 + 0.114 * 1
    assert extract_features(model, inputs)[3].teacher.grid == (4, 4)


@pytest.mark.parametrize('channels', [1, 4])
def test_images_that_are_no_photographs_are_grey(channels):
    model = SimpleNamespace(
        student_normalisation=Normalisation((5., ), (2., )),
        data_preprocessor=SimpleNamespace())
    picture = pictures_of(model, torch.full((2, channels, 4, 4), 7.))
    assert picture.shape == (2, 4, 4, 3) and (picture == 19).all()


@pytest.mark.parametrize('name', ['to_rgb', '_channel_conversion',
                                  'channel_conversion'])
def test_red_is_red_whatever_the_preprocessor_calls_it(name):
    """mmpretrain's name, OneDL's mmseg's, and the original mmseg's."""
    model = SimpleNamespace(student_normalisation=Normalisation(),
                            data_preprocessor=SimpleNamespace(**{name: True}))
    red = torch.zeros(1, 3, 4, 4)
    red[:, 0] = 255
    assert (pictures_of(model, red)[0, 0, 0] == [255, 0, 0]).all()
    setattr(model.data_preprocessor, name, False)
    assert (pictures_of(model, red)[0, 0, 0] == [0, 0, 255]).all()


def test_the_middle_is_kept(tmp_path):
    image = np.zeros((32, 96, 3), np.uint8)
    image[:, 32:64] = 200
    cv2.imwrite(str(tmp_path / 'a.png'), image)
    model = distiller()
    pictures = pictures_of(model, read_images([str(tmp_path / 'a.png')],
                                              model))
    assert (pictures == 200).all()


def test_bad_images(tmp_path):
    model = distiller()
    small = write_image(tmp_path / 'small.png', (7, 90))
    raises(lambda: read_images([small], model), 'small.png', '7x90',
           'smaller than a patch of 8x8', 'larger')
    (tmp_path / 'text.png').write_text('no image')
    raises(lambda: read_images([str(tmp_path / 'text.png')], model),
           'text.png', 'cannot be read')
    raises(lambda: read_images(['no.png'], model), "'no.png'", 'no such file')
    raises(lambda: read_images([], model), 'No image files')
    fine = write_image(tmp_path / 'fine.png')
    raises(lambda: read_images([fine], model, (4, 32)), 'size 4x32')


# -- tables ------------------------------------------------------------------

HEAD = 'table,row,column,published,measured,std,seeds,difference'
ROWS = ('ViT-L, as it is', 'ViT-S, as it is', 'ViT-L -> S, FitNet',
        'ViT-L -> S, SiNGER')
VALUES = {'IN top-1': (80, 76, 72, 79), 'NYU RMSE': (0.9, 1.1, 1.0, 0.8),
          'FG top-1': (82, 77, 71, 78)}


def write_table(path, name='table1', values=VALUES, rows=ROWS, seeds=1,
                std=''):
    lines = [HEAD]
    for i, row in enumerate(rows):
        for column, numbers in values.items():
            measured = numbers[i]
            lines.append(f'{name},"{row}",{column},{1},'
                         f'{"" if measured is None else measured},{std},'
                         f'{seeds},')
    path.write_text('\n'.join(lines) + '\n')
    return str(path)


def curves_of(axis):
    return {line.get_color(): line.get_ydata() for line in axis.lines}


def test_radar_by_hand(tmp_path):
    cells = read_table(write_table(tmp_path / 'table1.csv', seeds=3), 'table1')
    figure = draw_radar(cells)
    axis, = figure.axes
    lines = curves_of(axis)
    assert len(lines) == 4
    singer, fitnet = lines[COLOURS[0]], lines[COLOURS[1]]
    assert singer.tolist() == pytest.approx(
        [0.2 + 0.8 * 7 / 8, 1., 0.2 + 0.8 * 7 / 11, 0.2 + 0.8 * 7 / 8])
    assert fitnet[0] == pytest.approx(0.2)
    labels = [label.get_text() for label in axis.get_xticklabels()]
    assert labels[1] == 'NYU RMSE\n1.1 to 0.8'
    words = ' '.join(texts(figure)).replace('\n', ' ')
    assert 'mean over 3 seeds' in words and 'ViT-L -> S' in words
    for name in ('SiNGER', 'FitNet', 'student as it is', 'teacher as it is'):
        assert name in words


def test_radar_names_what_it_leaves_out(tmp_path):
    values = {**VALUES, 'IN top-1': (80, 76, None, 79)}
    cells = read_table(write_table(tmp_path / 'table1.csv', values=values),
                       'table1')
    figure = draw_radar(cells)
    assert len(figure.axes[0].lines) == 3
    assert 'FitNet (1 of 3 missing)' in ' '.join(texts(figure)).replace(
        '\n', ' ')
    published = draw_radar(cells, 'published')
    assert len(published.axes[0].lines) == 4
    assert 'as published' in ' '.join(texts(published)).replace('\n', ' ')


def test_radar_of_nothing(tmp_path):
    values = {key: (None, ) * 4 for key in VALUES}
    cells = read_table(write_table(tmp_path / 'table1.csv', values=values),
                       'table1')
    raises(lambda: draw_radar(cells), 'no measured values', 'reproduce.py',
           '--values published')


def test_sweep_by_hand(tmp_path):
    path = write_table(
        tmp_path / 'sweep.csv', 'sweep',
        {'quantile 0.9': (3., 2., None), 'quantile 0.95': (2., 1., 4.)},
        ('rank 8', 'rank 16', 'rank 64'), seeds=2, std=0.25)
    figure = draw_sweep(read_table(path, 'sweep'))
    axis, = figure.axes
    first, second = (bars.lines[0] for bars in axis.containers)
    assert first.get_xydata().tolist() == [[8, 3], [16, 2]]
    assert second.get_xydata().tolist() == [[8, 2], [16, 1], [64, 4]]
    words = ' '.join(texts(figure)).replace('\n', ' ')
    assert 'quantile 0.95' in words and 'Bars: standard deviation' in words
    assert 'mean over 2 seeds' in words


def test_tables_that_tools_reproduce_writes(tmp_path):
    """The names of rows and columns are those of the real plans."""
    from reproduction.profiles import PROFILES
    from reproduction.report import Report
    from reproduction.tables import sweep, table1
    profile = next(iter(PROFILES.values()))
    for make in (table1, sweep):
        table = make(profile, [0])
        path = str(tmp_path / f'{table.name}.csv')
        Report(table, {}).write_csv(path)
        cells = read_table(path, table.name)
        assert all(cell.data == table.caption for cell in cells.values())
        if make is table1:
            figure = draw_radar(cells, 'published')
            assert len(figure.axes) == 4
            assert [len(axis.lines) for axis in figure.axes] == [4, 5, 5, 4]
            raises(lambda: draw_radar(cells), 'no measured values')
        else:
            raises(lambda: draw_sweep(cells), 'no measured value')


def test_bad_tables(tmp_path):
    path = write_table(tmp_path / 'table4.csv', 'table4')
    raises(lambda: read_table(path, 'table1'), 'holds table4, not table1',
           'reproduce.py')
    other = tmp_path / 'other.csv'
    other.write_text('a,b\n1,2\n')
    raises(lambda: read_table(str(other), 'table1'), "no column 'table'",
           "['a', 'b']")
    (tmp_path / 'empty.csv').write_text(HEAD)
    raises(lambda: read_table(str(tmp_path / 'empty.csv'), 'sweep'),
           'no rows', 'not sweep')
    (tmp_path / 'bytes.csv').write_bytes(b'\xff\xfe\x00')
    raises(lambda: read_table(str(tmp_path / 'bytes.csv'), 'sweep'),
           'bytes.csv')
    raises(lambda: read_table('no.csv', 'table1'), "'no.csv'", 'no such file')
    wrong = write_table(tmp_path / 'sweep.csv', 'sweep')
    raises(lambda: draw_sweep(read_table(wrong, 'sweep')), 'ViT-L',
           "'rank' and a number")


# -- training curves ---------------------------------------------------------


def write_log(folder, lines, cut=''):
    path = folder / 'vis_data'
    path.mkdir(parents=True)
    (path / 'scalars.json').write_text(
        ''.join(json.dumps(line) + '\n' for line in lines) + cut)


def test_curves_of_a_resumed_run(tmp_path):
    write_log(tmp_path / '20260101_000000', [
        dict(loss=3., lr=0.1, iter=1, step=1),
        dict(loss=2., lr=0.1, iter=2, step=2),
        dict(mIoU=10., step=2), dict(loss=9., iter=3, step=3)],
        cut='{"loss": 8.')
    write_log(tmp_path / '20260102_000000', [
        dict(loss=1., iter=3, step=3),
        {'diagnostics/cosine_3': 0.9, 'iter': 4, 'step': 4}])
    curves = read_curves(str(tmp_path))
    assert curves['loss'] == ([1, 2, 3], [3., 2., 1.], 'iteration')
    assert curves['mIoU'] == ([2], [10.], 'iteration')
    assert 'step' not in curves and 'iter' not in curves
    assert choose_keys(curves, None) == ['loss', 'mIoU']
    assert choose_keys(curves, ['diagnostics/*', 'l*']) == [
        'diagnostics/cosine_3', 'loss', 'lr']
    # a run that began anew takes the earlier one's place
    write_log(tmp_path / '20260103_000000', [
        dict(loss=5., iter=1, step=1), dict(loss=4., iter=2, step=2)])
    assert read_curves(str(tmp_path))['loss'].values == [5., 4.]
    # the folder of one start, too
    one = read_curves(str(tmp_path / '20260101_000000'))
    assert one['loss'].values == [3., 2., 9.]


def test_metrics_of_runs_in_epochs(tmp_path):
    write_log(tmp_path / 'a', [
        dict(loss=3., epoch=1, iter=50, step=50),
        {'accuracy/top1': 20., 'step': 1},
        {'diagnostics/gram_3': 20., 'iter': 80, 'step': 80}])
    curves = read_curves(str(tmp_path))
    assert curves['accuracy/top1'].unit == 'epoch'
    assert curves['loss'].unit == 'iteration'
    assert curves['diagnostics/gram_3'].unit == 'iteration'


def test_curves_are_drawn(tmp_path):
    for name, factor in (('one', 1), ('two', 2)):
        write_log(tmp_path / name / 't', [
            dict(loss=factor * i, iter=i, step=i) for i in range(1, 5)])
    dirs = [str(tmp_path / name) for name in ('one', 'two')]
    runs = dict(zip(run_names(dirs), map(read_curves, dirs)))
    figure = draw_curves(runs, ['loss'])
    axis, = figure.axes
    assert [line.get_ydata().tolist() for line in axis.lines] == [
        [1, 2, 3, 4], [2, 4, 6, 8]]
    assert {'one', 'two'} <= {text.get_text() for legend in figure.legends
                              for text in legend.get_texts()}


def test_run_names_differ():
    assert run_names(['a/x/run', 'a/y/run']) == ['x/run', 'y/run']
    assert run_names(['a/one', 'b/two/']) == ['one', 'two']
    raises(lambda: run_names(['a/one', './a/one']), 'twice')


def test_bad_work_dirs(tmp_path):
    raises(lambda: read_curves(str(tmp_path / 'no')), 'no such folder',
           '--work-dir')
    raises(lambda: read_curves(str(tmp_path)), 'holds no logs',
           'LocalVisBackend')
    write_log(tmp_path / 't', [dict(loss=1., iter=1, step=1)])
    curves = read_curves(str(tmp_path))
    raises(lambda: choose_keys(curves, ['los']), '--keys los',
           "Did you mean 'loss'")


# -- the tool ----------------------------------------------------------------


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """A recipe, a checkpoint of it, images."""
    folder = tmp_path_factory.mktemp('plot')
    tiny.workplace(folder)
    from mmengine.registry import init_default_scope

    from mmsinger.engine.prepare import load_config
    from mmsinger.registry import MODELS
    cfg = load_config(tiny.SEG_CONFIG)
    init_default_scope('mmseg')
    cfg.model.teacher.checkpoint = str(folder / 'teacher.pth')
    model = MODELS.build(cfg.model)
    model.init_weights()
    model.refinement.init_weights(model.teacher)
    torch.save(dict(state_dict=model.state_dict()), folder / 'iter_1.pth')
    return folder


def test_tool_draws_maps(place):
    for figure, *more in (('norms', ), ('similarity', '--patch', '0.2', '0.7'),
                          ('pca', )):
        result = forked.run(
            'plot.py', figure, tiny.SEG_CONFIG, 'iter_1.pth',
            'scenes/images/0.png', 'scenes/images/1.png', '--out',
            f'{figure}.svg', *more, cwd=place)
        assert f'Written to {figure}.svg' in result.stdout
        svg = (place / f'{figure}.svg').read_text()
        for word in ('block 1', 'block 3', 'tiny_seg.py', '0.png'):
            assert word in svg
        assert len(re.findall('<image', svg)) >= 14


def test_tool_names_what_is_wrong(place):
    write_image(place / 'small.png', (4, 4))
    weights = torch.load(place / 'iter_1.pth')['state_dict']
    torch.save(dict(state_dict={
        key: value for key, value in weights.items()
        if not key.startswith('adapters.')}), place / 'fitnet.pth')
    for args, words in (
            (['norms', tiny.SEG_CONFIG, 'iter_1.pth', 'small.png'],
             ['small.png', 'smaller than a patch']),
            (['norms', tiny.SEG_CONFIG, 'fitnet.pth', 'scenes/images/0.png'],
             ['fitnet.pth', 'adapters.1.down', 'config that it was trained']),
            (['similarity', tiny.SEG_CONFIG, 'iter_1.pth',
              'scenes/images/0.png', '--patch', '1', '1'],
             ['argument --patch', 'below 1']),
            (['curves', 'scenes'], ['holds no logs']),
            (['radar', 'no.csv'], ['no such file']),
            (['radar', 'no.csv', '--out', 'a.bmp'], ['.png, .svg, .pdf'])):
        result = forked.run('plot.py', *args, cwd=place, check=False)
        assert result.returncode == 1 + ('--patch' in args), result.stdout
        assert 'Traceback' not in result.stdout
        for word in words:
            assert word in result.stdout
