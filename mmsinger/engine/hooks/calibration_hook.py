from typing import Any, Dict, Iterator

from mmengine.dist import broadcast
from mmengine.hooks import Hook

from mmsinger.engine.faults import batch_fault, explained
from mmsinger.engine.random_states import preserved_random_states
from mmsinger.engine.samples import DataError
from mmsinger.engine.unwrap import unwrap
from mmsinger.images import dataset_batches
from mmsinger.registry import HOOKS
from mmsinger.schema import Count

NUM_IMAGES = 256


@HOOKS.register_module()
class CalibrationHook(Hook):
    """Calibrates ``target_norm='standardise'`` and steps in ``targets`` that
    ask for it before the first step.

    Reads a fixed, evenly spaced set of training images past the sampler and
    with random states put back afterwards, so that training sees the same
    batches as without it. Statistics that came from a checkpoint are kept.

    Args:
        num_images (int): Images to calibrate on. Defaults to 256.
        batch_size (int): Images in one teacher pass. Defaults to 32.
    """

    priority = 'NORMAL'

    def __init__(self, num_images: Count = NUM_IMAGES,
                 batch_size: Count = 32) -> None:
        self.num_images = num_images
        self.batch_size = batch_size
        self.found = ''  # in words

    def before_train(self, runner) -> None:
        model = unwrap(runner.model)
        if not getattr(model, 'needs_calibration', False):
            return
        count = min(self.num_images, len(runner.train_dataloader.dataset))
        runner.logger.info(f'Calibrating targets on {count} training images')
        with preserved_random_states(seed=0):
            found = model.calibrate(
                training_batches(runner, self.num_images, self.batch_size))
        for part in (model.target_norms, *model.steps):
            for buffer in part.buffers():
                broadcast(buffer)
        self.found = f'Targets calibrated: {"; ".join(found)}'
        runner.logger.info(self.found)


def training_batches(runner, num_images: int, batch_size: int
                     ) -> Iterator[Dict[str, Any]]:
    """Evenly spaced training images, read past the sampler.

    Args:
        runner (Runner): Of a training run.
        num_images (int): How many; all if there are fewer.
        batch_size (int): Images at a time.

    Yields:
        dict: See :func:`~mmsinger.images.dataset_batches`.
    """
    loader = runner.train_dataloader
    total = len(loader.dataset)
    count = min(num_images, total)
    indices = [i * total // count for i in range(count)]
    model = unwrap(runner.model)

    preprocess = explained(
        lambda batch: model.data_preprocessor(batch, True), DataError,
        lambda error, batch: batch_fault(error, batch, model,
                                         'train_dataloader'))
    yield from dataset_batches(
        loader.dataset, indices, batch_size,
        lambda batch, training: preprocess(batch), True, loader.collate_fn)
