"""Build and install mmsinger: ``pip install -e '.[onedl]'``."""
import os
import shutil

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = os.path.dirname(os.path.abspath(__file__))


def read(path: str) -> str:
    with open(os.path.join(ROOT, path), encoding='utf-8') as f:
        return f.read()


def version() -> str:
    # Executed, not imported: `import mmsinger` needs torch.
    scope = {}
    exec(compile(read('mmsinger/version.py'), 'version.py', 'exec'), scope)
    return scope['__version__']


class BuildWithMim(build_py):
    """Ship ``configs/`` and ``tools/`` as ``mmsinger/.mim``, OpenMMLab's
    convention, so that an installed package finds its recipes.

    A wheel gets copies, made in the build folder only; an editable install
    gets links in the source tree, so that edits count at once.
    """
    folders = ('configs', 'tools')
    # What only this repository needs: its pages and its assets come of them
    stay = ('sweep_stock.py', 'publish_teacher.py')

    def run(self):
        if getattr(self, 'editable_mode', False):
            super().run()
            self.link(os.path.join(ROOT, 'mmsinger', '.mim'))
        else:
            # An earlier build leaves files here that may be gone by now.
            package = os.path.join(self.build_lib, 'mmsinger')
            shutil.rmtree(package, ignore_errors=True)
            super().run()
            self.copy(os.path.join(package, '.mim'))

    def link(self, mim: str) -> None:
        os.makedirs(mim, exist_ok=True)
        for folder in self.folders:
            link = os.path.join(mim, folder)
            if os.path.islink(link):
                os.remove(link)
            elif os.path.isdir(link):
                shutil.rmtree(link)
            try:
                os.symlink(os.path.join('..', '..', folder), link)
            except OSError:  # Windows, without the right to make links
                shutil.copytree(os.path.join(ROOT, folder), link)

    def copy(self, mim: str) -> None:
        for folder in self.folders:
            shutil.copytree(
                os.path.join(ROOT, folder), os.path.join(mim, folder),
                ignore=shutil.ignore_patterns('__pycache__', '*.pyc', '.*',
                                              *self.stay))


setup(
    name='mmsinger',
    version=version(),
    description='Distil vision transformers with SiNGER on MMPretrain and '
    'MMSegmentation',
    long_description=read('README.md'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    author='mmsinger contributors',
    keywords='knowledge distillation, vision transformer, SiNGER, OpenMMLab',
    classifiers=[
        'Development Status :: 4 - Beta',
        'Intended Audience :: Science/Research',
        'Operating System :: OS Independent',
        'Programming Language :: Python :: 3',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
    packages=find_packages(include=['mmsinger', 'mmsinger.*']),
    package_data={'mmsinger': ['assets/*', 'analysis/*.jinja']},
    cmdclass={'build_py': BuildWithMim},
    python_requires='>=3.9',
    # mmengine, mmcv, mmpretrain and mmseg are no requirements: two families
    # of distributions provide these packages (OneDL's and OpenMMLab's) and
    # overwrite each other's files. Choose one with an extra below, or keep
    # the one that is installed. tools/check_env.py tells when they mix.
    install_requires=['torch>=2.6', 'numpy', 'scipy', 'jinja2'],
    extras_require={
        # maintained; Python 3.10 or newer
        'onedl': [
            'onedl-mmengine>=0.10.12',
            'onedl-mmcv>=2.3.6',
            'onedl-mmpretrain>=1.3.6',
            'onedl-mmsegmentation>=1.4.2',
            'torchvision',
        ],
        # the original; setuptools because mmengine imports pkg_resources
        'openmmlab': [
            'mmengine==0.10.7',
            'mmcv>=2.0,<2.2',
            'mmpretrain==1.2.0',
            'mmsegmentation==1.2.2',
            'torchvision',
            'numpy<2',
            'ftfy',
            'regex',
            'setuptools<82',
        ],
        # the same for classification alone, without compiled operators
        'openmmlab-cls': [
            'mmengine==0.10.7',
            'mmcv-lite==2.1.0',
            'mmpretrain==1.2.0',
            'torchvision',
            'numpy>=1.26,<2',
            'opencv-python<4.12',  # later ones need numpy 2
            'setuptools<82',
        ],
        'det': ['onedl-mmdetection>=3.5.1'],
        'demo': ['scikit-learn', 'matplotlib'],
        'test': [
            'pytest>=7', 'hypothesis', 'timm', 'scikit-learn', 'matplotlib',
            'h5py', 'setuptools>=70.1', 'wheel'
        ],
        # what tools/reproduce.py runs jobs with; Python 3.11 or newer
        'reproduce': ['snakemake>=9.27; python_version >= "3.11"'],
        'slurm': ['snakemake-executor-plugin-slurm>=2.8; '
                  'python_version >= "3.11"'],
        # for tools/export_student.py --onnx and --layout timm
        'onnx': ['onnx', 'onnxscript', 'onnxruntime'],
        'timm': ['timm'],
        'nyu': ['h5py'],  # for NYUd-v2's .mat file
        'docs': ['sphinx', 'myst-parser'],
    },
    zip_safe=False)
