"""Make the built-in data: scenes of real handwritten digits, three tasks.

    python tools/make_digit_scenes.py

One or two of scikit-learn's 1,797 digits (8x8 px) stand before a slanted,
textured wall. Nearer digits are larger and hide farther ones, and everything
gets darker with distance. The stock datasets read what is written::

    root/
    ├── digit_scenes.json              settings, and the digits of each split
    ├── images/{training,validation}/scene_000000.png       8-bit colour
    ├── annotations/{training,validation}/scene_000000.png  8-bit classes
    ├── depth/{training,validation}/scene_000000.png        16-bit millimetres
    └── meta/{train,val,train_longtail,train_imbalance*}.txt "file label"

Of the long-tailed lists digit c keeps the share r^c of its training scenes:
0.6^c of all in train_longtail.txt, and in train_imbalance{10,50,100}.txt such
that the rarest digit is a tenth, a fiftieth and a hundredth of the commonest,
without the last sixth of the scenes, on which settings are tuned.
"""
import contextlib
import json
import math
import os
import time
from itertools import combinations
from typing import Annotated, Dict, List, Tuple

import numpy as np
from mmengine.logging import print_log

from mmsinger.command_line import ToolParser
from mmsinger.errors import ConfigError, readable_errors
from mmsinger.files import complete_folder, write_text
from mmsinger.images import write_png
from mmsinger.schema import (Count, Positive, Quantile, Range, Seed,
                             check_value, hints_of, reader)

DIGIT_SCENES_CLASSES = ('background', '0', '1', '2', '3', '4', '5', '6', '7',
                        '8', '9')
DIGIT_SCENES_PALETTE = [[40, 40, 40], [230, 25, 75], [60, 180, 75],
                        [255, 225, 25], [0, 130, 200], [245, 130, 48],
                        [145, 30, 180], [70, 240, 240], [240, 50, 230],
                        [170, 255, 195], [250, 190, 212]]

MARKER = 'digit_scenes.json'
SPLITS = {'training': 'train', 'validation': 'val'}  # folder, list in meta/
# By name: what a digit keeps of the share of the one before, and the scenes
# that are left out
LONGTAILS = {'longtail': (0.6, 0.),
             **{f'imbalance{ratio}': (ratio**(-1 / 9), 1 / 6)
                for ratio in (10, 50, 100)}}
FORMAT = 3  # raise it when the same settings give other scenes

PIXEL_METRES = 48.  # size of a digit [px] = 48 / its distance [m]
WALL_METRES = 8.
INK_THRESHOLD = 0.25
Side = Annotated[float, Range(8)]  # of a digit in px, which has 8 x 8


def make_digit_scenes(root: str,
                      num_train: Count = 12000,
                      num_val: Count = 1000,
                      canvas: Annotated[int, Range(16)] = 32,
                      digit_size: Tuple[Side, Side] = (13., 18.),
                      max_digits: Annotated[int, Range(1, 4)] = 2,
                      val_fraction: Annotated[float, Range(0.01, 0.99)] = 0.2,
                      seed: Seed = 0) -> bool:
    """Compose the scenes and write them to disk.

    The digits are split before composing: none is in both splits. Scene i of
    a split depends on the seed and i alone, so a smaller set is the beginning
    of a larger one. The folder appears under its name only when it is
    complete.

    Args:
        root (str): The folder to make.
        num_train (int): Number of training scenes. Defaults to 12000.
        num_val (int): Number of validation scenes. Defaults to 1000.
        canvas (int): Height and width of a scene in pixels. Defaults to 32.
        digit_size (tuple[float, float]): Smallest and largest size of a
            digit's 8x8 field in pixels; a digit of s pixels is 48 / s metres
            away. Defaults to (13, 18).
        max_digits (int): A scene holds 1 to ``max_digits`` digits, each
            number as often as the others. Defaults to 2.
        val_fraction (float): Share of the 1,797 digits kept for validation
            scenes. Defaults to 0.2.
        seed (int): Seed of the split and of the scenes. Defaults to 0.

    Returns:
        bool: True if the scenes were made, False if ``root`` already held
        them with the same settings.

    Raises:
        ConfigError: If scikit-learn is not installed, a setting is out of
            range, or ``root`` holds something else or cannot be written.
    """
    settings = dict(
        num_train=num_train, num_val=num_val, canvas=canvas,
        digit_size=[float(s) for s in digit_size], max_digits=max_digits,
        val_fraction=val_fraction, seed=seed)
    hints = hints_of(make_digit_scenes)
    for key, value in settings.items():
        check_value(f'make_digit_scenes.{key}', value, hints[key])
    if not digit_size[0] <= digit_size[1] <= canvas:
        raise ConfigError(
            f'make_digit_scenes.digit_size={digit_size!r}: give the smallest '
            f'and the largest, at most canvas={canvas} px.')
    settings['format'] = FORMAT
    root = os.path.realpath(root)
    if _is_complete(root, settings):
        with contextlib.suppress(PermissionError):  # of an older folder
            _write_longtails(os.path.join(root, 'meta'))
        return False

    images, labels = _load_digits()
    pools = dict(zip(SPLITS, split_digits(val_fraction, seed)))
    try:
        with complete_folder(root) as partial:
            used = {}
            for number, (split, name) in enumerate(SPLITS.items()):
                total = num_train if split == 'training' else num_val
                used[split] = _write_split(
                    partial, split, name, total, images, labels,
                    pools[split], settings, [seed, number])
            _write_longtails(os.path.join(partial, 'meta'))
            with open(os.path.join(partial, MARKER), 'w') as file:
                json.dump(dict(settings=settings, digits=used), file)
    except OSError as error:
        if _is_complete(root, settings):
            return False  # another process was faster
        raise ConfigError(f'root={root!r} cannot be written: {error}. Choose '
                          'another root, or mend what is wrong.') from error
    return True


