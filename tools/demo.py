"""The main job on built-in data: distil a small ViT, compare, show.

    python tools/demo.py

Makes scenes of real handwritten digits, trains a small ViT on them with and
without SiNGER for as many steps, evaluates teacher and students on digits
that none of them has seen, draws what they see, and writes a report on the
teacher. What is finished is kept: a second run only shows it again.
"""
import argparse
import glob
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time

import mmsinger  # noqa: F401  (before torchvision: see mmsinger.compat)
import torch
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS, init_default_scope
from mmengine.runner import find_latest_checkpoint

from make_digit_scenes import make_digit_scenes
from mmsinger import paths
from mmsinger.checkpoint import load_checkpoint, weights_of
from mmsinger.engine.prepare import load_config
from mmsinger.errors import ConfigError, TrainingError, readable_errors
from mmsinger.registry import MODELS
from mmsinger.figures import extract_features, norm_map
from mmsinger.schema import ToolParser

TEACHER = 'mmsinger://digits_teacher.pth'


def parse_args():
    parser = ToolParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--out', default='work_dirs/demo',
                        help='where runs, table and picture go')
    parser.add_argument('--cfg-options', nargs='+', default=[],
                        metavar='KEY=VALUE',
                        help='override settings of both trainings, for '
                        'instance train_cfg.max_iters=50')
    parser.add_argument('--fresh', action='store_true',
                        help='do not use what an earlier run left')
    return parser.parse_args()


class Job:
    """One row of the table: a config and the weights that go with it.

    Args:
        title (str): The row's name.
        config (str): Name of a recipe below configs/demo.
        out (str): The demo's folder.
        options (list[str]): ``--cfg-options`` for training and testing.
    """

    def __init__(self, title, config, out, options=()):
        self.title = title
        self.config = os.path.join(paths.configs(), 'demo', config)
        self.work_dir = os.path.join(out, os.path.splitext(config)[0])
        self.options = ['--cfg-options', *options] if options else []
        self.checkpoint = None

    def tool(self, name, *args):
        """Run a tool in its own process; its output is seen as it comes."""
        command = [sys.executable, os.path.join(paths.tools(), name),
                   self.config, *args, *self.options]
        if subprocess.run(command).returncode:
            raise TrainingError(
                f'{name} failed for {self.config}; the reason is above. '
                'The demo goes on from here when it is started again.')

    def signature(self):
        """Changes when the recipe or the package does."""
        text = load_config(self.config).pretty_text + str(self.options) + \
            mmsinger.__version__
        return hashlib.sha256(text.encode()).hexdigest()

    def forget(self):
        """Remove what an earlier demo left, and nothing else."""
        if any(os.path.isfile(os.path.join(self.work_dir, name))
               for name in ('demo.json', 'miou.json')):
            shutil.rmtree(self.work_dir)

    def train(self):
        """Train unless that is done; resume what was interrupted."""
        marker = os.path.join(self.work_dir, 'demo.json')
        state = _read_json(marker)
        if state.get('signature') != self.signature():
            if not state and os.path.isdir(self.work_dir) and \
                    os.listdir(self.work_dir):
                raise ConfigError(
                    f'{self.work_dir!r} holds files that are not of the demo '
                    '(there is no demo.json). Remove it, or choose another '
                    'place with --out.')
            shutil.rmtree(self.work_dir, ignore_errors=True)
            state = dict(signature=self.signature(), seconds=0.)
            _write_json(marker, state)
        if not state.get('trained'):
            start, before = time.time(), state['seconds']
            try:
                self.tool('train.py', '--work-dir', self.work_dir, '--resume',
                          '--no-validate')
                state['trained'] = True
            finally:
                state['seconds'] = before + time.time() - start
                _write_json(marker, state)
        self.seconds = state['seconds']
        self.checkpoint = find_latest_checkpoint(self.work_dir)

    def evaluate(self):
        """mIoU in per cent, through tools/test.py; once for each result."""
        result = os.path.join(self.work_dir, 'miou.json')
        done = _read_json(result)
        if done.get('signature') == self.signature():
            self.miou = done['mIoU']
            return
        folder = os.path.join(self.work_dir, 'test')
        shutil.rmtree(folder, ignore_errors=True)
        self.tool('test.py', self.checkpoint, '--work-dir', folder)
        path, = glob.glob(os.path.join(folder, '*', '*.json'))
        self.miou = _read_json(path)['mIoU']
        _write_json(result, dict(signature=self.signature(), mIoU=self.miou))


def main():
    args = parse_args()
    begin = time.time()
    os.makedirs(args.out, exist_ok=True)
    teacher = Job('teacher', 'digits_teacher.py', args.out)
    teacher.checkpoint = TEACHER
    student = Job('student, no distillation', 'digits_student.py', args.out,
                  args.cfg_options)
    singer = Job('student, SiNGER', 'singer_digits.py', args.out,
                 args.cfg_options)
    if args.fresh:
        for job in (teacher, student, singer):
            job.forget()

    step(1, 'scenes of handwritten digits')
    make_digit_scenes('data/digit_scenes')
    step(2, 'the student without distillation')
    student.train()
    step(3, 'the same student, distilled with SiNGER')
    singer.train()
    step(4, 'evaluation on unseen digits')
    for job in (teacher, student, singer):
        job.evaluate()
    step(5, 'picture')
    picture = os.path.join(args.out, 'demo.png')
    draw(teacher, student, singer, picture)
    step(6, 'report on the teacher: has it artifacts?')
    report = os.path.join(args.out, 'teacher')
    singer.tool('analyze_teacher.py', '--out', report, '--images',
                os.path.join('data', 'digit_scenes', 'images', 'validation'))

    table = format_table(teacher, student, singer)
    with open(os.path.join(args.out, 'table.md'), 'w') as file:
        file.write(table + '\n')
    print(f'\n{table}\n\nOne seed, {time.time() - begin:.0f} s in all. '
          f'Picture: {os.path.abspath(picture)}\n'
          f'Report: {os.path.abspath(os.path.join(report, "report.html"))}\n'
          'Student weights for plain mmseg: '
          f'{os.path.abspath(_student_file(singer))}')


