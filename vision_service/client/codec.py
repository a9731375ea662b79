"""Our types to protobuf and back, on the client's side."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from vision_service.api.v1 import vision_pb2 as pb
from vision_service.errors import InvalidImage, InvalidInput, choices
from vision_service.imaging.source import ColorOrder, ImageInput, RawPixels, describe
from vision_service.types import Params, Task
from vision_service.wire import (
    COLOR_ORDER_VALUES,
    IMAGE_ENCODING_VALUES,
    MASK_ENCODING_VALUES,
    TASK_VALUES,
    ImageEncoding,
    MaskEncoding,
)

E = TypeVar("E")

Classes = Sequence[str | int] | None


def classify_request(
    image: ImageInput,
    *,
    model: str = "",
    version: str = "",
    top_k: int | None = None,
    score_threshold: float | None = None,
    classes: Classes = None,
    color_order: ColorOrder = "rgb",
) -> pb.ClassifyRequest:
    """A call to Classify; see `VisionClient.classify`."""
    return pb.ClassifyRequest(
        model=pb.ModelSelector(name=model, version=version),
        image=image_message(image, color_order),
        classes=_class_filter(classes),
        **_chosen(top_k=top_k, score_threshold=score_threshold),
    )


def detect_request(
    image: ImageInput,
    *,
    model: str = "",
    version: str = "",
    score_threshold: float | None = None,
    iou_threshold: float | None = None,
    max_detections: int | None = None,
    classes: Classes = None,
    mask_encoding: MaskEncoding = "coco_rle",
    color_order: ColorOrder = "rgb",
) -> pb.DetectRequest:
    """A call to Detect; see `VisionClient.detect`."""
    return pb.DetectRequest(
        model=pb.ModelSelector(name=model, version=version),
        image=image_message(image, color_order),
        classes=_class_filter(classes),
        mask_encoding=_value("mask_encoding", mask_encoding, MASK_ENCODING_VALUES),
        **_chosen(score_threshold=score_threshold, iou_threshold=iou_threshold, max_detections=max_detections),
    )


def segment_request(
    image: ImageInput,
    *,
    model: str = "",
    version: str = "",
    score_threshold: float | None = None,
    classes: Classes = None,
    mask_encoding: MaskEncoding = "coco_rle",
    color_order: ColorOrder = "rgb",
) -> pb.SegmentRequest:
    """A call to Segment; see `VisionClient.segment`."""
    return pb.SegmentRequest(
        model=pb.ModelSelector(name=model, version=version),
        image=image_message(image, color_order),
        classes=_class_filter(classes),
        mask_encoding=_value("mask_encoding", mask_encoding, MASK_ENCODING_VALUES),
        **_chosen(score_threshold=score_threshold),
    )


def translate_request(
    image: ImageInput,
    *,
    model: str = "",
    version: str = "",
    image_encoding: ImageEncoding = "png",
    quality: int | None = None,
    color_order: ColorOrder = "rgb",
) -> pb.TranslateRequest:
    """A call to Translate; see `VisionClient.translate`."""
    if quality is not None and not 1 <= quality <= 100:
        raise InvalidInput("quality", f"must be 1 to 100, got {quality}")
    return pb.TranslateRequest(
        model=pb.ModelSelector(name=model, version=version),
        image=image_message(image, color_order),
        image_encoding=_value("image_encoding", image_encoding, IMAGE_ENCODING_VALUES),
        quality=quality,
    )


def list_models_request(task: Task | None = None) -> pb.ListModelsRequest:
    """A call to ListModels; ``None``: of all tasks."""
    return pb.ListModelsRequest(task=None if task is None else _value("task", task, TASK_VALUES))


def get_model_request(name: str, version: str = "") -> pb.GetModelRequest:
    """A call to GetModel."""
    return pb.GetModelRequest(name=name, version=version)


def image_message(image: ImageInput, color_order: ColorOrder = "rgb") -> pb.Image:
    """An image as it travels: files as they are, arrays as raw pixels.

    Args:
        image: a path, a file's bytes, raw pixels, or a uint8 array ``[H, W]``, ``[H, W, 3]`` or ``[H, W, 4]``.
        color_order: of an array with colours; files and `RawPixels` know their own.

    Returns:
        The message.

    Raises:
        InvalidImage: a file that cannot be read, or an array of another dtype or shape.
        InvalidInput: a ``color_order`` that is unknown, or that would have no effect.
    """
    order = _value("color_order", color_order, COLOR_ORDER_VALUES)
    if isinstance(image, np.ndarray):
        return pb.Image(raw=_array_message(image, order))
    if color_order != "rgb":
        raise InvalidInput("color_order", f"is for arrays; {describe(image)} has an order of its own")
    if isinstance(image, RawPixels):
        return pb.Image(raw=_raw_message(image))
    encoded = _file_bytes(image)
    if not encoded:
        raise InvalidImage(f"{describe(image)}: is empty")
    return pb.Image(encoded=encoded)


def _file_bytes(image: Any) -> bytes:
    if isinstance(image, bytes):
        return image
    if not isinstance(image, (str, Path)):
        raise InvalidImage(f"must be a path, the bytes of a file or a uint8 array, got {type(image).__name__}")
    try:
        return Path(image).read_bytes()
    except OSError as error:
        raise InvalidImage(f"cannot read {image}: {error.strerror or error}") from error


def _array_message(image: NDArray[Any], color_order: pb.ColorOrder) -> pb.RawImage:
    channels = image.shape[2] if image.ndim == 3 else 1
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or channels not in (1, 3, 4) or not image.size:
        raise InvalidImage(f"need uint8 [H, W], [H, W, 3] or [H, W, 4] with pixels, got {describe(image)}")
    height, width = image.shape[:2]
    return pb.RawImage(height=height, width=width, channels=channels, color_order=color_order, data=image.tobytes())


def _raw_message(raw: RawPixels) -> pb.RawImage:
    return pb.RawImage(
        height=raw.height,
        width=raw.width,
        channels=raw.channels,
        color_order=_value("color_order", raw.color_order, COLOR_ORDER_VALUES),
        data=raw.data,
    )


def _chosen(**values: float | None) -> dict[str, Any]:
    """What was chosen, checked by the rules of `Params`, so that a slip costs no trip to the server."""
    chosen: dict[str, Any] = {name: value for name, value in values.items() if value is not None}
    if chosen:
        Params(**chosen)
    return chosen


def _class_filter(classes: Classes) -> pb.ClassFilter | None:
    if isinstance(classes, str):
        raise InvalidInput("classes", f"must be a list of names and ids, got the text {classes!r}")
    if not classes:
        return None
    ids = [operator.index(item) for item in classes if not isinstance(item, str)]
    if any(class_id < 0 for class_id in ids):
        raise InvalidInput("classes", f"class ids start at 0, got {min(ids)}")
    return pb.ClassFilter(class_names=[item for item in classes if isinstance(item, str)], class_ids=ids)


def _value(field: str, word: str, values: Mapping[Any, E]) -> E:
    if word not in values:
        raise InvalidInput(field, f"unknown value {word!r}; {choices(str(word), [str(known) for known in values])}")
    return values[word]