def split_digits(val_fraction: float = 0.2,
                 seed: int = 0) -> Tuple[np.ndarray, np.ndarray]:
    """Split scikit-learn's digits between training and validation scenes.

    Args:
        val_fraction (float): Share of the digits for validation. Defaults to
            0.2.
        seed (int): Seed of the permutation. Defaults to 0.

    Returns:
        tuple[ndarray, ndarray]: Indices into ``load_digits().images`` for
        training and validation, int64, ascending, disjoint.

    Raises:
        ConfigError: If scikit-learn is not installed.
    """
    total = len(_load_digits()[1])
    order = np.random.default_rng(seed).permutation(total)
    num_val = round(val_fraction * total)
    return np.sort(order[num_val:]), np.sort(order[:num_val])


def compose_scene(images: np.ndarray, canvas: int,
                  digit_size: Tuple[float, float], rng: np.random.Generator
                  ) -> Tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Place digits before a wall.

    Args:
        images (ndarray): The digits, [n, 8, 8] float32, ink in [0, 1].
        canvas (int): Height and width of the scene in pixels.
        digit_size (tuple[float, float]): Smallest and largest size of a digit
            in pixels.
        rng (Generator): Source of all randomness.

    Returns:
        tuple: Colours [canvas, canvas, 3] uint8; visible digit of each pixel
        [canvas, canvas] int64, an index into ``images`` or -1 for the wall;
        depth [canvas, canvas] float64 in metres; index of the nearest digit.
    """
    colours, depth = _wall(canvas, rng)
    visible = np.full((canvas, canvas), -1)
    distances = PIXEL_METRES / rng.uniform(*digit_size, size=len(images))
    far_to_near = np.argsort(-distances)
    centres = _centres(PIXEL_METRES / distances, canvas, rng)
    for i in far_to_near:
        ink = _place(images[i], PIXEL_METRES / distances[i], centres[i],
                     rng.uniform(-12, 12), canvas)
        colour = rng.uniform(0.6, 1, 3)
        alpha = np.clip(ink * 1.5, 0, 1)[..., None]
        colours = colours * (1 - alpha) + colour * alpha
        hit = ink > INK_THRESHOLD
        visible[hit] = i
        depth[hit] = distances[i]
    fog = 1 - 0.04 * depth[..., None]
    noise = rng.normal(0, 0.03, colours.shape)
    colours = np.clip(colours * fog + noise, 0, 1) * 255
    return colours.astype(np.uint8), visible, depth, int(far_to_near[-1])


def _wall(canvas: int, rng) -> Tuple[np.ndarray, np.ndarray]:
    """A dark textured wall and its slanted depth in metres (6.5 to 9.5)."""
    import cv2
    ramp = np.linspace(-0.5, 0.5, canvas)
    slope_y, slope_x = rng.uniform(-1.5, 1.5, 2)
    depth = WALL_METRES + slope_y * ramp[:, None] + slope_x * ramp
    texture = cv2.resize(
        rng.uniform(-0.1, 0.1, (4, 4, 3)).astype(np.float32),
        (canvas, canvas), interpolation=cv2.INTER_CUBIC)
    return rng.uniform(0.1, 0.35, 3) + texture, depth


def _centres(sizes: np.ndarray, canvas: int, rng) -> np.ndarray:
    """Centres (x, y) inside the canvas, if possible far enough apart that no
    digit hides most of another."""
    margin = np.minimum(sizes[:, None] / 2, canvas / 2)
    for _ in range(20):
        centres = rng.uniform(margin, canvas - margin, (len(sizes), 2))
        gaps = [math.dist(*pair) for pair in combinations(centres, 2)]
        if min(gaps, default=canvas) > 0.75 * sizes.mean():
            break
    return centres


def _place(image: np.ndarray, size: float, centre: np.ndarray, degrees: float,
           canvas: int) -> np.ndarray:
    """Scale, rotate and shift one digit onto the canvas."""
    import cv2
    middle = (image.shape[0] - 1) / 2
    matrix = cv2.getRotationMatrix2D((middle, middle), degrees,
                                     size / image.shape[0])
    matrix[:, 2] += centre - 0.5 - middle
    return cv2.warpAffine(image, matrix, (canvas, canvas))


def _write_split(root: str, split: str, name: str, total: int,
                 images: np.ndarray, labels: np.ndarray, pool: np.ndarray,
                 settings: Dict, seeds: List[int]) -> List[int]:
    """Write one split; returns the digits that are in it, ascending."""
    folders = [os.path.join(root, kind, split)
               for kind in ('images', 'annotations', 'depth')]
    for folder in folders + [os.path.join(root, 'meta')]:
        os.makedirs(folder, exist_ok=True)
    used, lines = set(), []
    for index in range(total):
        rng = np.random.default_rng(seeds + [index])
        count = rng.integers(1, settings['max_digits'] + 1)
        digits = rng.choice(pool, count, replace=False)
        colours, visible, depth, nearest = compose_scene(
            images[digits], settings['canvas'], settings['digit_size'], rng)
        # visible is -1 at the wall and picks the appended class 0.
        classes = np.append(labels[digits] + 1, 0)[visible]
        file = f'scene_{index:06d}.png'
        for folder, picture in zip(folders, (
                colours, classes.astype(np.uint8),
                np.round(depth * 1000).astype(np.uint16))):
            write_png(os.path.join(folder, file), picture)
        used.update(digits.tolist())
        lines.append(f'{file} {labels[digits[nearest]]}\n')
        if (index + 1) % 2000 == 0 or index + 1 == total:
            print_log(f'digit scenes, {split}: {index + 1}/{total}',
                      logger='current')
    with open(os.path.join(root, 'meta', f'{name}.txt'), 'w') as file:
        file.writelines(lines)
    return sorted(used)


def _write_longtails(folder: str) -> None:
    """The beginning of each digit's scenes, in the order of the whole; lists
    that are there stay."""
    with open(os.path.join(folder, 'train.txt')) as file:
        scenes = file.readlines()
    for name, (ratio, left_out) in LONGTAILS.items():
        path = os.path.join(folder, f'train_{name}.txt')
        if os.path.exists(path):
            continue
        lines = scenes[:len(scenes) - int(len(scenes) * left_out)]
        digits = [int(line.split()[1]) for line in lines]
        left = {digit: math.ceil(round(digits.count(digit) * ratio**digit, 6))
                for digit in set(digits)}
        kept = []
        for digit, line in zip(digits, lines):
            if left[digit]:
                left[digit] -= 1
                kept.append(line)
        write_text(''.join(kept), path)


def _load_digits() -> Tuple[np.ndarray, np.ndarray]:
    """Ink [1797, 8, 8] float32 in [0, 1], and the labels [1797] int64."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ConfigError(
            "The digit scenes are made from scikit-learn's digits, and "
            'scikit-learn is not installed. Fix: pip install scikit-learn'
        ) from error
    digits = load_digits()
    return (digits.images / 16).astype(np.float32), digits.target


