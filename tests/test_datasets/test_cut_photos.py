import cut_photos
import cv2
import numpy as np
import pytest

from mmsinger.errors import ConfigError


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    """Three that serve (one upright), one twice, one flat, one small."""
    root = tmp_path_factory.mktemp('pictures')
    random = np.random.default_rng(0)
    (root / 'more').mkdir()
    for name, (height, width) in {
            'a.png': (200, 900), 'more/b.JPG': (300, 1000),
            'c.jpeg': (900, 200), 'small.png': (100, 900)}.items():
        coarse = random.integers(0, 256, (16, 16, 3)).astype(np.uint8)
        image = cv2.resize(coarse, (width, height),
                           interpolation=cv2.INTER_NEAREST)
        cv2.imwrite(str(root / name), image)
    cv2.imwrite(str(root / 'a_again.png'), cv2.resize(
        cv2.imread(str(root / 'a.png')), (1800, 400)))
    cv2.imwrite(str(root / 'flat.png'), np.full((200, 900, 3), 99, np.uint8))
    (root / 'broken.png').write_bytes(b'no picture')
    return root


def test_only_pictures_that_serve_are_taken(pictures):
    assert [path.split('/')[-1] for path in cut_photos.find(str(pictures))] \
        == ['a.png', 'c.jpeg', 'b.JPG']


@pytest.mark.parametrize('shape', [(200, 900, 3), (900, 200, 3)])
def test_parts_share_no_pixel_and_miss_none(shape):
    image = np.arange(np.prod(shape)).reshape(shape)
    parts = [cut_photos.part_of(image, *ends)
             for ends in cut_photos.PARTS.values()]
    found = np.concatenate([part.ravel() for part in parts])
    assert sorted(found) == list(range(image.size))


@pytest.fixture
def cut(pictures, monkeypatch, tmp_path):
    def run(out, *options):
        monkeypatch.setattr('sys.argv', [
            'cut_photos.py', str(pictures), str(tmp_path / out), *options])
        cut_photos.main()
        return sorted((tmp_path / out).rglob('*.png'))
    return run


def test_what_is_written(cut):
    options = ('--classes', '3', '--train', '3', '--tune', '1', '--test', '2',
               '--size', '28')
    files = cut('out', *options)
    assert [f'{path.parts[-3]}/{path.parts[-2]}' for path in files] == \
        [f'{part}/p00{i}' for part, count in
         (('test', 2), ('train', 3), ('tune', 1)) for i in range(3)
         for _ in range(count)]
    assert all(cv2.imread(str(path)).shape == (28, 28, 3) for path in files)
    assert [path.read_bytes() for path in cut('again', *options)] == \
        [path.read_bytes() for path in files]


@pytest.mark.parametrize('out, options, words', [
    ('new', ('--classes', '9'), 'has 3 pictures .* Ask for fewer'),
    ('.', (), 'is there already'),
])
def test_what_cannot_be_done_is_said(cut, out, options, words):
    with pytest.raises(ConfigError, match=words):
        cut(out, *options)


def test_a_full_disk_leaves_nothing(cut, tmp_path, monkeypatch):
    monkeypatch.setattr(cv2, 'imwrite', lambda *_: False)
    with pytest.raises(OSError, match='is the disk full'):
        cut('out', '--classes', '1')
    assert not list(tmp_path.glob('out*'))
