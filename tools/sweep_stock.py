"""Distil into the stock configs of the installed toolboxes.

    python tools/sweep_stock.py [--only PATTERN] [--workers 2]

Each config becomes a student in the documented way, beside a small teacher of
random weights: one step with gradients, export of the student, strict loading
into the plain model, equal outputs. What the plain toolbox cannot build and
train for a step itself does not count. Each result is a line of
``--results``, by which an interrupted sweep goes on; docs/coverage.md is the
page that is made of them.
"""
import argparse
import json
import multiprocessing
import os
import re
import resource
import signal
import tempfile
import traceback
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace

os.environ.setdefault('HF_HUB_OFFLINE', '1')  # weights are not needed
import mmsinger  # noqa: F401  (before torchvision: see mmsinger.compat)
import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import FUNCTIONS, TRANSFORMS, init_default_scope
from mmengine.runner import Runner

from mmsinger.checkpoint import (load_checkpoint, load_strict,
                                 student_state_dict)
from mmsinger.command_line import ToolParser
from mmsinger.engine.loading import build_model
from mmsinger.engine.prepare import (load_config, use_cpu_amp,
                                     use_data_preprocessor,
                                     use_student_constructor)
from mmsinger.errors import ConfigError, readable_errors
from mmsinger.export import save_student, student_config
from mmsinger.files import write_text
from mmsinger.images import first_view
from mmsinger.models.features.anatomy import (find_features, find_part,
                                              unmasked)
from mmsinger.schema import Count, reader

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TOOLBOXES = ('mmpretrain', 'mmseg', 'mmdet')
CROPS = dict(mmpretrain=96, mmseg=128)  # pixels, where a model takes them
# Small before large, by the words in the names of configs
SIZES = ('atto', 'femto', 'pico', 'nano', 'xxs', 'xs', 'tiny', 't', 'mini',
         's', 'small', 'm', 'medium', 'b', 'base', 'l', 'large', 'xl',
         'xlarge', 'h', 'huge', 'g', 'giant')
TEACHER = """\
teacher = dict(
    backbone=dict(
        type='mmpretrain.VisionTransformer', img_size=64, patch_size=16,
        in_channels={channels}, out_type='raw',
        arch=dict(embed_dims=32, num_layers=4, num_heads=4,
                  feedforward_channels=64)),
    checkpoint=None,
    layers=(1, 3))
"""
STUDENT = """\
_base_ = ['{stock}', '{teacher}', '{root}/configs/_base_/distillers/singer.py']
model = dict(_delete_=True, student=_base_.model, teacher=_base_.teacher,
             **_base_.distiller)
"""


# -- which configs ---------------------------------------------------------


def configs_of(toolbox):
    """The folder of a toolbox's configs; None if it is not installed."""
    spec = find_spec(toolbox)
    return spec and os.path.join(os.path.dirname(spec.origin), '.mim',
                                 'configs')


def stock_configs():
    """Groups of stock configs, ``TOOLBOX::PATH``, that differ in sizes, rates
    and weights alone; the smallest of each is first."""
    groups = defaultdict(list)
    for toolbox in TOOLBOXES:
        root = configs_of(toolbox)
        if root is None:
            continue
        # Once, not in each child
        import_module(f'{toolbox}.utils').register_all_modules(False)
        for path in sorted(glob(f'{root}/**/*.py', recursive=True)):
            name = os.path.relpath(path, root)
            if '_base_' in name:
                continue
            try:
                model = Config.fromfile(path).model.to_dict()
            except Exception:  # needs another toolbox, or is no config
                continue
            key = json.dumps([toolbox, erase_sizes(model)], default=str)
            groups[key].append(f'{toolbox}::{name}')
    return [sorted(group, key=size_of) for group in groups.values()]


