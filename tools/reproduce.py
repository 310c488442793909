"""Reproduce a table of the paper: distil, evaluate, put side by side.

    python tools/reproduce.py 1 --profile digits

Runs what is missing, goes on where an earlier call was interrupted, and writes
Markdown, CSV, LaTeX and a plot. Runs are shared between tables.
"""
import os
import re
import shlex
import shutil
import signal
import sys

import mmsinger  # noqa: F401  (before torchvision: see mmsinger.compat)
import torch
from mmengine.logging import MMLogger

from make_digit_scenes import MARKER, make_digit_scenes
from mmsinger.command_line import ToolParser
from mmsinger.errors import (ConfigError, check_choice, near_paths,
                             readable_errors)
from mmsinger.schema import Count, reader
from reproduction.evidence import TABLES as OURS
from reproduction.flow import Resources, run_jobs
from reproduction.plan import all_jobs, wanted_metrics
from reproduction.profiles import PROFILES
from reproduction.report import Report
from reproduction.tables import (sweep, table1, table3, table4, table5a,
                                 table5b, table7, table8)
from reproduction.workspace import Workspace

TABLES = {'1': table1, '3': table3, '4': table4, '5a': table5a,
          '5b': table5b, '7': table7, '8': table8, 'sweep': sweep}
KNOWN = {'full': TABLES, 'digits': {**TABLES, **OURS['digits']},
         'photos': OURS['photos']}


def parse_args():
    parser = ToolParser(__doc__)
    parser.add_argument('table', nargs='+',
                        help=f'one or several of {", ".join(TABLES)}; all of '
                        'these; or, with --profile digits, '
                        f'{", ".join(OURS["digits"])}; with --profile photos '
                        f'{" and ".join(OURS["photos"])} alone')
    parser.add_argument(
        '--profile', default='full',
        help='full: the paper\'s models and data; digits: small models on '
        'the built-in data; photos: DINOv2-S/14 and photographs of your own '
        '(default: full)')
    parser.add_argument('--seeds', type=reader(Count), default=1, metavar='N',
                        help='runs with seeds 0 to N - 1 (default: 1)')
    parser.add_argument('--dry-run', action='store_true',
                        help='print the plan and stop')
    parser.add_argument('--quick', action='store_true',
                        help='a few steps of everything, to see that it runs')
    parser.add_argument(
        '--report-only', action='store_true',
        help='run nothing, write the report of what is there')
    parser.add_argument(
        '--root', help='where runs and reports go '
        '(default: work_dirs/reproduce/PROFILE)')
    parser.add_argument(
        '--jobs', type=reader(Count), metavar='N',
        help='jobs at the same time (default: as many as the GPUs hold; on '
        'the CPU one for each core, with --profile full one in all). More '
        'than that share GPUs')
    parser.add_argument('--gpus', metavar='0,1,...',
                        help='which to use (default: all that torch sees)')
    parser.add_argument('--gpus-per-job', type=reader(Count),
                        default=1, metavar='N',
                        help='(default: 1)')
    parser.add_argument(
        '--slurm', nargs='*', metavar='NAME=VALUE', help='run each job '
        "through slurm, with resources by Snakemake's names: "
        'slurm_partition=gpu slurm_account=lab runtime=1440 mem_mb=64000; '
        '--jobs is then how many are queued at once')
    return parser.parse_args()


def chosen_tables(args):
    check_choice('--profile', args.profile, tuple(PROFILES))
    known = KNOWN[args.profile]
    if args.quick and args.profile != 'digits':
        raise ConfigError('--quick is for --profile digits, whose data are '
                          'built in.')
    for name in args.table:
        where = [profile for profile in KNOWN if name in KNOWN[profile]]
        if where and args.profile not in where:
            raise ConfigError(f'table {name!r} needs --profile '
                              f'{" or ".join(where)}.')
        check_choice('table', name, (
            *known, *(['all'] if TABLES.keys() <= known.keys() else [])))
    names = dict.fromkeys(
        each for name in args.table
        for each in (TABLES if name == 'all' else [name]))
    return [known[name](PROFILES[args.profile], range(args.seeds),
                        args.quick) for name in names]


