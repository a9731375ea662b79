"""Torchvision's one-stage detectors as dense networks: RetinaNet, FCOS, SSD and SSDLite.

What the library does image by image with lists of unequal length is done here for the whole batch in tensors of one
size, so that any runtime can take it. Which boxes may be reported is told by their scores: -1 is "not a candidate".
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.ssd import SSD

NO_CANDIDATE = -1.0
"""Score of what is never reported, whatever the threshold."""


class AnchorGrid(nn.Module):
    """The anchors of `AnchorGenerator`, without its state: its cells move with the network.

    Args:
        generator: whose cells to take.
    """

    def __init__(self, generator: AnchorGenerator) -> None:
        super().__init__()
        self.levels = len(generator.cell_anchors)
        for index, cell in enumerate(generator.cell_anchors):
            # Whole numbers of at most 2048, so that half precision holds them as well.
            self.register_buffer(f"cell{index}", cell, persistent=False)

    def forward(self, padded_hw: tuple[int, int], features: list[Tensor]) -> list[Tensor]:
        """Anchors of each level.

        Args:
            padded_hw: size of the network's input.
            features: ``[N, C, h, w]`` a level.

        Returns:
            float32 ``[h * w * A, 4]`` a level, x1, y1, x2, y2 in pixels of the input; rows first, then columns.
        """
        anchors = []
        for index, feature in enumerate(features):
            cell = self.get_buffer(f"cell{index}").float()  # [A, 4]
            height, width = feature.shape[-2:]
            y = torch.arange(height, device=cell.device) * (padded_hw[0] // height)
            x = torch.arange(width, device=cell.device) * (padded_hw[1] // width)
            y, x = (axis.reshape(-1) for axis in torch.meshgrid(y, x, indexing="ij"))
            shifts = torch.stack((x, y, x, y), dim=1)  # [h * w, 4]
            anchors.append((shifts[:, None] + cell).reshape(-1, 4))
        return anchors


def clip_boxes(boxes_xyxy: Tensor, sizes_hw: Tensor) -> Tensor:
    """Boxes cut at the edges of the pictures, which differ within a batch.

    Args:
        boxes_xyxy: float ``[N, ..., 4]``.
        sizes_hw: ``[N, 2]``, height and width.
    """
    limits = sizes_hw.flip(1).repeat(1, 2).to(boxes_xyxy.dtype)  # [N, 4] as w, h, w, h
    limits = limits.reshape(sizes_hw.shape[0], *[1] * (boxes_xyxy.ndim - 2), 4)
    return torch.minimum(boxes_xyxy.clamp(min=0), limits)


def keep_best(scores: Tensor, count: int) -> Tensor:
    """Scores with all but the highest of each row replaced by `NO_CANDIDATE`.

    Args:
        scores: ``[N, K]``.
        count: how many to keep a row.
    """
    if scores.shape[1] <= count:
        return scores
    values, indices = scores.topk(count, dim=1, sorted=False)
    return torch.full_like(scores, NO_CANDIDATE).scatter(1, indices, values)


class DenseLevels(nn.Module):
    """RetinaNet or FCOS: of each level the boxes with the likeliest pairs of box and class.

    The library keeps the ``topk_candidates`` best pairs a level that reach its threshold. They all lie in as many best
    boxes, so these leave the network, with the scores of all classes, and no threshold is needed here.

    Args:
        detector: as torchvision built it; its transform and its postprocessing are not used.
        drop_background: class 0 is "__background__" and never reported.
    """

    def __init__(self, detector: RetinaNet | FCOS, *, drop_background: bool) -> None:
        super().__init__()
        self.detector = detector
        self.anchors = AnchorGrid(cast(AnchorGenerator, detector.anchor_generator))
        self.candidates = int(detector.topk_candidates)
        self.drop_background = drop_background

    def forward(self, images: Tensor, sizes_hw: Tensor) -> tuple[Tensor, Tensor]:
        """Candidates of a batch.

        Args:
            images: normalised float ``[N, 3, h, w]``, zero where the pictures are padded.
            sizes_hw: int64 ``[N, 2]``, how far the pictures reach.

        Returns:
            Boxes float32 ``[N, K, 4]`` in pixels of the input, cut at the picture's edges, in the order of the anchors,
            and scores float32 ``[N, K, C]``, `NO_CANDIDATE` where a pair is not among its level's best.
        """
        features = list(self.detector.backbone(images).values())
        head: dict[str, Tensor] = self.detector.head(features)
        scores = head["cls_logits"].float().sigmoid()  # [N, A, C]
        if "bbox_ctrness" in head:
            scores = (scores * head["bbox_ctrness"].float().sigmoid()).sqrt()
        deltas = head["bbox_regression"].float()
        start, boxes, kept = 0, [], []
        for anchors in self.anchors((images.shape[2], images.shape[3]), features):
            level = slice(start, start + len(anchors))
            level_boxes, level_scores = self._level(anchors, deltas[:, level], scores[:, level])
            boxes.append(level_boxes)
            kept.append(level_scores)
            start += len(anchors)
        return clip_boxes(torch.cat(boxes, 1), sizes_hw), torch.cat(kept, 1)

    def _level(self, anchors: Tensor, deltas: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes ``[N, k, 4]`` and scores ``[N, k, C]`` of one level."""
        images, count, classes = scores.shape
        anchors = anchors.expand(images, -1, -1)
        if count > self.candidates:
            best = scores.amax(dim=2).topk(self.candidates, dim=1, sorted=False).indices
            best = best.sort(dim=1).values[..., None]  # in the order of the anchors, whatever their scores
            anchors, deltas = (rows.gather(1, best.expand(-1, -1, 4)) for rows in (anchors, deltas))
            scores = scores.gather(1, best.expand(-1, -1, classes))
        coder = self.detector.box_coder
        decode = coder.decode if isinstance(self.detector, FCOS) else coder.decode_single
        boxes = decode(deltas.reshape(-1, 4), anchors.reshape(-1, 4)).reshape(images, -1, 4)
        scores = keep_best(scores.flatten(1), self.candidates).view_as(scores)
        if self.drop_background:
            scores = torch.cat((torch.full_like(scores[..., :1], NO_CANDIDATE), scores[..., 1:]), dim=2)
        return boxes, scores


