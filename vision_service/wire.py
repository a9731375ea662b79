"""What the two ends of the wire share: words for the API's enums, and `ModelInfo` as protobuf and back."""

from __future__ import annotations

from typing import Literal, get_args

from vision_service.api.v1 import vision_pb2 as pb
from vision_service.imaging.source import ColorOrder
from vision_service.model_info import ModelInfo, ModelState
from vision_service.types import Task

MaskEncoding = Literal["coco_rle", "polygon", "png"]
ImageEncoding = Literal["png", "jpeg", "webp", "raw"]

DEFAULT_QUALITY = 90
"""JPEG and WebP quality when a request names none."""

LOSSY: tuple[ImageEncoding, ...] = ("jpeg", "webp")
"""The encodings that have a quality."""

TASKS: dict[pb.Task, Task] = {pb.Task.Value(f"TASK_{task.name}"): task for task in Task}
MODEL_STATES: dict[pb.ModelState, ModelState] = {
    pb.ModelState.Value(f"MODEL_STATE_{state.name}"): state for state in ModelState
}

# Zero is "not set": it means the same as the first word, so it comes first and its inverse is overwritten.
COLOR_ORDERS: dict[pb.ColorOrder, ColorOrder] = {
    pb.COLOR_ORDER_UNSPECIFIED: "rgb",
    **{pb.ColorOrder.Value(f"COLOR_ORDER_{word.upper()}"): word for word in get_args(ColorOrder)},
}
MASK_ENCODINGS: dict[pb.MaskEncoding, MaskEncoding] = {
    pb.MASK_ENCODING_UNSPECIFIED: "coco_rle",
    **{pb.MaskEncoding.Value(f"MASK_ENCODING_{word.upper()}"): word for word in get_args(MaskEncoding)},
}
IMAGE_ENCODINGS: dict[pb.ImageEncoding, ImageEncoding] = {
    pb.IMAGE_ENCODING_UNSPECIFIED: "png",
    **{pb.ImageEncoding.Value(f"IMAGE_ENCODING_{word.upper()}"): word for word in get_args(ImageEncoding)},
}

TASK_VALUES = {word: value for value, word in TASKS.items()}
MODEL_STATE_VALUES = {word: value for value, word in MODEL_STATES.items()}
COLOR_ORDER_VALUES = {word: value for value, word in COLOR_ORDERS.items()}
MASK_ENCODING_VALUES = {word: value for value, word in MASK_ENCODINGS.items()}
IMAGE_ENCODING_VALUES = {word: value for value, word in IMAGE_ENCODINGS.items()}

_SAME_FIELDS = (
    "name",
    "version",
    "state_reason",
    "is_default",
    "backend",
    "device",
    "runtime",
    "runtime_reason",
    "precision",
    "licence",
    "source",
    "preprocess_json",
    "max_batch_size",
    "max_queued_jobs",
    "queued_jobs",
    "max_delay_ms",
    "answer_within_ms",
    "max_wait_ms",
)


def model_to_proto(info: ModelInfo, *, with_class_names: bool = True) -> pb.Model:
    """A model as the API shows it.

    Args:
        info: what is known of it.
        with_class_names: listings leave the class table out.

    Returns:
        The message.
    """
    return pb.Model(
        task=TASK_VALUES[info.task],
        state=MODEL_STATE_VALUES[info.state],
        class_names=info.class_names if with_class_names else (),
        latency_curve=[pb.BatchLatency(batch_size=size, latency_ms=ms) for size, ms in info.latency_curve],
        latency_beside=[pb.BatchLatency(batch_size=size, latency_ms=ms) for size, ms in info.latency_beside],
        target_p99_ms=info.target_p99_ms,
        **{name: getattr(info, name) for name in _SAME_FIELDS},
    )


def model_from_proto(model: pb.Model) -> ModelInfo:
    """The inverse of `model_to_proto`.

    Raises:
        ValueError: a task or state that this version does not know.
    """
    if model.task not in TASKS or model.state not in MODEL_STATES:
        raise ValueError(f"model {model.name!r} has task {model.task} and state {model.state}; upgrade the client")
    return ModelInfo(
        task=TASKS[model.task],
        state=MODEL_STATES[model.state],
        class_names=tuple(model.class_names),
        latency_curve=tuple((point.batch_size, point.latency_ms) for point in model.latency_curve),
        latency_beside=tuple((point.batch_size, point.latency_ms) for point in model.latency_beside),
        target_p99_ms=model.target_p99_ms if model.HasField("target_p99_ms") else None,
        **{name: getattr(model, name) for name in _SAME_FIELDS},
    )
