"""What is installed, and how to mend it where mmsinger cannot run.

``tools/check_env.py`` runs this file by its path. It imports the standard
library only, so that it works where torch or OpenMMLab's packages are missing
or broken. :func:`check` looks at nothing but the facts it is given.
"""
import argparse
import dataclasses
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import sys
import warnings
from typing import Dict, List, Optional, Tuple

ONEDL = 'OneDL'
OPENMMLAB = 'OpenMMLab'

# Import package -> the distributions that provide it, the first of each
# family being what `pip install` should be asked for. All distributions of
# one row write the same folder.
PROVIDERS = {
    'mmengine': {
        ONEDL: ('onedl-mmengine', ),
        OPENMMLAB: ('mmengine', 'mmengine-lite')
    },
    'mmcv': {
        ONEDL: ('onedl-mmcv', ),
        OPENMMLAB: ('mmcv', 'mmcv-lite', 'mmcv-full')
    },
    'mmpretrain': {
        ONEDL: ('onedl-mmpretrain', ),
        OPENMMLAB: ('mmpretrain', )
    },
    'mmseg': {
        ONEDL: ('onedl-mmsegmentation', ),
        OPENMMLAB: ('mmsegmentation', )
    },
    'mmdet': {
        ONEDL: ('onedl-mmdetection', ),
        OPENMMLAB: ('mmdet', )
    },
}

# As in the extras of setup.py, and the original mmdet.
REQUIREMENTS = {
    'onedl-mmengine': 'onedl-mmengine>=0.10.12',
    'onedl-mmcv': 'onedl-mmcv>=2.3.6',
    'onedl-mmpretrain': 'onedl-mmpretrain>=1.3.6',
    'onedl-mmsegmentation': 'onedl-mmsegmentation>=1.4.2',
    'onedl-mmdetection': 'onedl-mmdetection>=3.5.1',
    'mmengine': 'mmengine==0.10.7',
    'mmcv': 'mmcv>=2.0,<2.2',
    'mmpretrain': 'mmpretrain==1.2.0',
    'mmsegmentation': 'mmsegmentation==1.2.2',
    'mmdet': 'mmdet==3.3.0',
}

# Oldest release that has what mmsinger uses.
OLDEST = {
    'mmengine': (0, 10),
    'mmcv': (2, 0),
    'mmpretrain': (1, 0),
    'mmseg': (1, 0),
    'mmdet': (3, 0),
}

TORCH = 'torch==2.13.0 torchvision==0.28.0'
OTHERS = ('torch', 'torchvision', 'numpy', 'timm', 'setuptools', 'mmsinger')


@dataclasses.dataclass
class Facts:
    """What :func:`collect` found; the tests make their own.

    Args:
        distributions (dict): Name of an installed distribution -> version.
        python (str): Python's version.
        import_errors (dict): Import package -> why its import failed.
        cuda (str, optional): The CUDA version that torch was built for.
        devices (tuple): Names of the GPUs that torch sees.
        torchvision_operators (bool, optional): Whether torchvision's compiled
            operators load; None if that was not looked at.
        mmcv_operators (bool, optional): The same for ``mmcv._ext``.
    """
    distributions: Dict[str, str]
    python: str = '3.11.0'
    import_errors: Dict[str, str] = dataclasses.field(default_factory=dict)
    cuda: Optional[str] = None
    devices: Tuple[str, ...] = ()
    torchvision_operators: Optional[bool] = None
    mmcv_operators: Optional[bool] = None

    def providers(self, package: str) -> List[str]:
        """The installed distributions that provide an import package."""
        return [
            name for names in PROVIDERS[package].values() for name in names
            if name in self.distributions
        ]

    def families(self) -> List[str]:
        """The families of which at least one distribution is installed."""
        return [
            family for family in (ONEDL, OPENMMLAB)
            if any(name in self.distributions for row in PROVIDERS.values()
                   for name in row[family])
        ]

    def release(self, distribution: str) -> Optional[Tuple[int, ...]]:
        """The release numbers of a distribution, None if not installed."""
        if distribution not in self.distributions:
            return None
        return release(self.distributions[distribution])


@dataclasses.dataclass
class Finding:
    """Something to tell the user.

    Args:
        what (str): What is wrong, and what it stops from working.
        fix (tuple): The commands that mend it, in order.
        error (bool): Whether mmsinger cannot be used before it is mended.
    """
    what: str
    fix: Tuple[str, ...]
    error: bool = True


def release(version: str) -> Tuple[int, ...]:
    """``'2.13.0+cpu'`` -> ``(2, 13, 0)``."""
    numbers = re.match(r'\d+(?:\.\d+)*', version)
    return tuple(map(int, numbers.group().split('.'))) if numbers else ()


