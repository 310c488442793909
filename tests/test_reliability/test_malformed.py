"""Every mistake ends in one message that names it, within seconds."""
import contextlib
import copy
import functools
import io
import os
import re
import sys
import traceback
from unittest import mock

import malformed
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.logging import MMLogger

from mmsinger.engine import prepare
from mmsinger.errors import ConfigError, readable_errors
from mmsinger.registry import MODELS

ROWS = malformed.rows()
_read = functools.lru_cache(maxsize=None)(prepare.Config.fromfile)


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    folder = tiny.workplace(tmp_path_factory.mktemp('place'))
    weights = torch.load(os.path.join(folder, 'teacher.pth'),
                         weights_only=True)['state_dict']
    weights['backbone.cls_token'][:] = float('nan')
    torch.save(weights, os.path.join(folder, 'nan.pth'))
    return folder


def call(tool, args, folder):
    """Exit status and output of a tool, in this process."""
    said = io.StringIO()
    argv, cwd = sys.argv, os.getcwd()
    os.chdir(folder)
    sys.argv = [f'{tool}.py', *args]
    MMLogger._instance_dict.clear()
    try:
        with mock.patch.object(
                prepare.Config, 'fromfile',
                lambda path: copy.deepcopy(_read(os.path.abspath(path)))), \
                contextlib.redirect_stdout(said), \
                contextlib.redirect_stderr(said), readable_errors():
            malformed.load_tool(tool).main()
        return 0, said.getvalue()
    except SystemExit as end:
        return end.code, said.getvalue()
    except BaseException:
        return 1, said.getvalue() + traceback.format_exc()
    finally:
        os.chdir(cwd)
        sys.argv = argv


@pytest.mark.parametrize('row', ROWS, ids=lambda row: ' '.join(
    (row.tool, *map(str, row.args[-2:])))[:70])
def test_malformed_call(place, row, request):
    args = row.args
    if row.tool == 'train' and args and args[0] == tiny.SEG_CONFIG:
        args = (args[0], '--work-dir', f'runs/{ROWS.index(row)}', *args[1:])
    code, output = call(row.tool, args, place)
    assert code not in (0, None), output[-2000:]
    assert 'Traceback' not in output, output[-3000:]
    said = re.split(r'(?m)^(?:ConfigError: |TrainingError: |\S+: error: )',
                    output)[-1]
    assert re.search(row.text, said, re.DOTALL), said[-1500:]
    assert 'Iter(train)' not in output or 'evaluator' in row.text


def test_there_are_enough():
    assert len(ROWS) >= 300
    assert len({(row.tool, row.args) for row in ROWS}) == len(ROWS)
    assert {row.tool for row in ROWS} >= set(malformed.TOOLS) - {
        'demo', 'publish_teacher'}


JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 40), st.floats(width=16),
    st.sampled_from(['', 'x', 'true', '1', 'layers.0', 'nullspace']),
    st.lists(st.one_of(st.integers(-3, 5), st.text('ab', max_size=2),
                       st.none()), max_size=3),
    st.dictionaries(st.sampled_from(['type', 'mad', 'rank', 'x']),
                    st.one_of(st.integers(-1, 3), st.just('x')), max_size=2))
KEYS = sorted(
    f'{where}.{key}' for where, (hints, before) in
    malformed.own_parts().items() if not before for key in hints
    if (where, key) not in (('model', 'student'), ('model', 'teacher'),
                            ('model.teacher', 'backbone')))


@settings(max_examples=80)
@given(key=st.sampled_from(KEYS), value=JUNK)
def test_any_value_is_taken_or_refused_by_name(place, key, value):
    cwd = os.getcwd()
    os.chdir(place)
    try:
        cfg = prepare.load_config(tiny.SEG_CONFIG, {key: value})
        cfg.work_dir = 'fuzzed'
        prepare.prepare_training(cfg)
        MODELS.build(cfg.model).init_weights()
    except ConfigError as error:
        words = key.split('.')[1:]
        assert any(word in str(error) for word in words), (key, value, error)
    finally:
        os.chdir(cwd)
