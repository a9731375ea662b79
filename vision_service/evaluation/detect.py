"""Scoring a detector on a dataset."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vision_service.errors import ConfigError
from vision_service.evaluation.classes import ClassMapping
from vision_service.evaluation.detection import (
    SIZES,
    CocoResult,
    ImageBoxes,
    ImageMatches,
    coco_guesses,
    coco_truths,
    image_boxes,
    run_coco,
)
from vision_service.evaluation.report import write_text
from vision_service.evaluation.samples import AnnotatedBoxes, Dataset, Sample
from vision_service.evaluation.scores import Metrics, Record, Scores, Unmapped, mean, short
from vision_service.types import Detections, ParamOverrides, Result


@dataclass(frozen=True, slots=True)
class DetectOptions:
    """What may be chosen.

    Attributes:
        score_threshold: lowest score that is asked for; average precision needs it near 0.
        iou_threshold: of the model's suppression; ``None``: the model's own.
        max_detections: most boxes an image, and most of a class that count.
        difficult: ``ignore``: difficult objects and crowds count neither way; ``count``: like any other.
        unmapped: ``ignore`` drops predictions of classes that the dataset lacks, ``count`` takes them for errors.
    """

    score_threshold: float = 0.01
    iou_threshold: float | None = None
    max_detections: int = 100
    difficult: str = "ignore"
    unmapped: Unmapped = "ignore"


class DetectionScorer:
    """COCO's metrics, by pycocotools.

    A record is ``image``, ``size_hw``, ``truth``: rows of class id, x1, y1, x2, y2, whether it is ignored, and the
    index of the prediction that has it at overlap 0.5 (-1: none); ``found``: rows of class id (-1: not of the dataset),
    score, x1, y1, x2, y2, and `ImageMatches.hits` and ``skipped``; and ``right``, ``wrong``, ``missed``: how many, at
    the score of ``metrics["best_f1_score"]``.
    """

    def __init__(self, dataset: Dataset, mapping: ClassMapping, options: DetectOptions) -> None:
        self._dataset = dataset
        self._mapping = mapping
        self._options = options
        self._ids = {name: index for index, name in enumerate(dataset.class_names)}
        self.images: list[ImageBoxes] = []

    def overrides(self) -> ParamOverrides:
        """Low scores, many boxes."""
        options = self._options
        return ParamOverrides(
            score_threshold=options.score_threshold,
            iou_threshold=options.iou_threshold,
            max_detections=options.max_detections,
        )

    def add(self, sample: Sample, result: Result[Detections]) -> None:
        """Keep boxes, no pixels."""
        truth, found = sample.truth, result.prediction
        assert isinstance(truth, AnnotatedBoxes), "datasets for detectors have boxes"
        truth = truth.in_pixels(result.original_hw)
        class_ids = self._mapping.to_dataset[found.class_ids]
        kept = class_ids >= 0 if self._options.unmapped == "ignore" else np.ones(len(found), np.bool_)
        image = image_boxes(
            sample.name,
            result.original_hw,
            truth,
            self._ids,
            found.boxes_xyxy[kept],
            class_ids[kept],
            found.scores[kept],
        )
        if self._options.difficult == "count":
            image.ignored[:] = False
        self.images.append(image)

    def finish(self) -> Scores:
        """Run pycocotools over all of it."""
        names = self._dataset.class_names
        if not any((~image.ignored).any() for image in self.images):
            raise ConfigError(
                f"no image that was answered has an object, so there is nothing to measure: {self._dataset.root}"
            )
        coco = run_coco(self.images, len(names), self._options.max_detections)
        threshold, best, curve = best_f1(self.images, coco.matches)
        records = [_record(image, match, threshold) for image, match in zip(self.images, coco.matches, strict=True)]
        metrics = self._metrics(coco) | {"best_f1": best, "best_f1_score": threshold}
        by_overlap = _no_negatives(coco.precision).mean(axis=1)  # [T, K, A]
        recall = _no_negatives(coco.recall)[:, :, 0, -1].mean(axis=0)  # [K]
        per_class = [
            {
                "class_name": name,
                "ap": _number(by_overlap[:, k, 0].mean()),
                "ap50": _number(by_overlap[0, k, 0]),
                "ap75": _number(by_overlap[5, k, 0]),
                **{f"ap_{size}": _number(by_overlap[:, k, a].mean()) for a, size in enumerate(SIZES) if a},
                "recall": _number(recall[k]),
                "objects": sum(int(((image.truth_ids == k) & ~image.ignored).sum()) for image in self.images),
                "predictions": sum(int((image.class_ids == k).sum()) for image in self.images),
            }
            for k, name in enumerate(names)
        ]
        pr = {
            name: [round(float(value), 4) for value in coco.precision[0, :, k, 0]]
            for k, name in enumerate(names)
            if coco.precision[0, 0, k, 0] >= 0
        }
        return Scores(metrics, per_class, records, {"precision_at_recall": pr, "f1_at_score": curve})

    def write_coco(self, folder: Path) -> None:
        """What was scored, as ``annotations.json`` and ``predictions.json`` that pycocotools reads.

        Raises:
            ConfigError: they cannot be written.
        """
        truths = coco_truths(self.images, self._dataset.class_names)
        write_text(folder / "annotations.json", json.dumps(truths))
        write_text(folder / "predictions.json", json.dumps(coco_guesses(self.images)))

    def _metrics(self, coco: CocoResult) -> Metrics:
        precision, recall = _no_negatives(coco.precision), _no_negatives(coco.recall)
        metrics: Metrics = {
            "map": mean(precision[..., 0]),
            "map50": mean(precision[0, ..., 0]),
            "map75": mean(precision[5, ..., 0]),
        }
        metrics |= {f"map_{size}": mean(precision[..., a]) for a, size in enumerate(SIZES) if a}
        counts = ("1", "10", "max")
        metrics |= {f"recall_{count}": mean(recall[:, :, 0, m]) for m, count in enumerate(counts)}
        known = np.isin(np.arange(len(self._dataset.class_names)), self._mapping.to_dataset)
        if not known.all():
            metrics["map_known_classes"] = mean(precision[:, :, known, 0])
            metrics["map50_known_classes"] = mean(precision[0][:, known, 0])
        return metrics


def best_f1(images: list[ImageBoxes], matches: list[ImageMatches]) -> tuple[float, float, list[list[float]]]:
    """The score at which F1 at overlap 0.5, over all classes together, is highest.

    Returns:
        That score, its F1, and at most 101 points of score, precision, recall and F1.
    """
    scores = np.concatenate([image.scores for image in images]).astype(np.float64)
    hits = np.concatenate([match.hits for match in matches]) & 1
    skipped = np.concatenate([match.skipped for match in matches]) & 1
    objects = sum(int((~image.ignored).sum()) for image in images)
    order = np.argsort(-scores, kind="stable")
    order = order[skipped[order] == 0]
    if not len(order):
        return 1.0, 0.0, []
    right = np.cumsum(hits[order])
    precision, recall = right / np.arange(1, len(order) + 1), right / objects
    f1 = 2 * right / (np.arange(1, len(order) + 1) + objects)
    ranked = scores[order]
    ends = np.append(np.flatnonzero(np.diff(ranked)), len(ranked) - 1)  # equal scores come and go together
    best = ends[np.argmax(f1[ends])]
    shown = ends[np.unique(np.linspace(0, len(ends) - 1, 101).astype(np.int64))]
    curve = [[round(float(column[i]), 4) for column in (ranked, precision, recall, f1)] for i in shown]
    return short(ranked[best]), float(f1[best]), curve


def _record(image: ImageBoxes, match: ImageMatches, threshold: float) -> Record:
    # A prediction that is skipped at 0.5, such as one of a crowd, is neither right nor wrong.
    shown = (image.scores >= threshold) & (match.skipped & 1 == 0)
    right = int((shown & (match.hits & 1 == 1)).sum())
    truth = [
        [int(class_id), *map(_exact, box), int(ignored), int(taker)]
        for class_id, box, ignored, taker in zip(
            image.truth_ids, image.truth_xyxy, image.ignored, match.found_by, strict=True
        )
    ]
    found = [
        [int(class_id), short(score), *map(short, box), int(hits), int(skipped)]
        for class_id, score, box, hits, skipped in zip(
            image.class_ids, image.scores, image.boxes_xyxy, match.hits, match.skipped, strict=True
        )
    ]
    return {
        "image": image.name,
        "size_hw": list(image.size_hw),
        "truth": truth,
        "found": found,
        "right": right,
        "wrong": int(shown.sum()) - right,
        "missed": int((~image.ignored).sum()) - right,
    }


def _exact(value: Any) -> float | int:
    number = float(value)
    return int(number) if number.is_integer() else number


def _no_negatives(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """NaN where pycocotools says -1: no object."""
    return np.where(values < 0, np.nan, values)


def _number(value: np.floating | float) -> float | None:
    return None if np.isnan(value) else float(value)
