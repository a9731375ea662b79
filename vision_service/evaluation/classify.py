"""Scoring a classifier on a dataset."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError, MulticlassConfusionMatrix

from vision_service.errors import ConfigError
from vision_service.evaluation.classes import ClassMapping
from vision_service.evaluation.samples import Dataset, Sample
from vision_service.evaluation.scores import Metrics, Record, Scores, Unmapped, short
from vision_service.types import Classification, Int64Array, ParamOverrides, Result

BINS = 15
"""Of scores, for the calibration error, as in Guo et al., On Calibration of Modern Neural Networks (ICML 2017)."""
LISTED = 5


@dataclass(frozen=True, slots=True)
class ClassifyOptions:
    """What may be chosen.

    Attributes:
        unmapped: ``count``: classes that the dataset lacks compete and are always wrong; ``ignore``: they are left out,
            and the scores of the others are divided by their sum.
    """

    unmapped: Unmapped = "count"


class ClassificationScorer:
    """Top-1, top-5, confusion and calibration, by torchmetrics.

    A record is ``image``, ``truth``: its class id; ``top``: rows of class id and score, five of them, ids past the
    dataset's are the model's own classes, in the order of the mapping's ``only_in_model``; ``rank`` of the true class
    from 1 on, and its ``score``.
    """

    def __init__(self, dataset: Dataset, mapping: ClassMapping, options: ClassifyOptions) -> None:
        self._dataset = dataset
        self._mapping = mapping
        self._options = options
        self._ids = {name: index for index, name in enumerate(dataset.class_names)}
        known = len(dataset.class_names)
        others = mapping.to_dataset < 0
        self._column = np.where(others, known - 1 + np.cumsum(others), mapping.to_dataset)  # [model's classes]
        self._width = known + (int(others.sum()) if options.unmapped == "count" else 0)
        if self._width < 2:
            raise ConfigError(f"{dataset.root}: with one class every answer is right; it takes two to classify")
        self._top1 = MulticlassAccuracy(self._width, average="micro")
        self._top5 = MulticlassAccuracy(self._width, top_k=5, average="micro") if self._width >= 5 else None
        self._ece = MulticlassCalibrationError(self._width, n_bins=BINS, norm="l1")
        self._confusion = MulticlassConfusionMatrix(known + 1)
        self._records: list[Record] = []

    def overrides(self) -> ParamOverrides:
        """The scores of all classes."""
        return ParamOverrides(top_k=len(self._mapping.model_names), score_threshold=0.0)

    def add(self, sample: Sample, result: Result[Classification]) -> None:
        """Keep the five likeliest and the rank of the right one."""
        truth = self._ids[str(sample.truth)]
        scores = self._scores(result.prediction)  # [width]
        ranked = scores.copy()
        if ranked[truth] == 0:
            ranked[truth] = -1.0  # a class without a score is last, not one of many at 0 of which five are listed
        order = np.argsort(-ranked, kind="stable")
        target = torch.tensor([truth])
        for metric in (self._top1, self._top5):
            if metric is not None:
                metric.update(torch.from_numpy(ranked)[None], target)
        self._ece.update(torch.from_numpy(scores)[None], target)
        known = len(self._dataset.class_names)
        self._confusion.update(torch.tensor([min(int(order[0]), known)]), target)
        self._records.append(
            {
                "image": sample.name,
                "truth": truth,
                "top": [[int(i), short(scores[i])] for i in order[:LISTED]],
                "rank": int(np.flatnonzero(order == truth)[0]) + 1,
                "score": short(scores[truth]),
            }
        )

    def finish(self) -> Scores:
        """Figures of all images."""
        if not self._records:
            raise ConfigError(f"no image was answered, so there is nothing to measure: {self._dataset.root}")
        ranks = np.array([record["rank"] for record in self._records])
        metrics: Metrics = {
            "top1": float(self._top1.compute()),
            "top5": float(self._top5.compute()) if self._top5 is not None else None,
            "ece": float(self._ece.compute()),
        }
        truths = np.array([record["truth"] for record in self._records])
        confusion = self._confusion.compute().numpy()
        per_class = []
        for k, name in enumerate(self._dataset.class_names):
            mine = ranks[truths == k]
            per_class.append(
                {
                    "class_name": name,
                    "top1": float((mine == 1).mean()) if len(mine) else None,
                    "top5": float((mine <= 5).mean()) if len(mine) and self._width >= 5 else None,
                    "precision": float(confusion[k, k] / confusion[:, k].sum()) if confusion[:, k].any() else None,
                    "images": len(mine),
                }
            )
        rows = [[int(t), int(p), int(confusion[t, p])] for t, p in zip(*np.nonzero(confusion), strict=True)]
        curves = {"confusion": rows, "reliability": reliability(self._records)}
        return Scores(metrics, per_class, self._records, curves)

    def _scores(self, found: Classification) -> NDArray[np.float32]:
        columns = self._column[found.class_ids]
        scores = np.zeros(self._width, np.float64)
        kept = columns < self._width
        np.add.at(scores, columns[kept], found.scores[kept].astype(np.float64))
        if self._options.unmapped == "ignore" and scores.sum() > 0:
            scores /= scores.sum()
        # Above 1, even by rounding, torchmetrics would take them for logits.
        return np.minimum(scores, 1.0).astype(np.float32)


class ClassifiedImages:
    """The records of a report, ready to be weighed.

    Args:
        images: records of `ClassificationScorer`.
        class_count: of the dataset.
    """

    def __init__(self, images: Sequence[Record], class_count: int) -> None:
        self._ranks = np.array([image["rank"] for image in images])
        self._is_small = bool(images) and len(images[0]["top"]) < LISTED
        self._confidence = np.array([image["top"][0][1] for image in images])
        self._bins = bins_of(self._confidence)
        self._class_count = class_count

    def metrics(self, weights: NDArray[np.float64]) -> dict[str, float]:
        """``top1``, ``top5`` (unless there are fewer classes), ``ece``."""
        total, right = weights.sum(), self._ranks == 1
        gaps = np.bincount(self._bins, weights * (right - self._confidence), minlength=BINS + 1)
        found = {"top1": float(weights @ right / total), "ece": float(np.abs(gaps).sum() / total)}
        if not self._is_small:
            found["top5"] = float(weights @ (self._ranks <= 5) / total)
        return found


def bins_of(confidence: NDArray[np.floating]) -> Int64Array:
    """Which of `BINS` equal bins each score falls into; one on an edge belongs to the upper, as in torchmetrics."""
    edges = np.linspace(0, 1, BINS + 1, dtype=np.float32)
    return (np.searchsorted(edges, confidence.astype(np.float32), side="right") - 1).astype(np.int64)


def reliability(images: Sequence[Record]) -> list[list[float]]:
    """Rows of mean score, share that is right, and count, of the bins that are not empty."""
    confidence = np.array([image["top"][0][1] for image in images])
    right = np.array([image["rank"] == 1 for image in images])
    bins = bins_of(confidence)
    return [
        [float(confidence[bins == b].mean()), float(right[bins == b].mean()), int((bins == b).sum())]
        for b in np.unique(bins)
    ]
