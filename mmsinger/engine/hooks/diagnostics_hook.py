import math
from typing import Optional

import torch
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from torch import Tensor

from mmsinger.engine.diagnostics import adapter_energies, step_diagnostics
from mmsinger.engine.hooks.calibration_hook import training_batches
from mmsinger.engine.random_states import preserved_random_states
from mmsinger.engine.unwrap import full_parameters, is_sharded, unwrap
from mmsinger.errors import ConfigError
from mmsinger.models import FeatureDistiller
from mmsinger.models.distillers.step_record import StepRecord
from mmsinger.registry import HOOKS
from mmsinger.schema import Count, Natural, Point


@HOOKS.register_module()
class DiagnosticsHook(Hook):
    """Logs what refinement does to the features, in numbers and pictures.

    Every ``interval`` iterations, from the step's own tokens and without
    another pass through a model: outlier share, token norms before and after,
    cosine and D_G of F and F_hat, D_G of teacher and student, E_safe and
    E_prob of the adapters, and the share of the KD gradient that comes from
    outlier tokens (equation 3; of an MSE it follows from the residuals, see
    :func:`gradient_share`). They are called ``diagnostics/NAME_LAYER``;
    docs/diagnostics.md says what each means.

    With ``draw``, after each validation (in runs without, after each epoch)
    or every ``draw_interval`` iterations: norm maps, similarity maps and PCA
    maps of teacher, target and student for the same training images. They
    take seconds.

    All goes to mmengine's visualizer, hence to every backend in
    ``vis_backends``: files, TensorBoard, W&B, MLflow. The first process
    measures and draws, on its own part of the batch. Iterations in between
    are untouched, and nothing that is random in training changes.

    For every :class:`FeatureDistiller` (what a method does not have is left
    out); with another model it does nothing, so that recipes can share one
    list of hooks.

    Args:
        interval (int): Iterations between two measurements; 0: none. Defaults
            to 100.
        num_images (int): Images of the batch to measure on. Defaults to 16.
        draw (bool): Whether to draw pictures. Defaults to False.
        draw_interval (int): Iterations between two sets of them. Defaults to
            0: after each validation or epoch.
        draw_images (int): How many images they show. Defaults to 4.
        patch (tuple[float, float]): Where the marked patch of the similarity
            maps is, as shares of height and width. Defaults to the middle.

    Raises:
        ConfigError: If a value is not valid.
    """

    priority = 'NORMAL'

    def __init__(self,
                 interval: Natural = 100,
                 num_images: Count = 16,
                 draw: bool = False,
                 draw_interval: Natural = 0,
                 draw_images: Count = 4,
                 patch: Point = (0.5, 0.5)) -> None:
        self.interval = interval
        self.num_images = num_images
        self.draw = draw
        self.draw_interval = draw_interval
        self.draw_images = draw_images
        self.patch = tuple(patch)
        self._record: Optional[StepRecord] = None
        self._images: Optional[Tensor] = None
        self._model: Optional[FeatureDistiller] = None

    def before_train(self, runner) -> None:
        model = unwrap(runner.model)
        if not isinstance(model, FeatureDistiller):
            return
        if self.draw and is_sharded(runner.model):
            raise ConfigError(
                'DiagnosticsHook.draw=True: with FSDP no process has the '
                'whole model to draw with. Set draw=False, and draw from a '
                'checkpoint with tools/plot.py.')
        if is_main_process():
            self._model = model

    # -- numbers -----------------------------------------------------------

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        if self._model is not None and \
                self.every_n_train_iters(runner, self.interval):
            self._record = StepRecord(self.num_images)
            self._model.records.append(self._record)

    def after_train_iter(self, runner, batch_idx, data_batch=None,
                         outputs=None) -> None:
        if self.every_n_train_iters(runner, self.interval):
            with full_parameters(runner.model):
                self._measure(runner)
        if self.every_n_train_iters(runner, self.draw_interval):
            self._draw(runner, runner.iter + 1)

    def _measure(self, runner) -> None:
        if self._record is None:  # another process, or another model
            return
        record, self._record = self._record, None
        self._model.records.remove(record)
        found = {f'{name}_{layer}': value
                 for layer, numbers in step_diagnostics(record).items()
                 for name, value in numbers.items()}
        numbers = dict(zip(found, torch.stack([*found.values()]).tolist()))
        refinement = self._model.refinement
        if refinement:
            for layer, ffn in refinement.ffn_directions.items():
                energies = adapter_energies(
                    refinement.adapters[str(layer)], ffn.directions)
                numbers.update({f'{name}_{layer}': value
                                for name, value in energies.items()})
        step = runner.iter + 1
        runner.visualizer.add_scalars(
            {**{f'diagnostics/{name}': value
                for name, value in numbers.items() if math.isfinite(value)},
             'iter': step},
            step=step, file_path=f'{runner.timestamp}.json')

    # -- pictures ----------------------------------------------------------

    def after_val_epoch(self, runner, metrics=None) -> None:
        if self.draw_interval == 0:
            self._draw(runner, runner.iter)

    def after_train_epoch(self, runner) -> None:
        if self.draw_interval == 0 and runner.val_loop is None:
            self._draw(runner, runner.iter)

    def _draw(self, runner, step: int) -> None:
        model = self._model
        # None in another process, with another model, and without training
        if not self.draw or model is None:
            return
        # Not before: training needs no matplotlib
        from mmsinger.figures import (draw_maps, extract_features, pictures_of,
                                      to_array)
        if self._images is None:
            with preserved_random_states(seed=0):
                self._images = torch.cat([
                    batch['inputs'] for batch in training_batches(
                        runner, self.draw_images, self.draw_images)]).cpu()
        with preserved_random_states(seed=0):
            features = extract_features(
                model, self._images.to(next(model.parameters()).device))
        images = pictures_of(model, self._images)
        for kind in ('norm', 'similarity', 'pca'):
            figure = draw_maps(kind, images, features,
                               f'Training images, iteration {step}.',
                               self.patch)
            add_image(runner.visualizer, f'{kind}_maps', to_array(figure),
                      step)


def add_image(visualizer, name: str, image, step: int) -> None:
    """Give a picture to all backends of a visualizer.

    MLflow's needs a file suffix in the name, and without a step in it would
    keep the last picture only.

    Args:
        visualizer (Visualizer): mmengine's.
        name (str): Without a slash, which no file name may have.
        image (np.ndarray): RGB, (H, W, 3), uint8.
        step (int): The iteration.
    """
    from mmengine.visualization import MLflowVisBackend
    for backend in visualizer._vis_backends.values():
        if isinstance(backend, MLflowVisBackend):
            backend.add_image(f'{name}_{step}.png', image, step)
        else:
            backend.add_image(name, image, step)
