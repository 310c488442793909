"""Reading checkpoints, good and bad ones, and loading them strictly."""
import functools
import http.server
import os
import pathlib
import pickle
import random
import struct
import sys
import threading

import pytest
import torch
from mmengine.logging import HistoryBuffer
from safetensors.torch import save, save_file
from torch import nn

from mmsinger.checkpoint import (load_checkpoint, load_strict, safe_loading,
                                 weights_of)
from mmsinger.errors import ConfigError
from mmsinger.registry import MODELS


def weights(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {'layers.0.weight': torch.randn(6, 4, generator=generator),
            'layers.0.bias': torch.arange(6.)}


def same(first, second):
    return list(first) == list(second) and \
        all(torch.equal(first[k], second[k]) for k in first)


def message_of(path, key='teacher.checkpoint'):
    """The complaint about a bad file; it always names key and file."""
    with pytest.raises(ConfigError) as caught:
        load_checkpoint(path, key)
    message = str(caught.value)
    assert f'{key}={os.fspath(path)!r}' in message
    return message


@pytest.fixture
def good(tmp_path):
    path = str(tmp_path / 'good.pth')
    torch.save(dict(state_dict=weights(), meta=dict(epoch=3)), path)
    return path


# -- good files ---------------------------------------------------------------


def test_round_trip(good):
    checkpoint = load_checkpoint(good)
    assert checkpoint['meta'] == dict(epoch=3)
    assert same(weights_of(checkpoint, good), weights())


def test_relative_and_path_objects(good, monkeypatch):
    monkeypatch.chdir(os.path.dirname(good))
    assert load_checkpoint('good.pth').keys() == load_checkpoint(good).keys()
    assert load_checkpoint(pathlib.Path(good))['meta'] == dict(epoch=3)


def test_files_of_older_torch(tmp_path):
    path = str(tmp_path / 'old.pth')
    torch.save(weights(), path, _use_new_zipfile_serialization=False)
    assert same(load_checkpoint(path), weights())


@pytest.fixture
def tidy_mmengine(monkeypatch):
    """Forget the loggers and scopes that a Runner leaves behind."""
    from mmengine.logging import MessageHub, MMLogger
    from mmengine.registry import DefaultScope
    from mmengine.visualization import Visualizer
    for manager in (DefaultScope, MessageHub, MMLogger, Visualizer):
        monkeypatch.setattr(manager, '_instance_dict',
                            manager._instance_dict.copy())


def test_a_runners_checkpoint(tmp_path, tidy_mmengine):
    """With optimizer, scheduler and a message hub full of histories."""
    from mmengine.model import BaseModel
    from mmengine.runner import Runner

    class Model(BaseModel):

        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 1)

        def forward(self, inputs, mode='tensor'):
            return dict(loss=self.linear(inputs).square().mean())

    runner = Runner(
        Model(), str(tmp_path),
        train_dataloader=dict(
            dataset=[dict(inputs=torch.randn(4)) for _ in range(4)],
            batch_size=2,
            sampler=dict(type='DefaultSampler', shuffle=True),
            collate_fn=dict(type='default_collate')),
        train_cfg=dict(by_epoch=True, max_epochs=1),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=0.1)),
        param_scheduler=dict(type='LinearLR', start_factor=0.1),
        default_hooks=dict(checkpoint=dict(type='CheckpointHook')),
        default_scope='mmengine', experiment_name='test_checkpoint')
    runner.train()
    path = str(tmp_path / 'epoch_1.pth')
    checkpoint = load_checkpoint(path)
    assert {'optimizer', 'param_schedulers', 'message_hub'} <= set(checkpoint)
    scalars = checkpoint['message_hub']['log_scalars']
    assert isinstance(scalars['train/loss'], HistoryBuffer)
    assert scalars['train/loss'].mean() > 0
    assert same(weights_of(checkpoint, path), runner.model.state_dict())


def test_history_buffers(tmp_path):
    path = str(tmp_path / 'epoch_1.pth')
    history = HistoryBuffer([0.5, 1.5], [1, 1])
    torch.save(dict(state_dict=weights(), message_hub=dict(
        log_scalars={'train/loss': history})), path)
    loaded = load_checkpoint(path)['message_hub']['log_scalars']['train/loss']
    assert loaded.mean() == 1 and loaded.current() == 1.5


