"""Teacher tokens in files: the right ones, or new ones."""
import copy
import os
import shutil
import tempfile

import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from test_teacher_memory import FAMILIES, ONE_SIZE, step

import mmsinger.models.teachers.record_files as record_files
from mmsinger.errors import ConfigError
from mmsinger.engine.loading import load_distiller
from mmsinger.models import FrozenTeacher, SiNGERDistiller
from mmsinger.models.teachers.frozen import Normalisation
from tiny import vit, write_teacher

PLAIN = Normalisation(None, None)
IMAGES = torch.randn(5, 3, 32, 48, generator=torch.Generator().manual_seed(1))
VALUES = 25 * 32  # of an image and a layer: CLS and 4 x 6 patches


class Counted:
    """A teacher of one seed, as one process has it, and how many images its
    backbone was run on."""

    def __init__(self, folder, remember=100, seed=0, dtype='bfloat16',
                 **kwargs):
        torch.manual_seed(seed)
        self.teacher = FrozenTeacher(
            backbone=vit(**kwargs), remember=remember, remember_dtype=dtype,
            remember_in=folder and str(folder))
        with torch.no_grad():
            for parameter in self.teacher.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        self.seen = 0
        self.teacher.backbone.register_forward_pre_hook(self._count)

    def _count(self, module, args):
        self.seen += len(args[0])

    def __call__(self, images=IMAGES, layers=(1, 2)):
        taps = self.teacher(images, layers, PLAIN)
        return {layer: taps.tokens(layer).values for layer in layers}


def equal(first, second):
    return first.keys() == second.keys() and all(
        torch.equal(first[layer], second[layer]) for layer in first)


def folders(path):
    return sorted(os.listdir(path))


def files(path, extension='.records'):
    return sorted(os.path.join(folder, name)
                  for folder, _, names in os.walk(path) for name in names
                  if name.endswith(extension))


def logged(caplog, work):
    logger = MMLogger.get_instance('tokens')
    logger.addHandler(caplog.handler)
    try:
        work()
    finally:
        logger.removeHandler(caplog.handler)
    found = [r for r in caplog.records if 'remember_in' in r.getMessage()]
    caplog.clear()
    return [(r.levelname, r.getMessage()) for r in found]


def distiller(name, folder=None, **kwargs):
    torch.manual_seed(0)
    model = SiNGERDistiller(
        student=vit(), task_loss_weight=0, teacher=dict(
            backbone=FAMILIES[name], layers=(1, 3), remember=10 * bool(folder),
            remember_in=folder and str(folder), **kwargs))
    model.init_weights()
    model.initialise_adapters()
    for adapter in model.adapters.values():
        torch.nn.init.normal_(adapter.down, std=0.1)
    model.eval()
    return model


@pytest.mark.parametrize('name', FAMILIES)
def test_losses_are_the_same(name, tmp_path):
    """In the run that fills it, and in one that finds all. Block 2 is run
    again, with what it received beside tokens."""
    data = torch.randn(4, 3, 32, 32)
    batches = [data[[0, 1]], data[[1, 2]], data[[3, 0, 0]]]
    plain = distiller(name)
    expected = [step(plain, images)[0] for images in batches]
    for run in range(2):
        model = distiller(name, tmp_path, remember_dtype='float32')
        seen = []
        model.teacher.backbone.register_forward_pre_hook(
            lambda module, args: seen.append(len(args[0])))
        for images, losses in zip(batches, expected):
            found, _ = step(model, images)
            for key, value in losses.items():
                assert torch.allclose(found[key], value, atol=1e-5), key
        assert sum(seen) == (1 if run else 5)
    assert len(files(tmp_path)) == 1


@pytest.mark.parametrize('name', ['plain'])
def test_rounding_hardly_changes_losses(name, tmp_path):
    data = torch.randn(4, 3, 32, 32)
    expected, _ = step(distiller(name), data)
    for _ in range(2):
        found, _ = step(distiller(name, tmp_path), data)
        for key, value in expected.items():
            assert torch.allclose(found[key], value, rtol=1e-2), key


