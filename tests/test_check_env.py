"""What tools/check_env.py finds, in made-up and in real environments."""
import importlib.metadata
import json
import os
import re
import subprocess
import sys

import packaging
import pytest
from check_env import (ONEDL, OPENMMLAB, PROVIDERS, Facts, check, installed,
                       release, versions)
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.requirements import Requirement

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CHECK_ENV = os.path.join(ROOT, 'tools', 'check_env.py')

COMMON = {'torch': '2.13.0+cpu', 'torchvision': '0.28.0'}
GOOD_ONEDL = dict(
    COMMON, **{
        'numpy': '2.4.6',
        'setuptools': '84.2.1',
        'onedl-mmengine': '0.10.12',
        'onedl-mmcv': '2.3.6',
        'onedl-mmpretrain': '1.3.6',
        'onedl-mmsegmentation': '1.4.2',
    })
MMCV = ('pip install "setuptools<82" wheel ninja && '
        'pip install --no-build-isolation "mmcv>=2.0,<2.2"')
GOOD_OPENMMLAB = dict(
    COMMON,
    numpy='1.26.4',
    setuptools='80.9.0',
    mmengine='0.10.7',
    mmcv='2.1.0',
    mmpretrain='1.2.0',
    mmsegmentation='1.2.2')


def without(distributions, *names):
    return {k: v for k, v in distributions.items() if k not in names}


def errors(facts, **kwargs):
    return [f for f in check(facts, **kwargs) if f.error]


@pytest.mark.parametrize('distributions', [GOOD_ONEDL, GOOD_OPENMMLAB])
def test_good_environments_have_no_findings(distributions):
    assert check(Facts(distributions, mmcv_operators=True)) == []


@pytest.mark.parametrize('distributions, says, fix', [
    # Python and torch
    (without(GOOD_ONEDL, 'torch'), 'torch is not installed',
     'pip install torch==2.13.0 torchvision==0.28.0'),
    (dict(GOOD_ONEDL, torch='1.13.1'), 'torch 1.13.1 is too old',
     'pip install torch==2.13.0 torchvision==0.28.0'),
    (without(GOOD_ONEDL, 'torchvision'), 'torchvision is not installed',
     'pip install "torchvision==0.28.*"'),
    # missing packages, filled up from the family that is there
    (without(GOOD_ONEDL, 'onedl-mmpretrain'), 'mmpretrain: not installed',
     'pip install "onedl-mmpretrain>=1.3.6"'),
    (without(GOOD_OPENMMLAB, 'mmpretrain'), 'mmpretrain: not installed',
     'pip install mmpretrain==1.2.0'),
    (without(GOOD_ONEDL, 'numpy'), 'numpy is not installed',
     'pip install numpy'),
    (without(GOOD_OPENMMLAB, 'numpy'), 'numpy is not installed',
     'pip install "numpy<2"'),
    # versions
    (dict(GOOD_OPENMMLAB, mmengine='0.9.1'), 'mmengine 0.9.1 is too old',
     'pip install mmengine==0.10.7'),
    (dict(GOOD_OPENMMLAB, mmcv='2.2.0'), 'mmcv 2.2.0 is too new',
     MMCV),
    (dict(GOOD_OPENMMLAB, mmcv='1.7.2'), 'mmcv 1.7.2 is too old',
     MMCV),
    (dict(GOOD_OPENMMLAB, numpy='2.0.0'), 'numpy 2.0.0 is too new',
     'pip install "numpy<2"'),
    (dict(GOOD_OPENMMLAB, setuptools='82.0.0'), 'setuptools<82',
     'pip install "setuptools<82"'),
])
def test_one_fault_is_named_with_its_fix(distributions, says, fix):
    found, = errors(Facts(distributions, mmcv_operators=True))
    assert says in found.what
    assert found.fix == (fix, )


def test_python_too_old():
    found, = errors(Facts(GOOD_ONEDL, python='3.8.18'))
    assert 'Python 3.8.18 is too old' in found.what


