"""Scoring a segmenter on a dataset."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassConfusionMatrix, MulticlassF1Score, MulticlassJaccardIndex
from torchmetrics.functional.classification import multiclass_confusion_matrix

from vision_service.errors import ConfigError, InvalidImage
from vision_service.evaluation.classes import BACKGROUNDS, ClassMapping
from vision_service.evaluation.samples import Dataset, MaskFile, Sample, read_mask
from vision_service.evaluation.scores import Metrics, Record, Scores, Unmapped, mean
from vision_service.imaging.masks import encode_rle
from vision_service.types import VOID, ParamOverrides, Result, SegmentationMap, UInt8Array


@dataclass(frozen=True, slots=True)
class SegmentOptions:
    """What may be chosen.

    Attributes:
        score_threshold: lowest probability that makes a pixel foreground; ``None``: the model's own.
        unmapped: what pixels are of which the model says a class that the dataset lacks: ``ignore``: background, if the
            dataset has one, for the dataset does not ask for that class; ``count``: wrong.
    """

    score_threshold: float | None = None
    unmapped: Unmapped = "ignore"


class SegmentationScorer:
    """IoU and Dice over the pixels of the whole dataset, by torchmetrics.

    A record is ``image``, ``size_hw``, ``confusion``: rows of true class id, found class id (the number of classes:
    none of them) and pixels; ``found``: COCO's run lengths by class id; and ``miou``: of the image alone.
    """

    def __init__(self, dataset: Dataset, mapping: ClassMapping, options: SegmentOptions) -> None:
        self._dataset = dataset
        self._options = options
        self._count = len(dataset.class_names)
        if self._count >= VOID:
            raise ConfigError(f"class maps have at most {VOID - 1} classes, the dataset has {self._count}")
        self._of_model = _table(mapping, dataset.class_names, options.unmapped)
        # One class more than the dataset has, for pixels that are found to be none of them.
        common: dict[str, Any] = {"num_classes": self._count + 1, "ignore_index": VOID}
        self._totals = MetricCollection(
            {
                "iou": MulticlassJaccardIndex(average="none", **common),
                "dice": MulticlassF1Score(average="none", **common),
                "confusion": MulticlassConfusionMatrix(**common),
            }
        )
        self._records: list[Record] = []

    def overrides(self) -> ParamOverrides:
        """The model's own, unless told otherwise."""
        return ParamOverrides(score_threshold=self._options.score_threshold)

    def add(self, sample: Sample, result: Result[SegmentationMap]) -> None:
        """Count pixels; what is kept of the maps are run lengths."""
        assert isinstance(sample.truth, MaskFile), "datasets for segmenters have masks"
        truth = read_mask(sample.truth, self._count)
        found = self._of_model[result.prediction.class_map]  # uint8 [H, W]
        if truth.shape != found.shape:
            raise InvalidImage(
                f"the mask is {truth.shape[1]}x{truth.shape[0]}, the image {found.shape[1]}x{found.shape[0]} "
                "(upright, as its EXIF data says)"
            )
        pair = torch.from_numpy(found.astype(np.int64)).ravel(), torch.from_numpy(truth.astype(np.int64)).ravel()
        self._totals.update(*pair)
        confusion = multiclass_confusion_matrix(*pair, num_classes=self._count + 1, ignore_index=VOID).numpy()
        iou, _ = iou_and_dice(confusion)
        rows = [[int(t), int(p), int(confusion[t, p])] for t, p in zip(*np.nonzero(confusion), strict=True)]
        self._records.append(
            {
                "image": sample.name,
                "size_hw": list(found.shape),
                "confusion": rows,
                "found": _run_lengths(found),
                "miou": mean(iou),
            }
        )

    def finish(self) -> Scores:
        """Figures from the pixels of all images together."""
        if not self._records:
            raise ConfigError(f"no image was answered, so there is nothing to measure: {self._dataset.root}")
        totals = self._totals.compute()
        confusion = totals["confusion"].numpy()
        present = (confusion.sum(axis=0) + confusion.sum(axis=1))[: self._count] > 0
        iou, dice = (
            np.where(present, totals[name].double().numpy()[: self._count], np.nan) for name in ("iou", "dice")
        )
        metrics: Metrics = {
            "miou": mean(iou),
            "mdice": mean(dice),
            "pixel_accuracy": float(np.trace(confusion) / confusion.sum()),
        }
        per_class = [
            {
                "class_name": name,
                "iou": None if np.isnan(iou[k]) else float(iou[k]),
                "dice": None if np.isnan(dice[k]) else float(dice[k]),
                "true_pixels": int(confusion[k].sum()),
                "found_pixels": int(confusion[:, k].sum()),
            }
            for k, name in enumerate(self._dataset.class_names)
        ]
        return Scores(metrics, per_class, self._records, {"confusion": confusion.tolist()})


class SegmentedImages:
    """The records of a report, ready to be weighed.

    Args:
        images: records of `SegmentationScorer`.
        class_count: of the dataset.
    """

    def __init__(self, images: Sequence[Record], class_count: int) -> None:
        self._confusions = np.zeros((len(images), class_count + 1, class_count + 1))
        for at, image in enumerate(images):
            for truth, found, pixels in image["confusion"]:
                self._confusions[at, truth, found] = pixels

    def metrics(self, weights: NDArray[np.float64]) -> dict[str, float]:
        """``miou``, ``mdice``, ``pixel_accuracy``."""
        confusion = np.tensordot(weights, self._confusions, axes=1)
        iou, dice = (mean(values) for values in iou_and_dice(confusion))
        total = confusion.sum()
        nothing = float("nan")
        return {
            "miou": nothing if iou is None else iou,
            "mdice": nothing if dice is None else dice,
            "pixel_accuracy": float(np.trace(confusion) / total) if total else nothing,
        }


def iou_and_dice(confusion: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Of each class but the last ("none of them"): NaN for a class that is neither there nor found.

    Args:
        confusion: ``[C + 1, C + 1]``, pixels by true and found class.
    """
    both = np.diag(confusion)[:-1].astype(np.float64)
    sizes = (confusion.sum(axis=0) + confusion.sum(axis=1))[:-1].astype(np.float64)
    with np.errstate(invalid="ignore"):
        return both / (sizes - both), 2 * both / sizes


def _table(mapping: ClassMapping, class_names: Sequence[str], unmapped: Unmapped) -> UInt8Array:
    """uint8 ``[256]``: from the model's class ids, `VOID` included, to the dataset's."""
    nothing = len(class_names)
    background = next((i for i, name in enumerate(class_names) if name.lower() in BACKGROUNDS), nothing)
    table = np.full(256, nothing if unmapped == "count" else background, np.uint8)
    table[VOID] = background  # the model says that nothing it knows is there
    for index, target in enumerate(mapping.to_dataset.tolist()):
        if target >= 0:
            table[index] = target
    return table


def _run_lengths(found: UInt8Array) -> dict[str, str]:
    return {str(class_id): encode_rle(found == class_id).decode("ascii") for class_id in np.unique(found).tolist()}
