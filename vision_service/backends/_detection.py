"""From dense boxes and scores to detections: threshold, class filter, suppression, and back to the original."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import batched_nms

from vision_service.backends._outputs import check_finite
from vision_service.imaging.preprocess import boxes_to_original
from vision_service.types import Detections, ImageMeta, Params

MAX_CANDIDATES = 4096
"""Most boxes an image that enter suppression, whose cost grows with their square: a threshold of 0 must not be a way
to keep the service busy."""


def dense_to_detections(
    boxes_xyxy: Tensor,
    scores: Tensor,
    metas: Sequence[ImageMeta],
    params: Sequence[Params],
    class_names: tuple[str, ...],
) -> list[Detections]:
    """Detections of a batch. Everything runs where the tensors are; one transfer brings what is left.

    Args:
        boxes_xyxy: float32 ``[N, A, 4]``, x1, y1, x2, y2 in pixels of the network's input.
        scores: float32 ``[N, A, C]``, probabilities; a box may have several classes.
        metas: N, how to go back.
        params: N; thresholds, class filter and limit may differ from image to image.
        class_names: C names.

    Returns:
        N detections in pixels of the originals, clipped to them, highest score first.

    Raises:
        InferenceFailed: a box or a score is NaN or infinite.
    """
    check_finite(boxes_xyxy, scores)
    kept = [
        _select(image_boxes, image_scores, image_params)
        for image_boxes, image_scores, image_params in zip(boxes_xyxy, scores, params, strict=True)
    ]
    table = torch.cat(kept).cpu().numpy()  # [sum of K, 6]
    splits = np.cumsum([len(rows) for rows in kept])[:-1]
    return [_detections(rows, meta, class_names) for rows, meta in zip(np.split(table, splits), metas, strict=True)]


def _select(boxes_xyxy: Tensor, scores: Tensor, params: Params) -> Tensor:
    """What is kept of one image: ``[K, 6]`` as x1, y1, x2, y2, score, class id, highest score first."""
    wanted = scores >= params.score_threshold  # [A, C]
    if params.class_ids is not None:
        allowed = torch.zeros(scores.shape[1], dtype=torch.bool)
        allowed[list(params.class_ids)] = True
        wanted &= allowed.to(scores.device)
    box_index, class_ids = wanted.nonzero(as_tuple=True)
    chosen_scores = scores[box_index, class_ids]
    if len(chosen_scores) > MAX_CANDIDATES:
        chosen_scores, top = chosen_scores.topk(MAX_CANDIDATES)
        box_index, class_ids = box_index[top], class_ids[top]
    chosen = boxes_xyxy[box_index]  # [K, 4]
    keep = batched_nms(chosen, chosen_scores, class_ids, params.iou_threshold)[: params.max_detections]
    # Class ids stay exact in float32 up to 2^24.
    return torch.cat((chosen[keep], chosen_scores[keep, None], class_ids[keep, None].to(chosen.dtype)), dim=1)


def _detections(rows: np.ndarray, meta: ImageMeta, class_names: tuple[str, ...]) -> Detections:
    boxes = boxes_to_original(rows[:, :4], meta)
    # A box that lay in the padding has no area left once it is clipped to the original.
    seen = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    boxes, rows = boxes[seen], rows[seen]
    class_ids = rows[:, 5].astype(np.int64)
    return Detections(
        boxes_xyxy=boxes,
        class_ids=class_ids,
        class_names=tuple(class_names[i] for i in class_ids),
        scores=np.ascontiguousarray(rows[:, 4]),
    )