def test_mmcv_2_2_is_fine_for_mmpretrain_alone():
    distributions = dict(without(GOOD_OPENMMLAB, 'mmsegmentation'),
                         mmcv='2.2.0')
    assert errors(Facts(distributions)) == []


def test_mmseg_is_needed_for_some_recipes_only():
    facts = Facts(without(GOOD_ONEDL, 'onedl-mmsegmentation'))
    note, = check(facts)
    assert not note.error and 'classification will' in note.what
    assert note.fix == ('pip install "onedl-mmsegmentation>=1.4.2"', )


def test_old_mmcv_full_is_replaced():
    distributions = dict(without(GOOD_OPENMMLAB, 'mmcv'),
                         **{'mmcv-full': '1.7.2'})
    found, = errors(Facts(distributions, mmcv_operators=True))
    assert found.fix == ('pip uninstall -y mmcv-full',
                         MMCV)


def test_both_families_of_one_package():
    found, = errors(Facts(dict(GOOD_ONEDL, mmcv='2.1.0', mmengine='0.10.7')))
    assert 'mmcv comes from onedl-mmcv and mmcv' in found.what
    assert found.fix == (
        'pip uninstall -y onedl-mmengine mmengine onedl-mmcv mmcv',
        'pip install "onedl-mmengine>=0.10.12" "onedl-mmcv>=2.3.6"')


def test_mmcv_beside_mmcv_lite_stays_openmmlab():
    found, = errors(Facts(dict(GOOD_OPENMMLAB, **{'mmcv-lite': '2.1.0'})))
    assert found.fix == ('pip uninstall -y mmcv mmcv-lite',
                         MMCV)


def test_mixed_families():
    distributions = dict(without(GOOD_ONEDL, 'onedl-mmsegmentation'),
                         mmsegmentation='1.2.2')
    found, = errors(Facts(distributions, mmcv_operators=True))
    assert 'mixed' in found.what
    assert found.fix == ('pip uninstall -y mmsegmentation',
                         'pip install "onedl-mmsegmentation>=1.4.2"')


@pytest.mark.parametrize('distributions, det, needed', [
    (GOOD_ONEDL, False, False),
    (dict(GOOD_ONEDL, **{'onedl-mmdetection': '3.5.1'}), False, True),
    (dict(GOOD_ONEDL, **{'onedl-mmdetection': '3.5.1'}), True, True),
    (GOOD_OPENMMLAB, False, True),  # mmseg 1.2.2 uses them
    (without(GOOD_OPENMMLAB, 'mmsegmentation'), False, False),
])
def test_mmcv_operators_only_where_needed(distributions, det, needed):
    found = errors(Facts(distributions, mmcv_operators=False), det=det)
    assert len(found) == needed
    if needed:
        assert 'mmcv._ext' in found[0].what
        assert '--no-build-isolation --no-cache-dir' in found[0].fix[-1]


@pytest.mark.parametrize('family, distributions, fix', [
    (ONEDL, dict(GOOD_ONEDL, **{'onedl-mmdetection': '3.5.1'}), (
        'pip install setuptools wheel ninja',
        'pip install --no-build-isolation --no-cache-dir --force-reinstall '
        '--no-deps --no-binary onedl-mmcv "onedl-mmcv>=2.3.6"')),
    (OPENMMLAB, dict(without(GOOD_OPENMMLAB, 'mmcv'),
                     **{'mmcv-lite': '2.1.0'}), (
        'pip uninstall -y mmcv-lite',
        'pip install "setuptools<82" wheel ninja',
        'pip install --no-build-isolation --no-cache-dir --force-reinstall '
        '--no-deps --no-binary mmcv "mmcv>=2.0,<2.2"')),
])
def test_how_mmcv_operators_are_compiled(family, distributions, fix):
    facts = Facts(distributions, mmcv_operators=False)
    assert facts.families() == {family}
    found, = errors(facts)
    assert found.fix == fix


