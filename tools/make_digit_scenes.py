"""Make the built-in data: scenes of real handwritten digits, three tasks.

    python tools/make_digit_scenes.py

See mmsinger/datasets/digit_scenes.py for what is written.
"""
import argparse
import time

from mmsinger.datasets import make_digit_scenes
from mmsinger.errors import readable_errors


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--root', default='data/digit_scenes',
                        help='the folder to make')
    parser.add_argument('--num-train', type=int, default=12000,
                        help='number of training scenes')
    parser.add_argument('--num-val', type=int, default=1000,
                        help='number of validation scenes')
    parser.add_argument('--canvas', type=int, default=32,
                        help='height and width of a scene in pixels')
    parser.add_argument('--digit-size', type=float, nargs=2,
                        default=(13., 18.), metavar=('MIN', 'MAX'),
                        help='range of the size of a digit in pixels')
    parser.add_argument('--max-digits', type=int, default=2,
                        help='most digits in a scene')
    parser.add_argument('--val-fraction', type=float, default=0.2,
                        help='share of the digits kept for validation')
    parser.add_argument('--seed', type=int, default=0,
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