def test_tokens_are_rounded_from_the_start(tmp_path):
    exact = Counted(None, remember=0)()
    first = Counted(tmp_path)
    new = first()
    for layer, values in exact.items():
        assert new[layer].dtype == torch.float32
        torch.testing.assert_close(new[layer], values.bfloat16().float(),
                                   rtol=2**-7, atol=1e-6)
        assert torch.equal(new[layer], new[layer].bfloat16().float())
        assert ((new[layer] - values) / values).abs().max() < 2**-8 + 1e-4
    assert first.seen == 1 + 5
    order = [3, 1, 4, 1]
    assert equal(first(IMAGES[order]),
                 {layer: values[order] for layer, values in new.items()})
    again = Counted(tmp_path)
    assert equal(again(), new)
    assert (first.seen, again.seen) == (6, 1)
    assert os.path.getsize(*files(tmp_path)) == 5 * 2 * VALUES * 2


def test_float32_files_are_exact(tmp_path):
    exact = Counted(None, remember=9)
    torch.testing.assert_close(exact(), Counted(tmp_path, dtype='float32')())
    assert equal(Counted(tmp_path, dtype='float32')(),
                 Counted(tmp_path, dtype='float32')())


@pytest.mark.parametrize('change', [
    dict(seed=1), dict(dtype='float32'), dict(pre_norm=True),
    dict(final_norm=False),
    dict(arch=dict(embed_dims=32, num_layers=4, num_heads=2,
                   feedforward_channels=64)),
], ids=lambda change: next(iter(change)))
def test_another_teacher_has_other_tokens(tmp_path, change):
    Counted(tmp_path)()
    other = Counted(tmp_path, **change)
    other()
    assert other.seen == 6
    assert len(folders(tmp_path)) == 2


def test_one_changed_weight_is_noticed(tmp_path):
    Counted(tmp_path)()
    changed = Counted(tmp_path)
    with torch.no_grad():
        changed.teacher.backbone.layers[0].attn.qkv.bias[-1] += 1e-4
    changed()
    assert changed.seen == 6


def test_where_the_weights_come_from_does_not_matter(tmp_path):
    """Content, not path; and other content at the same path."""
    tokens = tmp_path / 'tokens'
    seen = []
    for name, seed in (('a', 0), ('b', 0), ('b', 1)):
        path = str(tmp_path / f'{name}.pth')
        write_teacher(path, vit(), '', seed)
        teacher = FrozenTeacher(
            backbone=vit(init_cfg=dict(type='Pretrained', checkpoint=path)),
            remember=9, remember_in=tokens)
        teacher.load_weights()
        teacher.backbone.register_forward_pre_hook(
            lambda module, args: seen.append(len(args[0])))
        teacher(IMAGES, (1, ), PLAIN)
    assert seen == [1, 5, 1, 1, 5]


def test_what_else_makes_other_tokens(tmp_path):
    """Layers, image size, precision, and preprocessing through the pixels."""
    teacher = Counted(tmp_path)
    count = 0
    for images, layers in (
            (IMAGES, (1, 2)), (IMAGES, (1, 3)), (IMAGES, (1, )),
            (IMAGES.transpose(2, 3), (1, 2))):
        expected = {layer: values.bfloat16().float() for layer, values in
                    Counted(None, remember=0)(images, layers).items()}
        for _ in range(2):
            torch.testing.assert_close(
                teacher(images, layers), expected, rtol=2**-7, atol=1e-6)
        count += 1
        assert teacher.seen == 6 * count
        assert len(folders(tmp_path)) == count
    teacher(IMAGES, (3, 1))  # the same ones
    assert teacher.seen == 6 * count
    with torch.autocast('cpu', torch.bfloat16):
        assert teacher()[1].dtype == Counted(None, remember=0)()[1].dtype
        assert Counted(tmp_path)()[1].dtype == torch.float32
    assert teacher.seen == 6 * (count + 1)
    teacher.teacher.double()
    assert teacher(IMAGES.double())[1].dtype == torch.float64
    assert teacher.seen == 6 * (count + 2)
    assert len(folders(tmp_path)) == count + 2
    teacher.teacher.float()
    teacher(IMAGES + 1e-6)
    assert len(folders(tmp_path)) == count + 2
    assert teacher.seen == 6 * (count + 2) + 5


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
def test_teachers_of_another_precision(tmp_path, dtype):
    found = []
    for _ in range(2):
        teacher = Counted(tmp_path)
        teacher.teacher.to(dtype)
        found += [teacher(IMAGES.to(dtype)), teacher(IMAGES.to(dtype))]
    assert teacher.seen == 1
    for tokens in found:
        assert tokens[1].dtype == dtype
        assert equal(tokens, found[0])


