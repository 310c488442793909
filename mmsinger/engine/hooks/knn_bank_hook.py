import torch
from mmengine.dist import all_gather
from mmengine.hooks import Hook
from torch import Tensor

from mmsinger.engine.unwrap import unwrap
from mmsinger.errors import ConfigError
from mmsinger.models.probes.knn_classifier import KNNClassifier
from mmsinger.registry import HOOKS


@HOOKS.register_module()
class KNNBankHook(Hook):
    """Fills the bank of a :class:`KNNClassifier` before an evaluation.

    The training images pass the backbone once; each process of a distributed
    job takes its share.

    Args:
        dataloader (dict): Config of the training images' loader, with the
            test pipeline and ``sampler=dict(type='DefaultSampler',
            shuffle=False)``.
    """

    def __init__(self, dataloader: dict) -> None:
        if not isinstance(dataloader, dict) or \
                (dataloader.get('sampler') or {}).get('shuffle', True):
            raise ConfigError(
                'KNNBankHook.dataloader must be the config of a loader with '
                "sampler=dict(type='DefaultSampler', shuffle=False), got "
                f'{dataloader!r}.')
        self.dataloader = dataloader

    @torch.no_grad()
    def before_val(self, runner) -> None:
        model = unwrap(runner.model)
        if not isinstance(model, KNNClassifier):
            raise ConfigError(
                'KNNBankHook: the model is a '
                f"{type(model).__name__}, not a 'mmsinger.KNNClassifier'.")
        if not model.backbone.loaded:
            model.backbone.load_weights()
        model.eval()
        loader = runner.build_dataloader(self.dataloader, seed=runner.seed)
        features, labels = [], []
        for batch in loader:
            batch = model.data_preprocessor(batch, False)
            features.append(model.features(batch['inputs']))
            labels.append(torch.cat([sample.gt_label for sample
                                     in batch['data_samples']]))
        total = len(loader.dataset)
        model.fill_bank(_all(torch.cat(features), total),
                        _all(torch.cat(labels), total))
        runner.logger.info(f'k-NN: {total} training images in the bank')

    before_test = before_val


def _all(share: Tensor, total: int) -> Tensor:
    """The rows of all processes, in the data set's order. A DefaultSampler
    deals them out in turn, and some twice so that all have as many."""
    return torch.stack(all_gather(share), dim=1).flatten(0, 1)[:total]
