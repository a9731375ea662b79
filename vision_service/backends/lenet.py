"""Backend ``lenet5``: LeNet-5 for handwritten characters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from vision_service.backends._classification import logits_to_classifications
from vision_service.backends._options import read_options
from vision_service.backends.base import Backend
from vision_service.config import Letterbox, ModelSpec, ShortestSideCrop, Stretch
from vision_service.errors import ConfigError
from vision_service.networks.lenet import LeNet5
from vision_service.types import ImageMeta, Params, Prediction, Task

_INPUT_HW = (32, 32)


class LeNet5Backend(Backend):
    """Builds `LeNet5` for the spec's classes.

    Options: ``dark_ink`` (false): the characters are darker than what they stand on.
    """

    task: ClassVar[Task] = Task.CLASSIFY

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec)
        self._dark_ink: bool = read_options(spec, {"dark_ink": False})["dark_ink"]
        resize = spec.preprocess.resize
        size_hw = (
            resize.crop_hw
            if isinstance(resize, ShortestSideCrop)
            else resize.size_hw
            if isinstance(resize, Letterbox | Stretch)
            else None
        )
        if size_hw != _INPUT_HW:
            raise ConfigError(
                f"model {spec.name!r}: lenet5 takes 32 x 32 pixels, but preprocess.resize is {resize.mode} "
                f"{size_hw or ''}: use stretch or letterbox with size_hw [32, 32]"
            )

    def build_network(self) -> nn.Module:
        """`LeNet5`: logits ``[N, C]``."""
        return LeNet5(len(self.spec.classes), dark_ink=self._dark_ink)

    def postprocess(
        self, outputs: tuple[Tensor, ...], metas: Sequence[ImageMeta], params: Sequence[Params]
    ) -> list[Prediction]:
        """The likeliest classes."""
        (logits,) = outputs
        return list(logits_to_classifications(logits, params, self.spec.classes))