def test_teacher_dtype(tmp_path):
    """Each precision has its own, also where autocast looks the same."""
    found = {}
    for count, dtype in enumerate((None, 'fp32', 'bf16'), 1):
        for _ in range(2):
            torch.manual_seed(0)
            model = SiNGERDistiller(
                student=vit(), task_loss_weight=0, teacher_dtype=dtype,
                teacher=dict(backbone=vit(), layers=(1, 3), remember=9,
                             remember_in=tmp_path))
            model.load_teacher()
            with torch.autocast('cpu', torch.bfloat16):
                taps = model.run_teacher(IMAGES)
            values = taps.tokens(3).values
            assert torch.equal(found.setdefault(dtype, values), values)
        assert len(folders(tmp_path)) == count
    assert not torch.equal(found[None], found['fp32'])


@pytest.mark.parametrize('name', [n for n in FAMILIES if n not in ONE_SIZE])
def test_sizes_may_alternate(name, tmp_path):
    sizes = [torch.randn(2, 3, 32, 32), torch.randn(2, 3, 32, 48),
             torch.randn(1, 3, 48, 32)]
    plain = distiller(name)
    expected = [step(plain, images)[0] for images in sizes]
    model = distiller(name, tmp_path, remember_dtype='float32')
    for _ in range(2):
        for images, losses in zip(sizes, expected):
            found, _ = step(model, images)
            for key, value in losses.items():
                assert torch.allclose(found[key], value, atol=1e-5), key
    assert len(folders(tmp_path)) == 3


def test_capacity_counts_what_was_found(tmp_path):
    Counted(tmp_path, remember=2)()
    assert len(files(tmp_path)) == 1
    second = Counted(tmp_path, remember=4)
    second()
    assert second.seen == 1 + 3
    third = Counted(tmp_path, remember=4)
    for count in (2, 3):
        found = third()
        assert third.seen == count  # the last one each time
    assert torch.equal(found[1], found[1].bfloat16().float())
    # of all sizes together
    third(IMAGES.transpose(2, 3))
    assert third.seen == 3 + 6
    assert sum(map(os.path.getsize, files(tmp_path))) == 4 * 2 * VALUES * 2
    # a smaller one uses what is there
    fourth = Counted(tmp_path, remember=1)
    fourth(IMAGES[:4])
    assert fourth.seen == 1


def test_processes_share(tmp_path):
    """As in distributed training: other images, the same ones later on."""
    first, second = Counted(tmp_path), Counted(tmp_path)
    ours, theirs = first(IMAGES[:3]), second(IMAGES[3:])
    assert (first.seen, second.seen) == (4, 3)
    assert equal(first(IMAGES[3:]), theirs)
    assert equal(second(IMAGES[:3]), ours)
    assert (first.seen, second.seen) == (4, 3)
    assert len(files(tmp_path)) == 2 and len(folders(tmp_path)) == 1


