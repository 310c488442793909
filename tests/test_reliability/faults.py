"""Faults at every step of a run's writing, and what they cost.

    python tests/test_reliability/faults.py [KIND EVERY …]

kills a small run (``kill``, SIGKILL), fills its disk (``full``) and terminates
it (``term``, SIGTERM) at each step in turn, resumes it, and compares files and
weights with those of a run that nothing happened to. ``kill 1 full 2`` takes
each step for the one, every second for the other. All of it takes about three
quarters of an hour.
"""
import os
import re
import shutil
import signal
import sys
import tempfile

import torch

FOLDER = os.path.dirname(os.path.abspath(__file__))
if __name__ == '__main__':
    for path in (os.path.dirname(FOLDER), os.path.dirname(os.path.dirname(
            FOLDER)), os.path.join(os.path.dirname(os.path.dirname(FOLDER)),
                                   'tools')):
        sys.path.insert(0, path)

import forked  # noqa: E402
import tiny  # noqa: E402

TRAIN = os.path.join(FOLDER, 'faulty_train.py')
# One checkpoint is kept, and flips and dropout have to be repeated too
OPTIONS = [
    '--cfg-options', 'default_hooks.checkpoint.max_keep_ckpts=1',
    'model.student.backbone.drop_rate=0.1']


def names(folder):
    """What is in a work dir, without logs and the folder of the logger."""
    return {name for name in os.listdir(folder)
            if not re.match(r'\d{8}_', name)}


def weights(path):
    return torch.load(path, weights_only=False)['state_dict']


class Faults:
    """A run without faults, and runs with."""

    def __init__(self, place):
        self.place, self.number = place, 0
        self.steps_file = os.path.join(place, 'steps')
        forked.run(TRAIN, tiny.SEG_CONFIG, '--work-dir', 'whole', *OPTIONS,
                   cwd=place, STEPS=self.steps_file)
        with open(self.steps_file) as file:
            self.steps = file.read().splitlines()
        self.names = names(os.path.join(place, 'whole'))
        self.weights = weights(os.path.join(place, 'whole', 'iter_6.pth'))

    def inject(self, kind, step):
        """One fault at a step, counted from 1; what it led to.

        Returns:
            str: What was lost beyond the work since the last checkpoint;
            empty if nothing was.
        """
        folder = f'{kind}_{step}'
        result = forked.run(
            TRAIN, tiny.SEG_CONFIG, '--work-dir', folder, *OPTIONS,
            cwd=self.place, check=False, FAULT=f'{kind}:{step}')
        code = dict(kill=-signal.SIGKILL, full=1, term=128 + signal.SIGTERM)
        if result.returncode != code[kind] and not (
                kind == 'term' and result.returncode == 0):  # ended by then
            return f'exit status {result.returncode}: {result.stdout[-800:]}'
        if 'Traceback' in result.stdout:
            return f'traceback: {result.stdout[-800:]}'
        work_dir = os.path.join(self.place, folder)
        written = [line for line in self.steps[:step - 1]
                   if re.match(r'after replace iter_\d+\.pth', line)]
        good = [name for name in names(work_dir)
                if re.fullmatch(r'iter_\d+\.pth', name)]
        if written and not good:
            return 'no checkpoint'
        for name in good:
            weights(os.path.join(work_dir, name))
        resumed = forked.run(
            'train.py', tiny.SEG_CONFIG, '--work-dir', folder, '--resume',
            *OPTIONS, cwd=self.place, check=False)
        if resumed.returncode:
            return f'not resumed: {resumed.stdout[-800:]}'
        if written and 'resumed epoch' not in resumed.stdout:
            return 'begun anew'
        if names(work_dir) != self.names:
            return f'files {names(work_dir) ^ self.names}'
        found = weights(os.path.join(work_dir, 'iter_6.pth'))
        if not all(torch.equal(found[key], value)
                   for key, value in self.weights.items()):
            return 'other weights'
        shutil.rmtree(work_dir)
        return ''


def main(args):
    every = dict(zip(args[::2], map(int, args[1::2]))) or \
        dict(kill=1, full=1, term=1)
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        faults = Faults(tiny.workplace(folder))
        for kind, stride in every.items():
            outcomes = {step: faults.inject(kind, step) for step in
                        range(1, len(faults.steps) + 1, stride)}
            bad = {step: outcome for step, outcome in outcomes.items()
                   if outcome}
            for step, outcome in bad.items():
                print(f'{kind} at {faults.steps[step - 1]}: {outcome}')
            print(f'| {kind} | {len(outcomes)} | {len(bad)} |', flush=True)
            failed = failed or bool(bad)
    sys.exit(failed)


if __name__ == '__main__':
    main(sys.argv[1:])
