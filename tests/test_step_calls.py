"""A training step stays short: what it calls of ours, and where."""
import copy
import gc
import os
import sys

from mmengine.registry import init_default_scope

import samples
import tiny
from mmsinger.engine.prepare import load_config

PACKAGE = os.path.join(tiny.ROOT, 'mmsinger')


def test_a_plain_step_calls_few_functions(tmp_path, monkeypatch):
    """Calls in a train step, the files that they are in, and moves from one
    file to another: 164 in 12 files with 66 moves, before targets were steps
    and students of every kind."""
    monkeypatch.chdir(tiny.workplace(tmp_path))
    cfg = load_config(tiny.SEG_CONFIG)
    init_default_scope('mmseg')
    model = samples.build(cfg)
    optimizer = samples.optimizer_of(model, cfg)
    batch = samples.batch(cfg, size=32)
    model.train_step(copy.deepcopy(batch), optimizer)  # what is done once
    calls = []

    def count(frame, event, arg):
        code = frame.f_code
        if event == 'call' and code.co_filename.startswith(PACKAGE) and \
                not code.co_name.startswith('<'):
            calls.append(code.co_filename)

    gc.collect()
    gc.disable()  # what other tests left would end here, and be counted
    sys.setprofile(count)
    try:
        model.train_step(batch, optimizer)
    finally:
        sys.setprofile(None)
        gc.enable()
    moves = sum(a != b for a, b in zip(calls, calls[1:]))
    assert 50 < len(calls) <= 135
    assert len(set(calls)) <= 15 and moves <= 70
