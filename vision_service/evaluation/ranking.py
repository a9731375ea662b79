"""Average precision from matches that are kept, with images weighted; equal to pycocotools on repeated images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vision_service.evaluation.detection import OVERLAPS
from vision_service.evaluation.scores import Record
from vision_service.types import Int64Array

RECALLS = np.linspace(0.0, 1.0, 101)


@dataclass(frozen=True, slots=True, eq=False)
class RankedClass:
    """Predictions of one class in all images, highest score first.

    Attributes:
        images: int64 ``[D]``, where each is.
        hits: bool ``[T, D]``: right at each overlap.
        misses: bool ``[T, D]``: wrong; what is neither does not count.
        objects: float64 ``[images]``, how many there are to find.
    """

    images: Int64Array
    hits: NDArray[np.bool_]
    misses: NDArray[np.bool_]
    objects: NDArray[np.float64]

    def average_precision(self, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """``[T]``, NaN when there is nothing to find.

        Weighting an image is repeating it: between repeated rows recall only rises on right ones, where precision is
        highest at the end, so the interpolated precision at each recall is the same (``COCOeval.accumulate``).
        """
        count = float(weights @ self.objects)
        if count == 0:
            return np.full(OVERLAPS, np.nan)
        if not len(self.images):
            return np.zeros(OVERLAPS)
        of_row = weights[self.images]
        right, wrong = np.cumsum(self.hits * of_row, axis=1), np.cumsum(self.misses * of_row, axis=1)
        precision = right / (right + wrong + np.spacing(1))
        precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        recall = right / count
        found = np.zeros(OVERLAPS)
        for overlap in range(OVERLAPS):
            at = np.searchsorted(recall[overlap], RECALLS, side="left")
            found[overlap] = precision[overlap, at[at < len(self.images)]].sum() / len(RECALLS)
        return found


class RankedDetections:
    """The predictions of a report, ready to be weighed.

    Args:
        images: records of `DetectionScorer`.
        class_count: of the dataset.
    """

    def __init__(self, images: Sequence[Record], class_count: int) -> None:
        self.classes = rank(images, class_count)

    def metrics(self, weights: NDArray[np.float64]) -> dict[str, float]:
        """``map``, ``map50``, ``map75``: the mean over classes that have an object."""
        table = np.stack([one.average_precision(weights) for one in self.classes])  # [K, T]
        table = table[~np.isnan(table[:, 0])]
        if not len(table):
            return dict.fromkeys(("map", "map50", "map75"), float("nan"))
        return {"map": float(table.mean()), "map50": float(table[:, 0].mean()), "map75": float(table[:, 5].mean())}


def rank(images: Sequence[Record], class_count: int) -> list[RankedClass]:
    """Sort the predictions of each class by score; ties stay in the order of the images."""
    rows = [
        (at, row[0], row[1], row[6], row[7]) for at, image in enumerate(images) for row in image["found"] if row[0] >= 0
    ]
    where, class_ids, scores, hits, skipped = (
        np.array(column) for column in (zip(*rows, strict=True) if rows else ([],) * 5)
    )
    objects = np.zeros((class_count, len(images)))
    for at, image in enumerate(images):
        for row in image["truth"]:
            objects[row[0], at] += not row[5]
    bits = np.arange(OVERLAPS)[:, None]
    found = []
    for class_id in range(class_count):
        mine = np.flatnonzero(class_ids == class_id)
        mine = mine[np.argsort(-scores[mine].astype(np.float64), kind="stable")]
        is_hit = (hits[mine].astype(np.int64) >> bits) & 1 == 1
        is_skipped = (skipped[mine].astype(np.int64) >> bits) & 1 == 1
        found.append(RankedClass(where[mine].astype(np.int64), is_hit, ~is_hit & ~is_skipped, objects[class_id]))
    return found
