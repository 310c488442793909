"""Several processes: one that hangs, dies or is told to end."""
import os
import signal

import faulty_data
import pytest
import torch

import forked
import tiny
from test_distributed import unused_port

# Random numbers of every kind, and differing between processes
OPTIONS = [
    'train_cfg.max_iters=8', 'train_cfg.val_interval=8',
    'default_hooks.checkpoint.interval=4', 'model.task_loss_weight=0',
    'train_dataloader.num_workers=1', 'model.student.backbone.drop_rate=0.1',
    'randomness.diff_rank_seed=True', 'env_cfg.dist_cfg.timeout=4']
FSDP = ['strategy.type=mmsinger.FSDPStrategy']


def start(place, work_dir, *options, actions=('pass', 'pass'), args=()):
    """Two processes; each does something before its third step."""
    port = str(unused_port())
    return [forked.start(
        faulty_data.__file__, tiny.SEG_CONFIG, '--work-dir', work_dir,
        '--launcher', 'pytorch', *args, '--cfg-options', *OPTIONS, *options,
        cwd=place, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2',
        MASTER_ADDR='localhost', MASTER_PORT=port, AT='3',
        ACTION=actions[rank]) for rank in (0, 1)]


@pytest.mark.parametrize('number, words', [
    (signal.SIGSTOP, ['nothing came within 4 s', 'dist_cfg.timeout']),
    # its data worker may keep its connections open for a while
    (signal.SIGKILL, ['has gone'])], ids=['stopped', 'killed'])
@pytest.mark.parametrize('rank', [0, 1])
def test_a_process_that_hangs_or_dies(place, rank, number, words):
    actions = ['pass', 'pass']
    actions[rank] = f'os.kill(os.getpid(), {int(number)})'
    pair = start(place, f'{number.name}_{rank}', actions=actions)
    result = pair[1 - rank].finish(check=False, timeout=100)
    pair[rank].process.kill()
    pair[rank].finish(check=False)
    assert result.returncode == 1, result.stdout[-3000:]
    assert 'Traceback' not in result.stdout, result.stdout[-3000:]
    message = result.stdout[result.stdout.index('\nTrainingError: '):]
    for word in (f'Process {1 - rank} of 2', f'process {rank} ', *words,
                 '--resume'):
        assert word in message


@pytest.mark.parametrize('rank', [0, 1])
@pytest.mark.parametrize('options', [[], FSDP], ids=['ddp', 'fsdp'])
def test_sigterm_to_one_ends_both_at_the_same_iteration(place, options, rank):
    name = f'term_{len(options)}_{rank}'
    whole = f'whole_{len(options)}'
    if not os.path.isdir(os.path.join(place, whole)):
        for process in start(place, whole, *options):
            process.finish()
    actions = ['pass', 'pass']
    actions[rank] = 'os.kill(os.getpid(), signal.SIGTERM)'
    for process in start(place, name, *options, actions=actions):
        result = process.finish(check=False)
        assert result.returncode == 143, result.stdout[-3000:]
        assert 'Traceback' not in result.stdout
    assert os.path.isfile(os.path.join(place, name, 'iter_3.pth'))
    for process in start(place, name, *options, args=['--resume']):
        process.finish()
    first, second = (torch.load(os.path.join(place, one, 'iter_8.pth'),
                                weights_only=False)['state_dict']
                     for one in (name, whole))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], value)
               for key, value in second.items())
