"""Backend ``torchvision_detector``: torchvision's detectors, without their own resizing and normalisation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models import detection
from torchvision.models.detection.ssd import SSD
from torchvision.ops import batched_nms

from vision_service.backends._options import read_options
from vision_service.backends._outputs import check_finite
from vision_service.backends._torchvision_dense import DenseLevels, DenseSSD
from vision_service.backends._torchvision_load import load_library_weights
from vision_service.backends._torchvision_rcnn import TwoStage, mask_probabilities, paste_masks
from vision_service.backends.base import Backend
from vision_service.config import ModelSpec
from vision_service.errors import ConfigError, choices
from vision_service.imaging.preprocess import boxes_to_original
from vision_service.types import Detections, ImageMeta, Params, Prediction, Task

BACKGROUND = "__background__"

MAX_CANDIDATES = 10_000
"""Most boxes an image that enter suppression. Torchvision has no limit; its own thresholds stay below this one."""


def architectures() -> list[str]:
    """Names of torchvision's detectors that find boxes (and masks); those of keypoints are not among them."""
    return [name for name in models.list_models(module=detection) if not name.startswith("keypoint")]


class TorchvisionDetector(Backend):
    """Builds a detector by its name in torchvision for the spec's classes.

    Options: ``arch`` (``fasterrcnn_resnet50_fpn``), any name of `architectures`; ``zero_eps`` (false): batch norms
    divide by the deviation alone, as torchvision does with the first COCO weights of its ResNet-50 networks.

    The class table is torchvision's: class 0 is ``__background__``, which is never reported. RetinaNet and FCOS, which
    have no need of it, also take tables without it.
    """

    task: ClassVar[Task] = Task.DETECT
    mixes_sizes: ClassVar[bool] = True

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec)
        options = read_options(spec, {"arch": "fasterrcnn_resnet50_fpn", "zero_eps": False})
        self._arch: str = options["arch"]
        self._zero_eps: bool = options["zero_eps"]
        self._network: TwoStage | DenseLevels | DenseSSD | None = None
        known = architectures()
        if self._arch not in known:
            raise ConfigError(
                f"model {spec.name!r}: torchvision has no detector {self._arch!r}; {choices(self._arch, known)}"
            )
        needs_background = not self._arch.startswith(("retinanet", "fcos"))
        if needs_background and spec.classes[0] != BACKGROUND:
            raise ConfigError(
                f"model {spec.name!r}: class 0 of {self._arch} means that nothing is there; "
                f"begin the classes with {BACKGROUND!r}, got {spec.classes[0]!r}"
            )

    def build_network(self) -> nn.Module:
        """`TwoStage`, `DenseLevels` or `DenseSSD`: boxes and scores, and features for a mask head."""
        detector: Any = models.get_model(
            self._arch, weights=None, weights_backbone=None, num_classes=len(self.spec.classes)
        )
        if self._zero_eps:
            for module in detector.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eps = 0.0
        if isinstance(detector, detection.FasterRCNN):
            self._network = TwoStage(detector)
        elif isinstance(detector, SSD):
            self._network = DenseSSD(detector)
        else:
            self._network = DenseLevels(detector, drop_background=self.spec.classes[0] == BACKGROUND)
        return self._network

    def load_weights(self, network: nn.Module) -> None:
        """Fill a network from a checkpoint of torchvision's detector.

        Raises:
            WeightsError: the file is missing, altered, or of another architecture.
        """
        load_library_weights(network.get_submodule("detector"), self.spec)

    def postprocess(
        self, outputs: tuple[Tensor, ...], metas: Sequence[ImageMeta], params: Sequence[Params]
    ) -> list[Prediction]:
        """Detections, suppressed class by class; masks from a Mask R-CNN, cut at a probability of 0.5."""
        check_finite(*outputs)
        boxes, scores = outputs[0].float(), outputs[1].float()
        tables = [_select(*row) for row in zip(boxes, scores, params, strict=True)]
        found = [self._detections(table.cpu().numpy(), meta) for table, meta in zip(tables, metas, strict=True)]
        if len(outputs) == 2:
            return [detections for detections, _ in found]
        return self._with_masks(outputs[2:], tables, found, metas)

    def _detections(self, rows: np.ndarray, meta: ImageMeta) -> tuple[Detections, np.ndarray]:
        """Detections in the original, and which rows they are: a box has no area left if it lay in the padding."""
        boxes = boxes_to_original(rows[:, :4], meta)
        kept = np.flatnonzero((boxes[:, 2:] > boxes[:, :2]).all(axis=1))
        class_ids = rows[kept, 5].astype(np.int64)
        names = tuple(self.spec.classes[i] for i in class_ids)
        return Detections(boxes[kept], class_ids, names, np.ascontiguousarray(rows[kept, 4])), kept

    def _with_masks(
        self,
        levels: Sequence[Tensor],
        tables: Sequence[Tensor],
        found: Sequence[tuple[Detections, np.ndarray]],
        metas: Sequence[ImageMeta],
    ) -> list[Prediction]:
        """The detections with their masks; the mask head runs once for the whole batch."""
        assert isinstance(self._network, TwoStage), "outputs come from the network that was built"
        rows = [table[torch.from_numpy(kept).to(table.device)] for table, (_, kept) in zip(tables, found, strict=True)]
        masks = mask_probabilities(
            self._network.heads, levels, [row[:, :4] for row in rows], [row[:, 5].long() for row in rows]
        )
        return [
            Detections(
                detections.boxes_xyxy,
                detections.class_ids,
                detections.class_names,
                detections.scores,
                paste_masks(mask, torch.from_numpy(detections.boxes_xyxy), meta.original_hw),
            )
            for (detections, _), mask, meta in zip(found, masks, metas, strict=True)
        ]


def _select(boxes_xyxy: Tensor, scores: Tensor, params: Params) -> Tensor:
    """What is kept of one image.

    Args:
        boxes_xyxy: float32 ``[K, 4]``, or ``[K, C, 4]`` when each class has its own.
        scores: float32 ``[K, C]``; negative: never.
        params: thresholds, classes and limit.

    Returns:
        float32 ``[k, 6]`` as x1, y1, x2, y2, score, class id, highest score first.
    """
    wanted = scores >= params.score_threshold  # [K, C]
    if params.class_ids is not None:
        allowed = torch.zeros(scores.shape[1], dtype=torch.bool)
        allowed[list(params.class_ids)] = True
        wanted &= allowed.to(scores.device)
    rows, class_ids = wanted.nonzero(as_tuple=True)
    chosen_scores = scores[rows, class_ids]
    if len(chosen_scores) > MAX_CANDIDATES:
        chosen_scores, top = chosen_scores.topk(MAX_CANDIDATES)
        rows, class_ids = rows[top], class_ids[top]
    chosen = boxes_xyxy[rows, class_ids] if boxes_xyxy.ndim == 3 else boxes_xyxy[rows]
    keep = batched_nms(chosen, chosen_scores, class_ids, params.iou_threshold)[: params.max_detections]
    return torch.cat((chosen[keep], chosen_scores[keep, None], class_ids[keep, None].to(chosen.dtype)), dim=1)