def test_det_asks_for_mmdet():
    missing, operators = errors(
        Facts(GOOD_ONEDL, mmcv_operators=False), det=True)
    assert missing.fix == ('pip install "onedl-mmdetection>=3.5.1"', )
    assert '--no-binary onedl-mmcv' in operators.fix[-1]


@pytest.mark.parametrize('torchvision, says, fix', [
    ('0.28.0', 'another build of torch',
     'pip install --force-reinstall torch==2.13.0 torchvision==0.28.0'),
    ('0.20.1', 'does not belong', 'pip install "torchvision==0.28.*"'),
])
def test_torchvision_operators_are_a_note(torchvision, says, fix):
    facts = Facts(
        dict(GOOD_ONEDL, torchvision=torchvision),
        torchvision_operators=False)
    note, = check(facts)
    assert not note.error
    assert says in note.what and 'nms' in note.what
    assert 'After `import mmsinger`' in note.what
    assert note.fix[0].startswith(fix)
    assert 'without compiled operators' in versions(facts)['torchvision']


def test_broken_import_is_told_unless_something_else_explains_it():
    broken = {'mmpretrain': 'ImportError: no such file'}
    found, = errors(Facts(GOOD_ONEDL, import_errors=broken))
    assert 'ImportError: no such file' in found.what
    assert found.fix == ('pip install --force-reinstall --no-deps '
                         'onedl-mmpretrain==1.3.6', )
    found, = errors(
        Facts(without(GOOD_ONEDL, 'onedl-mmcv'), import_errors=broken))
    assert found.what == 'mmcv: not installed.'


def test_broken_torch():
    facts = Facts(GOOD_ONEDL, import_errors={'torch': 'OSError: libcudart'})
    found, = errors(facts)
    assert 'OSError: libcudart' in found.what
    assert '--force-reinstall torch==' in found.fix[0]


def test_mmsinger_without_metadata(monkeypatch):
    def requires(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, 'requires', requires)
    note, = check(Facts(GOOD_ONEDL))
    assert not note.error and 'versions that it asks for' in note.what
    assert 'pip install --no-deps -e .' in note.fix[0]


# Whatever is installed, following the printed commands ends in a usable
# environment.

CATALOGUE = {
    'torch': ('2.5.1', '2.6.0', '2.13.0'),
    'torchvision': ('0.14.1', '0.15.2', '0.28.0'),
    'numpy': ('1.26.4', '2.4.6'),
    'setuptools': ('80.9.0', '84.2.1'),
    'onedl-mmengine': ('0.10.8', '0.10.12'),
    'mmengine': ('0.7.0', '0.10.7'),
    'mmengine-lite': ('0.9.0', '0.10.7'),
    'onedl-mmcv': ('2.3.0', '2.3.6', '2.4.0'),
    'mmcv': ('1.7.2', '2.1.0', '2.2.0'),
    'mmcv-lite': ('2.1.0', '2.2.0'),
    'mmcv-full': ('1.7.2', ),
    'onedl-mmpretrain': ('1.3.6', ),
    'mmpretrain': ('0.12.0', '1.2.0'),
    'onedl-mmsegmentation': ('1.4.2', ),
    'mmsegmentation': ('0.30.0', '1.2.2'),
    'onedl-mmdetection': ('3.5.1', ),
    'mmdet': ('2.28.0', '3.3.0'),
}


