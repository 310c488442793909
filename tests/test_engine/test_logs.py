"""What a run's log begins with."""
import logging

import torch
from torch import nn

from mmsinger.compat import import_datasets
from mmsinger.engine.logs import demote_details, describe_groups


def test_parameter_groups_by_rate():
    model = nn.ModuleDict(dict(
        student=nn.Linear(4, 4), adapters=nn.Linear(4, 1, bias=False),
        frozen=nn.Linear(2, 2)))
    model['frozen'].requires_grad_(False)
    optimizer = torch.optim.AdamW([
        dict(params=[model['student'].weight]),
        dict(params=[model['student'].bias], weight_decay=0),
        dict(params=model['adapters'].parameters(), lr=1e-4),
        dict(params=model['frozen'].parameters())], lr=1e-3)
    torch.optim.lr_scheduler.ConstantLR(optimizer, 0.1)  # a warm-up
    assert describe_groups(model, optimizer.param_groups) == '\n'.join([
        'Parameters by learning rate and weight decay:',
        '  lr 0.001, weight decay 0.01: 1 tensors, 1.6e-05 M (student)',
        '  lr 0.001, weight decay 0: 1 tensors, 4e-06 M (student)',
        '  lr 0.0001, weight decay 0.01: 1 tensors, 4e-06 M (adapters)',
        '  frozen: 2 tensors, 6e-06 M (frozen)'])


def test_details_become_debug_messages():
    records = [logging.LogRecord('', logging.INFO, '', 0, text, (), None)
               for text in ('paramwise_options -- a:lr=1', 'Iter(train)')]
    assert all(map(demote_details, records))
    assert [r.levelno for r in records] == [logging.DEBUG, logging.INFO]


def test_a_scope_that_is_no_toolbox():
    import_datasets('mmengine')
    import_datasets('elsewhere')
