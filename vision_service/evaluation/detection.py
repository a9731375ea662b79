"""How good a detector is: average precision, by pycocotools."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from vision_service.evaluation.voc import AnnotatedBoxes
from vision_service.types import Detections


@dataclass(frozen=True, slots=True)
class DetectionScore:
    """Average precision over the classes that the annotations have.

    Attributes:
        map50: mean over classes at an overlap (IoU) of 0.5.
        map50_95: mean over classes and the overlaps 0.5, 0.55, ... 0.95 (COCO's AP).
        ap50_by_class: at 0.5, by class name.
    """

    map50: float
    map50_95: float
    ap50_by_class: dict[str, float]


def score_detections(
    predictions: Sequence[Detections], annotations: Sequence[AnnotatedBoxes], max_detections: int = 100
) -> DetectionScore:
    """Average precision with COCO's rules: precision sampled at 101 recalls, classes matched by name.

    Predictions of classes that no annotation has are left out. Objects marked as difficult are treated as COCO treats
    crowds: finding or missing them changes nothing.

    Args:
        predictions: an image each, with scores down to near 0.
        annotations: of the same images, in the same order.
        max_detections: most predictions of a class that count in an image.

    Returns:
        Scores in 0..1.

    Raises:
        ValueError: the lengths differ, or there is nothing annotated.
    """
    if len(predictions) != len(annotations):
        raise ValueError(f"{len(predictions)} predictions for {len(annotations)} annotated images")
    names = sorted({n for a in annotations for n, hard in zip(a.class_names, a.difficult, strict=True) if not hard})
    if not names:
        raise ValueError("the annotations hold no object, so there is nothing to measure against")
    ids = {name: index + 1 for index, name in enumerate(names)}
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        precision = _precision(_truths(annotations, ids), _guesses(predictions, ids), max_detections)
    by_overlap = precision.mean(axis=1)  # [T, K]
    by_class = {name: float(by_overlap[0, index]) for index, name in enumerate(names)}
    return DetectionScore(float(by_overlap[0].mean()), float(by_overlap.mean()), by_class)


def _precision(truths: dict[str, Any], guesses: list[dict[str, Any]], max_detections: int) -> np.ndarray:
    """Precision as float ``[T, R, K]``: overlaps, recalls, classes."""
    dataset = COCO()
    dataset.dataset = truths
    dataset.createIndex()
    if not guesses:  # pycocotools cannot load none
        return np.zeros((10, 101, len(truths["categories"])))
    evaluation = COCOeval(dataset, dataset.loadRes(guesses), "bbox")
    evaluation.params.maxDets = [max_detections]
    evaluation.params.areaRng = evaluation.params.areaRng[:1]
    evaluation.params.areaRngLbl = evaluation.params.areaRngLbl[:1]
    evaluation.evaluate()
    evaluation.accumulate()
    precision: np.ndarray = evaluation.eval["precision"][:, :, :, 0, 0]
    return precision


def _xywh(box: np.ndarray) -> list[float]:
    x1, y1, x2, y2 = (float(value) for value in box)
    return [x1, y1, x2 - x1, y2 - y1]


def _truths(annotations: Sequence[AnnotatedBoxes], ids: dict[str, int]) -> dict[str, Any]:
    found: list[dict[str, Any]] = []
    for image_id, annotation in enumerate(annotations, start=1):
        rows = zip(annotation.boxes_xyxy, annotation.class_names, annotation.difficult, strict=True)
        for box, name, difficult in rows:
            if name in ids:
                x, y, width, height = _xywh(box)
                row = {"id": len(found) + 1, "image_id": image_id, "category_id": ids[name], "area": width * height}
                found.append(row | {"bbox": [x, y, width, height], "iscrowd": int(difficult)})
    return {
        "images": [{"id": index + 1} for index in range(len(annotations))],
        "categories": [{"id": index, "name": name} for name, index in ids.items()],
        "annotations": found,
    }


def _guesses(predictions: Sequence[Detections], ids: dict[str, int]) -> list[dict[str, Any]]:
    return [
        {"image_id": image_id, "category_id": ids[name], "bbox": _xywh(box), "score": float(score)}
        for image_id, prediction in enumerate(predictions, start=1)
        for box, name, score in zip(prediction.boxes_xyxy, prediction.class_names, prediction.scores, strict=True)
        if name in ids
    ]
