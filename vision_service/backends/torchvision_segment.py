"""Backend ``torchvision_segmenter``: DeepLabV3, FCN and LR-ASPP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, cast

from torch import Tensor, nn
from torchvision import models
from torchvision.models import segmentation

from vision_service.backends._options import read_options
from vision_service.backends._segmentation import logits_to_maps
from vision_service.backends._torchvision_load import load_library_weights
from vision_service.backends.base import Backend
from vision_service.config import ModelSpec
from vision_service.errors import ConfigError, choices
from vision_service.types import ImageMeta, Params, Prediction, Task


class Logits(nn.Module):
    """A segmentation network of torchvision that returns a tensor instead of a dictionary.

    Args:
        segmenter: as torchvision built it.
    """

    def __init__(self, segmenter: nn.Module) -> None:
        super().__init__()
        self.segmenter = segmenter

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[N, C, h, w]`` for normalised images ``[N, 3, h, w]``."""
        return cast(Tensor, self.segmenter(images)["out"])


class TorchvisionSegmenter(Backend):
    """Builds a network by its name in torchvision, without the auxiliary head that only training needs.

    Options: ``arch`` (``deeplabv3_resnet50``), any name that ``list_models(module=models.segmentation)`` has.
    """

    task: ClassVar[Task] = Task.SEGMENT

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec)
        self._arch: str = read_options(spec, {"arch": "deeplabv3_resnet50"})["arch"]
        known = models.list_models(module=segmentation)
        if self._arch not in known:
            raise ConfigError(
                f"model {spec.name!r}: torchvision has no segmentation network {self._arch!r}; "
                f"{choices(self._arch, known)}"
            )

    def build_network(self) -> nn.Module:
        """`Logits`, of the input's size."""
        extra = {} if self._arch.startswith("lraspp") else {"aux_loss": False}
        classes = len(self.spec.classes)
        return Logits(models.get_model(self._arch, weights=None, weights_backbone=None, num_classes=classes, **extra))

    def load_weights(self, network: nn.Module) -> None:
        """Fill a network from a checkpoint of torchvision's segmentation network.

        Raises:
            WeightsError: the file is missing, altered, or of another architecture.
        """
        load_library_weights(network.get_submodule("segmenter"), self.spec, unused=("aux_classifier.",))

    def postprocess(
        self, outputs: tuple[Tensor, ...], metas: Sequence[ImageMeta], params: Sequence[Params]
    ) -> list[Prediction]:
        """Class maps of the originals' sizes."""
        (logits,) = outputs
        return list(logits_to_maps(logits, metas, params, self.spec))
