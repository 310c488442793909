"""Classification by nearest neighbours: an evaluation without training."""
from typing import Any, Optional

import torch
from mmengine.model import BaseModel
from torch import Tensor, nn

from mmsinger.errors import ConfigError
from mmsinger.registry import MODELS
from mmsinger.schema import Count, Positive


@MODELS.register_module()
class KNNClassifier(BaseModel):
    """Weighted votes of the k nearest training images.

    Neighbours are those of the highest cosine similarity s; each votes for
    its class with weight ``exp(s / temperature)``. ``KNNBankHook`` fills the
    bank of training features before an evaluation.

    Args:
        backbone (dict): A :class:`FrozenBackbone` whose output is a vector.
        num_classes (int): Number of classes.
        k (int): Neighbours. Defaults to 20.
        temperature (float): Defaults to 0.07.
        chunk_size (int): Features of the bank that a batch is compared with
            at a time; bounds the memory. Defaults to 32768.
        data_preprocessor (dict, optional): As of mmpretrain's
            ImageClassifier. Defaults to None.

    Raises:
        ConfigError: If a value is out of range.
    """

    needs_checkpoint = False  # the backbone brings its own

    def __init__(self,
                 backbone: dict,
                 num_classes: Count,
                 k: Count = 20,
                 temperature: Positive = 0.07,
                 chunk_size: Count = 32768,
                 data_preprocessor: Optional[dict] = None) -> None:
        super().__init__(data_preprocessor=data_preprocessor)
        self.backbone = MODELS.build(backbone)
        self.num_classes = num_classes
        self.k = k
        self.temperature = temperature
        self.chunk_size = chunk_size
        # DistributedDataParallel refuses a model that cannot be trained
        self.unused = nn.Parameter(torch.zeros(()))
        self.register_buffer('bank', None, persistent=False)
        self.register_buffer('labels', None, persistent=False)

    def fill_bank(self, features: Tensor, labels: Tensor) -> None:
        """Set the training images to compare with.

        Args:
            features (Tensor): Unit vectors from :meth:`features`, (n, C).
            labels (Tensor): Their classes, (n, ), int64.

        Raises:
            ConfigError: If there are fewer than k, or a class is out of
                range.
        """
        if len(features) < self.k:
            raise ConfigError(
                f'model.k={self.k}, but the bank has only {len(features)} '
                'images. Lower k, or check the dataloader of KNNBankHook.')
        outside = labels[(labels < 0) | (labels >= self.num_classes)]
        if len(outside):
            raise ConfigError(
                f'model.num_classes={self.num_classes}, but the bank has a '
                f'label {int(outside[0])}. Labels count from 0.')
        self.bank, self.labels = features, labels

    def features(self, inputs: Tensor) -> Tensor:
        """Unit vectors (B, C) of preprocessed images (B, 3, H, W)."""
        features = self.backbone(inputs)[-1]
        if features.dim() != 2:
            raise ConfigError(
                f'model.backbone.output={self.backbone.output!r} is a map; '
                "nearest neighbours need 'cls_token' or 'mean_patch'.")
        return nn.functional.normalize(features.float(), dim=1)

    @torch.no_grad()
    def scores(self, features: Tensor) -> Tensor:
        """Shares of the votes, (B, num_classes), for unit vectors (B, C)."""
        if self.bank is None:
            raise ConfigError(
                'KNNClassifier has no training images to compare with. Add '
                "dict(type='mmsinger.KNNBankHook', dataloader=…) to "
                'custom_hooks.')
        near = features.new_empty(len(features), 0)
        labels = self.labels.new_empty(len(features), 0)
        for bank, classes in zip(self.bank.split(self.chunk_size),
                                 self.labels.split(self.chunk_size)):
            near = torch.cat([near, features @ bank.T], dim=1)
            labels = torch.cat(
                [labels, classes.expand(len(features), -1)], dim=1)
            near, index = near.topk(min(self.k, near.shape[1]), dim=1)
            labels = labels.gather(1, index)
        votes = (near / self.temperature).softmax(dim=1)
        return votes.new_zeros(len(features), self.num_classes).scatter_add_(
            1, labels, votes)

    def forward(self, inputs: Tensor, data_samples: Optional[list] = None,
                mode: str = 'tensor') -> Any:
        """Scores or predictions, in mmpretrain's modes.

        Args:
            inputs (Tensor): Preprocessed images, shape (B, 3, H, W).
            data_samples (list[DataSample], optional): Get the predictions.
            mode (str): ``'tensor'`` or ``'predict'``.

        Returns:
            Tensor | list[DataSample]: Scores (B, num_classes), or the data
            samples.
        """
        if mode == 'loss':
            raise ConfigError(
                'KNNClassifier is not trained. Evaluate with '
                'tools/linear_eval.py or tools/test.py.')
        scores = self.scores(self.features(inputs))
        if mode == 'tensor':
            return scores
        for sample, score in zip(data_samples, scores):
            sample.set_pred_score(score).set_pred_label(
                score.argmax(dim=0, keepdim=True))
        return data_samples