def check(facts: Facts, det: bool = False) -> List[Finding]:
    """Compare what is installed with what mmsinger needs.

    Args:
        facts (Facts): What is installed.
        det (bool): Whether mmdet is going to be used. Defaults to False;
            taken for granted where mmdet is installed.

    Returns:
        list[Finding]: Errors and notes, the first to be mended first.
    """
    families = list(_check_families(facts))
    findings = [
        *_check_python(facts),
        *_check_torch(facts),
        *families,
        *_check_missing(facts, det),
    ]
    if not families:  # otherwise they are going to be replaced
        findings += _check_versions(facts)
        findings += _check_mmcv_operators(facts, det)
    findings += _check_torchvision_operators(facts)
    if not any(finding.error for finding in findings):
        # Otherwise most likely a consequence of the errors above.
        findings += _check_imports(facts)
    return findings


def install(*requirements: str) -> str:
    """The command that installs the requirements, quoted for a shell.

    OpenMMLab's mmcv is source that newer setuptools do not build, and that
    has to see torch for its operators.
    """
    words = ' '.join(
        f'"{r}"' if re.search('[<>*]', r) else r for r in requirements)
    if any(r.startswith('mmcv>') for r in requirements):
        return (install('setuptools<82', 'wheel', 'ninja')
                + f' && pip install --no-build-isolation {words}')
    return f'pip install {words}'


def _check_python(facts):
    if release(facts.python) < (3, 9):
        yield Finding(
            f'Python {facts.python} is too old: mmsinger needs 3.9 or newer, '
            'the OneDL packages 3.10.',
            ('make install PYTHON=python3.11', ))


def _check_torch(facts):
    torch = facts.release('torch')
    if torch is None:
        yield Finding('torch is not installed.', (install(TORCH), ))
        return
    if 'torch' in facts.import_errors:
        yield Finding(
            f'torch {facts.distributions["torch"]} cannot be imported: '
            f'{facts.import_errors["torch"]}',
            (f'pip install --force-reinstall {TORCH}', ))
    elif torch < (2, 6):
        yield Finding(
            f'torch {facts.distributions["torch"]} is too old: mmsinger needs '
            '2.6 or newer.', (install(TORCH), ))
        return
    if 'torchvision' not in facts.distributions:
        yield Finding('torchvision is not installed: mmpretrain and mmseg '
                      'import it.', (install(_torchvision_for(torch)), ))


def _torchvision_for(torch: Tuple[int, ...]) -> str:
    # torchvision 0.15 came with torch 2.0, and they have kept step since.
    if len(torch) < 2 or torch[0] != 2:
        return 'torchvision'
    return f'torchvision==0.{torch[1] + 15}.*'


def _check_families(facts):
    families = facts.families()
    doubled = [p for p in PROVIDERS if len(facts.providers(p)) > 1]
    if not doubled and len(families) < 2:
        return
    keep = OPENMMLAB if families == [OPENMMLAB] else ONEDL
    replace = doubled + [
        p for p, row in PROVIDERS.items() if p not in doubled
        and not set(facts.providers(p)) <= set(row[keep])
    ]
    if doubled:
        what = '; '.join(f'{p} comes from {" and ".join(facts.providers(p))}'
                         for p in doubled)
        what = (f'Two distributions of one package are installed: {what}. '
                'They write the same folder: its files are a mixture, and '
                'removing one leaves the other incomplete. Remove both, then '
                'install one')
    else:
        names = ', '.join(facts.providers(p)[0] for p in PROVIDERS
                          if facts.providers(p))
        what = (f'{names}: packages of {ONEDL} and of {OPENMMLAB} are mixed, '
                'which neither supports. Take all from one')
    remove = [name for p in replace for name in facts.providers(p)]
    yield Finding(
        f'{what} (here: {keep}).',
        ('pip uninstall -y ' + ' '.join(remove),
         install(*(REQUIREMENTS[PROVIDERS[p][keep][0]] for p in replace))))


def _check_missing(facts, det):
    family = OPENMMLAB if facts.families() == [OPENMMLAB] else ONEDL
    needed = ['mmengine', 'mmcv', 'mmpretrain'] + ['mmdet'] * det
    missing = [p for p in needed if not facts.providers(p)]
    if missing:
        yield Finding(
            f'{", ".join(missing)}: not installed.',
            (install(*(REQUIREMENTS[PROVIDERS[p][family][0]]
                       for p in missing)), ))
    if not facts.providers('mmseg'):
        yield Finding(
            'mmseg is not installed: segmentation and depth recipes will not '
            'run, classification will.',
            (install(REQUIREMENTS[PROVIDERS['mmseg'][family][0]]), ),
            error=False)
    if 'numpy' not in facts.distributions:
        wanted = 'numpy<2' if family == OPENMMLAB else 'numpy'
        yield Finding('numpy is not installed.', (install(wanted), ))
    if 'mmsinger' in facts.import_errors:
        yield Finding(
            f'mmsinger cannot be imported: {facts.import_errors["mmsinger"]}',
            ('pip install --no-deps -e .   # in the checkout', ))


