"""Backend ``torchvision_classifier``: every classification network of torchvision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from torchvision import models

from vision_service.backends._classification import logits_to_classifications
from vision_service.backends._options import read_options
from vision_service.backends._torchvision_load import load_library_weights
from vision_service.backends.base import Backend
from vision_service.config import ModelSpec
from vision_service.errors import ConfigError, choices
from vision_service.types import ImageMeta, Params, Prediction, Task

# These return a tuple with auxiliary logits while training; their checkpoints have tensors for them.
_AUXILIARY = {"googlenet": ("aux1.", "aux2."), "inception_v3": ("AuxLogits.",)}


class TorchvisionClassifier(Backend):
    """Builds a network by its name in torchvision, with as many outputs as the spec has classes.

    Options: ``arch`` (``mobilenet_v2``), any name that ``torchvision.models.list_models(module=models)`` has;
    ``transform_input`` (false), for GoogLeNet and Inception v3 alone: the network itself changes from ImageNet's mean
    and deviation to 0.5 and 0.5, as with torchvision's own weights.
    """

    task: ClassVar[Task] = Task.CLASSIFY

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec)
        options = read_options(spec, {"arch": "mobilenet_v2", "transform_input": False})
        self._arch: str = options["arch"]
        self._transform_input: bool = options["transform_input"]
        known = models.list_models(module=models)
        if self._arch not in known:
            raise ConfigError(
                f"model {spec.name!r}: torchvision has no classification network {self._arch!r}; "
                f"{choices(self._arch, known)}"
            )
        if self._transform_input and self._arch not in _AUXILIARY:
            raise ConfigError(
                f"model {spec.name!r}: option 'transform_input' has no effect on {self._arch}; "
                f"it is for {' and '.join(_AUXILIARY)}"
            )

    def build_network(self) -> nn.Module:
        """The network: logits ``[N, C]``."""
        arguments = self._arguments()
        try:
            network: nn.Module = models.get_model(
                self._arch, weights=None, num_classes=len(self.spec.classes), **arguments
            )
        except (AssertionError, ValueError) as error:  # torchvision says so when a size is no multiple of its patches
            raise ConfigError(
                f"model {self.spec.name!r}: {self._arch} cannot be built with {arguments}: {error}; "
                "check preprocess.resize"
            ) from error
        return network

    def _arguments(self) -> dict[str, Any]:
        """What torchvision's builder takes from the enum when it loads the weights itself."""
        if self._arch in _AUXILIARY:
            return {"aux_logits": False, "init_weights": False, "transform_input": self._transform_input}
        resize = self.spec.preprocess.resize
        size_hw = getattr(resize, "crop_hw", None) or getattr(resize, "size_hw", None)
        if size_hw is not None and self._arch.startswith("vit_"):
            return {"image_size": size_hw[0]}  # these have a position for each patch
        if size_hw is not None and self._arch.startswith("maxvit"):
            return {"input_size": tuple(size_hw)}
        return {}

    def load_weights(self, network: nn.Module) -> None:
        """Fill a network from a checkpoint of torchvision's.

        Raises:
            WeightsError: the file is missing, altered, or of another architecture.
        """
        load_library_weights(network, self.spec, unused=_AUXILIARY.get(self._arch, ()))

    def postprocess(
        self, outputs: tuple[Tensor, ...], metas: Sequence[ImageMeta], params: Sequence[Params]
    ) -> list[Prediction]:
        """The likeliest classes; the probabilities are over all classes, whichever the call keeps."""
        (logits,) = outputs
        return list(logits_to_classifications(logits, params, self.spec.classes))