def erase_sizes(value, key=''):
    """What of a model config is its structure."""
    if isinstance(value, dict):
        return {k: erase_sizes(v, k) for k, v in sorted(value.items())
                if k not in ('init_cfg', 'pretrained', 'data_preprocessor',
                             'train_cfg', 'test_cfg', '_scope_')}
    if isinstance(value, (list, tuple)):
        return [erase_sizes(v, key) for v in value]
    if key == 'depth' and isinstance(value, int):
        return 'basic' if value < 50 else 'bottleneck'  # blocks of a ResNet
    if key in ('arch', 'checkpoint', 'model_name') or \
            isinstance(value, (int, float)) and not isinstance(value, bool):
        return None
    return str(value)


def size_of(name):
    words = re.split(r'[-_/]', name.lower())
    numbers = [int(n) for n in re.findall(r'\d+', name)]
    return max([SIZES.index(w) for w in words if w in SIZES] or [0]), \
        max([n for n in numbers if n < 1000] or [0]), len(name), name


# -- one config ------------------------------------------------------------


def without_weights(value):
    """A model config that names no files of weights."""
    if isinstance(value, dict):
        return type(value)({
            k: None if k == 'pretrained' else without_weights(v)
            for k, v in value.items() if not (
                k == 'init_cfg' and 'Pretrained' in str(v))})
    if isinstance(value, (list, tuple)):
        return type(value)(without_weights(v) for v in value)
    return value


def with_crops(value, pixels, key=''):
    """A pipeline or data preprocessor for smaller images."""
    if isinstance(value, dict):
        return type(value)({k: with_crops(v, pixels, k)
                            for k, v in value.items()})
    if key in ('crop_size', 'size', 'scale') and value is not None:
        return pixels if isinstance(value, int) else (pixels, pixels)
    if key == 'scales':
        return [pixels, pixels]
    if isinstance(value, (list, tuple)):
        return type(value)(with_crops(v, pixels) for v in value)
    return value


def random_batch(cfg, count=2):
    """What the config's own pipeline makes of random images."""
    dataset = cfg.train_dataloader.dataset
    while 'pipeline' not in dataset:
        dataset = dataset.get('dataset') or dataset.datasets[0]
    pipeline = Compose([
        TRANSFORMS.build(step) for step in dataset.pipeline
        if not str(step['type']).split('.')[-1].startswith('Load')])
    shape, channels = (256, 320), channels_of(cfg)
    several = 'MultiLabel' in str(cfg.model)
    random = np.random.default_rng(0)
    data = []
    for i in range(count):
        image = random.integers(0, 256, (*shape, channels), dtype=np.uint8)
        classes = random.integers(0, 2, shape, dtype=np.uint8)
        data.append(pipeline(dict(
            img=image if channels > 1 else image[..., 0], img_path='',
            img_shape=shape, ori_shape=shape, sample_idx=i,
            gt_label=[i] if several else i, gt_seg_map=classes,
            seg_fields=['gt_seg_map'], reduce_zero_label=False,
            label_map=None, seg_map_path='',
            gt_depth_map=classes.astype(np.float32) + 1)))
    collate = cfg.train_dataloader.get('collate_fn') or dict(
        type='pseudo_collate')
    return FUNCTIONS.get(collate['type'])(data)


def backward(model, batch):
    """The losses of a batch, with gradients in place."""
    data = model.data_preprocessor(batch, True)
    losses = model(**data, mode='loss')
    total, logged = model.parse_losses(losses)
    total.backward()
    return logged


def try_plain(name):
    """Load a config, cut it, and train the plain model for a step.

    Returns:
        tuple[Config, dict]: It, and a batch for it.
    """
    toolbox, path = name.split('::')
    stock = load_config(os.path.join(configs_of(toolbox), path))
    init_default_scope(stock.get('default_scope') or toolbox)
    use_cpu_amp(stock)
    for crop in (CROPS.get(toolbox), None):
        cut = dict(model=without_weights(stock.model))
        if crop:
            loader = dict(stock.train_dataloader)
            cut['train_dataloader'] = with_crops(loader, crop)
            for place, given in ((cut['model'], stock.model), (cut, stock)):
                if 'data_preprocessor' in given:
                    place['data_preprocessor'] = with_crops(
                        given['data_preprocessor'], crop)
        cfg = Config({**stock.to_dict(), **cut})
        try:
            torch.manual_seed(0)
            batch = random_batch(cfg)
            model = build_model(cfg)
            model.train()
            shapes = shapes_of(model)
            backward(model, batch)
            if crop and shapes_of(model) != shapes:
                continue  # a buffer of the image's size
            optimizer_of(model, cfg)
            return cfg, batch
        except Exception:
            if not crop:
                raise


