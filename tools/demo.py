"""The main job on built-in data: a teacher with artifacts, and what they cost.

    python tools/demo.py

Makes scenes of real handwritten digits, plants artifacts into the features of
a small ViT that was trained on them, and distils a smaller one without labels:
by FitNet, by SiNGER, and with the robust preset, each with learning rates that
a search found. Compares them by linear probes on digits that none of them has
seen, draws what they see, and writes a report on the teacher. What is finished
is kept: a second run only shows it again.
"""
import os
import subprocess
import sys
import time

import mmsinger  # noqa: F401  (before torchvision: see mmsinger.compat)
from mmengine.runner import find_latest_checkpoint

from mmsinger import paths
from mmsinger.command_line import ToolParser
from mmsinger.engine.loading import load_distiller, open_config
from mmsinger.errors import TrainingError, readable_errors
from mmsinger.export import student_path
from mmsinger.figures import (Column, draw_columns, extract_features, norm_map,
                              pca_map, pictures_of, principal_components,
                              save_figure)
from mmsinger.schema import Count, reader
from plot import read_images
from reproduce import end_in_order
from reproduction.evidence import DEMO, METHODS, demo
from reproduction.profiles import PROFILES

IMAGES = os.path.join('data', 'digit_scenes', 'images', 'validation')


def parse_args():
    parser = ToolParser(__doc__)
    parser.add_argument('--out', default='work_dirs/demo',
                        help='where runs, table and pictures go')
    parser.add_argument('--jobs', type=reader(Count), metavar='N',
                        help='runs at the same time (default: one a core)')
    parser.add_argument('--quick', action='store_true',
                        help='a few steps of everything, to see that it runs')
    return parser.parse_args()


def main():
    args = parse_args()
    end_in_order()
    begin = time.time()
    step(1, 'students of a teacher with artifacts')
    run('reproduce.py', 'demo', '--profile', 'digits', '--root', args.out,
        *(['--quick'] if args.quick else []),
        *(['--jobs', str(args.jobs)] if args.jobs else []))
    step(2, 'what they see')
    runs = distilled(args.out, args.quick)
    picture = os.path.join(args.out, 'demo.png')
    save_figure(draw(runs), picture)
    step(3, 'report on the teacher: has it artifacts?')
    report = os.path.join(args.out, 'teacher')
    recipe, checkpoint = runs['robust']
    run('analyze_teacher.py', recipe, '--out', report, '--images', IMAGES,
        *(['--num', '8'] if args.quick else []))

    with open(os.path.join(args.out, 'demo.md')) as file:
        table = '|' + file.read().split('\n|', 1)[1].split('\n\n')[0]
    print(f'\n{table}\n\nOne seed, {time.time() - begin:.0f} s in all. '
          f'Picture: {os.path.abspath(picture)}\n'
          f'Report: {os.path.abspath(os.path.join(report, "report.html"))}\n'
          'Student weights for plain mmpretrain: '
          f'{os.path.abspath(student_path(checkpoint))}')


def step(number, title):
    print(f'\n== {number} of 3: {title}', flush=True)


def run(tool, *args):
    """Run a tool in its own process, which ends with this one; its output is
    seen as it comes."""
    process = subprocess.Popen(
        [sys.executable, os.path.join(paths.tools(), tool), *args],
        start_new_session=True)  # Ctrl-C reaches it once, from here
    try:
        code = process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    if code:
        raise TrainingError(
            f'{tool} failed; the reason is above. The demo goes on from here '
            'when it is started again.')


def distilled(root, quick):
    """Config and last checkpoint of each distillation, by method."""
    table = demo(PROFILES['digits'], [0], quick)
    found = {}
    (case, methods), = DEMO.plan
    for name, job in table.jobs.items():
        for method in methods:
            if f'-{case}-{method}-' in name and name.endswith('/distil'):
                folder = os.path.join(root, name)
                found[method] = (
                    os.path.join(folder, os.path.basename(job.config)),
                    find_latest_checkpoint(folder))
    return found


def draw(runs, scenes=range(4)):
    """The teacher's norms as it is and under the robust preset, and the
    main directions of teacher and students as colours.

    Args:
        runs (dict[str, tuple[str, str]]): Config and checkpoint by method.
        scenes (Sequence[int]): Validation scenes to show.

    Returns:
        matplotlib.figure.Figure: A row a scene.
    """
    views, pictures = {}, None
    for method, (config, checkpoint) in runs.items():
        distiller = load_distiller(open_config(config), checkpoint)
        inputs = read_images(
            [os.path.join(IMAGES, f'scene_{scene:06d}.png')
             for scene in scenes], distiller)
        pictures = pictures_of(distiller, inputs)
        layer = distiller.layers[-1]
        views[method] = extract_features(distiller, inputs)[layer]
    teacher, target = views['fitnet'].teacher, views['robust'].target
    norms = {'norms, teacher': norm_map(teacher),
             'norms, target of\nthe robust preset': norm_map(target)}
    top = max(float(values.max()) for values in norms.values())
    columns = [Column(title, values.numpy(), (0., top))
               for title, values in norms.items()]
    colours = {'colours, teacher': teacher, **{
        f'colours, student,\n{METHODS[method].title.replace(", ", chr(10), 1)}':
        view.student for method, view in views.items()}}
    columns += [
        Column(title, pca_map(tokens, principal_components(tokens)).numpy())
        for title, tokens in colours.items()]
    return draw_columns(
        pictures, columns, 'norm',
        'A teacher with planted artifacts on scenes that nothing was trained '
        f'on. Norms of its standardised patch tokens after block {layer}, as '
        'it is and under the robust preset; then the three main directions '
        'of patch tokens, of it and of students, as colours.')


if __name__ == '__main__':
    with readable_errors():
        main()
