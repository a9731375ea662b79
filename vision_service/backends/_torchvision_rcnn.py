"""Torchvision's two-stage detectors as dense networks: Faster R-CNN and Mask R-CNN.

The library's proposals are lists of unequal length. Here every image has as many rows as it may have proposals; rows
that are missing have no area, and their scores say `NO_CANDIDATE`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.roi_heads import RoIHeads, paste_masks_in_image
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import nms

from vision_service.backends._torchvision_dense import NO_CANDIDATE, AnchorGrid, clip_boxes
from vision_service.imaging.masks import encode_rle

_SMALLEST_BOX = 1e-2
"""Sides, in pixels of the input, below which the library drops a box of the second stage."""

_MASK_THRESHOLD = 0.5


class TwoStage(nn.Module):
    """Backbone, proposals and box head.

    Args:
        detector: as torchvision built it (Mask R-CNN is a Faster R-CNN); its transform and its postprocessing are not
            used.
    """

    def __init__(self, detector: FasterRCNN) -> None:
        super().__init__()
        self.detector = detector
        self.anchors = AnchorGrid(cast(AnchorGenerator, self.rpn.anchor_generator))
        self._settle_scales()

    @property
    def rpn(self) -> RegionProposalNetwork:
        """The first stage."""
        return cast(RegionProposalNetwork, self.detector.rpn)

    @property
    def heads(self) -> RoIHeads:
        """The second stage."""
        return cast(RoIHeads, self.detector.roi_heads)

    def _settle_scales(self) -> None:
        """Let the pooling layers infer the levels' scales from an input of whole strides.

        By themselves they infer them, once and for all, from the first image that they see, and are wrong if that one
        is smaller than a stride.
        """
        was_training = self.detector.training
        self.detector.eval()
        with torch.inference_mode():
            parameter = next(self.detector.parameters())
            features = self.detector.backbone(parameter.new_zeros(1, 3, 128, 128))
            for pool in (self.heads.box_roi_pool, self.heads.mask_roi_pool):
                if pool is not None:
                    pool(features, [parameter.new_tensor([[0.0, 0.0, 9.0, 9.0]])], [(128, 128)])
        self.detector.train(was_training)

    def forward(self, images: Tensor, sizes_hw: Tensor) -> tuple[Tensor, ...]:
        """Candidates of a batch.

        Args:
            images: normalised float ``[N, 3, h, w]``, zero where the pictures are padded.
            sizes_hw: int64 ``[N, 2]``, how far the pictures reach.

        Returns:
            Boxes float32 ``[N, R, C, 4]``, one a class, in pixels of the input, cut at the picture's edges; scores
            float32 ``[N, R, C]``, `NO_CANDIDATE` for class 0, the background, for missing rows and for boxes without
            area; and for Mask R-CNN the levels that its mask head reads, ``[N, 256, h', w']`` each.
        """
        features = self.detector.backbone(images)
        proposals, is_proposal = self._proposals(images, sizes_hw, list(features.values()))
        count, rows = proposals.shape[:2]
        pooled = pool_float32(self.heads.box_roi_pool, features, list(proposals))
        logits, deltas = self.heads.box_predictor(self.heads.box_head(pooled.to(images.dtype)))
        boxes = self.heads.box_coder.decode_single(deltas.float(), proposals.reshape(-1, 4))
        boxes = clip_boxes(boxes.reshape(count, rows, -1, 4), sizes_hw)
        scores = logits.float().softmax(dim=1).reshape(count, rows, -1)
        has_area = (boxes[..., 2:] - boxes[..., :2] >= _SMALLEST_BOX).all(dim=3)
        has_area = has_area & (torch.arange(scores.shape[2], device=scores.device) > 0)
        scores = scores.masked_fill(~(has_area & is_proposal[..., None]), NO_CANDIDATE)
        if not self.heads.has_mask():
            return boxes, scores
        names = cast(Any, self.heads.mask_roi_pool).featmap_names
        return boxes, scores, *(features[name] for name in names)

    def _proposals(self, images: Tensor, sizes_hw: Tensor, features: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Proposals float32 ``[N, R, 4]`` and which of them are any, bool ``[N, R]``."""
        objectness, deltas = self.rpn.head(features)
        boxes, scores, levels = [], [], []
        for level, anchors in enumerate(self.anchors((images.shape[2], images.shape[3]), features)):
            flat = objectness[level].float().permute(0, 2, 3, 1).flatten(1)  # [N, h * w * A]
            count, total = flat.shape
            best = flat.topk(min(self.rpn.pre_nms_top_n(), total), dim=1)
            index = best.indices[..., None].expand(-1, -1, 4)
            codes = deltas[level].float().permute(0, 2, 3, 1).reshape(count, total, 4).gather(1, index)
            chosen = anchors.expand(count, -1, -1).gather(1, index)
            decoded = self.rpn.box_coder.decode_single(codes.reshape(-1, 4), chosen.reshape(-1, 4))
            boxes.append(clip_boxes(decoded.reshape(count, -1, 4), sizes_hw))
            scores.append(best.values.sigmoid())
            levels.append(self._survivors(boxes[-1], scores[-1]))
        all_boxes, kept = torch.cat(boxes, 1), torch.cat(scores, 1).masked_fill(~torch.cat(levels, 1), NO_CANDIDATE)
        top = kept.topk(min(self.rpn.post_nms_top_n(), kept.shape[1]), dim=1)
        is_proposal = top.values > NO_CANDIDATE
        proposals = all_boxes.gather(1, top.indices[..., None].expand(-1, -1, 4))
        return proposals * is_proposal[..., None], is_proposal

    def _survivors(self, boxes: Tensor, scores: Tensor) -> Tensor:
        """What non-maximum suppression leaves of one level: bool ``[N, K]``."""
        valid: Tensor = (boxes[..., 2:] - boxes[..., :2] >= self.rpn.min_size).all(dim=2)
        valid = valid & (scores >= self.rpn.score_thresh)
        # What the library removes beforehand must suppress nothing: it comes last.
        scores = scores.masked_fill(~valid, NO_CANDIDATE)
        kept = [self._suppressed(image, row) for image, row in zip(boxes, scores, strict=True)]
        return torch.stack(kept) & valid

    def _suppressed(self, boxes: Tensor, scores: Tensor) -> Tensor:
        """What suppression leaves of one image: bool ``[K]``.

        An exported program takes it for granted that at least two boxes are left, so two are added that touch no other.
        """
        apart = boxes.new_tensor([[-2.0, -2.0, -1.0, -1.0], [-4.0, -4.0, -3.0, -3.0]])
        scores = torch.cat((scores, scores.new_full((2,), NO_CANDIDATE)))
        kept = nms(torch.cat((boxes, apart)), scores, self.rpn.nms_thresh)
        return torch.zeros_like(scores, dtype=torch.bool).index_fill(0, kept, True)[: len(boxes)]


