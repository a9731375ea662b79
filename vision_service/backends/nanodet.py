"""Backend ``nanodet``: the detector NanoDet-g."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from vision_service.backends._detection import dense_to_detections
from vision_service.backends._options import read_options
from vision_service.backends.base import Backend
from vision_service.config import ModelSpec
from vision_service.networks.nanodet import NanoDet
from vision_service.types import ImageMeta, Params, Prediction, Task


class NanoDetBackend(Backend):
    """Builds `NanoDet` for the spec's classes and suppresses its overlapping boxes.

    Options: ``width`` (channels of the stem, 32), ``neck_channels`` (128), ``reg_max`` (10).
    """

    task: ClassVar[Task] = Task.DETECT

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec)
        self._options = read_options(spec, {"width": 32, "neck_channels": 128, "reg_max": 10})

    def build_network(self) -> nn.Module:
        """`NanoDet`: boxes ``[N, A, 4]`` in pixels of the input and scores ``[N, A, C]``, both float32."""
        return NanoDet(num_classes=len(self.spec.classes), **self._options)

    def postprocess(
        self, outputs: tuple[Tensor, ...], metas: Sequence[ImageMeta], params: Sequence[Params]
    ) -> list[Prediction]:
        """Detections; suppression is class by class."""
        boxes, scores = outputs
        return list(dense_to_detections(boxes.float(), scores.float(), metas, params, self.spec.classes))
