"""Results as plain values that JSON holds, and back: what result files have, whoever writes them.

One object an image and a model:

    task, model, version   what was done by whom
    height, width          of the image, pixels, after EXIF orientation
    classes                classify: [{class_id, class_name, score}], highest score first
    detections             detect: [{class_id, class_name, score, box, mask}], highest score first; box is
                           [x1, y1, x2, y2]; mask is left out by models that make none
    segments               segment: [{class_id, class_name, area, box, mask}], largest first
    image                  translate: {height, width} of the output image
    timings_ms             decode, preprocess, queue, forward, postprocess, encode, and batch_size; left out on demand
    request_id             what the server's log calls it; left out in process

A mask is COCO's {size: [height, width], counts: text}, which pycocotools reads.
Scores are rounded to 6 digits, boxes to 2 and times to 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from vision_service.errors import VisionError
from vision_service.imaging.masks import decode_rle, encode_rle
from vision_service.segments import segments_of
from vision_service.types import (
    VOID,
    Classification,
    Detections,
    Prediction,
    Result,
    SegmentationMap,
    Task,
    TranslatedImage,
)

Record = dict[str, Any]


def to_record(result: Result[Prediction], *, timings: bool = True) -> Record:
    """A result as plain values; the keys stand above.

    Args:
        result: of an image.
        timings: with what depends on the run: times and the request id. Without them equal answers are equal records.
    """
    height, width = result.original_hw
    task, found = _prediction(result.prediction, result.original_hw)
    return {
        "task": str(task),
        "model": result.model_name,
        "version": result.model_version,
        "height": height,
        "width": width,
        **found,
        **(_of_this_run(result) if timings else {}),
    }


def error_to_record(error: VisionError) -> Record:
    """An error as plain values: its class, its status and its message."""
    return {"error": type(error).__name__, "status": error.status, "message": str(error)}


def to_prediction(record: Mapping[str, Any], class_names: tuple[str, ...] | None = None) -> Prediction:
    """What a record says, as the prediction it came from, to the digits that it has.

    Args:
        record: from `to_record`.
        class_names: of the model, for a class map; ``None`` names the classes that the record has.

    Raises:
        ValueError: of a `TranslatedImage` a record has the size alone; or this is no record.
    """
    match record.get("task"):
        case Task.CLASSIFY:
            rows = record["classes"]
            return Classification(_ids(rows), _names(rows), _scores(rows))
        case Task.DETECT:
            rows = record["detections"]
            boxes = np.array([row["box"] for row in rows], np.float32).reshape(len(rows), 4)
            rles = tuple(row["mask"]["counts"].encode("ascii") for row in rows if "mask" in row)
            return Detections(boxes, _ids(rows), _names(rows), _scores(rows), rles or None)
        case Task.SEGMENT:
            return _class_map(record, class_names)
        case other:
            raise ValueError(f"no prediction can be made of a record of task {other!r}")


def _of_this_run(result: Result[Prediction]) -> Record:
    times = result.timings
    return {
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


def _prediction(prediction: Prediction, size_hw: tuple[int, int]) -> tuple[Task, Record]:
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


def _rows(found: Classification | Detections) -> list[Record]:
    rows = zip(found.class_ids.tolist(), found.class_names, found.scores.tolist(), strict=True)
    return [{"class_id": i, "class_name": name, "score": round(score, 6)} for i, name, score in rows]


def _segments(found: SegmentationMap) -> list[Record]:
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


def _mask(rle: bytes, size_hw: tuple[int, ...]) -> Record:
    return {"size": list(size_hw), "counts": rle.decode("ascii")}


def _ids(rows: list[Record]) -> Any:
    return np.array([row["class_id"] for row in rows], np.int64)


def _names(rows: list[Record]) -> tuple[str, ...]:
    return tuple(row["class_name"] for row in rows)


def _scores(rows: list[Record]) -> Any:
    return np.array([row["score"] for row in rows], np.float32)


def _class_map(record: Mapping[str, Any], class_names: tuple[str, ...] | None) -> SegmentationMap:
    """Background, where the model has one, is no segment: those pixels are `VOID` here."""
    class_map = np.full((record["height"], record["width"]), VOID, np.uint8)
    names = dict(enumerate(class_names or ()))
    for segment in record["segments"]:
        mask = decode_rle(segment["mask"]["counts"].encode("ascii"), tuple(segment["mask"]["size"]))
        class_map[mask.astype(bool)] = segment["class_id"]
        names.setdefault(segment["class_id"], segment["class_name"])
    table = tuple(names.get(i, str(i)) for i in range(max(names, default=-1) + 1))
    return SegmentationMap(class_map, table)