def test_histories_written_with_the_other_numpy(tmp_path):
    """numpy 1 and 2 name the same functions differently in a pickle."""
    path = str(tmp_path / 'epoch_1.pth')
    torch.save(dict(history=HistoryBuffer([0.5, 1.5], [1, 1])), path,
               _use_new_zipfile_serialization=False)
    with open(path, 'rb') as file:
        content = file.read()
    here, there = b'cnumpy._core.', b'cnumpy.core.'
    if here not in content:
        here, there = there, here
    assert here in content
    with open(path, 'wb') as file:
        file.write(content.replace(here, there))
    assert load_checkpoint(path)['history'].mean() == 1


class Getattr:
    """Looks something up when it is unpickled."""

    def __init__(self, *args):
        self.args = args

    def __reduce__(self):
        return getattr, self.args


@pytest.mark.parametrize('args', [
    (HistoryBuffer, '__init__'), (HistoryBuffer, '__subclasses__'),
    (torch.Tensor, 'mean'), (HistoryBuffer([1.], [1]), 'mean'),
], ids=['private', 'type', 'other-class', 'instance'])
def test_histories_do_not_open_a_door(tmp_path, args):
    """Their pickle calls getattr, with which a file could reach anything."""
    path = str(tmp_path / 'epoch_1.pth')
    torch.save(dict(state_dict=weights(), x=Getattr(*args)), path)
    assert 'cannot be loaded safely' in message_of(path)


def test_reading_leaves_the_safe_list_as_it_was(good):
    before = set(torch.serialization.get_safe_globals())
    load_checkpoint(good)
    assert set(torch.serialization.get_safe_globals()) == before


# -- where the weights are ----------------------------------------------------


@pytest.mark.parametrize('wrap', [
    lambda w: w,
    lambda w: dict(state_dict=w, meta={}),
    lambda w: dict(model=w, optimizer={}, epoch=1),
    lambda w: dict(model_state_dict=w),
    lambda w: dict(module=w),
    lambda w: {'module.' + k: v for k, v in w.items()},
    lambda w: dict(state_dict={'module.' + k: v for k, v in w.items()}),
    lambda w: dict(w, version=3, name='vit'),
    lambda w: {**w, 0: torch.ones(2)},
], ids=['plain', 'mmengine', 'timm-training', 'model_state_dict', 'deepspeed',
        'ddp', 'ddp-state_dict', 'other-entries', 'numbered-entries'])
def test_weights_are_found(wrap):
    assert same(weights_of(wrap(weights()), 'x.pth'), weights())


def test_module_is_removed_only_if_all_keys_have_it():
    mixed = {'module.a': torch.ones(1), 'b': torch.ones(1)}
    assert set(weights_of(mixed, 'x.pth')) == {'module.a', 'b'}


@pytest.mark.parametrize('checkpoint', [
    {}, dict(meta={}, epoch=3), dict(state_dict={}),
    dict(state_dict=dict(version=1))], ids=str)
def test_no_weights(checkpoint):
    with pytest.raises(ConfigError) as caught:
        weights_of(checkpoint, 'work_dirs/x.pth')
    message = str(caught.value)
    assert "'work_dirs/x.pth' holds no weights" in message
    assert str(list(checkpoint)) in message and "'state_dict'" in message


# -- bad files ----------------------------------------------------------------


