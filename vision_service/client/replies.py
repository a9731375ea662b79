"""Replies as our types: the reading half of the client's codec.

A reply to Segment carries masks, not the model's class table. The `SegmentationMap` that is made of it has a table
that reaches up to the highest id in the reply, with empty names for classes that are not in the image; pixels of no
segment are the background class, or `VOID` where the model has none. `get_model` has the whole table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from vision_service.api.v1 import vision_pb2 as pb
from vision_service.errors import VisionError
from vision_service.imaging.decode import DecodeLimits, decode_image
from vision_service.imaging.masks import decode_png, decode_rle, encode_rle, from_polygons
from vision_service.model_info import ModelInfo
from vision_service.types import (
    VOID,
    Classification,
    Detections,
    Prediction,
    Result,
    SegmentationMap,
    Timings,
    TranslatedImage,
)
from vision_service.wire import model_from_proto

T = TypeVar("T")
Q = TypeVar("Q", bound=Prediction)


def read_reply(read: Callable[[Any, str], T], response: Any, request_id: str) -> T:
    """Read a reply with one of the functions below.

    Raises:
        VisionError: it is not what the API promises.
    """
    try:
        return read(response, request_id)
    except (ValueError, VisionError) as error:
        what = type(response).__name__
        raise VisionError(f"the server's {what} (request {request_id!r}) cannot be read: {error}") from error


def read_classification(response: pb.ClassifyResponse, request_id: str = "") -> Result[Classification]:
    """The answer of Classify."""
    rows = response.classes
    classification = Classification(
        class_ids=np.array([row.class_id for row in rows], np.int64),
        class_names=tuple(row.class_name for row in rows),
        scores=np.array([row.score for row in rows], np.float32),
    )
    return _result(classification, response.info, request_id)


def read_detections(response: pb.DetectResponse, request_id: str = "") -> Result[Detections]:
    """The answer of Detect; masks become run lengths, whichever way they are written."""
    rows = response.detections
    with_masks = any(row.HasField("mask") for row in rows)
    size_hw = (response.info.image_height, response.info.image_width)
    boxes = [(row.box.x1, row.box.y1, row.box.x2, row.box.y2) for row in rows]
    detections = Detections(
        boxes_xyxy=np.array(boxes, np.float32).reshape(-1, 4),
        class_ids=np.array([row.class_id for row in rows], np.int64),
        class_names=tuple(row.class_name for row in rows),
        scores=np.array([row.score for row in rows], np.float32),
        mask_rles=tuple(_rle(row.mask, size_hw) for row in rows) if with_masks else None,
    )
    return _result(detections, response.info, request_id)


def read_segments(response: pb.SegmentResponse, request_id: str = "") -> Result[SegmentationMap]:
    """The answer of Segment, whichever way its masks are written."""
    size_hw = (response.info.image_height, response.info.image_width)
    background_id = response.background_id if response.HasField("background_id") else None
    ids = [segment.class_id for segment in response.segments]
    names = [""] * (1 + max(ids if background_id is None else [*ids, background_id], default=-1))
    if len(names) > VOID:
        raise ValueError(f"class ids must be below {VOID}, got {len(names) - 1}")
    class_map = np.full(size_hw, VOID if background_id is None else background_id, np.uint8)
    for segment in response.segments:
        names[segment.class_id] = segment.class_name
        class_map[_mask(segment.mask, size_hw)] = segment.class_id
    return _result(SegmentationMap(class_map, tuple(names), background_id), response.info, request_id)


def read_image(response: pb.TranslateResponse, request_id: str = "") -> Result[TranslatedImage]:
    """The answer of Translate, whichever way its image is written."""
    size_hw = (response.height, response.width)
    if response.image.WhichOneof("source") == "raw":
        image = np.frombuffer(response.image.raw.data, np.uint8).reshape(*size_hw, 3).copy()
    else:
        limits = DecodeLimits(max_bytes=len(response.image.encoded), max_pixels=response.height * response.width)
        image = decode_image(response.image.encoded, limits)
    if image.shape[:2] != size_hw:
        raise ValueError(f"the image is {image.shape[:2]}, the reply says {size_hw}")
    return _result(TranslatedImage(image), response.info, request_id)


def read_list_models(response: pb.ListModelsResponse, _request_id: str = "") -> list[ModelInfo]:
    """The answer of ListModels."""
    return [model_from_proto(model) for model in response.models]


def read_get_model(response: pb.GetModelResponse, _request_id: str = "") -> ModelInfo:
    """The answer of GetModel."""
    return model_from_proto(response.model)


def _result(prediction: Q, info: pb.ResponseInfo, request_id: str) -> Result[Q]:
    times = info.timings
    return Result(
        prediction=prediction,
        original_hw=(info.image_height, info.image_width),
        model_name=info.model_name,
        model_version=info.model_version,
        timings=Timings(
            decode_ms=times.decode_ms,
            preprocess_ms=times.preprocess_ms,
            queue_ms=times.queue_ms,
            forward_ms=times.forward_ms,
            postprocess_ms=times.postprocess_ms,
            batch_size=times.batch_size,
            encode_ms=times.encode_ms,
        ),
        request_id=request_id,
    )


def _rle(mask: pb.Mask, size_hw: tuple[int, int]) -> bytes:
    pixels = _mask(mask, size_hw)  # also checks run lengths, which stay as they are
    return mask.coco_rle.counts if mask.WhichOneof("encoding") == "coco_rle" else encode_rle(pixels)


def _mask(mask: pb.Mask, size_hw: tuple[int, int]) -> NDArray[np.bool_]:
    match mask.WhichOneof("encoding"):
        case "coco_rle":
            found = decode_rle(mask.coco_rle.counts, (mask.coco_rle.height, mask.coco_rle.width))
        case "polygons":
            outlines = [np.array(polygon.xy, np.float32).reshape(-1, 2) for polygon in mask.polygons.polygons]
            found = from_polygons(outlines, size_hw)
        case "png":
            found = decode_png(mask.png)
        case encoding:
            raise ValueError(f"a mask is written as {encoding}")
    if found.shape != size_hw:
        raise ValueError(f"a mask is {found.shape}, the image {size_hw}")
    return found
