"""Backend ``selfie_segmentation``: MediaPipe's person segmentation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from vision_service.backends._options import read_options
from vision_service.backends._segmentation import foreground_id, logits_to_maps
from vision_service.backends.base import Backend
from vision_service.config import ModelSpec
from vision_service.errors import ConfigError
from vision_service.networks.selfie_segmentation import SelfieSegmentation
from vision_service.types import ImageMeta, Params, Prediction, Task


class SelfieSegmentationBackend(Backend):
    """Builds `SelfieSegmentation`; a pixel is a person where the probability reaches the threshold.

    No options.
    """

    task: ClassVar[Task] = Task.SEGMENT

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec)
        read_options(spec, {})
        try:
            foreground_id(len(spec.classes), spec.background_id)
        except ValueError as error:
            raise ConfigError(f"model {spec.name!r}: {error}") from None

    def build_network(self) -> nn.Module:
        """`SelfieSegmentation`: logits ``[N, 1, h, w]``."""
        return SelfieSegmentation()

    def postprocess(
        self, outputs: tuple[Tensor, ...], metas: Sequence[ImageMeta], params: Sequence[Params]
    ) -> list[Prediction]:
        """Class maps of the originals' sizes."""
        (logits,) = outputs
        return list(logits_to_maps(logits, metas, params, self.spec))