def step(number, title):
    print(f'\n== {number} of 6: {title}', flush=True)


def format_table(teacher, *students):
    """The result table in Markdown."""
    rows = ['| model | parameters | steps | training | '
            'mIoU on unseen digits |',
            '|---|---|---|---|---|',
            f'| {teacher.title} | {_parameters(teacher):,} | - | shipped | '
            f'{teacher.miou:.2f} |']
    for job in students:
        steps = load_checkpoint(job.checkpoint)['meta']['iter']
        rows.append(f'| {job.title} | {_parameters(job):,} | {steps} | '
                    f'{job.seconds:.0f} s | {job.miou:.2f} |')
    return '\n'.join(rows)


def _plain(job):
    """The plain model of a job with its weights, in evaluation mode."""
    cfg = load_config(job.config)
    model_cfg = cfg.model.get('student', cfg.model)
    init_default_scope(cfg.default_scope)
    model = MODELS.build(model_cfg)
    path = TEACHER if job.checkpoint == TEACHER else _student_file(job)
    model.load_state_dict(weights_of(load_checkpoint(path), path))
    model.eval()
    return model


def _student_file(job):
    """The plain weights: beside the checkpoint if a distiller wrote it."""
    stem = os.path.splitext(job.checkpoint)[0]
    sibling = f'{stem}_student.pth'
    return sibling if os.path.exists(sibling) else job.checkpoint


def _parameters(job):
    return sum(p.numel() for p in _plain(job).parameters())


@torch.no_grad()
def draw(teacher, student, singer, path, scenes=(0, 1, 2, 3)):
    """Predictions, and patch norms before and after refinement.

    Args:
        teacher (Job): See :class:`Job`.
        student (Job): The undistilled student.
        singer (Job): The distilled student.
        path (str): Where to write the PNG.
        scenes (Sequence[int]): Validation scenes to show.
    """
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    import numpy as np

    cfg = load_config(singer.config)
    init_default_scope(cfg.default_scope)
    dataset = DATASETS.build(cfg.val_dataloader.dataset)
    palette = np.array(dataset.metainfo['palette'], np.uint8)
    batch = pseudo_collate([dataset[i] for i in scenes])
    truth = [s.gt_sem_seg.data[0].numpy() for s in batch['data_samples']]
    predictions = [
        [s.pred_sem_seg.data[0].numpy() for s in _plain(job).test_step(batch)]
        for job in (teacher, student, singer)]

    distiller = MODELS.build(cfg.model)
    distiller.init_weights()
    distiller.load_state_dict(weights_of(load_checkpoint(singer.checkpoint),
                                         singer.checkpoint))
    inputs = distiller.data_preprocessor(batch, False)['inputs']
    last = distiller.layers[-1]
    features = extract_features(distiller, inputs)[last]
    before, after = (norm_map(tokens).numpy()
                     for tokens in (features.teacher, features.refined))

    images = [x.permute(1, 2, 0).numpy()[..., ::-1] for x in batch['inputs']]
    columns = [
        ('image', images), ('truth', [palette[t] for t in truth]),
        *((f'{job.title}\nmIoU {job.miou:.1f}', [palette[p] for p in maps_])
          for job, maps_ in zip((teacher, student, singer), predictions)),
        (f'patch norms, block {last}\nbefore', before),
        (f'patch norms, block {last}\nafter refinement', after)]
    figure, axes = plt.subplots(
        len(scenes), len(columns), layout='constrained',
        figsize=(1.9 * len(columns), 2. * len(scenes) + 0.9), squeeze=False)
    for c, (title, pictures) in enumerate(columns):
        for r, axis in enumerate(axes[:, c]):
            axis.set_axis_off()
            if pictures is before or pictures is after:
                top = max(before.max(), after.max())
                shown = axis.imshow(pictures[r], vmin=0, vmax=top,
                                    cmap='cividis')
            else:
                axis.imshow(pictures[r])
        axes[0, c].set_title(title.replace(', ', ',\n', 1), fontsize=9)
    bar = figure.colorbar(shown, ax=axes[:, -1], shrink=0.6)
    bar.set_label('norm', fontsize=9)
    patches = [plt.Rectangle((0, 0), 1, 1, color=colour / 255)
               for colour in palette]
    figure.legend(patches, dataset.metainfo['classes'], ncols=len(palette),
                  loc='outside lower center', fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _read_json(path):
    if not os.path.exists(path):
        return {}
    with open(path) as file:
        return json.load(file)


def _write_json(path, content):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, 'w') as file:
        json.dump(content, file)


if __name__ == '__main__':
    with readable_errors():
        main()
