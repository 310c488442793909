"""Each metric over a stream of images."""
import contextlib
from typing import Any, Dict, List, Tuple

import torch
from torch import Tensor

from mmsinger.analysis.block_norms import BlockNorms, Inflation
from mmsinger.analysis.nullspace import NullDirections, deviations
from mmsinger.metrics import (Deviation, Moments, Sample, gram_distance,
                              token_cosine)
from mmsinger.models.distillers import FeatureDistiller
from mmsinger.models.features.tokens import Tokens, align_tokens
from mmsinger.models.targets import TeacherOutputs


class Stream:
    """One metric, over batches.

    Args:
        distiller (FeatureDistiller): What is measured.
        seed (int): Seeds all that is random.
    """

    needs_student = False

    def __init__(self, distiller: FeatureDistiller, seed: int) -> None:
        self.distiller = distiller
        self.seed = seed
        self.moments: Dict[Tuple[int, str], Moments] = {}

    @property
    def teacher_layers(self) -> List[int]:
        """Teacher blocks whose outputs are read."""
        return self.distiller.tapped_teacher_layers

    def watching(self):
        """A context for the teacher's pass."""
        return contextlib.nullcontext()

    def update(self, outputs: TeacherOutputs, student: Dict[int, Tokens]
               ) -> None:
        """Take in one batch."""
        raise NotImplementedError

    def result(self) -> Dict[str, Any]:
        """Numbers by layer."""
        return {str(layer): self.summaries(layer)
                for layer in self.distiller.layers}

    def add(self, layer: int, name: str, values: Tensor) -> None:
        """Take in one value an image, (B, )."""
        self.moments.setdefault((layer, name), Moments()).add(values)

    def summaries(self, layer: int) -> Dict[str, Dict[str, float]]:
        """Mean and std over images of all that was added for a layer."""
        return {name: moments.summary() for (at, name), moments
                in self.moments.items() if at == layer}


class CosineStream(Stream):
    """Cosines before and after refinement (Table 3)."""

    def update(self, outputs, student):
        refinement = self.distiller.refinement
        for layer in self.distiller.layers:
            tokens = outputs.tokens(layer)
            refined = refinement.refine(layer, tokens).tokens
            self.add(layer, 'refined', token_cosine(
                tokens.patches, refined.patches))
            if layer != refinement.last_layer:
                self.add(layer, 'next_block', token_cosine(
                    outputs.tokens(layer + 1).patches,
                    outputs.next_block(layer, refined).patches))


class GramStream(Stream):
    """How patches lie to each other (Table 5b)."""

    needs_student = True

    def update(self, outputs, student):
        for layer in self.distiller.layers:
            tokens = outputs.tokens(layer)
            if self.distiller.refinement:
                refined = self.distiller.refinement.refine(layer, tokens)
                self.add(layer, 'teacher_refined', gram_distance(
                    tokens.patches, refined.tokens.patches))
            own, tokens = align_tokens(student[layer], tokens)
            self.add(layer, 'teacher_student', gram_distance(
                tokens.patches, own.patches))
            projected = self.distiller.projectors[str(layer)](own.patches)
            self.add(layer, 'teacher_projected', gram_distance(
                tokens.patches, projected))


class InflationStream(Stream):
    """Growth of norms in every block of the teacher (Table 7)."""

    def __init__(self, distiller, seed):
        super().__init__(distiller, seed)
        self.blocks = range(len(distiller.teacher.blocks))
        self.norms = BlockNorms(distiller.teacher.blocks, self.blocks)
        self.samples = {block: Sample(seed=seed) for block in self.blocks}

    @property
    def teacher_layers(self):
        return [self.blocks[-1]]  # so that the pass reaches it

    def watching(self):
        return self.norms

    def update(self, outputs, student):
        num_prefix = outputs.taps.tokens(self.blocks[-1]).num_prefix
        for block in self.blocks:
            values = torch.stack(self.norms.inflation(block), dim=-1)
            self.samples[block].add(values[:, num_prefix:].flatten(0, 1))

    def result(self):
        rows = {str(block): sample.rows
                for block, sample in self.samples.items()}
        rows['all'] = torch.cat(list(rows.values()))
        return {name: {
            field: dict(mean=values.mean().item(),
                        median=values.quantile(0.5).item(),
                        p95=values.quantile(0.95).item())
            for field, values in zip(Inflation._fields, part.double().T)
        } for name, part in rows.items()}


class DeviationStream(Stream):
    """What the next block sees of steps along null directions (Table 8).

    Args:
        distiller (FeatureDistiller): What is measured.
        seed (int): Seeds the steps.
        strength (float): Their length over the tokens' norms.
        directions (dict[int, NullDirections]): By layer.
    """

    estimates = ('ours', 'jacobian', 'random')  # as in the table

    def __init__(self, distiller: FeatureDistiller, seed: int,
                 strength: float, directions: Dict[int, NullDirections]
                 ) -> None:
        super().__init__(distiller, seed)
        self.strength = strength
        self.directions = directions
        self.generator = torch.Generator().manual_seed(seed)

    def update(self, outputs, student):
        for layer, directions in self.directions.items():
            found = deviations(
                outputs.tokens(layer), outputs.tokens(layer + 1).patches,
                directions, self.strength, self.generator,
                lambda moved: outputs.next_block(layer, moved))
            for name, deviation in zip(self.estimates, found):
                for field, values in deviation._asdict().items():
                    self.add(layer, f'{name}.{field}', values)

    def result(self):
        results = {}
        for layer in self.directions:
            values = self.summaries(layer)
            results[str(layer)] = dict(block=layer + 1, **{
                name: {field: values[f'{name}.{field}']
                       for field in Deviation._fields}
                for name in self.estimates
            })
        return results