def _is_complete(root: str, settings: Dict) -> bool:
    """Whether ``root`` holds these scenes; refuse it if it holds others."""
    if not os.path.exists(root) or (os.path.isdir(root)
                                    and not os.listdir(root)):
        return False
    fix = 'Remove it, or choose another root.'
    try:
        with open(os.path.join(root, MARKER)) as file:
            found = json.load(file)['settings']
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f'root={root!r} exists, but its {MARKER} is missing or damaged: '
            f'it is incomplete, or holds something else. {fix}') from error
    differing = [f'{key}={found.get(key)!r} (asked for {value!r})'
                 for key, value in settings.items()
                 if found.get(key) != value]
    if differing:
        raise ConfigError(f'root={root!r} holds digit scenes with other '
                          f'settings: {", ".join(differing)}. {fix}')
    return True


def parse_args():
    parser = ToolParser(__doc__)
    parser.add_argument('--root', default='data/digit_scenes',
                        help='the folder to make')
    parser.add_argument('--num-train', type=reader(Count), default=12000,
                        help='number of training scenes')
    parser.add_argument('--num-val', type=reader(Count), default=1000,
                        help='number of validation scenes')
    parser.add_argument('--canvas', type=reader(Count), default=32,
                        help='height and width of a scene in pixels')
    parser.add_argument('--digit-size', type=reader(Positive), nargs=2,
                        default=(13., 18.), metavar=('MIN', 'MAX'),
                        help='range of the size of a digit in pixels')
    parser.add_argument('--max-digits', type=reader(Count), default=2,
                        help='most digits in a scene')
    parser.add_argument('--val-fraction', type=reader(Quantile), default=0.2,
                        help='share of the digits kept for validation')
    parser.add_argument('--seed', type=reader(Seed), default=0,
                        help='seed of the split and the scenes')
    return parser.parse_args()


def main():
    args = parse_args()
    start = time.time()
    made = make_digit_scenes(**vars(args))
    print(f'{args.root}: made in {time.time() - start:.0f} s' if made else
          f'{args.root}: already there with these settings')


if __name__ == '__main__':
    with readable_errors():
        main()
