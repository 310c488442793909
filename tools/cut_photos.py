"""Cut a labelled data set from a folder of pictures.

    python tools/cut_photos.py PICTURES OUT

Each picture is a class. Along its longer side the first 60 % give crops for
training, the next 20 % for tuning and the rest for testing, so that no pixel
is in two of them. Small, flat and repeated pictures are left out. Written
are OUT/{train,tune,test}/CLASS/NUMBER.png, as ImageNet-like data sets have
it. The same pictures always give the same crops.
"""
import os
from typing import List, Optional

import cv2
import numpy as np
from mmengine.utils import scandir

from mmsinger.command_line import ToolParser
from mmsinger.errors import ConfigError, readable_errors
from mmsinger.files import complete_folder
from mmsinger.images import write_png
from mmsinger.schema import Count, reader

SHORT_SIDE = 720  # px, to which larger pictures are brought first
CROP = (160, 240)  # side of a crop in px
PARTS = {'train': (0., 0.6), 'tune': (0.6, 0.8), 'test': (0.8, 1.)}
SUFFIXES = ('.jpg', '.jpeg', '.png')


def parse_args():
    parser = ToolParser(__doc__)
    parser.add_argument('pictures', help='a folder, searched with all below')
    parser.add_argument('out', help='where to write; must not exist')
    parser.add_argument('--size', type=reader(Count), default=84,
                        metavar='PX', help='height and width of the crops')
    parser.add_argument('--classes', type=reader(Count), default=64,
                        metavar='N', help='how many pictures to take, evenly '
                        'spaced among those that serve')
    for part, count in dict(train=32, tune=12, test=24).items():
        parser.add_argument(f'--{part}', type=reader(Count), default=count,
                            metavar='N', help='crops of each picture')
    return parser.parse_args()


def load(path: str) -> Optional[np.ndarray]:
    """A picture, its short side at most :data:`SHORT_SIDE`; None if it
    cannot be read."""
    image = cv2.imread(path)
    if image is None:
        return None
    scale = min(1., SHORT_SIDE / min(image.shape[:2]))
    return cv2.resize(image, None, fx=scale, fy=scale,
                      interpolation=cv2.INTER_AREA)


def find(folder: str) -> List[str]:
    """Pictures that are large, detailed and unlike those before them."""
    paths, marks = [], []
    for name in sorted(scandir(folder, SUFFIXES, recursive=True,
                               case_sensitive=False)):
        path = os.path.join(folder, name)
        image = load(path)
        if image is None or min(min(image.shape[:2]), 0.2 * max(
                image.shape[:2])) < CROP[0]:
            continue
        small = cv2.resize(image, (16, 16), interpolation=cv2.INTER_AREA)
        gray = cv2.cvtColor(cv2.resize(image, (512, 512),
                                       interpolation=cv2.INTER_AREA),
                            cv2.COLOR_BGR2GRAY)
        if small.std() < 12 or cv2.Laplacian(gray, cv2.CV_64F).var() < 60:
            continue  # flat
        mark = (small - small.mean()) / small.std()
        if any((mark * other).mean() > 0.97 for other in marks):
            continue  # the same in another size
        paths.append(path)
        marks.append(mark)
    return paths


def part_of(image: np.ndarray, start: float, end: float) -> np.ndarray:
    """What lies between two places along the longer side."""
    axis = int(image.shape[1] >= image.shape[0])
    length = image.shape[axis]
    region = slice(round(start * length), round(end * length))
    return image[:, region] if axis else image[region]


def cut(image: np.ndarray, count: int, size: int, folder: str,
        random: np.random.Generator) -> None:
    """Write square crops of random place and side."""
    os.makedirs(folder)
    height, width = image.shape[:2]
    for i in range(count):
        side = random.integers(CROP[0], min(CROP[1], height, width) + 1)
        y, x = random.integers((height - side + 1, width - side + 1))
        write_png(f'{folder}/{i:03d}.png', cv2.resize(
            image[y:y + side, x:x + side], (size, size),
            interpolation=cv2.INTER_AREA))


def main():
    args = parse_args()
    if not os.path.isdir(args.pictures):
        raise ConfigError(f'{args.pictures!r} is no folder. Give one that '
                          'holds pictures.')
    if os.path.exists(args.out):
        raise ConfigError(f'{args.out!r} is there already. Remove it, or '
                          'write elsewhere.')
    found = find(args.pictures)
    if len(found) < args.classes:
        raise ConfigError(
            f'--classes {args.classes}: {args.pictures!r} has {len(found)} '
            f'pictures ({", ".join(SUFFIXES)}) that serve: distinct, detailed '
            f'and at least {CROP[0]} x {5 * CROP[0]} px, with the short side '
            f'brought down to {SHORT_SIDE} (so squares are none). Ask for '
            'fewer, or add pictures.')
    random = np.random.default_rng(0)
    with complete_folder(args.out) as out:
        for i in range(args.classes):
            image = load(found[i * len(found) // args.classes])
            for part, (start, end) in PARTS.items():
                cut(part_of(image, start, end), getattr(args, part),
                    args.size, f'{out}/{part}/p{i:03d}', random)
    print(f'{args.out}: {args.classes} classes, for each '
          + ', '.join(f'{getattr(args, part)} crops to {part}'
                      for part in PARTS))


if __name__ == '__main__':
    with readable_errors():
        main()