@pytest.mark.parametrize('name', ['missing.pth', 'missing.safetensors', ''])
def test_missing(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = message_of(name)
    assert 'no such file' in message and str(tmp_path) in message
    assert 'set teacher.checkpoint' in message


def test_folder(tmp_path):
    assert 'a folder, not a file' in message_of(str(tmp_path))


@pytest.mark.parametrize('old', [False, True], ids=['zip', 'old-format'])
def test_truncated_anywhere(tmp_path, old):
    path = str(tmp_path / 'cut.pth')
    torch.save(dict(state_dict=weights(), history=HistoryBuffer([1.], [1])),
               path, _use_new_zipfile_serialization=not old)
    with open(path, 'rb') as file:
        content = file.read()
    for share in [i / 40 for i in range(40)] + [0.999]:
        with open(path, 'wb') as file:
            file.write(content[:int(share * len(content))])
        message = message_of(path)
        assert 'truncated' in message or 'damaged' in message


@pytest.mark.parametrize('old', [False, True], ids=['zip', 'old-format'])
def test_flipped_bytes_never_escape_as_another_error(tmp_path, old):
    path = str(tmp_path / 'flipped.pth')
    torch.save(dict(state_dict=weights(), history=HistoryBuffer([1.], [1])),
               path, _use_new_zipfile_serialization=not old)
    with open(path, 'rb') as file:
        content = file.read()
    rng = random.Random(0)
    refused = 0
    for _ in range(100):
        damaged = bytearray(content)
        for _ in range(4):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        with open(path, 'wb') as file:
            file.write(damaged)
        try:
            load_checkpoint(path)
        except ConfigError:
            refused += 1
    assert refused > (50 if old else 90)  # the old format has no checksums


def test_a_flipped_bit_of_a_weight_is_refused(tmp_path):
    path = str(tmp_path / 'flipped.pth')
    torch.save(dict(state_dict=dict(a=torch.full((1000, ), 1.5))), path)
    with open(path, 'rb') as file:
        content = bytearray(file.read())
    at = content.index(struct.pack('<10f', *[1.5] * 10)) + 3
    content[at] ^= 16
    with open(path, 'wb') as file:
        file.write(content)
    assert torch.load(path)['state_dict']['a'].min() < 1  # torch takes it
    assert 'the checksum of' in message_of(path)
    with open(path, 'rb') as file, safe_loading(), \
            pytest.raises(ConfigError, match='the checksum of'):
        torch.load(file)


@pytest.mark.parametrize('content', [
    b'', b'hello', b'(no pickle)', b'0\n', b'\x80\x02', b'\x00' * 100, b'PK\x03\x04', bytes(range(256))], ids=repr)
def test_no_checkpoint(tmp_path, content):
    path = tmp_path / 'text.pth'
    path.write_bytes(content)
    message = message_of(str(path))
    assert 'torch said: ' in message and len(message) < 1000


@pytest.mark.parametrize('content, words', [
    (b'\n<html>404 Not Found</html>', 'a page of HTML'),
    (b'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n',
     'git lfs pull'),
    (save(dict(a=torch.ones(2))), '.safetensors')])
def test_what_else_a_file_is(tmp_path, content, words):
    path = tmp_path / 'text.pth'
    path.write_bytes(content)
    assert words in message_of(str(path))


@pytest.mark.parametrize('value', [
    torch.ones(3, dtype=torch.int8), torch.ones(3, dtype=torch.complex64)],
    ids=lambda v: str(v.dtype))
def test_numbers_that_are_not_real_are_no_weights(value):
    module = torch.nn.Linear(3, 1)
    with pytest.raises(ConfigError, match=f'it: {value.dtype}.*weight. Fix'):
        load_strict(module, dict(weight=value[None], bias=torch.ones(1)),
                    'it', 'Fix it.')


@pytest.mark.parametrize('value', [
    torch.ones(3).to_sparse(), torch.ones(3, device='meta')],
    ids=['sparse', 'meta'])
def test_weights_without_values(value):
    with pytest.raises(ConfigError, match='sparse ones, a'):
        weights_of(dict(state_dict=dict(a=value)), 'x.pth')


@pytest.mark.parametrize('content', [[1, 2], 'text', 3, torch.ones(2)],
                         ids=lambda c: type(c).__name__)
def test_no_dictionary(tmp_path, content):
    path = str(tmp_path / 'list.pth')
    torch.save(content, path)
    message = message_of(path)
    assert f'holds a {type(content).__name__}' in message
    assert 'state_dict()' in message


class Malicious:
    """Runs a command when it is unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (self.target, )


@pytest.mark.parametrize('writer', ['torch', 'old-torch', 'pickle'])
def test_code_in_a_checkpoint_is_not_run(tmp_path, writer):
    path, target = str(tmp_path / 'evil.pth'), str(tmp_path / 'made')
    content = dict(state_dict=weights(), meta=Malicious(target))
    if writer == 'pickle':
        with open(path, 'wb') as file:
            pickle.dump(content, file)
    else:
        torch.save(content, path,
                   _use_new_zipfile_serialization=writer == 'torch')
    message = message_of(path)
    assert not os.path.exists(target)
    if writer == 'torch':
        assert 'cannot be loaded safely' in message
        assert 'Ask for a file with tensors only' in message
        assert 'mkdir' in message
        # the test itself works: whoever trusts the file runs it
        torch.load(path, weights_only=False)
        assert os.path.exists(target)


def test_a_whole_model_is_refused(tmp_path):
    path = str(tmp_path / 'model.pth')
    torch.save(nn.Linear(2, 2), path)
    assert 'cannot be loaded safely' in message_of(path)


def test_the_checkpoint_itself_is_the_default_key(tmp_path):
    path = str(tmp_path / 'missing.pth')
    with pytest.raises(ConfigError, match=f"checkpoint='{path}'"):
        load_checkpoint(path)


# -- safetensors --------------------------------------------------------------


@pytest.fixture
def safe(tmp_path):
    save_file = pytest.importorskip('safetensors.torch').save_file
    path = str(tmp_path / 'model.safetensors')
    save_file(weights(), path)
    return path


def test_safetensors(safe):
    loaded = load_checkpoint(safe)
    assert same({k: loaded[k] for k in weights()}, weights())
    assert weights_of(loaded, safe).keys() == weights().keys()
    module = nn.Module()
    module.layers = nn.ModuleList([nn.Linear(4, 6)])
    load_strict(module, weights_of(loaded, safe), 'x', 'y')
    assert torch.equal(module.layers[0].weight, weights()['layers.0.weight'])


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16,
                                   torch.int64], ids=str)
def test_safetensors_of_other_types(tmp_path, dtype):
    save_file = pytest.importorskip('safetensors.torch').save_file
    path = str(tmp_path / 'HALF.SAFETENSORS')
    save_file({'a': torch.arange(6).to(dtype)}, path)
    assert torch.equal(load_checkpoint(path)['a'], torch.arange(6).to(dtype))


def test_damaged_safetensors(safe):
    with open(safe, 'rb') as file:
        content = file.read()
    for damaged in [content[:i] for i in range(0, len(content), 16)] + [
            b'hello', b'\xff' * 200, content + b'x']:
        with open(safe, 'wb') as file:
            file.write(damaged)
        message = message_of(safe)
        assert 'no safetensors file' in message and 'Fetch it again' in message


def test_a_torch_checkpoint_that_is_called_safetensors(tmp_path):
    pytest.importorskip('safetensors')
    path = str(tmp_path / 'x.safetensors')
    torch.save(weights(), path)
    assert 'no safetensors file' in message_of(path)


def test_safetensors_not_installed(safe, monkeypatch):
    for name in [n for n in sys.modules if n.startswith('safetensors')]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, 'safetensors', None)
    monkeypatch.setitem(sys.modules, 'safetensors.torch', None)
    assert '`pip install safetensors`' in message_of(safe)


# -- addresses ----------------------------------------------------------------


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A folder behind http, and an empty cache; counts the requests."""
    root = tmp_path / 'www'
    root.mkdir()
    requests = []

    class Handler(http.server.SimpleHTTPRequestHandler):

        def log_message(self, *args):
            pass

        def do_GET(self):
            requests.append(self.path)
            super().do_GET()

    monkeypatch.setenv('no_proxy', '127.0.0.1')
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))
    httpd = http.server.ThreadingHTTPServer(
        ('127.0.0.1', 0), functools.partial(Handler, directory=str(root)))
    thread = threading.Thread(target=httpd.serve_forever, args=(0.01, ),
                              daemon=True)
    thread.start()
    yield root, f'http://127.0.0.1:{httpd.server_port}', requests
    httpd.shutdown()
    httpd.server_close()
    thread.join()


