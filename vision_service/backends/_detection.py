"""From dense boxes and scores to detections: threshold, class filter, suppression, and back to the original."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import batched_nms, nms

from vision_service.backends._outputs import check_finite
from vision_service.imaging.preprocess import boxes_to_original
from vision_service.types import Detections, ImageMeta, Params

MAX_CANDIDATES = 4096
"""Most boxes an image that enter suppression, whose cost grows with their square: a threshold of 0 must not be a way
to keep the service busy."""

TOGETHER = 4 * MAX_CANDIDATES
"""Most boxes that enter suppression together on a GPU: its memory grows with their square, to 34 MB here."""


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
    select = select_each if boxes_xyxy.device.type == "cpu" else select_together
    table, counts = select(boxes_xyxy, scores, params)
    splits = np.cumsum(counts)[:-1]
    return [_detections(rows, meta, class_names) for rows, meta in zip(np.split(table, splits), metas, strict=True)]


def select_each(boxes_xyxy: Tensor, scores: Tensor, params: Sequence[Params]) -> tuple[np.ndarray, list[int]]:
    """What is kept, image by image: quickest on a CPU.

    Args:
        boxes_xyxy: float32 ``[N, A, 4]`` on the CPU.
        scores: float32 ``[N, A, C]``, likewise.
        params: N.

    Returns:
        float32 ``[sum of K, 6]`` as x1, y1, x2, y2, score, class id, image by image and the highest score first, and
        how many rows each image has.
    """
    kept = [_select(*image) for image in zip(boxes_xyxy, scores, params, strict=True)]
    return torch.cat(kept).numpy(), [len(rows) for rows in kept]


def _select(boxes_xyxy: Tensor, scores: Tensor, params: Params) -> Tensor:
    """What is kept of one image: ``[K, 6]``."""
    # numpy's search takes a fifth of the time of torch's `nonzero` on the CPU.
    index = torch.from_numpy(np.flatnonzero(scores.numpy() >= np.float32(params.score_threshold)))
    box_index, class_ids = index.div(scores.shape[1], rounding_mode="floor"), index % scores.shape[1]
    if params.class_ids is not None:
        chosen = torch.isin(class_ids, torch.tensor(list(params.class_ids), dtype=torch.int64))
        box_index, class_ids = box_index[chosen], class_ids[chosen]
    chosen_scores = scores[box_index, class_ids]
    if len(chosen_scores) > MAX_CANDIDATES:
        chosen_scores, top = chosen_scores.topk(MAX_CANDIDATES)
        box_index, class_ids = box_index[top], class_ids[top]
    candidates = boxes_xyxy[box_index]  # [K, 4]
    keep = batched_nms(candidates, chosen_scores, class_ids, params.iou_threshold)[: params.max_detections]
    # Class ids stay exact in float32 up to 2^24.
    return torch.cat((candidates[keep], chosen_scores[keep, None], class_ids[keep, None].float()), dim=1)


def select_together(boxes_xyxy: Tensor, scores: Tensor, params: Sequence[Params]) -> tuple[np.ndarray, list[int]]:
    """What `select_each` keeps, by a number of kernels that does not grow with the batch: for a GPU.

    The host waits for the device three times: for the number of candidates, within suppression, and for the rows.
    """
    images, _, classes = scores.shape
    device = scores.device
    thresholds = torch.tensor([one.score_threshold for one in params], dtype=scores.dtype).to(device)
    wanted = scores >= thresholds[:, None, None]
    if any(one.class_ids is not None for one in params):
        allowed = torch.zeros(images, classes, dtype=torch.bool)
        for row, one in zip(allowed, params, strict=True):
            row[slice(None) if one.class_ids is None else list(one.class_ids)] = True
        wanted &= allowed.to(device)[:, None, :]
    image_index, box_index, class_ids = wanted.nonzero(as_tuple=True)
    if not len(image_index):
        return np.zeros((0, 6), np.float32), [0] * images
    if len(image_index) > TOGETHER and images > 1:
        half = images // 2
        first = select_together(boxes_xyxy[:half], scores[:half], params[:half])
        second = select_together(boxes_xyxy[half:], scores[half:], params[half:])
        return np.concatenate((first[0], second[0])), first[1] + second[1]
    values = scores[image_index, box_index, class_ids]
    if len(values) > MAX_CANDIDATES:  # of all images together; which of them has too many is not known yet
        order = values.argsort(descending=True)
        order = order[image_index[order].argsort(stable=True)]  # by image, the highest score first
        best = order[_rank_within(image_index[order]) < MAX_CANDIDATES]
        image_index, box_index, class_ids, values = (rows[best] for rows in (image_index, box_index, class_ids, values))
    boxes = boxes_xyxy[image_index, box_index]  # [K, 4]
    keep = _suppress(boxes, values, image_index, class_ids, params)
    keep = keep[image_index[keep].argsort(stable=True)]
    limits = torch.tensor([one.max_detections for one in params]).to(device)[image_index[keep]]
    keep = keep[_rank_within(image_index[keep]) < limits]
    columns = (values[keep, None], class_ids[keep, None].float(), image_index[keep, None].float())
    table = torch.cat((boxes[keep], *columns), dim=1).cpu().numpy()  # [K, 7]
    return table[:, :6], np.bincount(table[:, 6].astype(np.int64), minlength=images).tolist()


def _rank_within(groups: Tensor) -> Tensor:
    """Place of each element in its group; ``groups`` is sorted."""
    return torch.arange(len(groups), device=groups.device) - torch.searchsorted(groups, groups)


def _suppress(boxes: Tensor, values: Tensor, images: Tensor, class_ids: Tensor, params: Sequence[Params]) -> Tensor:
    """Which of K boxes are kept, the highest score first, with each image's own overlap."""
    # Images and classes side by side, in double precision: far from 0 there are few bits left.
    far = boxes.double()
    place = images * (class_ids.max() + 1) + class_ids
    apart = far + (place * (far.amax() - far.amin() + 1))[:, None]
    kept = []
    overlaps = {one.iou_threshold for one in params}
    for overlap in overlaps:
        mine = torch.tensor([one.iou_threshold == overlap for one in params]).to(boxes.device)[images]
        index = mine.nonzero()[:, 0] if len(overlaps) > 1 else torch.arange(len(boxes), device=boxes.device)
        kept.append(index[nms(apart[index], values[index].double(), overlap)])
    keep = torch.cat(kept)
    return keep[values[keep].argsort(descending=True, stable=True)]


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