def shapes_of(model):
    return {k: v.shape for k, v in model.state_dict().items()}


def optimizer_of(model, cfg):
    return Runner.build_optim_wrapper(
        SimpleNamespace(model=model), cfg.optim_wrapper)


def channels_of(cfg):
    """Channels of the images, by the data preprocessor."""
    preprocessor = cfg.get('data_preprocessor') or \
        cfg.model.get('data_preprocessor') or {}
    return len(preprocessor.get('mean') or [0] * 3)


def distil(name, cfg, batch, **options):
    """Wrap a config, take a step, export; what it shows.

    Args:
        name (str): The stock config.
        cfg (Config): As it was cut.
        batch (dict): From a data loader.
        **options: Overrides of ``model``.
    """
    with tempfile.TemporaryDirectory() as folder:
        paths = [os.path.join(folder, part) for part in (
            'teacher.py', 'recipe.py', 'student.pth')]
        for path, text in zip(paths, (
                TEACHER.format(channels=channels_of(cfg)),
                STUDENT.format(stock=name, teacher=paths[0], root=ROOT))):
            with open(path, 'w') as file:
                file.write(text)
        recipe = load_config(paths[1])
        recipe.model.student = cfg.model
        if 'data_preprocessor' in cfg:
            recipe.data_preprocessor = cfg.data_preprocessor
        recipe.model.update(options)
        for prepare in (use_cpu_amp, use_student_constructor,
                        use_data_preprocessor):
            prepare(recipe)
        torch.manual_seed(0)
        model = build_model(recipe)
        model.init_weights()
        model.train()
        optimizer = optimizer_of(model, recipe)
        before = {k: p.detach().clone()
                  for k, p in model.student_backbone.named_parameters()}
        logged = backward(model, batch)
        if not all(torch.isfinite(v).all() for v in logged.values()):
            raise FloatingPointError(f'A loss is not finite: {logged}')
        optimizer.step()
        moved = sum(not torch.equal(p, before[k]) for k, p in
                    model.student_backbone.named_parameters())
        if not moved or not float(logged['distill.loss_kd']):
            raise AssertionError('The step changes nothing in the student')
        save_student(student_state_dict(model.state_dict()), {}, paths[2])
        plain = build_model(student_config(recipe))
        exported = load_checkpoint(paths[2])['state_dict']
        load_strict(plain, exported, what='The exported student', fix='')
        # LoRA's files lack what both have from a pretrained model
        for (key, ours), theirs in zip(model.student.named_parameters(),
                                       plain.parameters(), strict=True):
            if key not in exported and not theirs.requires_grad:
                theirs.data.copy_(ours)
        data = model.data_preprocessor(batch, True)
        pairs = list(zip(outputs(model.student, data), outputs(plain, data),
                         strict=True))
        for ours, theirs in pairs:
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        features = find_features(model.student_backbone, 'student')
        ends = dict.fromkeys((features.paths[0], features.paths[-1]))
        return dict(
            features=f'{len(features)}: '
            + ' to '.join(f'`{path}`' for path in ends),
            exact=all(torch.equal(*pair) for pair in pairs),
            moved=f'{moved} of {len(before)}',
            taps=[features.paths[i] for i in model.student_layers])