def resources_of(args):
    if args.slurm is not None:
        return slurm_resources(args)
    gpus = chosen_gpus(args.gpus)
    if args.gpus_per_job > max(1, len(gpus)):
        raise ConfigError(
            f'--gpus-per-job {args.gpus_per_job}: there are only {len(gpus)} '
            f'GPUs ({", ".join(gpus)}).' if gpus else
            f'--gpus-per-job {args.gpus_per_job}: torch sees no GPU.')
    if gpus:
        return Resources(args.jobs or len(gpus) // args.gpus_per_job, gpus,
                         args.gpus_per_job)
    return Resources(args.jobs or (1 if args.profile == 'full' else
                                   len(os.sched_getaffinity(0))))


def slurm_resources(args):
    if shutil.which('sbatch') is None:
        raise ConfigError('--slurm: there is no command sbatch on this '
                          'machine. Start where slurm is, or leave --slurm '
                          'out.')
    for setting in args.slurm:
        if not re.fullmatch(r'\w+=.+', setting):
            raise ConfigError(f'--slurm {setting!r}: NAME=VALUE is needed, '
                              'such as slurm_partition=gpu.')
    return Resources(args.jobs or 1, (), args.gpus_per_job, args.slurm)


def chosen_gpus(wanted):
    count = torch.cuda.device_count()
    seen = os.environ.get('CUDA_VISIBLE_DEVICES')
    seen = [gpu.strip() for gpu in seen.split(',')][:count] \
        if seen is not None else list(map(str, range(count)))
    if wanted is None:
        return tuple(seen)
    gpus = wanted.split(',')
    if len(set(gpus)) < len(gpus) or not set(gpus) <= set(seen):
        raise ConfigError(
            f'--gpus {wanted}: give each once, from those that torch sees: '
            f'{", ".join(seen) or "none"}. Without --gpus all of them are '
            'used.')
    return tuple(gpus)


def make_data(quick):
    root = 'data/digit_scenes'
    if quick and os.path.exists(os.path.join(root, MARKER)):
        return  # any scenes will do
    MMLogger.get_instance('mmengine')
    make_digit_scenes(root)


def show_plan(workspace):
    found = workspace.states()
    for name, job in workspace.jobs.items():
        command = shlex.join([job.tool, *workspace.arguments(name)])
        print(f'{found[name]:<12}{name}\n{"":<12}{command}')
    finished = list(found.values()).count('finished')
    print(f'{len(found)} jobs, {finished} finished')


def found_records(workspace):
    """What is there of the jobs, from this call or another."""
    if not os.path.isdir(workspace.root):
        raise ConfigError(f'--report-only: there is no folder '
                          f'{workspace.root!r}.{near_paths(workspace.root)} '
                          'Run the table first, or name another --root.')
    records = {name: record for name in workspace.jobs
               if (record := workspace.record(name)) is not None}
    outdated = list(workspace.states().values()).count('outdated')
    if outdated:
        print(f'{outdated} of {len(records)} runs are of another command or '
              "config than today's; --dry-run says which.")
    return records


def end_in_order():
    """Let signals end what is running too."""
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        if (number, signal.getsignal(number)) != (
                signal.SIGHUP, signal.SIG_IGN):  # by nohup
            signal.signal(number, signal.default_int_handler)


def main():
    args = parse_args()
    tables = chosen_tables(args)
    resources = resources_of(args)
    workspace = Workspace(args.root or os.path.join(
        'work_dirs', 'reproduce', args.profile + '_quick' * args.quick),
        all_jobs(tables), wanted_metrics(tables))
    if args.dry_run:
        show_plan(workspace)
        return
    if args.report_only:
        records = found_records(workspace)
    else:
        end_in_order()
        PROFILES[args.profile].check_needs()
        if args.profile == 'digits':
            make_data(args.quick)
        records = run_jobs(workspace, resources)
    for table in tables:
        own = {n: r for n, r in records.items() if n in table.jobs}
        paths = Report(table, own).write(workspace.root)
        print(f'\n{table.title}: {", ".join(paths)}')
    failed = sum(r.status == 'failed' for r in records.values())
    if failed:
        sys.exit(f'{failed} of {len(records)} jobs failed; the reports say '
                 'which and why.')


if __name__ == '__main__':
    with readable_errors():
        try:
            main()
        except KeyboardInterrupt:
            sys.exit('Interrupted. The same command goes on from here.')
