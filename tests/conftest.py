"""Shared fixtures. mmsinger comes before anything that imports torchvision."""
import os
import sys

os.environ.setdefault('CUDA_VISIBLE_DEVICES', '')
# What the tools share among themselves
sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(
    os.path.abspath(__file__))), 'tools'))

import mmsinger  # noqa: E402, F401
import pytest  # noqa: E402
import torch  # noqa: E402
from mmengine.registry import DefaultScope  # noqa: E402
from hypothesis import settings  # noqa: E402

import tiny  # noqa: E402

TORCH_LOAD = torch.load

# The same examples in every run, and no time limit on a busy machine.
settings.register_profile('mmsinger', derandomize=True, deadline=None,
                          database=None, max_examples=50)
settings.load_profile('mmsinger')


def pytest_addoption(parser):
    parser.addoption(
        '--parity-dir', action='append', default=[], metavar='DIR',
        help='check official_*.npz files of this folder too')
    parser.addoption(
        '--kept-run', action='append', default=[], metavar='DIR',
        help='read the checkpoints that tests/keep_run.py left there too')


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """A folder in which tests/configs/tiny_seg.py can be run, for a file."""
    return tiny.workplace(tmp_path_factory.mktemp('place'))


@pytest.fixture(autouse=True)
def fresh_state():
    """The same seed, and nothing left over from another test: no default
    scope, and no safe torch.load of a run that ended in an error."""
    torch.manual_seed(0)
    DefaultScope._instance_dict.clear()
    torch.load = torch.serialization.load = TORCH_LOAD
