"""Requests as our types: the reading half of the server's codec. Decodes no pixels, so it is quick.

Requests are checked here as far as that needs no model: what is wrong is an `InvalidInput` that names the field as
the API does. `replies` is the other half.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from vision_service.api.v1 import vision_pb2 as pb
from vision_service.errors import InvalidImage, InvalidInput
from vision_service.imaging.source import RawPixels
from vision_service.model_info import ModelSelector
from vision_service.types import ParamOverrides, Params, Task
from vision_service.wire import (
    COLOR_ORDERS,
    DEFAULT_QUALITY,
    IMAGE_ENCODINGS,
    LOSSY,
    MASK_ENCODINGS,
    TASKS,
    ImageEncoding,
    MaskEncoding,
)

PredictRequest = pb.ClassifyRequest | pb.DetectRequest | pb.SegmentRequest | pb.TranslateRequest

W = TypeVar("W")

MAX_NAME = 100
"""Longest name of a model or version, characters (as in `config.specs`)."""

MAX_CLASSES = 5_000
"""Most entries of a class filter, which are read on the event loop."""

_THRESHOLDS = {
    kind: tuple(
        name
        for name in ("top_k", "score_threshold", "iou_threshold", "max_detections")
        if name in kind.DESCRIPTOR.fields_by_name
    )
    for kind in (pb.ClassifyRequest, pb.DetectRequest, pb.SegmentRequest)
}
"""Which of them a request can have."""

_NOTHING = ParamOverrides()


@dataclass(frozen=True, slots=True)
class ReplyForm:
    """What a reply is to be like.

    Attributes:
        task: which method was called.
        mask_encoding: how masks are written.
        image_encoding: how an output image is written.
        quality: of lossy output images, 1..100.
    """

    task: Task
    mask_encoding: MaskEncoding = "coco_rle"
    image_encoding: ImageEncoding = "png"
    quality: int = DEFAULT_QUALITY


@dataclass(frozen=True, slots=True)
class Call:
    """One request, checked as far as that needs no model.

    Attributes:
        form: of the reply, which is needed when the image is not any more.
        model: which model is meant.
        image: a file's bytes, or pixels.
        overrides: what the caller chose; within its range.
    """

    form: ReplyForm
    model: ModelSelector
    image: bytes | RawPixels
    overrides: ParamOverrides


_CLASSIFICATION = ReplyForm(Task.CLASSIFY)


def read_classify(request: pb.ClassifyRequest) -> Call:
    """A call to Classify.

    Raises:
        InvalidInput: a field is wrong; names it.
    """
    return _read(_CLASSIFICATION, request, _overrides(request))


def read_detect(request: pb.DetectRequest) -> Call:
    """A call to Detect.

    Raises:
        InvalidInput: a field is wrong; names it.
    """
    return _read(_with_masks(Task.DETECT, request), request, _overrides(request))


def read_segment(request: pb.SegmentRequest) -> Call:
    """A call to Segment.

    Raises:
        InvalidInput: a field is wrong; names it.
    """
    return _read(_with_masks(Task.SEGMENT, request), request, _overrides(request))


def read_translate(request: pb.TranslateRequest) -> Call:
    """A call to Translate.

    Raises:
        InvalidInput: a field is wrong; names it.
    """
    encoding = _word("image_encoding", request.image_encoding, IMAGE_ENCODINGS)
    form = ReplyForm(Task.TRANSLATE, image_encoding=encoding, quality=_quality(request, encoding))
    return _read(form, request, _NOTHING)


def read_list_models(request: pb.ListModelsRequest) -> Task | None:
    """The task that is asked for, or ``None`` for all.

    Raises:
        InvalidInput: an unknown task.
    """
    return None if request.task == pb.TASK_UNSPECIFIED else _word("task", request.task, TASKS)


def read_get_model(request: pb.GetModelRequest) -> ModelSelector:
    """The model that is asked for.

    Raises:
        InvalidInput: no name.
    """
    if not request.name:
        raise InvalidInput("name", "is empty; ListModels has the names")
    return ModelSelector(_name("name", request.name), _name("version", request.version))


def _with_masks(task: Task, request: pb.DetectRequest | pb.SegmentRequest) -> ReplyForm:
    return ReplyForm(task, mask_encoding=_word("mask_encoding", request.mask_encoding, MASK_ENCODINGS))


def _read(form: ReplyForm, request: PredictRequest, overrides: ParamOverrides) -> Call:
    model = request.model
    selector = ModelSelector(_name("model.name", model.name), _name("model.version", model.version))
    return Call(form, selector, _image(request.image), overrides)


def _name(field: str, text: str) -> str:
    """A name, if it is not longer than any name can be."""
    if len(text) > MAX_NAME:
        raise InvalidInput(field, f"has {len(text)} characters; names have at most {MAX_NAME}")
    return text


def _image(image: pb.Image) -> bytes | RawPixels:
    source = image.WhichOneof("source")
    if source is None:
        raise InvalidImage("is not set; send `encoded` (a file's bytes) or `raw` (pixels)")
    if source == "raw":
        return _raw(image.raw)
    encoded = image.encoded
    if not encoded:
        raise InvalidImage("is empty; send the bytes of an image file", "image.encoded")
    return encoded


def _raw(raw: pb.RawImage) -> RawPixels:
    for side in ("height", "width"):
        if getattr(raw, side) < 1:
            raise InvalidImage("must be 1 or more, got 0", f"image.raw.{side}")
    if raw.channels not in (1, 3, 4):
        raise InvalidImage(f"must be 1, 3 or 4, got {raw.channels}", "image.raw.channels")
    order = _word("image.raw.color_order", raw.color_order, COLOR_ORDERS)
    data = raw.data
    expected = raw.height * raw.width * raw.channels
    if len(data) != expected:
        size = f"{raw.height} x {raw.width} x {raw.channels}"
        raise InvalidImage(f"must be {size} = {expected} bytes, got {len(data)}", "image.raw.data")
    return RawPixels(data, raw.height, raw.width, raw.channels, order)


def _overrides(request: pb.ClassifyRequest | pb.DetectRequest | pb.SegmentRequest) -> ParamOverrides:
    """What is set, checked by the rules of `Params`; which classes there are only the model knows."""
    chosen: dict[str, Any] = {
        name: getattr(request, name) for name in _THRESHOLDS[type(request)] if request.HasField(name)
    }
    if chosen:
        Params(**chosen)
    if not request.HasField("classes"):
        return ParamOverrides(**chosen) if chosen else _NOTHING
    count = len(request.classes.class_names) + len(request.classes.class_ids)
    if count > MAX_CLASSES:
        raise InvalidInput("classes", f"lists {count} classes; at most {MAX_CLASSES} are accepted: name each one once")
    classes = (*request.classes.class_names, *request.classes.class_ids)
    return ParamOverrides(**chosen, classes=classes or None)


def _quality(request: pb.TranslateRequest, encoding: ImageEncoding) -> int:
    if not request.HasField("quality"):
        return DEFAULT_QUALITY
    if encoding not in LOSSY:
        raise InvalidInput("quality", f"has no effect on {encoding.upper()}; leave it unset or ask for JPEG or WEBP")
    if not 1 <= request.quality <= 100:
        raise InvalidInput("quality", f"must be 1 to 100, got {request.quality}")
    return request.quality


def _word(field: str, value: int, words: Mapping[Any, W]) -> W:
    """The word for an enum's number: proto3 lets any number through."""
    if value not in words:
        known = ", ".join(f"{number} ({word})" for number, word in words.items() if number)
        problem = f"unknown value {value}; known are {known}"
        raise InvalidImage(problem, field) if field.startswith("image.") else InvalidInput(field, problem)
    return words[value]
