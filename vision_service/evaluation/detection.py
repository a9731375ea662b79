"""How good a detector is: average precision, by pycocotools."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from vision_service.evaluation.samples import AnnotatedBoxes
from vision_service.types import Detections, Int64Array

SIZES = ("all", "small", "medium", "large")
"""COCO's bins by area in pixels: below 32x32, to 96x96, above."""
OVERLAPS = 10
"""0.5, 0.55, ... 0.95."""


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


@dataclass(frozen=True, slots=True, eq=False)
class ImageBoxes:
    """What is in an image and what was found, with the dataset's class ids.

    Attributes:
        name: of the image.
        size_hw: its height and width, pixels.
        truth_xyxy: float64 ``[M, 4]``, pixels.
        truth_ids: int64 ``[M]``.
        truth_areas: float64 ``[M]``, pixels.
        ignored: bool ``[M]``: neither to be found nor to be missed.
        boxes_xyxy: float32 ``[N, 4]``, pixels, highest score first.
        class_ids: int64 ``[N]``; -1 for a class that the dataset lacks: never right.
        scores: float32 ``[N]``.
    """

    name: str
    size_hw: tuple[int, int]
    truth_xyxy: NDArray[np.floating]
    truth_ids: Int64Array
    truth_areas: NDArray[np.floating]
    ignored: NDArray[np.bool_]
    boxes_xyxy: NDArray[np.floating]
    class_ids: Int64Array
    scores: NDArray[np.floating]


@dataclass(frozen=True, slots=True, eq=False)
class CocoResult:
    """What pycocotools makes of a dataset.

    Attributes:
        precision: float ``[T, R, K, A]``: overlaps, 101 recalls, classes, sizes; -1 where there is no object.
        recall: float ``[T, K, A, M]``: the last axis is 1, 10 and the most detections an image; -1 likewise.
        matches: an image each, see `ImageMatches`.
    """

    precision: NDArray[np.float64]
    recall: NDArray[np.float64]
    matches: list[ImageMatches]


@dataclass(frozen=True, slots=True, eq=False)
class ImageMatches:
    """Which predictions of an image are right.

    Attributes:
        hits: int64 ``[N]``: bit t is set when the prediction has an object at overlap ``0.5 + 0.05 t``.
        skipped: int64 ``[N]``: bit t is set when it counts neither way, for what it has is an ignored object; all
            bits for predictions of a class past the most that count.
        found_by: int64 ``[M]``: index of the prediction that has the object at overlap 0.5, -1 when it is missed.
    """

    hits: Int64Array
    skipped: Int64Array
    found_by: Int64Array


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
    ids = {name: index for index, name in enumerate(names)}
    images = [
        image_boxes(str(index), (0, 0), truth, ids, found.boxes_xyxy, _ids(found.class_names, ids), found.scores)
        for index, (found, truth) in enumerate(zip(predictions, annotations, strict=True))
    ]
    by_overlap = run_coco(images, len(names), max_detections, sizes=1).precision[..., 0].mean(axis=1)  # [T, K]
    by_class = {name: float(by_overlap[0, index]) for index, name in enumerate(names)}
    return DetectionScore(float(by_overlap[0].mean()), float(by_overlap.mean()), by_class)


def image_boxes(
    name: str,
    size_hw: tuple[int, int],
    truth: AnnotatedBoxes,
    ids: dict[str, int],
    boxes_xyxy: NDArray[np.floating],
    class_ids: Int64Array,
    scores: NDArray[np.floating],
) -> ImageBoxes:
    """Annotations and predictions of an image, joined; objects of classes that are not in ``ids`` are left out."""
    kept = np.array([item in ids for item in truth.class_names], np.bool_)
    boxes = np.asarray(truth.boxes_xyxy, np.float64)[kept]
    sides = boxes[:, 2:] - boxes[:, :2]
    areas = sides.prod(axis=1) if truth.areas is None else truth.areas[kept]
    truth_ids = _ids([item for item in truth.class_names if item in ids], ids)
    return ImageBoxes(
        name, size_hw, boxes, truth_ids, areas, truth.difficult[kept], boxes_xyxy, class_ids, np.asarray(scores)
    )


def run_coco(images: Sequence[ImageBoxes], class_count: int, max_detections: int, sizes: int = 4) -> CocoResult:
    """Run pycocotools.

    Args:
        images: in the order that breaks ties of scores.
        class_count: K; classes without objects have -1 in the results.
        max_detections: most predictions of a class that count in an image.
        sizes: how many of `SIZES`.
    """
    guesses = coco_guesses(images)
    if not guesses:  # pycocotools cannot load none
        return _nothing_found(images, class_count, sizes)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        dataset = COCO()
        dataset.dataset = coco_truths(images, [str(index) for index in range(class_count)])
        dataset.createIndex()
        evaluation = COCOeval(dataset, dataset.loadRes(guesses), "bbox")
        evaluation.params.maxDets = [1, min(10, max_detections), max_detections]
        evaluation.params.areaRng = evaluation.params.areaRng[:sizes]
        evaluation.params.areaRngLbl = evaluation.params.areaRngLbl[:sizes]
        evaluation.evaluate()
        evaluation.accumulate()
    precision: NDArray[np.float64] = evaluation.eval["precision"][..., -1]
    return CocoResult(precision, evaluation.eval["recall"], _matches(images, evaluation))


