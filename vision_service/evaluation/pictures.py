"""Images of a dataset with what is there and what was found, small enough for a page."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np

from vision_service.errors import VisionError
from vision_service.evaluation.report import Report
from vision_service.evaluation.samples import MaskFile, Page, Sample, read_image, read_mask
from vision_service.evaluation.scores import Record
from vision_service.imaging.decode import decode_image, from_array
from vision_service.imaging.draw import annotate
from vision_service.imaging.encode import encode_image
from vision_service.imaging.masks import decode_rle
from vision_service.types import VOID, Classification, SegmentationMap, Task, UInt8Array

_LONGEST_SIDE = 520
_QUALITY = 82

RIGHT, WRONG, MISSED, SKIPPED = 0, 1, 2, 3
COLOURS = ("#2e9e44", "#d62728", "#ff9f1c", "#9e9e9e")
LEGEND = ("right", "false alarm", "missed", "does not count")


def worst(report: Report, count: int) -> list[Record]:
    """The images with most errors (detect), lowest mIoU (segment), or the right class furthest down (classify)."""
    order: dict[Task, Callable[[Record], tuple[float, ...]]] = {
        Task.DETECT: lambda image: (-(image["wrong"] + image["missed"]), image["right"]),
        Task.SEGMENT: lambda image: (2.0 if image["miou"] is None else image["miou"],),
        Task.CLASSIFY: lambda image: (-image["rank"], image["score"]),
    }
    return sorted(report.images, key=order[Task(report.task)])[:count]


def draw_record(record: Record, report: Report, sample: Sample) -> list[tuple[str, str]]:
    """An image as it should be and as it was found.

    Args:
        record: of the report.
        report: the report.
        sample: where the image lies.

    Returns:
        Captions and addresses for ``<img src>``; none when the image cannot be read any more.
    """
    try:
        image = load(sample)
        draw: dict[Task, Callable[..., list[tuple[str, UInt8Array]]]] = {
            Task.DETECT: _boxes,
            Task.SEGMENT: _masks,
            Task.CLASSIFY: _classes,
        }
        pictures = draw[Task(report.task)](image, record, report, sample)
    except (OSError, ValueError, VisionError):  # moved, or changed, since
        return []
    return [(caption, address(picture)) for caption, picture in pictures]


def load(sample: Sample) -> UInt8Array:
    """The image of a sample, upright RGB.

    Raises:
        OSError, VisionError: it cannot be read.
    """
    image = read_image(sample.image)
    if isinstance(sample.image, Page):
        return from_array(np.asarray(image))
    return decode_image(sample.image.read_bytes())


def address(picture: UInt8Array) -> str:
    """A picture, made smaller, for ``<img src>``."""
    scale = _LONGEST_SIDE / max(picture.shape[:2])
    picture = _resized(picture, scale) if scale < 1 else picture
    data = base64.b64encode(encode_image(picture, "jpeg", _QUALITY)).decode("ascii")
    return f"data:image/jpeg;base64,{data}"


def _boxes(image: UInt8Array, record: Record, report: Report, _: Sample) -> list[tuple[str, UInt8Array]]:
    threshold = report.metrics["best_f1_score"] or 0.0
    found = [row for row in record["found"] if row[1] >= threshold]
    truth = [
        ([*row[1:5]], SKIPPED if row[5] else MISSED if _is_missed(row, record, threshold) else RIGHT, row[0])
        for row in record["truth"]
    ]
    guesses = [(row[2:6], SKIPPED if row[7] & 1 else RIGHT if row[6] & 1 else WRONG, row) for row in found]
    left = _draw(image, [(box, kind, report.class_name(class_id)) for box, kind, class_id in truth])
    right = _draw(image, [(box, kind, f"{report.class_name(row[0])} {row[1]:.2f}") for box, kind, row in guesses])
    return [("what is there", left), (f"what was found, scores from {threshold:.2f}", right)]


def _is_missed(row: list[Any], record: Record, threshold: float) -> bool:
    return bool(row[6] < 0 or record["found"][row[6]][1] < threshold)


def _draw(image: UInt8Array, boxes: Sequence[tuple[Sequence[float], int, str]]) -> UInt8Array:
    import supervision as sv

    scale = _LONGEST_SIDE / max(image.shape[:2])
    image = _resized(image, scale)  # before drawing, so that lines and letters are of one size on every picture
    if not boxes:
        return image
    palette = sv.ColorPalette.from_hex(list(COLOURS))
    detections = sv.Detections(
        xyxy=np.array([box for box, _, _ in boxes], np.float32) * scale,
        class_id=np.array([kind for _, kind, _ in boxes]),
    )
    scene: Any = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    scene = sv.BoxAnnotator(color=palette, thickness=2).annotate(scene, detections)
    writer = sv.LabelAnnotator(
        color=palette, text_color=sv.Color.BLACK, text_scale=0.36, text_padding=2, smart_position=True
    )
    scene = writer.annotate(scene, detections, [text for _, _, text in boxes])
    return np.asarray(cv2.cvtColor(scene, cv2.COLOR_BGR2RGB), np.uint8)


def _masks(image: UInt8Array, record: Record, report: Report, sample: Sample) -> list[tuple[str, UInt8Array]]:
    assert isinstance(sample.truth, MaskFile), "datasets for segmenters have masks"
    names = tuple(report.class_names)
    truth = read_mask(sample.truth, len(names))
    found = found_map(record)
    errors = np.full(truth.shape, VOID, np.uint8)
    errors[(truth != VOID) & (truth != found)] = 0
    background = next((i for i, name in enumerate(names) if name.lower() == "background"), None)
    return [
        ("what is there", annotate(image, SegmentationMap(truth, names, background))),
        ("what was found", annotate(image, SegmentationMap(found, (*names, "(other)"), background))),
        ("pixels that are wrong", annotate(image, SegmentationMap(errors, ("wrong",)))),
    ]


def found_map(record: Record) -> UInt8Array:
    """The class map that a record keeps as run lengths."""
    height, width = record["size_hw"]
    found = np.full((height, width), VOID, np.uint8)
    for class_id, counts in record["found"].items():
        found[decode_rle(counts.encode("ascii"), (height, width))] = int(class_id)
    return found


def _classes(image: UInt8Array, record: Record, report: Report, _: Sample) -> list[tuple[str, UInt8Array]]:
    rows = [(class_id, score) for class_id, score in record["top"] if score > 0]
    answer = Classification(
        np.array([class_id for class_id, _ in rows], np.int64),
        tuple(report.class_name(class_id) for class_id, _ in rows),
        np.array([score for _, score in rows], np.float32),
    )
    truth = f"{report.class_name(record['truth'])}, number {record['rank']} with {record['score']:.4f}"
    return [(truth, annotate(_resized(image, _LONGEST_SIDE / max(image.shape[:2])), answer))]


def _resized(image: UInt8Array, scale: float) -> UInt8Array:
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(image, size, interpolation=how), np.uint8)
