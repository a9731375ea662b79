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
        hits: at each overlap, the rows that are right: int64, rising.
        skipped: at each overlap, the rows that count neither way, and how many of them are before each of ``hits``.
        objects: float64 ``[images]``, how many there are to find.
    """

    images: Int64Array
    hits: list[Int64Array]
    skipped: list[tuple[Int64Array, Int64Array]]
    objects: NDArray[np.float64]

    def average_precision(self, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """``[T]``, NaN when there is nothing to find.

        Weighting an image is repeating it: between repeated rows recall only rises on right ones, where precision is
        highest at the end, so the interpolated precision at each recall is the same (``COCOeval.accumulate``). For the
        same reason only right rows need be looked at.
        """
        count = float(weights @ self.objects)
        if count == 0:
            return np.full(OVERLAPS, np.nan)
        of_row = weights[self.images]
        up_to = np.cumsum(of_row)
        found = np.zeros(OVERLAPS)
        for overlap, (hits, (skipped, before)) in enumerate(zip(self.hits, self.skipped, strict=True)):
            if not len(hits):
                continue
            right = np.cumsum(of_row[hits])
            counted = up_to[hits] - np.concatenate([[0.0], np.cumsum(of_row[skipped])])[before]
            precision = right / (counted + np.spacing(1))
            precision = np.maximum.accumulate(precision[::-1])[::-1]
            at = np.searchsorted(right / count, RECALLS, side="left")
            found[overlap] = precision[at[at < len(hits)]].sum() / len(RECALLS)
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
    found = []
    for class_id in range(class_count):
        mine = np.flatnonzero(class_ids == class_id)
        mine = mine[np.argsort(-scores[mine].astype(np.float64), kind="stable")]
        right, neither = _rows(hits[mine]), _rows(skipped[mine])
        pairs = [(rows, np.searchsorted(rows, at)) for rows, at in zip(neither, right, strict=True)]
        found.append(RankedClass(where[mine].astype(np.int64), right, pairs, objects[class_id]))
    return found


def _rows(bits: NDArray[np.generic]) -> list[Int64Array]:
    """At each overlap, the rows whose bit is set."""
    numbers = np.asarray(bits, np.int64)
    return [np.flatnonzero(numbers >> overlap & 1) for overlap in range(OVERLAPS)]