def coco_truths(images: Sequence[ImageBoxes], class_names: Sequence[str]) -> dict[str, Any]:
    """Annotations as COCO's JSON has them; ids count from 1, for pycocotools takes a match with 0 for none."""
    rows: list[dict[str, Any]] = []
    for image_id, image in enumerate(images, start=1):
        for box, class_id, area, ignored in zip(
            image.truth_xyxy, image.truth_ids.tolist(), image.truth_areas.tolist(), image.ignored.tolist(), strict=True
        ):
            row = {"id": len(rows) + 1, "image_id": image_id, "category_id": class_id + 1, "bbox": _xywh(box)}
            rows.append(row | {"area": area, "iscrowd": int(ignored)})
    return {
        "images": [
            {"id": index, "file_name": image.name, "height": image.size_hw[0], "width": image.size_hw[1]}
            for index, image in enumerate(images, start=1)
        ],
        "categories": [{"id": index, "name": name} for index, name in enumerate(class_names, start=1)],
        "annotations": rows,
    }


def coco_guesses(images: Sequence[ImageBoxes]) -> list[dict[str, Any]]:
    """Predictions as COCO's result files have them; those of classes that the dataset lacks are left out."""
    return [
        {"image_id": image_id, "category_id": class_id + 1, "bbox": _xywh(box), "score": float(score)}
        for image_id, image in enumerate(images, start=1)
        for box, class_id, score in zip(image.boxes_xyxy, image.class_ids.tolist(), image.scores, strict=True)
        if class_id >= 0
    ]


def _matches(images: Sequence[ImageBoxes], evaluation: COCOeval) -> list[ImageMatches]:
    """Per prediction and per object what pycocotools matched, for objects of all sizes."""
    # Where each id of pycocotools lies in its image: they count up over images, as in the lists above.
    found = [_unmatched(image) for image in images]
    places = [np.flatnonzero(image.class_ids >= 0) for image in images]
    first_guess = np.cumsum([1, *(len(place) for place in places)])
    first_truth = np.cumsum([1, *(len(image.truth_ids) for image in images)])
    weights = 1 << np.arange(OVERLAPS, dtype=np.int64)[:, None]  # [T, 1]
    for entry in evaluation.evalImgs:
        if entry is None or entry["aRng"] != evaluation.params.areaRng[0]:
            continue
        at = entry["image_id"] - 1
        rows = places[at][np.array(entry["dtIds"], np.int64) - first_guess[at]]
        matched, skipped = np.asarray(entry["dtMatches"]) > 0, np.asarray(entry["dtIgnore"]) > 0  # [T, D]
        found[at].hits[rows] = ((matched & ~skipped) * weights).sum(axis=0)
        found[at].skipped[rows] = (skipped * weights).sum(axis=0)
        objects = np.array(entry["gtIds"], np.int64) - first_truth[at]
        takers = np.asarray(entry["gtMatches"])[0].astype(np.int64)  # ids; 0 for none
        is_taken = takers > 0
        found[at].found_by[objects[is_taken]] = places[at][takers[is_taken] - first_guess[at]]
    return found


def _unmatched(image: ImageBoxes) -> ImageMatches:
    beyond = (1 << OVERLAPS) - 1  # until pycocotools says that it counts
    skipped = np.where(image.class_ids >= 0, beyond, 0)
    return ImageMatches(np.zeros(len(skipped), np.int64), skipped, np.full(len(image.truth_ids), -1, np.int64))


def _nothing_found(images: Sequence[ImageBoxes], class_count: int, sizes: int) -> CocoResult:
    bounds = [(0, 1e10), (0, 32**2), (32**2, 96**2), (96**2, 1e10)][:sizes]
    precision = np.full((OVERLAPS, 101, class_count, sizes), -1.0)
    recall = np.full((OVERLAPS, class_count, sizes, 3), -1.0)
    for image in images:
        for size, (low, high) in enumerate(bounds):
            ids = image.truth_ids[~image.ignored & (image.truth_areas >= low) & (image.truth_areas <= high)]
            precision[:, :, ids, size] = 0.0
            recall[:, ids, size] = 0.0
    return CocoResult(precision, recall, [_unmatched(image) for image in images])


def _ids(names: Sequence[str], ids: dict[str, int]) -> Int64Array:
    return np.array([ids.get(name, -1) for name in names], np.int64)


def _xywh(box: NDArray[np.floating]) -> list[float]:
    x1, y1, x2, y2 = (float(value) for value in box)
    return [x1, y1, x2 - x1, y2 - y1]
