"""No checkpoint runs code: what is loaded here would, loaded without care."""
import functools
import http.server
import os
import tempfile
import threading

import hostile
import pytest
import torch
from mmengine.runner.checkpoint import _load_checkpoint

import forked
import tiny
from mmsinger import checkpoint
from mmsinger.checkpoint import load_checkpoint, safe_loading
from mmsinger.errors import ConfigError

with tempfile.TemporaryDirectory() as names_only:
    GADGETS = sorted(hostile.gadgets(os.path.join(names_only, 'canary')))
CASES = [(gadget, 'as_zip', 'meta') for gadget in GADGETS] + [
    ('os.system', container, place) for container in hostile.CONTAINERS
    for place in ('state_dict', 'optimizer', 'message_hub', 'whole')]


@pytest.fixture
def canary(tmp_path):
    return str(tmp_path / 'canary')


def write(folder, canary, gadget='os.system', container='as_zip',
          place='meta'):
    """A hostile file."""
    path = os.path.join(folder, 'evil.pth')
    content = hostile.checkpoint(hostile.gadgets(canary)[gadget], place)
    hostile.CONTAINERS[container](content, path)
    return path


def test_enough_of_them():
    assert len(set(CASES)) >= 40


@pytest.mark.parametrize('gadget, container, place', CASES)
def test_nothing_runs(tmp_path, canary, gadget, container, place):
    path = write(tmp_path, canary, gadget, container, place)
    for load in (load_checkpoint, _load_checkpoint,
                 lambda name: torch.load(name, weights_only=False)):
        with safe_loading(), pytest.raises(ConfigError) as caught:
            load(path)
        assert repr(path) in str(caught.value)
    assert not os.path.lexists(canary)
    # The file is what it is said to be
    try:
        torch.load(path, weights_only=False)
    except Exception:  # after the code has run
        pass
    assert os.path.lexists(canary)


@pytest.fixture(scope='module')
def server(tmp_path_factory):
    """A folder and its address."""
    folder = tmp_path_factory.mktemp('served')

    class Quiet(http.server.SimpleHTTPRequestHandler):

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(
            ('127.0.0.1', 0), functools.partial(Quiet, directory=folder)) \
            as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield folder, f'http://127.0.0.1:{httpd.server_port}'
        httpd.shutdown()


@pytest.mark.parametrize('container', [
    'as_zip', 'as_legacy', 'as_tar', 'as_zipped_file'])