def test_a_download_is_kept(server):
    root, address, requests = server
    torch.save(dict(state_dict=weights()), root / 'vit.pth')
    for _ in range(2):
        loaded = load_checkpoint(f'{address}/vit.pth')
        assert same(weights_of(loaded, 'x'), weights())
    assert requests == ['/vit.pth']


def test_downloads_of_one_name_are_told_apart(server):
    root, address, requests = server
    for name in ('first', 'second'):
        (root / name).mkdir()
        torch.save(dict(state_dict=dict(name=torch.tensor(len(name)))),
                   root / name / 'model.pth')
    for name in ('first', 'second', 'first'):
        loaded = load_checkpoint(f'{address}/{name}/model.pth')
        assert loaded['state_dict']['name'] == len(name)
    assert requests == ['/first/model.pth', '/second/model.pth']


def test_a_name_with_a_hash_is_shared_with_torch_hub(server, tmp_path):
    root, address, _ = server
    torch.save(dict(state_dict=weights()), root / 'vit-0a1b2c3d.pth')
    load_checkpoint(f'{address}/vit-0a1b2c3d.pth')
    assert (tmp_path / 'hub' / 'checkpoints' / 'vit-0a1b2c3d.pth').is_file()


def test_a_safetensors_link_with_a_question(server):
    root, address, _ = server
    save_file(weights(), root / 'vit.safetensors')
    loaded = load_checkpoint(f'{address}/vit.safetensors?download=true')
    assert same(dict(sorted(loaded.items())), dict(sorted(weights().items())))


def test_a_damaged_download_names_the_copy_to_delete(server, tmp_path):
    root, address, _ = server
    (root / 'vit.pth').write_bytes(b'hello')
    with pytest.raises(ConfigError):
        load_checkpoint(f'{address}/vit.pth')
    (root / 'cut.pth').write_bytes(b'')
    message = message_of(f'{address}/cut.pth')
    kept, = (tmp_path / 'hub' / 'checkpoints').glob('*/cut.pth')
    assert str(kept) in message