@torch.no_grad()
def outputs(model, data):
    """All tensors that a model gives in evaluation mode."""
    model.eval()
    torch.manual_seed(0)
    first = first_view(data['inputs'])
    try:
        if isinstance(data['inputs'], (list, tuple)):
            raise TypeError
        found = model(data['inputs'], data.get('data_samples'))
    except Exception:  # not every method has a pass without losses
        backbone = find_part(model, 'backbone')
        found = backbone(first, **unmasked(backbone, first))

    def flat(value):
        if isinstance(value, torch.Tensor):
            yield value.nan_to_num()
        elif isinstance(value, dict):
            yield from flat(list(value.values()))
        elif isinstance(value, (list, tuple)):
            for item in value:
                yield from flat(item)

    return list(flat(found))


def sweep_one(name, say):
    """The result of one config, as a dict that JSON can hold; ``say`` is
    called as soon as the plain model has trained."""
    try:
        cfg, batch = try_plain(name)
    except BaseException as error:
        return dict(name=name, result='not counted', message=said(error))
    say('plain')
    try:
        try:
            return dict(name=name, result='trains',
                        **distil(name, cfg, batch))
        except Exception as error:
            if 'task_loss_weight=0' not in str(error):
                raise
            return dict(name=name, result='features only', message=said(error),
                        **distil(name, cfg, batch, task_loss_weight=0))
    except Exception as error:
        refused = isinstance(cause_of(error), ConfigError)
        return dict(name=name, result='refused' if refused else 'fails',
                    message=said(error), where=traceback.format_exc()[-2500:])


def cause_of(error):
    while not isinstance(error, ConfigError) and error.__cause__:
        error = error.__cause__
    return error


def said(error):
    error = cause_of(error)
    return f'{type(error).__name__}: {error}'[:600]


def in_child(name, seconds, gigabytes):
    """Try a config in a process of its own, which may take too long or die.
    What happens before the plain model has trained does not count."""
    fork = multiprocessing.get_context('fork')
    ours, theirs = fork.Pipe(False)

    def work():
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        resource.setrlimit(resource.RLIMIT_AS, (gigabytes << 30, ) * 2)
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
        theirs.send(sweep_one(name, theirs.send))

    process = fork.Process(target=work)
    process.start()
    theirs.close()
    result = 'not counted'
    try:
        while not isinstance(message := ours.recv(), dict):
            result = 'fails'
        return message
    except EOFError:
        process.join()
        late = process.exitcode == -signal.SIGXCPU
        return dict(name=name, result=result, message=(
            f'not done in {seconds} s of processor time' if late
            else 'its process died (memory)'))
    finally:
        process.kill()
        process.join()


# -- the page --------------------------------------------------------------


def write_page(results, groups, path):
    families = defaultdict(list)
    for result in results:
        families['/'.join(re.split('::|/', result['name'])[:2])].append(result)
    counts = Counter(r['result'] for r in results)
    counted = len(results) - counts['not counted']
    works = counts['trains'] + counts['features only']
    alike = {group[0]: len(group) for group in groups}
    lines = [
        '# Coverage', '',
        'Made by `python tools/sweep_stock.py`: stock configs of mmpretrain '
        'and mmseg become students of a small random teacher by the statement '
        'of [configs.md](configs.md). Each takes a step with gradients; the '
        'exported student loads strictly into the plain model and gives equal '
        f'outputs, bit for bit in {sum(r.get("exact", 0) for r in results)}, '
        'to 1e-5 in the others (sums in another order).', '',
        f'**{works} of {counted} work ({100 * works / max(counted, 1):.1f} '
        '%)**: ' f'{counts["trains"]} with their own loss beside '
        f'distillation, {counts["features only"]} with '
        f'`task_loss_weight=0`. {counts["refused"]} end in a message before '
        f'training, {counts["fails"]} fail.', '',
        'Configs whose models differ in sizes, rates and weights alone are '
        'tried once, the smallest of them. Tried so far: '
        f'{len(results)} of {len(groups)}, which stand for '
        f'{sum(alike.get(r["name"], 1) for r in results)} of '
        f'{sum(alike.values())} configs. Weights are '
        'random, images random through the config\'s own pipeline, cut to '
        f'{CROPS["mmpretrain"]} (mmpretrain) or {CROPS["mmseg"]} pixels '
        '(mmseg) where the model takes them. What the plain toolbox did not '
        'build and train for a step itself on the CPU it was tried on does '
        f'not count ({counts["not counted"]}: listed below).', '',
        '| family | work | features only | do not | features of the student |',
        '|---|---|---|---|---|']
    for family, found in sorted(families.items()):
        by = Counter(r['result'] for r in found)
        if by['not counted'] == len(found):
            continue
        shown = sorted({r['features'] for r in found if 'features' in r})
        lines.append(
            f'| {family} | {by["trains"] + by["features only"]} | '
            f'{by["features only"] or ""} | '
            f'{by["refused"] + by["fails"] or ""} | {"; ".join(shown)} |')
    for title, kinds in (('What does not work', ('refused', 'fails')),
                         ('Features only', ('features only', )),
                         ('Not counted', ('not counted', ))):
        lines += ['', f'## {title}', '']
        by_message = defaultdict(list)
        for result in results:
            if result['result'] in kinds:
                message = re.sub(r'(the student) \w+ (is a method)', r'\1 \2',
                                 ' '.join(result['message'].split()))
                by_message[message].append(result['name'])
        lines += [f'- {", ".join(f"`{n}`" for n in names)}: {message}'
                  for message, names in sorted(by_message.items())]
    write_text('\n'.join(lines) + '\n', path)


