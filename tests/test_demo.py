"""The demo, but for its trainings (tests/test_reproduction.py)."""
import argparse
import os
import runpy
import signal
import sys

import cv2
import numpy as np
import pytest
import torch
from mmengine.registry import init_default_scope

import tiny
from mmsinger import paths
from mmsinger.engine.loading import load_distiller
from mmsinger.engine.options import ConfigOptions
from mmsinger.engine.prepare import load_config
from reproduction import evidence
from reproduction.profiles import PROFILES


@pytest.fixture
def demo(tmp_path, monkeypatch):
    """The script's names, where there are four scenes and no runs."""
    monkeypatch.chdir(tmp_path)
    names = runpy.run_path(os.path.join(tiny.ROOT, 'tools', 'demo.py'),
                           run_name='demo')
    os.makedirs(names['IMAGES'])
    for i in range(4):
        cv2.imwrite(os.path.join(names['IMAGES'], f'scene_{i:06d}.png'),
                    np.random.default_rng(i).integers(
                        0, 256, (32, 32, 3)).astype(np.uint8))
    return names


# In the place of the first tool: it waits, and has something to do at its end
TOOL = '''
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.default_int_handler)
try:
    os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(60)
finally:
    time.sleep(0.5)
    open('ended in order', 'w').close()
'''


def test_a_signal_ends_what_the_demo_runs(demo, tmp_path, monkeypatch):
    (tmp_path / 'reproduce.py').write_text(TOOL)
    monkeypatch.setattr(paths, 'tools', lambda: str(tmp_path))
    monkeypatch.setattr(sys, 'argv', ['demo.py'])
    numbers = signal.SIGHUP, signal.SIGINT, signal.SIGTERM
    before = list(map(signal.getsignal, numbers))
    try:
        with pytest.raises(KeyboardInterrupt):
            demo['main']()
    finally:
        list(map(signal.signal, numbers, before))
    assert (tmp_path / 'ended in order').exists()


def test_each_method_is_there_with_its_own_rates():
    table = evidence.demo(PROFILES['digits'], [0])
    labels = [label for label, _ in table.rows]
    assert labels[0] == 'teacher' and labels[-1].startswith('No teacher')
    assert [label.removesuffix(' *') for label in labels[1:-1]] == [
        'FitNet', 'SiNGER', 'Robust preset']
    planted = [job for job in table.jobs.values()
               if job.name.endswith('/distil')]
    assert len(planted) == 3 and all(
        'model.teacher.backbone.share=0.3' in job.options for job in planted)


def test_the_picture_shows_runs_of_all_methods(demo):
    parser = argparse.ArgumentParser()
    parser.add_argument('--options', nargs='+', action=ConfigOptions)
    table = evidence.demo(PROFILES['digits'], [0])
    for job in table.jobs.values():
        if not job.name.endswith('/distil'):
            continue
        folder = os.path.join('out', job.name)
        os.makedirs(folder)
        cfg = load_config(job.config, parser.parse_args(
            ['--options', *job.options]).options)
        init_default_scope(cfg.default_scope)
        cfg.dump(os.path.join(folder, os.path.basename(job.config)))
        distiller = load_distiller(cfg)
        distiller.calibrate([torch.randn(8, 3, 32, 32)])
        path = os.path.abspath(os.path.join(folder, 'iter_1.pth'))
        torch.save(dict(state_dict=distiller.state_dict(), meta={}), path)
        with open(os.path.join(folder, 'last_checkpoint'), 'w') as file:
            file.write(path)
    runs = demo['distilled']('out', False)
    assert list(runs) == ['fitnet', 'singer', 'robust']
    figure = demo['draw'](runs)
    titles = [axis.get_title() for axis in figure.axes]
    for title in ('norms, teacher', 'norms, target of\nthe robust preset',
                  'colours, teacher', 'colours, student,\nFitNet',
                  'colours, student,\nSiNGER'):
        assert title in titles
