"""Backend ``segnet``: SegNet with VGG-16's encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from vision_service.backends._options import read_options
from vision_service.backends._segmentation import logits_to_maps
from vision_service.backends.base import Backend
from vision_service.config import ModelSpec
from vision_service.errors import ConfigError
from vision_service.networks.segnet import SegNet
from vision_service.types import ImageMeta, Params, Prediction, Task


class SegNetBackend(Backend):
    """Builds `SegNet`; the likeliest class of each pixel, by softmax.

    Options: ``width`` (channels of the first stage, 64 as published).
    """

    task: ClassVar[Task] = Task.SEGMENT

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec)
        self._width: int = read_options(spec, {"width": 64})["width"]
        if self._width < 1:
            raise ConfigError(f"model {spec.name!r}: option 'width' must be 1 or more, got {self._width}")
        if len(spec.classes) < 2:
            raise ConfigError(
                f"model {spec.name!r}: segnet has a channel for each class and needs two or more, got "
                f"{list(spec.classes)}: add the background as a class"
            )

    def build_network(self) -> nn.Module:
        """`SegNet`: logits ``[N, C, h, w]``."""
        return SegNet(len(self.spec.classes), self._width)

    def postprocess(
        self, outputs: tuple[Tensor, ...], metas: Sequence[ImageMeta], params: Sequence[Params]
    ) -> list[Prediction]:
        """Class maps of the originals' sizes."""
        (logits,) = outputs
        return list(logits_to_maps(logits, metas, params, self.spec))
