"""What the command lines of all tools share."""
import os

import pytest

from mmsinger.command_line import ToolParser


def test_help_shows_defaults_where_there_are_any():
    parser = ToolParser('What it does.\n\nMore.')
    parser.add_argument('--seed', type=int, default=0, help='a seed')
    parser.add_argument('--out', help='where (default: beside it)')
    parser.add_argument('--size', default=8, help='a size (default: eight)')
    parser.add_argument('--all', action='store_true', help='every one')
    parser.add_cfg_options('the task')
    text = parser.format_help()
    assert 'What it does.' in text and 'More' not in text
    assert 'a seed (default: 0)' in text and 'every one\n' in text
    assert text.count('(default') == 3
    assert 'override settings of the task' in text


def test_cfg_options_are_read_as_mmengine_reads_them():
    parser = ToolParser('x')
    parser.add_cfg_options('the task')
    parser.add_cfg_options('the source', '--source-options')
    args = parser.parse_args(['--cfg-options', 'a.b=1', 'c=[1,2]',
                              '--source-options', 'd=x'])
    assert args.cfg_options == {'a.b': 1, 'c': [1, 2]}
    assert args.source_options == {'d': 'x'}


@pytest.mark.parametrize('given, expected', [
    ([], None), (['--size', '8'], (8, 8)), (['--size', '8', '16'], (8, 16))])
def test_a_size_is_height_and_width(given, expected):
    parser = ToolParser('x')
    parser.add_size('--size', 'of it', 'its own')
    assert parser.parse_args(given).size == expected


@pytest.mark.parametrize('given, said', [
    (['8', '16', '3'], 'give one number, or height and width'),
    (['0'], "'0'"), (['8x16'], "'8x16'"), ([], 'at least one')])
def test_what_is_no_size(capsys, given, said):
    parser = ToolParser('x')
    parser.add_size('--size', 'of it', 'its own')
    with pytest.raises(SystemExit):
        parser.parse_args(['--size', *given])
    error = capsys.readouterr().err
    assert 'argument --size' in error and said in error


@pytest.mark.parametrize('environ, args, expected', [
    ({}, [], '0'),
    ({}, ['--local-rank=3'], '3'),  # python -m torch.distributed.launch
    ({'LOCAL_RANK': '2'}, [], '2'),  # torchrun, slurm
    ({'OMPI_COMM_WORLD_LOCAL_RANK': '1'}, ['--launcher', 'mpi'], '1'),
])
def test_the_local_rank_by_every_launcher(monkeypatch, environ, args,
                                          expected):
    monkeypatch.setattr(os, 'environ', dict(environ))
    parser = ToolParser('x')
    parser.add_launcher()
    parser.parse_args(args)
    assert os.environ['LOCAL_RANK'] == expected


def test_an_empty_text_is_no_value(capsys):
    parser = ToolParser('x')
    parser.add_argument('--resume', nargs='?', const='auto')
    with pytest.raises(SystemExit):
        parser.parse_args(['--resume', ''])
    assert 'argument --resume: the value is empty' in capsys.readouterr().err