def test_it_goes_on_where_it_was_interrupted(tmp_path):
    first = Counted(tmp_path)()
    path, = files(tmp_path)
    os.truncate(path, os.path.getsize(path) * 3 // 5 - 1)
    second = Counted(tmp_path)
    found = second()
    assert second.seen == 1 + 3
    third = Counted(tmp_path)
    assert equal(third(), found)
    assert third.seen == 1
    for layer in first:
        torch.testing.assert_close(found[layer], first[layer], rtol=2**-7,
                                   atol=1e-6)


@pytest.mark.parametrize('after', [0, 1, 5])
def test_a_disk_that_becomes_full(tmp_path, monkeypatch, caplog, after):
    write, left = record_files._write, [after]

    def limited(*args):
        if not left[0]:
            raise OSError(28, 'No space left on device')
        left[0] -= 1
        write(*args)

    monkeypatch.setattr(record_files, '_write', limited)
    teacher = Counted(tmp_path)
    found = []
    said = logged(caplog, lambda: found.extend(teacher() for _ in range(3)))
    warned = [text for level, text in said if level == 'WARNING']
    assert len(warned) == 1
    for word in (f"teacher.remember_in='{tmp_path}'", 'No space left'):
        assert word in warned[0]
    kept = after // 2  # a record and its key
    assert teacher.seen == 1 + 5 + 2 * (5 - kept)
    exact = Counted(None, remember=0)()
    for tokens in found:
        torch.testing.assert_close(tokens, {
            layer: values.bfloat16().float() for layer, values in
            exact.items()}, rtol=2**-7, atol=1e-6)
    monkeypatch.undo()
    again = Counted(tmp_path)
    again()
    assert again.seen == 1 + 5 - kept


def test_a_folder_that_can_only_be_read(tmp_path, monkeypatch, caplog):
    Counted(tmp_path)(IMAGES[:3])

    def refuse(*args, **kwargs):
        raise PermissionError(13, 'Permission denied')

    with monkeypatch.context() as patch:  # root may write anywhere
        patch.setattr(tempfile, 'TemporaryFile', refuse)
        teacher = Counted(tmp_path)
        said = logged(caplog, teacher.teacher.memory.check)
    assert [level for level, _ in said] == ['WARNING']
    assert 'Permission denied' in said[0][1]
    for count in (3, 5):
        teacher()
        assert teacher.seen == count
    assert len(files(tmp_path)) == 1


def test_no_folder_is_an_error_before_training(tmp_path):
    (tmp_path / 'file').touch()
    for folder in (tmp_path / 'file', tmp_path / 'file' / 'tokens'):
        teacher = Counted(folder).teacher
        with pytest.raises(ConfigError) as error:
            teacher.load_weights()
        for word in ('teacher.remember_in', str(folder), 'leave it out'):
            assert word in str(error.value)


def test_a_folder_that_is_lost_on_the_way(tmp_path):
    teacher = Counted(tmp_path / 'tokens')
    expected = teacher()
    shutil.rmtree(tmp_path / 'tokens')
    for _ in range(2):
        torch.testing.assert_close(teacher(), expected, rtol=2**-7, atol=1e-6)
    assert equal(teacher(IMAGES.flip(3)), teacher(IMAGES.flip(3)))


def test_tokens_that_are_not_finite_are_not_kept(tmp_path):
    teacher = Counted(tmp_path)
    images = IMAGES.clone()
    images[2, 0, 0, 0] = float('nan')
    for _ in range(2):
        assert teacher(images)[1][2].isnan().any()
    assert teacher.seen == 1 + 5 + 1
    again = Counted(tmp_path)
    again(images)
    assert again.seen == 2


def test_the_log_says_how_many_were_found(tmp_path, caplog):
    for count in (0, 5):
        teacher = Counted(tmp_path)
        said = logged(caplog, lambda: [
            teacher(), teacher(), teacher(IMAGES.transpose(2, 3))])
        assert len(said) == 1 and said[0][0] == 'INFO'
        for word in (f'tokens of {count} images', 'up to 100', '3,200 bytes'):
            assert word in said[0][1]


def test_too_little_space_is_told_at_the_start(tmp_path, caplog):
    teacher = Counted(tmp_path, remember=10**15)
    said = logged(caplog, teacher)
    assert [level for level, _ in said] == ['INFO', 'WARNING']
    assert f'{3200 * 10**15:,} bytes' in said[1][1]


def test_what_is_remembered_cannot_be_changed_from_outside(tmp_path):
    teacher = Counted(tmp_path)
    first = teacher()
    expected = copy.deepcopy(first)
    for layer in first:
        first[layer].zero_()
    again = teacher()
    assert equal(again, expected)
    again[1].zero_()
    assert equal(teacher(), expected)


def test_nothing_is_touched_without(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    teacher = FrozenTeacher(backbone=vit(), remember=0, remember_in='tokens')
    teacher.load_weights()
    teacher(IMAGES, (1, ), PLAIN)
    FrozenTeacher(backbone=vit(), remember=9, remember_in='tokens')
    cfg = Config(dict(model=dict(
        type='mmsinger.FitNetDistiller', student=vit(), layers=(1, 3),
        task_loss_weight=0, teacher=dict(
            backbone=vit(), remember=10, remember_in='tokens'))))
    load_distiller(cfg)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize('key, value', [
    ('remember_in', ''), ('remember_in', 3), ('remember_in', True),
    ('remember_dtype', 'float16'), ('remember_dtype', torch.float32)])
def test_errors(key, value):
    with pytest.raises(ConfigError, match=rf'teacher\.{key}='):
        FrozenTeacher(backbone=vit(), remember=9, **{key: value})
