"""One loop: images through a model, predictions into a scorer, failures into a list."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from vision_service.errors import (
    DeadlineExceeded,
    InferenceFailed,
    InvalidImage,
    ResourceExhausted,
    VisionError,
)
from vision_service.evaluation.predictors import Predictor
from vision_service.evaluation.samples import Dataset, Sample, read_image
from vision_service.evaluation.scores import Scorer, Scores
from vision_service.imaging.source import ImageInput
from vision_service.types import Result

ABOUT_ONE_IMAGE = (InvalidImage, InferenceFailed, DeadlineExceeded, ResourceExhausted)
"""Errors after which the next image may be answered; others stop the run."""


@dataclass(frozen=True, slots=True)
class Run:
    """What came of it.

    Attributes:
        scores: of the images that were answered.
        failures: ``image``, ``error`` (its class) and ``message`` of those that were not.
        notes: what a reader of the figures should know.
    """

    scores: Scores
    failures: list[dict[str, str]]
    notes: list[str]


def run(
    predictor: Predictor,
    dataset: Dataset,
    scorer: Scorer,
    *,
    max_failures: int | None = None,
    watch: Callable[[Sample], None] = lambda _: None,
) -> Run:
    """Answer and score all images of a dataset; pixels are held for those that are under way only.

    Args:
        predictor: who answers.
        dataset: its images and annotations.
        scorer: for the dataset's task.
        max_failures: stop once more images than this failed; ``None``: go on whatever happens.
        watch: told after every image.

    Raises:
        VisionError: too many images failed, or an error that is not about one image, such as a server that is gone.
        ConfigError: nothing could be measured.
    """
    failures: list[dict[str, str]] = []
    odd: list[str] = []
    for sample, outcome in _outcomes(predictor, dataset.samples, scorer):
        try:
            if isinstance(outcome, VisionError):
                raise outcome
            scorer.add(sample, outcome)
        except ABOUT_ONE_IMAGE as error:
            failures.append({"image": sample.name, "error": type(error).__name__, "message": str(error)})
            if max_failures is not None and len(failures) > max_failures:
                raise VisionError(
                    f"stopped: {len(failures)} images failed, more than --max-failures {max_failures}; the last is "
                    f"{sample.name}: {error}"
                ) from error
        else:
            if sample.declared_hw is not None and sample.declared_hw != outcome.original_hw:
                odd.append(sample.name)
        watch(sample)
    return Run(scorer.finish(), failures, [*dataset.notes, *_about_sizes(odd)])


def _outcomes(
    predictor: Predictor, samples: Iterable[Sample], scorer: Scorer
) -> Iterator[tuple[Sample, Result[Any] | VisionError]]:
    waiting: deque[tuple[Sample, InvalidImage | None]] = deque()

    def images() -> Iterator[ImageInput]:
        for sample in samples:
            image: ImageInput = b""  # what cannot be read still takes its turn
            unread = None
            try:
                image = read_image(sample.image)
            except InvalidImage as error:
                unread = error
            waiting.append((sample, unread))
            yield image

    for outcome in predictor.predict_many(images(), scorer.overrides()):
        sample, unread = waiting.popleft()
        yield sample, unread or outcome


def _about_sizes(odd: list[str]) -> list[str]:
    if not odd:
        return []
    return [
        f"{len(odd)} images are not of the size that their annotation says, so its boxes may not fit: "
        f"{', '.join(odd[:5])}{' ...' if len(odd) > 5 else ''}"
    ]