def follow(command, facts):
    """Do to the facts what pip would do to the environment."""
    if ' && ' in command:
        for part in command.split(' && '):
            follow(part, facts)
        return
    words = re.sub(r'\s+#.*', '', command).replace('"', '').split()
    assert words[0] == 'pip'
    if words[1] == 'uninstall':
        assert words[2] == '-y'
        for name in words[3:]:
            del facts.distributions[name]  # KeyError: it was not there
        return
    assert words[1] == 'install'
    if '--no-binary' in words:
        facts.mmcv_operators = True
        del words[words.index('--no-binary'):][:2]
        words = [w for w in words if w not in ('onedl-mmcv', 'mmcv')]
    for word in words[2:]:
        if word.startswith('--') or word == 'URL':
            continue
        requirement = Requirement(word)
        fitting = [
            v for v in CATALOGUE.get(requirement.name, ('1.0', ))
            if requirement.specifier.contains(v)
        ]
        assert fitting, f'{command}: there is no {word}'
        facts.distributions[requirement.name] = max(fitting, key=release)


@settings(deadline=None)
@given(
    st.fixed_dictionaries({}, optional={
        name: st.sampled_from(found) for name, found in CATALOGUE.items()
    }), st.sampled_from([None, True, False]), st.booleans(), st.booleans())
def test_following_the_fixes_ends_in_a_usable_environment(
        distributions, operators, det, one_by_one):
    facts = Facts(dict(distributions), mmcv_operators=operators)
    for _ in range(12 if one_by_one else 4):
        found = errors(facts, det=det)
        for finding in found[:1] if one_by_one else found:
            for command in finding.fix:
                follow(command, facts)
    assert not errors(facts, det=det)
    for package in ('mmengine', 'mmcv', 'mmpretrain') + ('mmdet', ) * det:
        assert len(facts.providers(package)) == 1
    assert len(facts.families()) == 1


def test_names_are_listed_once():
    names = [name for row in PROVIDERS.values() for name in row]
    assert len(names) == len(set(names))


# Real interpreters

def run(*args, isolated=False, path=ROOT):
    if isolated:  # packaging alone of what is installed
        os.symlink(os.path.dirname(packaging.__file__), path / 'packaging')
    command = [sys.executable, *(['-S'] if isolated else []), CHECK_ENV]
    return subprocess.run(
        [*command, *args], capture_output=True, text=True, timeout=300,
        env=dict(os.environ, PYTHONPATH=str(path)))


def test_this_environment_is_usable():
    done = run('--json')
    report = json.loads(done.stdout)
    assert report['usable'], report['findings']
    assert done.returncode == 0
    assert report['versions']['mmengine'] != 'not installed'


@pytest.mark.skipif('onedl-mmcv' not in installed(), reason='needs OneDL')
def test_report_with_both_families(tmp_path):
    (tmp_path / 'mmcv-2.1.0.dist-info').mkdir()
    (tmp_path / 'mmcv-2.1.0.dist-info' / 'METADATA').write_text(
        'Metadata-Version: 2.1\nName: mmcv\nVersion: 2.1.0\n')
    done = run(path=f'{ROOT}{os.pathsep}{tmp_path}')
    assert done.returncode == 1
    assert 'mmcv comes from onedl-mmcv and mmcv' in done.stdout
    assert 'pip uninstall -y onedl-mmcv mmcv' in done.stdout


def test_report_without_torch(tmp_path):
    done = run(isolated=True, path=tmp_path)  # -S: no site-packages
    assert done.returncode == 1, done.stderr
    assert 'torch is not installed' in done.stdout
    assert 'pip install torch==' in done.stdout


def test_report_with_broken_torch(tmp_path):
    (tmp_path / 'torch').mkdir()
    (tmp_path / 'torch' / '__init__.py').write_text(
        'raise OSError("libcudart.so.13: cannot open shared object file")')
    done = run(isolated=True, path=tmp_path)
    assert done.returncode == 1, done.stderr
    assert 'cannot be imported: OSError: libcudart.so.13' in done.stdout


def test_import_without_torch_points_to_the_tool():
    done = subprocess.run(
        [sys.executable, '-S', '-c', 'import mmsinger'], text=True,
        capture_output=True, env=dict(os.environ, PYTHONPATH=ROOT))
    assert done.returncode == 1
    assert 'tools/check_env.py' in done.stderr
