"""The whole analysis of a teacher, from images to verdict."""
from itertools import zip_longest
from typing import Any, Dict, List, NamedTuple, Optional

import mmengine
import torch
from mmengine.utils import ProgressBar, track_iter_progress

from mmsinger.analysis.collect import Collection, collect
from mmsinger.analysis.nullspace import compare_with_jacobian, ffn_spectra
from mmsinger.analysis.verdict import (Evidence, Suggestion, Verdict, judge,
                                       snippet, suggest)
from mmsinger.engine.loading import Subject
from mmsinger.images import ImageFolder
from mmsinger.schema import Count, Natural, check_value
from mmsinger.version import __version__


class Analysis(NamedTuple):
    """All that is known of a teacher.

    Attributes:
        meta (dict): What was looked at, and how.
        collection (Collection): Norms of all blocks, and sample images.
        evidence (list[Evidence]): For each block, of artifacts.
        spectra (list[dict]): See :func:`ffn_spectra`.
        jacobian (list[dict] | None): See :func:`compare_with_jacobian`; None
            if it was not asked for.
        verdict (Verdict): The judgement.
        suggestion (Suggestion): What to begin with.
        snippet (str): The suggestion as a config to paste.
    """
    meta: Dict[str, Any]
    collection: Collection
    evidence: List[Evidence]
    spectra: List[Dict[str, Any]]
    jacobian: Optional[List[Dict[str, Any]]]
    verdict: Verdict
    suggestion: Suggestion
    snippet: str

    def numbers(self) -> Dict[str, Any]:
        """Everything but the pictures, for JSON."""
        verdict = self.verdict._asdict()
        verdict['signs'] = [signs._asdict() for signs in self.verdict.signs]
        layers = []
        for index, (record, seen, ffn, jacobian) in enumerate(zip_longest(
                self.collection.layers, self.evidence, self.spectra,
                self.jacobian or ())):
            layers.append(dict(
                layer=index, **record.numbers(), busiest=seen.busiest,
                group=seen.group and seen.group._asdict(),
                dimensions=seen.dimensions or None, ffn=ffn,
                jacobian=jacobian))
        return dict(
            meta=self.meta, verdict=verdict, layers=layers,
            suggestion=dict(**self.suggestion._asdict(), config=self.snippet))


def analyse(subject: Subject, folder: ImageFolder, config: str,
            batch_size: int = 8, num_samples: int = 4,
            jacobian_images: int = 0, jacobian_products: int = 64,
            seed: int = 0) -> Analysis:
    """Look at a teacher.

    Args:
        subject (Subject): The teacher; it runs where its parameters are.
        folder (ImageFolder): The images.
        config (str): The config's path, for the report and the snippet.
        batch_size (int): Images at a time. Defaults to 8.
        num_samples (int): Images to show. Defaults to 4.
        jacobian_images (int): Images at which blocks are linearised. Defaults
            to 0: the FFN is not compared with the Jacobian.
        jacobian_products (int): See :func:`compare_with_jacobian`. Defaults
            to 64.
        seed (int): For whatever is random. Defaults to 0.

    Returns:
        Analysis: Everything for report and JSON.

    Raises:
        ConfigError: If a number is not valid or there are no images.
    """
    for option, value, kind in (
            ('--batch-size', batch_size, Count),
            ('--samples', num_samples, Natural),
            ('--jacobian', jacobian_images, Natural),
            ('--jacobian-products', jacobian_products, Count)):
        check_value(option, value, kind)
    teacher = subject.teacher
    collection = collect(
        subject, track_iter_progress((folder, len(folder))), batch_size,
        num_samples, jacobian_images)
    evidence = [record.evidence() for record in collection.layers]
    verdict = judge(evidence, collection.count)
    suggestion = suggest(verdict, evidence, teacher.blocks.dim)
    spectra = ffn_spectra(teacher, [
        record.excess.rows for record in collection.layers])
    jacobian = None
    if jacobian_images:
        bar = ProgressBar(len(collection.layers) - 1)
        jacobian = compare_with_jacobian(
            teacher, collection.inputs, subject.normalisation,
            suggestion.rank, jacobian_products, seed, bar.update)
        print()
    meta = dict(
        config=config, part=subject.source,
        checkpoint=teacher.checkpoint,
        backbone=type(teacher.backbone).__name__,
        blocks=len(collection.layers), channels=teacher.blocks.dim,
        grid=list(collection.grid), configured_layers=subject.layers,
        folder=folder.folder, images=collection.count,
        image_size=list(folder.size), unreadable=len(folder.unreadable),
        too_small=len(folder.too_small), skipped=folder.skipped(),
        seed=seed, jacobian_images=jacobian_images,
        jacobian_products=jacobian_products if jacobian_images else None,
        notes=subject.notes,
        versions=dict(mmsinger=__version__, torch=torch.__version__,
                      mmengine=mmengine.__version__))
    return Analysis(meta, collection, evidence, spectra, jacobian, verdict,
                    suggestion,
                    snippet(suggestion, config if subject.recipe else None))