class DenseSSD(nn.Module):
    """SSD or SSDLite: every default box, with the best ``topk_candidates`` of each class.

    Args:
        detector: as torchvision built it; its transform and its postprocessing are not used.
    """

    def __init__(self, detector: SSD) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor, sizes_hw: Tensor) -> tuple[Tensor, Tensor]:
        """Candidates of a batch.

        Args:
            images: normalised float ``[N, 3, h, w]``.
            sizes_hw: int64 ``[N, 2]``, how far the pictures reach.

        Returns:
            Boxes float32 ``[N, A, 4]`` in pixels of the input, cut at the picture's edges, and scores float32
            ``[N, A, C]``, `NO_CANDIDATE` for class 0, the background, and where a box is not among its class's best.
        """
        features = list(self.detector.backbone(images).values())
        head: dict[str, Tensor] = self.detector.head(features)
        deltas = head["bbox_regression"].float()  # [N, A, 4]
        # Only shapes, device and precision of these two are looked at. Half precision would move boxes by half a pixel.
        sizes = ImageList(images, [(images.shape[2], images.shape[3])])
        (anchors,) = self.detector.anchor_generator(
            sizes, [f.new_empty(f.shape, dtype=torch.float32) for f in features]
        )
        anchors = anchors.expand(images.shape[0], -1, -1).reshape(-1, 4)
        boxes = self.detector.box_coder.decode_single(deltas.reshape(-1, 4), anchors).view_as(deltas)
        scores = head["cls_logits"].float().softmax(dim=2)
        columns = scores.transpose(1, 2)[:, 1:]  # [N, C - 1, A]
        best = keep_best(columns.flatten(0, 1), int(self.detector.topk_candidates)).view(columns.shape)
        background = torch.full_like(scores[..., :1], NO_CANDIDATE)
        return clip_boxes(boxes, sizes_hw), torch.cat((background, best.transpose(1, 2)), dim=2)