def test_downloads(server, tmp_path, canary, container, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    folder, address = server
    content = hostile.checkpoint(hostile.gadgets(canary)['os.system'])
    getattr(hostile, container)(content, str(folder / f'{container}.pth'))
    with safe_loading(), pytest.raises(ConfigError):
        _load_checkpoint(f'{address}/{container}.pth', map_location='cpu')
    assert not os.path.exists(canary)
    try:
        _load_checkpoint(f'{address}/{container}.pth', map_location='cpu')
    except Exception:  # after the code has run
        pass
    assert os.path.exists(canary)


def test_a_config_in_a_checkpoint_is_not_executed(tmp_path):
    """mmengine executes ``meta['config']`` when it resumes."""
    path = str(tmp_path / 'evil.pth')
    torch.save(dict(meta=dict(config='import os', iter=1)), path)
    with safe_loading():
        assert torch.load(path)['meta'] == dict(iter=1)


def test_torch_load_is_put_back():
    before = torch.load
    with pytest.raises(ZeroDivisionError):
        with safe_loading(), safe_loading():
            assert torch.load is torch.serialization.load is not before
            1 / 0
    assert torch.load is torch.serialization.load is before


def test_what_replaces_torch_load_is_guarded_and_put_back(
        tmp_path, canary, monkeypatch):
    def careless(f, **kwargs):
        return original(f, **{**kwargs, 'weights_only': False})

    original = torch.load
    monkeypatch.setattr(torch, 'load', careless)
    with safe_loading(), pytest.raises(ConfigError):
        torch.load(write(tmp_path, canary))
    assert not os.path.exists(canary)
    assert torch.load is careless
    assert torch.serialization.load is original


def test_a_context_that_ends_late_opens_no_other():
    before = torch.load
    first, second = safe_loading(), safe_loading()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.load is not before
    second.__exit__(None, None, None)
    assert torch.load is before


def test_whoever_trusts_a_file_says_so(tmp_path, canary, monkeypatch):
    path = write(tmp_path, canary)
    with pytest.raises(ConfigError) as caught:
        load_checkpoint(path)
    variable, digest = str(caught.value).split('variable ')[1].split(
        ',')[0].split('=')
    assert variable == checkpoint.TRUSTED
    monkeypatch.setenv(variable, digest)
    assert load_checkpoint(path)['meta']['gadget'] == 0
    assert os.path.exists(canary)
    os.remove(canary)
    with open(path, 'ab') as file:  # not the file that was trusted
        file.write(b'x')
    with pytest.raises(ConfigError):
        load_checkpoint(path)
    assert not os.path.exists(canary)


BACKBONE = 'model.student.backbone.init_cfg'


@pytest.mark.parametrize('args', [
    ['--cfg-options', 'load_from=evil.pth'],
    ['--resume', 'evil.pth'],
    ['--resume'],
    ['--cfg-options', 'model.student.pretrained=evil.pth'],
    ['--cfg-options', f'{BACKBONE}.type=Pretrained',
     f'{BACKBONE}.checkpoint=evil.pth'],
    ['--cfg-options', 'model.teacher.checkpoint=evil.pth'],
    ['--cfg-options', 'load_from={address}/evil.pth'],
], ids=['load_from', 'resume-path', 'resume', 'pretrained', 'init_cfg',
        'teacher', 'http'])
def test_no_run_runs_it(place, server, args):
    canary = os.path.join(place, 'canary')
    path = write(place, canary, place='meta')
    folder, address = server
    for copy in (folder / 'evil.pth',
                 os.path.join(place, 'evil', 'iter_2.pth')):
        os.makedirs(os.path.dirname(copy), exist_ok=True)
        with open(path, 'rb') as source, open(copy, 'wb') as target:
            target.write(source.read())
    result = forked.run(
        'train.py', tiny.SEG_CONFIG, '--work-dir',
        'evil' if '--resume' in args else 'anew',
        *[arg.format(address=address) for arg in args], cwd=place,
        check=False, TORCH_HOME=str(place))
    assert not os.path.exists(canary), result.stdout
    assert result.returncode == 1
    assert 'Traceback' not in result.stdout, result.stdout
    assert 'cannot be loaded safely' in result.stdout


# As mmseg's and mmpretrain's own tools/train.py
HOST = """
import sys
import mmsinger
from mmengine.config import Config
from mmengine.runner import Runner
from mmsinger.compat import onedl_config_packages
with onedl_config_packages():
    cfg = Config.fromfile(sys.argv[1])
cfg.merge_from_dict(dict(option.split('=') for option in sys.argv[2:]))
cfg.work_dir = 'host'
cfg.resume = cfg.get('resume') == 'yes'
cfg.custom_hooks = [dict(type='mmsinger.StudentCheckpointHook')]
Runner.from_cfg(cfg).train()
"""


@pytest.mark.parametrize('options', [
    ['load_from=evil.pth'], ['load_from=evil.pth', 'resume=yes'],
    ['model.student.pretrained=evil.pth']])
def test_no_host_runs_it(place, options):
    script = os.path.join(place, 'host.py')
    with open(script, 'w') as file:
        file.write(HOST)
    canary = os.path.join(place, 'canary')
    write(place, canary)
    result = forked.run(script, tiny.SEG_CONFIG, *options, cwd=place,
                        check=False)
    assert not os.path.exists(canary), result.stdout[-3000:]
    assert 'cannot be loaded safely' in result.stdout, result.stdout[-3000:]
