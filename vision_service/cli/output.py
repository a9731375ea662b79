"""Results as JSON and as a line of text.

The JSON of a result, one object an image:

    task, model, version   what was done by whom
    height, width          of the image, pixels, after EXIF orientation
    timings_ms             decode, preprocess, queue, forward, postprocess, encode, and batch_size
    request_id             what the server's log calls it; left out in process
    classes                classify: [{class_id, class_name, score}], highest score first
    detections             detect: [{class_id, class_name, score, box, mask}], highest score first; box is
                           [x1, y1, x2, y2]; mask is left out by models that make none
    segments               segment: [{class_id, class_name, area, box, mask}], largest first
    image                  translate: {height, width} of the output image

A mask is COCO's {size: [height, width], counts: text}, which pycocotools reads.
Scores are rounded to 6 digits, boxes to 2 and times to 3.
"""

from __future__ import annotations

from typing import Any

from vision_service.errors import VisionError
from vision_service.imaging.masks import encode_rle
from vision_service.segments import segments_of
from vision_service.types import Classification, Detections, Prediction, Result, SegmentationMap, Task, TranslatedImage


def to_json(result: Result[Prediction]) -> dict[str, Any]:
    """A result as plain values; the keys stand above."""
    times = result.timings
    height, width = result.original_hw
    task, found = _prediction(result.prediction, result.original_hw)
    return {
        "task": str(task),
        "model": result.model_name,
        "version": result.model_version,
        "height": height,
        "width": width,
        **found,
        "timings_ms": {
            "decode": round(times.decode_ms, 3),
            "preprocess": round(times.preprocess_ms, 3),
            "queue": round(times.queue_ms, 3),
            "forward": round(times.forward_ms, 3),
            "postprocess": round(times.postprocess_ms, 3),
            "encode": round(times.encode_ms, 3),
            "batch_size": times.batch_size,
        },
        **({"request_id": result.request_id} if result.request_id else {}),
    }


def error_to_json(error: VisionError) -> dict[str, Any]:
    """An error as plain values: its class, its status and its message."""
    return {"error": type(error).__name__, "status": error.status, "message": str(error)}


def to_line(result: Result[Prediction]) -> str:
    """A result in a few words."""
    match result.prediction:
        case Classification() as found:
            rows = zip(found.class_names, found.scores.tolist(), strict=True)
            return ", ".join(f"{name} {score:.2f}" for name, score in rows) or "no class"
        case Detections() as found:
            rows = zip(found.class_names, found.scores.tolist(), strict=True)
            return ", ".join(f"{name} {score:.2f}" for name, score in rows) or "nothing found"
        case SegmentationMap() as found:
            pixels = found.class_map.size
            shares = [f"{segment.class_name} {segment.area / pixels:.1%}" for segment in segments_of(found)]
            return ", ".join(shares) or "nothing found"
        case TranslatedImage() as found:
            height, width = found.image.shape[:2]
            return f"image of {width}x{height} pixels"


def _prediction(prediction: Prediction, size_hw: tuple[int, int]) -> tuple[Task, dict[str, Any]]:
    match prediction:
        case Classification() as found:
            return Task.CLASSIFY, {"classes": _rows(found)}
        case Detections() as found:
            boxes = found.boxes_xyxy.tolist()
            rows = [
                {**row, "box": [round(edge, 2) for edge in box]} for row, box in zip(_rows(found), boxes, strict=True)
            ]
            for row, rle in zip(rows, found.mask_rles or (), strict=False):
                row["mask"] = _mask(rle, size_hw)
            return Task.DETECT, {"detections": rows}
        case SegmentationMap() as found:
            return Task.SEGMENT, {"segments": _segments(found)}
        case TranslatedImage() as found:
            height, width = found.image.shape[:2]
            return Task.TRANSLATE, {"image": {"height": height, "width": width}}


def _rows(found: Classification | Detections) -> list[dict[str, Any]]:
    rows = zip(found.class_ids.tolist(), found.class_names, found.scores.tolist(), strict=True)
    return [{"class_id": i, "class_name": name, "score": round(score, 6)} for i, name, score in rows]


def _segments(found: SegmentationMap) -> list[dict[str, Any]]:
    return [
        {
            "class_id": segment.class_id,
            "class_name": segment.class_name,
            "area": segment.area,
            "box": list(segment.box_xyxy),
            "mask": _mask(encode_rle(segment.mask), segment.mask.shape),
        }
        for segment in segments_of(found)
    ]


def _mask(rle: bytes, size_hw: tuple[int, ...]) -> dict[str, Any]:
    return {"size": list(size_hw), "counts": rle.decode("ascii")}