def test_an_address_that_is_not_there(server):
    message = message_of(f'{server[1]}/missing.pth')
    assert 'cannot be fetched' in message and '404' in message
    assert 'local file' in message


def test_an_address_that_does_not_answer(server):
    assert 'cannot be fetched' in message_of('http://127.0.0.1:1/x.pth')


# -- strict loading -----------------------------------------------------------


def model():
    return nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))


def test_all_fits():
    source, target = model(), model()
    state = source.state_dict()
    load_strict(target, state, 'x', 'y')
    assert same(target.state_dict(), state)
    assert len(state) == 4  # the argument is not changed


def problem(state, **kwargs):
    with pytest.raises(ConfigError) as caught:
        load_strict(model(), state, 'teacher.pth and a ViT',
                    'Change the recipe.', **kwargs)
    message = str(caught.value)
    assert message.startswith('teacher.pth and a ViT')
    assert message.endswith('Change the recipe.')
    return message


def test_missing_and_unexpected_keys_are_listed_together():
    state = model().state_dict()
    del state['0.bias'], state['1.weight']
    state['head.weight'] = torch.ones(1)
    message = problem(state)
    assert '2 missing keys' in message and '1 unexpected keys' in message
    for key in ('0.bias', '1.weight', 'head.weight'):
        assert key in message
    assert '0.weight' not in message


def test_shapes_that_differ_are_listed():
    state = model().state_dict()
    state['0.weight'] = torch.ones(6, 5)
    state['1.bias'] = torch.ones(3)
    message = problem(state)
    for part in ('shapes differ', '0.weight', '[6, 5]', '[6, 4]', '1.bias'):
        assert part in message


def test_nothing_fits():
    message = problem({})
    assert '4 missing keys' in message and 'unexpected' not in message


def test_ignored_keys():
    state = model().state_dict()
    state.update({'head.weight': torch.ones(1), 'neck.x': torch.ones(1)})
    load_strict(model(), state, 'x', 'y', ignore=['head.', 'neck.'])
    assert 'neck.x' in problem(state, ignore=['head.'])
    assert len(state) == 6
    # what the model needs must be there all the same
    message = problem(model().state_dict(), ignore=['0.'])
    assert '2 missing keys' in message


@pytest.mark.parametrize('kind', ['missing', 'unexpected', 'shapes'])
def test_long_lists_are_cut(kind):
    large = nn.Sequential(*[nn.Linear(2, 2) for _ in range(100)])
    state = large.state_dict()
    if kind == 'missing':
        state = {}
    elif kind == 'unexpected':
        state.update({f'other.{i}': torch.ones(1) for i in range(200)})
    else:
        state = {k: torch.ones(3) for k in state}
    with pytest.raises(ConfigError) as caught:
        load_strict(large, state, 'x', 'y')
    message = str(caught.value)
    assert '… and 180 more' in message
    assert len(message) < 4000 and message.count('\n') < 30


def test_hooks_of_the_model_run():
    """As backbones use them to resize position embeddings."""
    target = model()

    def rename(state_dict, prefix, *args):
        state_dict[prefix + '0.bias'] = state_dict.pop(prefix + 'old')

    target._register_load_state_dict_pre_hook(rename)
    state = model().state_dict()
    state['old'] = state.pop('0.bias')
    load_strict(target, state, 'x', 'y')
    assert torch.equal(target[0].bias, state['old'])


def test_what_a_backbone_passes_over_is_not_missing():
    """Swin V2 computes relative coordinates anew and loads none."""
    swin = MODELS.build(dict(
        type='mmpretrain.SwinTransformerV2', arch=dict(
            embed_dims=8, depths=[1, 1], num_heads=[1, 1],
            extra_norm_every_n_blocks=0), img_size=32, out_indices=(1, )))
    state = swin.state_dict()
    load_strict(swin, state, 'x', 'y')
    del state['stages.0.blocks.0.attn.w_msa.qkv.weight']
    with pytest.raises(ConfigError, match='1 missing keys:\n.*qkv.weight'):
        load_strict(swin, state, 'x', 'y')


def test_file_that_ships_with_the_package():
    assert 'state_dict' in load_checkpoint('mmsinger://digits_teacher.pth')
    with pytest.raises(ConfigError, match='no such file'):
        load_checkpoint('mmsinger://no_such.pth')