def _check_versions(facts):
    for package, oldest in OLDEST.items():
        for name in facts.providers(package):
            if facts.release(name) >= oldest:
                continue
            fix = [install(REQUIREMENTS[name])] if name in REQUIREMENTS else [
                f'pip uninstall -y {name}',
                install(REQUIREMENTS[PROVIDERS[package][OPENMMLAB][0]])
            ]
            yield Finding(
                f'{name} {facts.distributions[name]} is too old: mmsinger '
                f'needs {package} {_dotted(oldest)} or newer.', tuple(fix))
    yield from _check_newest_mmcv(facts)
    if facts.families() == [OPENMMLAB]:
        yield from _check_what_openmmlab_needs(facts)


def _check_newest_mmcv(facts):
    # The upper bounds that these packages assert when they are imported.
    strict = [
        n for n in ('mmsegmentation', 'mmdet') if n in facts.distributions
    ]
    limit = _dotted((2, 2) if strict else (2, 4))
    users = ' and '.join(strict or facts.providers('mmpretrain'))
    for name in facts.providers('mmcv'):
        if users and facts.release(name) >= release(limit):
            yield Finding(
                f'{name} {facts.distributions[name]} is too new: {users} '
                f'takes versions below {limit} only.',
                (install(f'{name}>=2.0,<{limit}'), ))


def _check_what_openmmlab_needs(facts):
    numpy = facts.release('numpy')
    if numpy and numpy >= (2, ):
        yield Finding(
            f'numpy {facts.distributions["numpy"]} is too new for '
            f"{OPENMMLAB}'s packages, which were made for numpy 1 (those of "
            f'{ONEDL} take numpy 2).', (install('numpy<2'), ))
    setuptools = facts.release('setuptools')
    if setuptools is None or setuptools >= (82, ):
        got = facts.distributions.get('setuptools', 'not installed')
        yield Finding(
            'mmengine imports pkg_resources, which setuptools holds up to '
            f'version 81 (here: {got}).', (install('setuptools<82'), ))


def _dotted(numbers: Tuple[int, ...]) -> str:
    return '.'.join(map(str, numbers))


def _check_mmcv_operators(facts, det):
    if facts.mmcv_operators is not False:
        return
    users = [
        name for name in ('onedl-mmdetection', 'mmdet', 'mmsegmentation')
        if name in facts.distributions
    ] or ['mmdet'] * det
    if not users:
        return
    lite = [n for n in facts.providers('mmcv') if n == 'mmcv-lite']
    name = 'onedl-mmcv' if 'onedl-mmcv' in facts.distributions else 'mmcv'
    yield Finding(
        'mmcv has no compiled operators (mmcv._ext), which '
        f'{" and ".join(users)} needs: pip built it without seeing torch. '
        'Compiling takes 5 to 15 minutes.',
        (*[f'pip uninstall -y {n}' for n in lite],
         install('setuptools<82' if name == 'mmcv' else 'setuptools', 'wheel',
                 'ninja'),
         # pip keeps the build without operators under the same key as one
         # with them: --no-cache-dir and --no-binary stop it from taking it.
         'pip install --no-build-isolation --no-cache-dir --force-reinstall '
         f'--no-deps --no-binary {name} "{REQUIREMENTS[name]}"'))


def _check_torchvision_operators(facts):
    if facts.torchvision_operators is not False or \
            'torch' not in facts.distributions:
        return
    torch, torchvision = (
        facts.distributions[n] for n in ('torch', 'torchvision'))
    wanted = _torchvision_for(release(torch))
    kept_step = f'torchvision=={_dotted(release(torchvision)[:2])}.*' == wanted
    if kept_step:
        why = 'it was compiled for another build of torch (CUDA or CPU)'
        fix = ('pip install --force-reinstall '
               f'torch=={_dotted(release(torch))} '
               f'torchvision=={_dotted(release(torchvision))} '
               '--index-url URL   # the URL that '
               'https://pytorch.org/get-started/locally names for your '
               'platform, CPU or CUDA')
    else:
        why = f'it does not belong to this torch, {wanted} does'
        fix = install(wanted)
    yield Finding(
        f'torchvision {torchvision} beside torch {torch} has no compiled '
        f'operators: {why}. mmsinger declares what its import looks for, so '
        'that transforms, mmpretrain and mmseg work; only '
        "torchvision.ops' own operators on boxes (nms, roi_align) stay "
        'absent. Nothing needs mending unless you use those.', (fix, ),
        error=False)


