"""Imports run one way: no room of the package imports a higher one."""
import ast
import glob
import os
import subprocess
import sys

import pytest

from tiny import ROOT

# The rooms, low to high: each imports its own and lower levels alone. A room
# is a module of this name and all below it; the longest name counts.
LEVELS = (
    {'mmsinger.version', 'mmsinger.compat'},
    {'mmsinger'},  # its __init__ alone
    {'mmsinger.errors', 'mmsinger.paths'},
    {'mmsinger.schema'},
    {'mmsinger.files', 'mmsinger.registry'},
    {'mmsinger.images', 'mmsinger.metrics', 'mmsinger.checkpoint',
     'mmsinger.datasets'},
    {'mmsinger.models.features'},
    {'mmsinger.models.adapters', 'mmsinger.models.losses'},
    {'mmsinger.models.backbones', 'mmsinger.models.targets',
     'mmsinger.models.teachers'},
    {'mmsinger.models.distillers', 'mmsinger.models.probes'},
    {'mmsinger.models'},
    {'mmsinger.export'},
    {'mmsinger.figures'},
    {'mmsinger.engine'},
    {'mmsinger.analysis'},
    {'mmsinger.command_line', 'mmsinger.converters', 'mmsinger.linear_eval'},
)
HEIGHT = {room: height for height, rooms in enumerate(LEVELS)
          for room in rooms}

FILES = sorted(os.path.relpath(path, ROOT) for path in glob.glob(
    os.path.join(ROOT, 'mmsinger', '**', '*.py'), recursive=True)
    if '.mim' not in path)


def module_of(path):
    name = os.path.splitext(path)[0].replace(os.sep, '.')
    return name[:-len('.__init__')] if name.endswith('.__init__') else name


MODULES = {module_of(path) for path in FILES}


def room_of(module):
    while module not in HEIGHT:
        assert '.' in module[len('mmsinger.'):], \
            f'{module} is in no room: add it to LEVELS'
        module = module.rpartition('.')[0]
    return module


def imports(path):
    """Names of all modules that a file imports, also inside functions."""
    with open(os.path.join(ROOT, path), encoding='utf-8') as file:
        tree = ast.parse(file.read())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f'{path}: relative import'
            for alias in node.names:
                whole = f'{node.module}.{alias.name}'
                yield whole if whole in MODULES else node.module


@pytest.mark.parametrize('path', FILES)
def test_no_file_imports_a_higher_room(path):
    own = room_of(module_of(path))
    for module in imports(path):
        if module.split('.')[0] != 'mmsinger':
            continue
        room = room_of(module)
        if room != own:
            assert HEIGHT[room] < HEIGHT[own], \
                f'{path} ({own}) imports {module}, which is not below it'


def test_the_package_does_not_know_the_tools():
    tools = {name.partition('.')[0]
             for name in os.listdir(os.path.join(ROOT, 'tools'))}
    for path in FILES:
        found = {module.split('.')[0] for module in imports(path)} & tools
        assert not found, f'{path} imports {found} of tools/'


def test_training_imports_no_figures_and_no_studies():
    """What tools/train.py imports, and all that a config can name."""
    code = (
        'import sys, train, mmsinger.models, mmsinger.engine.hooks\n'
        'import mmsinger.engine.optim, mmsinger.engine.strategy\n'
        'print([name for name in sys.modules if name == "matplotlib" or '
        'name.startswith(("mmsinger.figures", "mmsinger.analysis"))])')
    tools = os.path.join(ROOT, 'tools')
    result = subprocess.run(
        [sys.executable, '-c', code], text=True, check=True,
        stdout=subprocess.PIPE, env=dict(
            os.environ, PYTHONPATH=os.pathsep.join([ROOT, tools])))
    assert result.stdout.splitlines()[-1] == '[]'
