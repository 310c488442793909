"""What is said of a batch that a model cannot take."""
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mmsinger.engine.faults import batch_fault, explained, _gradient_fault
from mmsinger.errors import TrainingError


def batch(shape, img_shape):
    return dict(inputs=[torch.zeros(shape)] * 2, data_samples=[
        SimpleNamespace(img_path=name, img_shape=img_shape)
        for name in ('a.png', 'b.png')])


@pytest.mark.parametrize('img_shape', [(8, 9), (8, 9, 3), None])
def test_small_images_are_named(img_shape):
    said = batch_fault(ValueError('no'), batch((3, 8, 9), img_shape),
                       nn.Identity(), 'train_dataloader')
    assert 'a.png 8x9, b.png 8x9' in said and 'The model said: no' in said


def test_cached_features_are_no_images():
    """A wrong output of the backbone is not a matter of the images' size."""
    assert batch_fault(ValueError('no'), batch((16, 64), (32, 32)),
                       nn.Identity(), 'train_dataloader') is None


def test_parameters_without_a_gradient():
    """As torch says it in the second step of several processes."""
    def step():
        raise RuntimeError(
            'Expected to have finished reduction in the prior iteration. You '
            'can enable unused parameter detection by passing the keyword '
            'argument `find_unused_parameters=True` to ...')

    with pytest.raises(TrainingError, match='no part in the losses.*--cfg-op'):
        explained(step, TrainingError,
                  lambda error, _: _gradient_fault(error))()
    assert _gradient_fault(RuntimeError('another')) is None


def test_a_pipeline_that_does_not_pack():
    said = batch_fault(KeyError('inputs'), dict(img=[], gt_label=[]),
                       nn.Identity(), 'val_dataloader')
    assert 'samples have img, gt_label' in said
    assert 'End val_dataloader.dataset.pipeline with PackInputs' in said
