"""What YOLO heads mean: boxes, classes and masks as Ultralytics' ``predict`` reads them, without that library.

The steps are those of its ``utils/nms.py`` (``non_max_suppression`` with one class a box) and ``utils/ops.py``
(``process_mask``, ``scale_masks``), written anew. One difference, on purpose: a score *at* the threshold is kept, as
`Params` says, where theirs must be above.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torchvision.ops import nms

from vision_service.imaging.masks import encode_rle
from vision_service.imaging.preprocess import boxes_to_original, plane_to_original
from vision_service.types import Detections, ImageMeta, Params

MAX_CANDIDATES = 30_000
"""Most boxes an image that enter suppression."""

CLASS_OFFSET = 7680.0
"""Boxes are moved apart by class before suppression, in pixels. In float32 this rounds the boxes of high class ids by
up to 1/32 of a pixel, which decides some close calls: so it is part of what equality takes."""

_MASKS_AT_ONCE = 16


def grid(height: int, width: int, strides: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """The cells of a pyramid, finest stride first, each row by row.

    Args:
        height: of the network's input, pixels, a multiple of each stride.
        width: likewise.
        strides: pixels a cell of each level.
        device: where to make them.

    Returns:
        Centres, float32 ``[2, A]`` as x and y in cells of their level, and strides, float32 ``[1, A]``.
    """
    centres, sizes = [], []
    for stride in strides:
        rows = torch.arange(height // stride, device=device, dtype=torch.float32) + 0.5
        columns = torch.arange(width // stride, device=device, dtype=torch.float32) + 0.5
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        centres.append(torch.stack((x.flatten(), y.flatten())))
        sizes.append(torch.full((1, x.numel()), float(stride), device=device))
    return torch.cat(centres, dim=1), torch.cat(sizes, dim=1)


def corners(boxes_xywh: Tensor) -> Tensor:
    """Boxes as centre x, centre y, width, height turned into x1, y1, x2, y2: float ``[..., 4]``."""
    centre, half = boxes_xywh[..., :2], boxes_xywh[..., 2:] / 2
    return torch.cat((centre - half, centre + half), dim=-1)


def suppress(boxes_xyxy: Tensor, scores: Tensor, params: Params) -> tuple[Tensor, Tensor]:
    """The objects among an image's dense boxes: each box has its best class only, suppression is class by class.

    Args:
        boxes_xyxy: float32 ``[A, 4]``, pixels of the network's input.
        scores: float32 ``[A, C]``, probabilities.
        params: thresholds, class filter and limit.

    Returns:
        ``[K, 6]`` as x1, y1, x2, y2, score, class id, highest score first, and int64 ``[K]``: which boxes they are.
    """
    best, class_ids = scores.max(dim=1)
    index = (best >= params.score_threshold).nonzero()[:, 0]
    rows = torch.cat((boxes_xyxy[index], best[index, None], class_ids[index, None].to(best.dtype)), dim=1)
    rows, index = _of_classes(rows, index, params)
    if len(rows) > MAX_CANDIDATES:
        top = rows[:, 4].argsort(descending=True)[:MAX_CANDIDATES]
        rows, index = rows[top], index[top]
    keep = nms(rows[:, :4] + rows[:, 5:] * CLASS_OFFSET, rows[:, 4], params.iou_threshold)[: params.max_detections]
    return rows[keep], index[keep]


def listed(rows: Tensor, params: Params) -> tuple[Tensor, Tensor]:
    """The objects in an end-to-end head's list, which holds each one once: nothing is suppressed.

    Args:
        rows: float32 ``[A, 6]``, x1, y1, x2, y2, score, class id, highest score first.
        params: threshold, class filter and limit.

    Returns:
        As `suppress`.
    """
    index = (rows[:, 4] >= params.score_threshold).nonzero()[:, 0]
    rows, index = _of_classes(rows[index], index, params)
    return rows[: params.max_detections], index[: params.max_detections]


def _of_classes(rows: Tensor, index: Tensor, params: Params) -> tuple[Tensor, Tensor]:
    if params.class_ids is None:
        return rows, index
    wanted = torch.isin(rows[:, 5].long(), torch.tensor(sorted(params.class_ids), device=rows.device))
    return rows[wanted], index[wanted]


def masks_in_input(protos: Tensor, coefficients: Tensor, boxes_xyxy: Tensor, input_hw: tuple[int, int]) -> Tensor:
    """Masks from prototypes (YOLACT, Bolya et al. 2019, section 3.2): combined, enlarged, cut at 0, cropped to the box.

    Args:
        protos: float32 ``[M, h, w]``.
        coefficients: float32 ``[K, M]``.
        boxes_xyxy: float32 ``[K, 4]``, pixels of the network's input.
        input_hw: its height and width.

    Returns:
        bool ``[K, H, W]`` of the input's size.
    """
    height, width = input_hw
    x, y = (torch.arange(side, device=protos.device, dtype=torch.float32) for side in (width, height))
    parts = [torch.empty((0, height, width), dtype=torch.bool, device=protos.device)]
    # The enlarged float planes of 300 objects are half a gigabyte.
    for start in range(0, len(coefficients), _MASKS_AT_ONCE):
        some, boxes = (rows[start : start + _MASKS_AT_ONCE] for rows in (coefficients, boxes_xyxy))
        planes = (some @ protos.flatten(1)).view(1, -1, *protos.shape[1:])
        inside = functional.interpolate(planes, size=input_hw, mode="bilinear", align_corners=False)[0] > 0
        x1, y1, x2, y2 = boxes.T[:, :, None]  # [k, 1] each
        inside &= ((x >= x1) & (x < x2))[:, None, :] & ((y >= y1) & (y < y2))[:, :, None]
        parts.append(inside)
    return torch.cat(parts)


def detections(rows: Tensor, meta: ImageMeta, class_names: tuple[str, ...], masks: Tensor | None = None) -> Detections:
    """Objects in pixels of the original.

    Args:
        rows: float32 ``[K, 6]``, from `suppress` or `listed`.
        meta: how to go back.
        class_names: the model's.
        masks: bool ``[K, H, W]`` of the input's size, from `masks_in_input`; those that are empty take their box along.

    Returns:
        In the order of ``rows``, without boxes that have no area left once they are clipped to the original.
    """
    table = rows.cpu().numpy()
    boxes = boxes_to_original(table[:, :4], meta)
    seen = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    rles = None
    if masks is not None:
        seen &= masks.flatten(1).any(dim=1).cpu().numpy()
        rles = tuple(_rle(mask.cpu().numpy(), meta) for mask in masks[torch.from_numpy(seen).to(masks.device)])
    class_ids = table[seen, 5].astype(np.int64)
    names = tuple(class_names[i] for i in class_ids)
    return Detections(boxes[seen], class_ids, names, np.clip(table[seen, 4], 0.0, 1.0), rles)


def _rle(mask: np.ndarray, meta: ImageMeta) -> bytes:
    """A mask of the input's size as run lengths of the original's: bilinear, inside from one half."""
    return encode_rle(plane_to_original(mask.astype(np.float32), meta) > 0.5)