def read_results(path):
    """Results of an earlier sweep, by name."""
    try:
        with open(path) as file:
            return {r['name']: r for r in map(json.loads, file) if r['result']}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f'--results={path!r} does not hold the results of a sweep, a line '
            f'of JSON each: {type(error).__name__}: {error}. Mend or remove '
            'it, or name another file.') from error


def pattern(text):
    """A regular expression of the command line."""
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(
            f'{text!r} is no regular expression: {error}') from error


def main():
    parser = ToolParser(__doc__)
    parser.add_argument('--only', default='', metavar='PATTERN', type=pattern,
                        help='a regular expression for names of configs')
    parser.add_argument('--again', default='^$', metavar='PATTERN',
                        type=pattern,
                        help='results to try again, such as "fails|refused"')
    parser.add_argument('--workers', type=reader(Count), default=1)
    parser.add_argument('--seconds', type=reader(Count), default=180,
                        help='limit of processor time for a config')
    parser.add_argument('--gigabytes', type=reader(Count), default=10,
                        help='memory limit of a config')
    parser.add_argument('--results', default='work_dirs/sweep_stock.jsonl')
    parser.add_argument('--page', metavar='FILE', help='what to write '
                        '(default: docs/coverage.md, once all are done)')
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.makedirs(os.path.dirname(args.results) or '.', exist_ok=True)
    done = read_results(args.results) if os.path.exists(args.results) else {}
    groups = stock_configs()
    todo = [group[0] for group in groups
            if args.only.search(group[0]) and not (
                group[0] in done
                and not args.again.search(done[group[0]]['result']))]
    print(f'{len(groups)} distinct configs, {len(todo)} to do', flush=True)
    with ThreadPoolExecutor(args.workers) as pool:
        for result in pool.map(
                lambda name: in_child(name, args.seconds, args.gigabytes),
                todo):
            done[result['name']] = result
            with open(args.results, 'a') as file:
                file.write(json.dumps(result) + '\n')
            print(f'{result["result"]:14}{result["name"]}  '
                  f'{result.get("message", "")[:100]}', flush=True)
    names = [group[0] for group in groups if group[0] in done]
    page = args.page
    if page is None and len(names) == len(groups):
        page = os.path.join(ROOT, 'docs', 'coverage.md')
    if page is None:
        print(f'{len(groups) - len(names)} are left: no page is written. '
              '--page FILE writes one of those that are done.')
        return
    write_page([done[name] for name in sorted(names)], groups, page)


if __name__ == '__main__':
    with readable_errors():
        main()
