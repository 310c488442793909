"""The wheel: what is in it, and that building it leaves nothing behind."""
import glob
import os
import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser

import check_env
import pytest

import mmsinger
from mmsinger import paths

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
NOT_SOURCE = ('.git', '.venv*', 'build', 'dist', '*.egg-info', 'work_dirs',
              'data', 'checkpoints', '.hypothesis', '.pytest_cache')


def run(*command, cwd, **env):
    done = subprocess.run(
        command, cwd=cwd, env=dict(os.environ, **env), text=True,
        capture_output=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def backend(call, cwd):
    """Call setuptools' build backend as pip does."""
    run(sys.executable, '-c',
        f'from setuptools import build_meta as b; b.{call}', cwd=cwd)


def build_wheel(source, out):
    run(sys.executable, '-m', 'pip', 'wheel', '--no-deps',
        '--no-build-isolation', '-w', str(out), '.', cwd=source)
    wheel, = glob.glob(f'{out}/*.whl')
    return wheel


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    """A copy of the tree, so that builds do not touch ours."""
    folder = tmp_path_factory.mktemp('packaging') / 'source'

    def ignore(path, names):
        at_top = NOT_SOURCE if path == ROOT else ()
        return shutil.ignore_patterns('.mim', '__pycache__', *at_top)(
            path, names)

    shutil.copytree(ROOT, folder, ignore=ignore)
    return folder


@pytest.fixture(scope='module')
def wheel(source):
    return build_wheel(source, source.parent / 'wheel')


@pytest.fixture(scope='module')
def site(wheel):
    """The wheel, unpacked."""
    folder = os.path.join(os.path.dirname(wheel), 'site')
    with zipfile.ZipFile(wheel) as f:
        f.extractall(folder)
    return folder


def files_below(folder):
    return {
        os.path.relpath(os.path.join(at, name), folder)
        for at, _, names in os.walk(folder) for name in names
        if not name.endswith('.pyc')
    }


def metadata(site):
    path, = glob.glob(f'{site}/*.dist-info/METADATA')
    with open(path, encoding='utf-8') as f:
        return Parser().parse(f)


def test_version_and_license(site):
    about = metadata(site)
    assert about['Name'] == 'mmsinger'
    assert about['Version'] == mmsinger.__version__
    assert 'Apache-2.0' in (about['License-Expression'] or about['License'])
    assert about['Requires-Python'] == '>=3.9'


@pytest.mark.parametrize('folder', ['configs', 'tools'])
def test_recipes_and_tools_are_in_the_wheel(source, site, folder):
    there = files_below(source / folder)
    assert there
    stay = {f for f in there if f in ('sweep_stock.py', 'publish_teacher.py')}
    assert len(stay) == 2 * (folder == 'tools')
    there -= stay
    assert files_below(f'{site}/mmsinger/.mim/{folder}') == there


def test_all_modules_and_assets_are_in_the_wheel(source, site):
    package = source / 'mmsinger'
    wanted = {
        f for f in files_below(package)
        if f.endswith(('.py', '.jinja')) or f.startswith('assets')
    }
    missing = wanted - files_below(f'{site}/mmsinger')
    assert not missing, 'a folder without __init__.py?'


def test_wheel_by_way_of_the_sdist_is_the_same(source, site, tmp_path):
    backend(f'build_sdist({str(tmp_path)!r})', cwd=source)
    archive, = glob.glob(f'{tmp_path}/*.tar.gz')
    shutil.unpack_archive(archive, tmp_path / 'unpacked')
    unpacked, = glob.glob(f'{tmp_path}/unpacked/*')
    assert os.path.isfile(f'{unpacked}/tests/test_packaging.py')
    again = build_wheel(unpacked, tmp_path / 'wheel')
    with zipfile.ZipFile(again) as f:
        assert set(f.namelist()) == {
            n.replace(os.sep, '/') for n in files_below(site)}


def test_removed_files_do_not_come_back(source, wheel, tmp_path):
    """From the build folder that the wheel before has left."""
    assert os.path.isdir(source / 'build')
    for left in ('mmsinger/gone.py', 'mmsinger/.mim/configs/gone.py'):
        for lib in glob.glob(f'{source}/build/lib*'):
            open(os.path.join(lib, left), 'w').close()
    with zipfile.ZipFile(build_wheel(source, tmp_path)) as f:
        assert not [n for n in f.namelist() if 'gone' in n]


@pytest.mark.skipif(not shutil.which('git'), reason='needs git')
def test_building_leaves_nothing_that_git_sees(source, wheel, tmp_path):
    tree = tmp_path / 'tree'
    shutil.copytree(source, tree, ignore=shutil.ignore_patterns(
        'build', '*.egg-info'))
    run('git', 'init', '-q', cwd=tree)
    run('git', 'add', '-A', cwd=tree)
    build_wheel(tree, tmp_path)
    (tmp_path / 'editable').mkdir()
    backend(f'build_editable({str(tmp_path / "editable")!r})', cwd=tree)
    assert os.path.samefile(tree / 'mmsinger/.mim/configs', tree / 'configs')
    assert os.path.samefile(tree / 'mmsinger/.mim/tools', tree / 'tools')
    assert not run('git', 'diff', '--name-only', cwd=tree)
    assert not run('git', 'ls-files', '--others', '--exclude-standard',
                   cwd=tree)


@pytest.mark.parametrize('package, family, wanted', [
    ('mmcv', check_env.ONEDL, 'onedl-mmcv>=2.3.6'),
    ('mmdet', check_env.ONEDL, 'onedl-mmdetection>=3.5.1'),
    ('mmcv', check_env.OPENMMLAB, 'mmcv>=2.0,<2.2'),
    ('mmseg', check_env.OPENMMLAB, 'mmsegmentation==1.2.2'),
    ('setuptools', check_env.OPENMMLAB, 'setuptools<82')])
def test_check_env_recommends_what_the_extras_ask_for(
        site, monkeypatch, package, family, wanted):
    monkeypatch.setattr('importlib.metadata.requires', lambda name:
                        metadata(site).get_all('Requires-Dist'))
    assert check_env.wanted(package, family) == wanted


def test_installed_package_finds_its_recipes(site):
    out = run(sys.executable, '-c', 'import mmsinger.paths as p; '
              'print(p.configs()); print(p.tools())', cwd=site,
              PYTHONPATH=site)
    mim = os.path.join(os.path.realpath(site), 'mmsinger', '.mim')
    assert out.split() == [f'{mim}/configs', f'{mim}/tools']


def test_checkout_finds_its_recipes():
    assert os.path.samefile(paths.configs(), os.path.join(ROOT, 'configs'))
    assert os.path.samefile(paths.tools(), os.path.join(ROOT, 'tools'))


def test_paths_say_what_is_missing(tmp_path):
    shutil.copytree(os.path.join(ROOT, 'mmsinger'), tmp_path / 'mmsinger',
                    ignore=shutil.ignore_patterns('.mim', '__pycache__'))
    done = subprocess.run(
        [sys.executable, '-c', 'import mmsinger.paths as p; p.configs()'],
        cwd=tmp_path, env=dict(os.environ, PYTHONPATH=str(tmp_path)),
        capture_output=True, text=True)
    assert "no folder 'configs' of mmsinger" in done.stderr


@pytest.mark.parametrize('where', ['checkout', 'wheel'])
def test_check_env_help(site, where):
    tools = f'{ROOT}/tools' if where == 'checkout' else \
        f'{site}/mmsinger/.mim/tools'
    out = run(sys.executable, f'{tools}/check_env.py', '--help', cwd=site)
    assert re.search(r'usage: check_env\.py .*--det.*--json', out)
