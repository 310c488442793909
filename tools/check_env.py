"""Print versions, and how to mend what is wrong with the installation.

    python tools/check_env.py [--det] [--json]

Beside the standard library this needs packaging alone, which comes with pip:
`import mmsinger` needs torch, whose absence is one of the faults to be told.
What to install is read from mmsinger's own metadata, the extras of setup.py.
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
import types
import warnings
from typing import Dict, Iterator, List, Optional, Set, Tuple

try:
    from packaging.requirements import Requirement
    from packaging.version import InvalidVersion, Version
except ImportError:
    from pip._vendor.packaging.requirements import Requirement
    from pip._vendor.packaging.version import InvalidVersion, Version

ONEDL = 'OneDL'
OPENMMLAB = 'OpenMMLab'
EXTRAS = {ONEDL: ('onedl', 'det'), OPENMMLAB: ('openmmlab', )}  # of mmsinger

# Import package -> the distributions that provide it: OneDL's, then the one
# of OpenMMLab to ask pip for, then others. All of a row write one folder.
PROVIDERS = {
    'mmengine': ('onedl-mmengine', 'mmengine', 'mmengine-lite'),
    'mmcv': ('onedl-mmcv', 'mmcv', 'mmcv-lite', 'mmcv-full'),
    'mmpretrain': ('onedl-mmpretrain', 'mmpretrain'),
    'mmseg': ('onedl-mmsegmentation', 'mmsegmentation'),
    'mmdet': ('onedl-mmdetection', 'mmdet'),
}

# Who runs with what; strict ones first. mmsinger's extras ask for what it is
# tested with, which is less. Others assert theirs in code.
RUNS_WITH = {
    'mmsinger': ('torch>=2.6', 'torchvision', 'numpy', 'mmengine>=0.10',
                 'mmcv>=2.0', 'mmpretrain>=1.0', 'mmseg>=1.0', 'mmdet>=3.0'),
    'mmsegmentation': ('mmcv<2.2', ),
    'mmdet': ('mmcv<2.2', ),
    'mmpretrain': ('mmcv<2.4', ),
    'onedl-mmpretrain': ('mmcv<2.4', ),
    'mmengine': ('numpy<2', 'setuptools<82'),  # pkg_resources
    'mmengine-lite': ('numpy<2', 'setuptools<82'),
}
TORCH = 'torch==2.13.0 torchvision==0.28.0'


@dataclasses.dataclass
class Facts:
    """What :func:`collect` found; the tests make their own.

    Args:
        distributions (dict): Name of an installed distribution -> version.
        python (str): Python's version.
        import_errors (dict): Import package -> why its import failed.
        torch_build (str): The CUDA version that torch was built for, and the
            GPUs that it sees.
        torchvision_operators (bool, optional): Whether torchvision's compiled
            operators load; None if that was not looked at.
        mmcv_operators (bool, optional): Whether ``mmcv._ext`` is there; None
            if that was not looked at.
    """
    distributions: Dict[str, str]
    python: str = '3.11.0'
    import_errors: Dict[str, str] = dataclasses.field(default_factory=dict)
    torch_build: str = ''
    torchvision_operators: Optional[bool] = None
    mmcv_operators: Optional[bool] = None

    def providers(self, package: str) -> List[str]:
        """The installed distributions that provide an import package."""
        return [name for name in PROVIDERS.get(package, (package, ))
                if name in self.distributions]

    def families(self) -> Set[str]:
        """The families of which at least one distribution is installed."""
        return {family_of(name) for package in PROVIDERS
                for name in self.providers(package)}

    def has(self, requirement: str) -> bool:
        """Whether a distribution in this range is installed, for instance
        ``'torch>=2.6'``."""
        wanted = Requirement(requirement)
        found = self.distributions.get(wanted.name)
        return found is not None and wanted.specifier.contains(
            release(found).base_version)


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


def release(version: str) -> Version:
    """A version to compare; 0 for what is none."""
    try:
        return Version(version)
    except InvalidVersion:
        return Version('0')


def family_of(distribution: str) -> str:
    """The family of a distribution in ``PROVIDERS``."""
    return ONEDL if distribution.startswith('onedl-') else OPENMMLAB


def wanted(name: str, family: str) -> str:
    """What to ask pip for.

    Args:
        name (str): An import package of ``PROVIDERS``, or a distribution.
        family (str): Whose.

    Returns:
        str: The requirement in mmsinger's metadata; without a version where
        it has none, or mmsinger is not installed.
    """
    if name in PROVIDERS:
        name = next(n for n in PROVIDERS[name] if family_of(n) == family)
    try:
        asked = map(Requirement, importlib.metadata.requires('mmsinger'))
    except (importlib.metadata.PackageNotFoundError, TypeError):
        return name
    for requirement in asked:
        if requirement.name == name and requirement.marker and any(
                requirement.marker.evaluate({'extra': extra})
                for extra in EXTRAS[family]):
            return name + ','.join(sorted(  # the lower bound first
                map(str, requirement.specifier), reverse=True))
    return name


def install(*requirements: str) -> str:
    """The command that installs the requirements, quoted for a shell.

    OpenMMLab's mmcv is source that newer setuptools do not build, and that
    has to see torch for its operators.
    """
    words = ' '.join(f'"{r}"' if set(r) & set('<>*') else r
                     for r in requirements)
    if any(re.match(r'mmcv\b', r) for r in requirements):
        return (install('setuptools<82', 'wheel', 'ninja')
                + f' && pip install --no-build-isolation {words}')
    return f'pip install {words}'


def check(facts: Facts, det: bool = False) -> List[Finding]:
    """Compare what is installed with what mmsinger needs.

    Args:
        facts (Facts): What is installed.
        det (bool): Whether mmdet is going to be used. Defaults to False;
            taken for granted where mmdet is installed.

    Returns:
        list[Finding]: Errors and notes, the first to be mended first.
    """
    family = OPENMMLAB if facts.families() == {OPENMMLAB} else ONEDL
    mixed = list(_mixed_families(facts, family))
    findings = [*_broken_base(facts), *_versions(facts, family, bool(mixed)),
                *mixed, *_missing(facts, family, det)]
    if not mixed:
        findings += _mmcv_operators(facts, family, det)
    findings += _torchvision_operators(facts)
    if not any(finding.error for finding in findings):
        # Otherwise most likely a consequence of the errors above.
        findings += [
            Finding(f'{package} ({name} {facts.distributions[name]}) cannot '
                    f'be imported: {error}',
                    ('pip install --force-reinstall --no-deps '
                     f'{name}=={facts.distributions[name]}', ))
            for package, error in facts.import_errors.items()
            for name in facts.providers(package)]
    return findings


def _broken_base(facts: Facts) -> Iterator[Finding]:
    if release(facts.python) < Version('3.9'):
        yield Finding(
            f'Python {facts.python} is too old: mmsinger needs 3.9 or newer, '
            'the OneDL packages 3.10.', ('make install PYTHON=python3.11', ))
    install_mmsinger = 'pip install --no-deps -e .   # in the checkout'
    for package, fix in (('torch', f'pip install --force-reinstall {TORCH}'),
                         ('mmsinger', install_mmsinger)):
        if package in facts.import_errors:
            yield Finding(
                f'{package} {facts.distributions.get(package, "")} cannot be '
                f'imported: {facts.import_errors[package]}', (fix, ))
    if wanted('mmengine', ONEDL) == 'onedl-mmengine':  # it has no metadata
        yield Finding('mmsinger is not installed, so the versions that it '
                      'asks for are not known here. Install it first.',
                      (install_mmsinger, ), error=False)


def _mixed_families(facts: Facts, keep: str) -> Iterator[Finding]:
    found = {p: facts.providers(p) for p in PROVIDERS if facts.providers(p)}
    doubled = [p for p in found if len(found[p]) > 1]
    replace = doubled + [p for p in found if p not in doubled
                         and family_of(found[p][0]) != keep]
    if doubled:
        what = '; '.join(f'{p} comes from {" and ".join(found[p])}'
                         for p in doubled)
        what = (f'Two distributions of one package are installed: {what}. '
                'They write the same folder: its files are a mixture, and '
                'removing one leaves the other incomplete. Remove both, then '
                'install one')
    elif replace:
        names = ', '.join(names[0] for names in found.values())
        what = (f'{names}: packages of {ONEDL} and of {OPENMMLAB} are mixed, '
                'which neither supports. Take all from one')
    else:
        return
    yield Finding(f'{what} (here: {keep}).', (
        'pip uninstall -y ' + ' '.join(sum((found[p] for p in replace), [])),
        install(*(wanted(p, keep) for p in replace))))


def _missing(facts: Facts, family: str, det: bool) -> Iterator[Finding]:
    missing = [p for p in ('mmengine', 'mmcv', 'mmpretrain', *['mmdet'] * det)
               if not facts.providers(p)]
    if missing:
        yield Finding(f'{", ".join(missing)}: not installed.',
                      (install(*(wanted(p, family) for p in missing)), ))
    if not facts.providers('mmseg'):
        yield Finding(
            'mmseg is not installed: segmentation and depth recipes will not '
            'run, classification will.',
            (install(wanted('mmseg', family)), ), error=False)


def _versions(facts: Facts, family: str, mixed: bool) -> Iterator[Finding]:
    told = {'torch'} & facts.import_errors.keys()
    users = ['mmsinger'] if mixed else [  # mixed ones will be replaced
        user for user in RUNS_WITH if user == 'mmsinger' or facts.has(user)]
    for user, text in [(u, text) for u in users for text in RUNS_WITH[u]]:
        package = Requirement(text).name
        limit = text[len(package):]
        names = [package]
        if package in PROVIDERS:
            names = [] if mixed else facts.providers(package)
        for name in names:
            if name in told or facts.has(name + limit) or \
                    name == 'torchvision' and 'torch' in told:
                continue
            told.add(name)
            asked = wanted(package, family)
            if package == 'torch':
                asked = TORCH
            elif package == 'torchvision':
                asked = _torchvision_for(facts.distributions['torch'])
            elif family == ONEDL and limit[:1] == '<':
                asked = f'{name}>=2.0,{limit}'
            remove = [f'pip uninstall -y {name}'] * (
                package in PROVIDERS and Requirement(asked).name != name)
            found = facts.distributions.get(name)
            what = f'{name} is not installed' if found is None else \
                f'{name} {found} is too {"new" if limit[0] == "<" else "old"}'
            yield Finding(f'{what}: {user} needs {text}.',
                          (*remove, install(asked)))


def _torchvision_for(torch: str) -> str:
    # torchvision 0.15 came with torch 2.0, and they have kept step since.
    version = release(torch)
    return f'torchvision==0.{version.minor + 15}.*' if version.major == 2 \
        else 'torchvision'


def _mmcv_operators(facts: Facts, family: str, det: bool
                    ) -> Iterator[Finding]:
    users = [name for name in ('onedl-mmdetection', 'mmdet', 'mmsegmentation')
             if facts.has(name)] or ['mmdet'] * det
    if facts.mmcv_operators is not False or not users:
        return
    asked = wanted('mmcv', family)
    yield Finding(
        'mmcv has no compiled operators (mmcv._ext), which '
        f'{" and ".join(users)} needs: pip built it without seeing torch. '
        'Compiling takes 5 to 15 minutes.',
        (*['pip uninstall -y mmcv-lite'] * facts.has('mmcv-lite'),
         install('setuptools' if family == ONEDL else 'setuptools<82', 'wheel',
                 'ninja'),
         # pip keeps the build without operators under the same key as one
         # with them: --no-cache-dir and --no-binary stop it from taking it.
         'pip install --no-build-isolation --no-cache-dir --force-reinstall '
         f'--no-deps --no-binary {Requirement(asked).name} "{asked}"'))


def _torchvision_operators(facts: Facts) -> Iterator[Finding]:
    if facts.torchvision_operators is not False or not facts.has('torch'):
        return
    torch, torchvision = (facts.distributions[n]
                          for n in ('torch', 'torchvision'))
    fitting = _torchvision_for(torch)
    if facts.has(fitting):
        why = 'it was compiled for another build of torch (CUDA or CPU)'
        fix = ('pip install --force-reinstall '
               f'torch=={release(torch).base_version} '
               f'torchvision=={release(torchvision).base_version} --index-url '
               'URL   # from https://pytorch.org/get-started/locally')
    else:
        why = f'it does not belong to this torch, {fitting} does'
        fix = install(fitting)
    yield Finding(
        f'torchvision {torchvision} beside torch {torch} has no compiled '
        f'operators: {why}. After `import mmsinger`, transforms, mmpretrain '
        'and mmseg work all the same: it declares what their imports look '
        'for. Mend it where you import torchvision, timm, mmpretrain or mmseg '
        "without mmsinger, or use torchvision.ops' operators on boxes (nms, "
        'roi_align).',
        (fix, ), error=False)


def collect() -> Facts:
    """Look at this interpreter: metadata, then one import after the other."""
    facts = Facts(installed(), python=platform.python_version())
    torch = _imports('torch', facts)
    if torch is None:
        if 'torch' in facts.import_errors:
            facts.distributions.setdefault('torch', 'unknown')
        return facts
    facts.distributions.setdefault('torch', torch.__version__)
    facts.torch_build = f'CUDA {torch.version.cuda}' if torch.version.cuda \
        else 'CPU only'
    if torch.cuda.is_available():
        facts.torch_build += (f', {torch.cuda.device_count()} x '
                              f'{torch.cuda.get_device_name(0)}')
    if importlib.util.find_spec('mmsinger') is None:
        facts.import_errors['mmsinger'] = 'it is not installed'
        sys.path.append(
            os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    from mmsinger import compat
    if facts.has('torchvision'):
        facts.torchvision_operators = compat.torchvision_operators_present()
    for package in filter(facts.providers, ('torchvision', *PROVIDERS)):
        _imports(package, facts)
    if 'mmcv' in sys.modules:
        facts.mmcv_operators = \
            importlib.util.find_spec('mmcv._ext') is not None
    return facts


def installed() -> Dict[str, str]:
    """Versions of the installed distributions; where pip was interrupted,
    there is none."""
    return {d.metadata['Name']: d.version
            for d in importlib.metadata.distributions() if d.version}


def _imports(package: str, facts: Facts) -> Optional[types.ModuleType]:
    """Import a package; note the error if it is installed but broken."""
    try:
        if importlib.util.find_spec(package) is None:
            if facts.providers(package):
                facts.import_errors[package] = 'its files are missing'
            return None
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            return importlib.import_module(package)
    except Exception as error:  # whatever it is, it is what we look for
        message = ' '.join(str(error).split())
        facts.import_errors[package] = f'{type(error).__name__}: {message}'
        return None


def versions(facts: Facts) -> Dict[str, str]:
    """What to print: import package -> version, provider, remark."""
    rows = {'Python': facts.python}
    for package in ('mmsinger', 'torch', 'torchvision', *PROVIDERS, 'timm',
                    'numpy'):
        rows[package] = ' and '.join(
            facts.distributions[name] + f'  {name}' * (name != package)
            for name in facts.providers(package)) or 'not installed'
    for package, remark in (
            ('torch', facts.torch_build),
            ('torchvision', 'without compiled operators'
             if facts.torchvision_operators is False else ''),
            ('mmcv', 'without compiled operators'
             if facts.mmcv_operators is False else '')):
        rows[package] += f'  {remark}' * bool(remark)
    return rows


def main() -> int:
    """Print the report.

    Returns:
        int: 0 if mmsinger can be used, 1 if something must be mended first.
    """
    parser = argparse.ArgumentParser(
        description='Print the versions of everything '
        'that mmsinger runs on, and how to mend what is wrong. Ends with 0 '
        'if mmsinger can be used, 1 if something must be mended first.')
    parser.add_argument(
        '--det', action='store_true', help='check what detection needs too')
    parser.add_argument(
        '--json', action='store_true', help='print JSON, for programs')
    args = parser.parse_args()
    facts = collect()
    findings = check(facts, args.det)
    usable = not any(finding.error for finding in findings)
    if args.json:
        print(json.dumps({
            'usable': usable, 'versions': versions(facts),
            'findings': [dataclasses.asdict(f) for f in findings],
        }, indent=2))
        return int(not usable)

    for name, text in versions(facts).items():
        print(f'{name:<12} {text}')
    for finding in findings:
        print(f'\n{"ERROR" if finding.error else "Note"}: {finding.what}')
        print(*(f'    {command}' for command in finding.fix), sep='\n')
    if findings:
        print(f'\n(pip stands for: {sys.executable} -m pip)')
    print('\nmmsinger can be used.' if usable else '\nSomething must be '
          'mended before mmsinger can be used: see ERROR above.')
    return int(not usable)


if __name__ == '__main__':
    sys.exit(main())