def pool_float32(pool: Any, features: dict[str, Tensor], boxes: list[Tensor]) -> Tensor:
    """`MultiScaleRoIAlign` in float32: in half precision, a box of a large image is only known to half a pixel."""
    # Sizes are asked for only to infer the scales, which `TwoStage` has done.
    return cast(Tensor, pool(OrderedDict((k, v.float()) for k, v in features.items()), boxes, [(0, 0)] * len(boxes)))


def mask_probabilities(
    heads: RoIHeads, levels: Sequence[Tensor], boxes_xyxy: Sequence[Tensor], class_ids: Sequence[Tensor]
) -> list[Tensor]:
    """Masks of the boxes that are reported.

    Args:
        heads: of a Mask R-CNN.
        levels: what the mask head reads, ``[N, 256, h', w']`` each.
        boxes_xyxy: N of float32 ``[K, 4]``, pixels of the network's input.
        class_ids: N of int64 ``[K]``.

    Returns:
        N of float32 ``[K, 1, 28, 28]`` on the CPU, probabilities over the box.
    """
    counts = [len(boxes) for boxes in boxes_xyxy]
    ids = torch.cat(list(class_ids))
    if len(ids) == 0:
        return [torch.zeros(0, 1, 28, 28) for _ in counts]
    features = dict(zip(cast(Any, heads.mask_roi_pool).featmap_names, levels, strict=True))
    pooled = pool_float32(heads.mask_roi_pool, features, list(boxes_xyxy))
    head, predictor = cast(nn.Module, heads.mask_head), cast(nn.Module, heads.mask_predictor)
    logits = predictor(head(pooled.to(next(head.parameters()).dtype)))  # [sum of K, C, 28, 28]
    rows = torch.arange(len(ids), device=ids.device)
    return list(logits[rows, ids][:, None].float().sigmoid().cpu().split(counts))


def paste_masks(probabilities: Tensor, boxes_xyxy: Tensor, original_hw: tuple[int, int]) -> tuple[bytes, ...]:
    """Masks of the original's size, as COCO's compressed run lengths.

    One by one: a hundred float32 masks of a 12 megapixel photo are five gigabytes.

    Args:
        probabilities: float32 ``[K, 1, 28, 28]``.
        boxes_xyxy: float32 ``[K, 4]``, pixels of the original.
        original_hw: height and width of the original.
    """
    return tuple(
        encode_rle((paste_masks_in_image(mask[None], box[None], original_hw)[0, 0] >= _MASK_THRESHOLD).numpy())
        for mask, box in zip(probabilities, boxes_xyxy, strict=True)
    )