def _check_imports(facts):
    for package, error in facts.import_errors.items():
        names = facts.providers(package) if package in PROVIDERS else [package]
        for name in names:
            yield Finding(
                f'{package} ({name} {facts.distributions.get(name, "")}) '
                f'cannot be imported: {error}',
                ('pip install --force-reinstall --no-deps '
                 f'{name}=={facts.distributions.get(name, "")}', ))


def collect() -> Facts:
    """Look at this interpreter: metadata, then one import after the other."""
    facts = Facts(_installed(), python=platform.python_version())
    if not _imports('torch', facts):
        if 'torch' in facts.import_errors:
            facts.distributions.setdefault('torch', 'unknown')
        return facts
    import torch
    facts.distributions.setdefault('torch', torch.__version__)
    facts.cuda = torch.version.cuda
    if torch.cuda.is_available():
        facts.devices = tuple(
            torch.cuda.get_device_name(i)
            for i in range(torch.cuda.device_count()))
    if importlib.util.find_spec('mmsinger') is None:
        facts.import_errors['mmsinger'] = 'it is not installed'
        sys.path.append(
            os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    from mmsinger import compat
    if 'torchvision' in facts.distributions:
        facts.torchvision_operators = compat.torchvision_operators_present()
    for package in ('torchvision', *PROVIDERS):
        if package == 'torchvision' or facts.providers(package):
            _imports(package, facts)
    facts.mmcv_operators = _mmcv_operators()
    return facts


def _installed() -> Dict[str, str]:
    names = [n for row in PROVIDERS.values() for f in row.values() for n in f]
    found = {}
    for name in (*names, *OTHERS):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if version:  # None where pip was interrupted
            found[name] = version
    return found


def _imports(package: str, facts: Facts) -> bool:
    """Import a package; note the error if it is installed but broken."""
    if importlib.util.find_spec(package) is None:
        if package in facts.distributions or package in PROVIDERS:
            facts.import_errors[package] = 'its files are missing'
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            importlib.import_module(package)
    except Exception as error:  # whatever it is, it is what we look for
        message = ' '.join(str(error).split())
        facts.import_errors[package] = f'{type(error).__name__}: {message}'
        return False
    return True


def _mmcv_operators() -> Optional[bool]:
    spec = importlib.util.find_spec('mmcv')
    if spec is None or not spec.submodule_search_locations:
        return None
    files = os.listdir(list(spec.submodule_search_locations)[0])
    return any(
        f.startswith('_ext') and f.endswith(('.so', '.pyd')) for f in files)


def versions(facts: Facts) -> Dict[str, str]:
    """What to print: import package -> version, provider, remark."""
    rows = {'Python': facts.python}
    for name in ('mmsinger', 'torch', 'torchvision', *PROVIDERS, 'timm',
                 'numpy'):
        names = facts.providers(name) if name in PROVIDERS else \
            [name] * (name in facts.distributions)
        text = ' and '.join(
            facts.distributions[n] + (f'  {n}' if n != name else '')
            for n in names)
        rows[name] = text or 'not installed'
    if 'torch' in facts.distributions:
        rows['torch'] += f'  CUDA {facts.cuda}' if facts.cuda else '  CPU only'
        if facts.devices:
            rows['torch'] += f', {len(facts.devices)} x {facts.devices[0]}'
    if facts.torchvision_operators is False:
        rows['torchvision'] += '  without compiled operators'
    if facts.mmcv_operators is False:
        rows['mmcv'] += '  without compiled operators'
    return rows


def main() -> int:
    """Print the report.

    Returns:
        int: 0 if mmsinger can be used, 1 if something must be mended first.
    """
    parser = argparse.ArgumentParser(
        prog='check_env.py', description='Print the versions of everything '
        'that mmsinger runs on, and how to mend what is wrong. Ends with 0 '
        'if mmsinger can be used, 1 if something must be mended first.')
    parser.add_argument(
        '--det', action='store_true', help='check what detection needs too')
    parser.add_argument(
        '--json', action='store_true', help='print JSON, for programs')
    args = parser.parse_args()
    facts = collect()
    findings = check(facts, args.det)
    errors = sum(finding.error for finding in findings)
    if args.json:
        print(json.dumps({
            'usable': not errors,
            'versions': versions(facts),
            'findings': [dataclasses.asdict(f) for f in findings],
        }, indent=2))
        return int(errors > 0)

    for name, text in versions(facts).items():
        print(f'{name:<12} {text}')
    for finding in findings:
        print(f'\n{"ERROR" if finding.error else "Note"}: {finding.what}')
        for command in finding.fix:
            print(f'    {command}')
    if findings:
        print(f'\n(pip stands for: {sys.executable} -m pip)')
    print('\nSomething must be mended before mmsinger can be used: see ERROR '
          'above.' if errors else '\nmmsinger can be used.')
    return int(errors > 0)


if __name__ == '__main__':
    sys.exit(main())
