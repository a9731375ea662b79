"""What ONNX graphs return, as what the rest of the house takes: boxes and scores, probabilities, planes.

The heads of detectors are those that the usual exporters write: Ultralytics' YOLOv5 and YOLOv8, separate boxes and
scores, and graphs that suppress overlapping boxes themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vision_service.backends._classification import softmax
from vision_service.errors import InferenceFailed

Decoded = tuple[Tensor, Tensor]
"""Boxes ``[N, A, 4]`` as the graph writes them, scores ``[N, A, C]``."""


def boxes_scores(outputs: tuple[Tensor, ...], num_classes: int) -> Decoded:
    """Boxes ``[N, A, 4]`` and scores ``[N, A, C]``."""
    boxes, scores = outputs
    _check(boxes, "boxes", 4)
    _check(scores, "scores", num_classes)
    return boxes, scores


def yolov5(outputs: tuple[Tensor, ...], num_classes: int) -> Decoded:
    """``[N, A, 5 + C]``: box, objectness, classes; a score is the product of the last two."""
    (rows,) = outputs
    _check(rows, "output", 5 + num_classes)
    return rows[..., :4], rows[..., 4:5] * rows[..., 5:]


def yolov8(outputs: tuple[Tensor, ...], num_classes: int) -> Decoded:
    """``[N, 4 + C, A]``: box, classes."""
    (columns,) = outputs
    rows = columns.transpose(1, 2)
    _check(rows, "transposed output", 4 + num_classes)
    return rows[..., :4], rows[..., 4:]


def nms(outputs: tuple[Tensor, ...], num_classes: int) -> Decoded:
    """What is left after suppression: boxes ``[N, K, 4]``, scores and class ids ``[N, K]``, or all in ``[N, K, 6]``.

    A class id below 0 marks a row that means nothing. The score of every class but a row's own is -1, below any
    threshold.
    """
    if len(outputs) == 1:
        (rows,) = outputs
        _check(rows, "output", 6)
        boxes, scores, class_ids = rows[..., :4], rows[..., 4], rows[..., 5]
    else:
        boxes, scores, class_ids = outputs
        _check(boxes, "boxes", 4)
    class_ids = class_ids.long()
    if bool((class_ids >= num_classes).any()):
        raise InferenceFailed(f"the graph returned class id {int(class_ids.max())} of {num_classes} classes")
    check_probabilities(scores)
    classes = torch.arange(num_classes, device=class_ids.device)
    scores = scores.clamp(0.0, 1.0)[..., None]
    return boxes, torch.where(class_ids[..., None] == classes, scores, -torch.ones_like(scores))


HEADS: dict[str, tuple[Callable[[tuple[Tensor, ...], int], Decoded], tuple[int, ...], str]] = {
    "boxes_scores": (boxes_scores, (3, 3), "xyxy"),
    "yolov5": (yolov5, (3,), "cxcywh"),
    "yolov8": (yolov8, (3,), "cxcywh"),
    "nms": (nms, (3, 2, 2), "xyxy"),
    "nms_rows": (nms, (3,), "xyxy"),
}
"""By name: the decode, the axes of its outputs, and how it usually writes boxes."""


def to_xyxy(boxes: Tensor, box_format: str) -> Tensor:
    """Boxes ``[..., 4]`` of any of `BOX_FORMATS` as x1, y1, x2, y2."""
    a, b, c, d = boxes.unbind(dim=-1)
    match box_format:
        case "cxcywh":
            corners = (a - c / 2, b - d / 2, a + c / 2, b + d / 2)
        case "xywh":
            corners = (a, b, a + c, b + d)
        case "yxyx":
            corners = (b, a, d, c)
        case _:
            corners = (a, b, c, d)
    return torch.stack(corners, dim=-1)


BOX_FORMATS = ("xyxy", "yxyx", "xywh", "cxcywh")


def _check(rows: Tensor, what: str, columns: int) -> None:
    if rows.shape[-1] != columns:
        raise InferenceFailed(
            f"the graph's {what} has {rows.shape[-1]} columns, {list(rows.shape)}, where the head and the model's "
            f"classes need {columns}: check option 'head' and the classes"
        )


def activate(scores: Tensor, activation: str) -> Tensor:
    """Probabilities from a graph's output.

    Args:
        scores: float, ``[N, C]`` for ``softmax``, else of any shape.
        activation: ``softmax``, ``sigmoid``, or ``none`` when they are probabilities already.

    Raises:
        InferenceFailed: with activation ``none`` they are none.
    """
    if activation == "softmax":
        return softmax(scores)
    if activation == "sigmoid":
        return scores.sigmoid()
    check_probabilities(scores)
    return scores.clamp(0.0, 1.0)


def check_probabilities(scores: Tensor) -> None:
    """Refuse values outside 0..1.

    Raises:
        InferenceFailed: there are some; says what to look at.
    """
    # Half precision may end a little above 1.
    if scores.numel() and (float(scores.min()) < -1e-3 or float(scores.max()) > 1 + 1e-3):
        raise InferenceFailed(
            f"the graph returned values from {scores.min():g} to {scores.max():g} where probabilities are expected: "
            "check what the model's options say of its output"
        )


def channels_first(values: Tensor, channels: Sequence[int]) -> Tensor:
    """``[N, C, h, w]`` of the same or of ``[N, h, w, C]``.

    Raises:
        InferenceFailed: neither has so many channels.
    """
    if values.ndim == 4 and values.shape[1] in channels:
        return values
    if values.ndim == 4 and values.shape[3] in channels:
        return values.permute(0, 3, 1, 2).contiguous()
    raise InferenceFailed(
        f"the graph returned {list(values.shape)}; need a batch of planes with {' or '.join(map(str, channels))} "
        "channels"
    )
