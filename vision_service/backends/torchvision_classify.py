"""Backend ``torchvision_classifier``: every classification network of torchvision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from torch import Tensor, nn
from torchvision import models

from vision_service.backends._options import read_options
from vision_service.backends._outputs import check_finite
from vision_service.backends.base import Backend
from vision_service.config import ModelSpec
from vision_service.errors import ConfigError, choices
from vision_service.types import Classification, Float32Array, ImageMeta, Params, Prediction, Task

# These return a tuple with auxiliary logits while training, and take weights of a form of their own.
_OWN_FORM = {"googlenet", "inception_v3"}


class TorchvisionClassifier(Backend):
    """Builds a network by its name in torchvision, with as many outputs as the spec has classes.

    Options: ``arch`` (``mobilenet_v2``), any name that ``torchvision.models.list_models(module=models)`` has.
    """

    task: ClassVar[Task] = Task.CLASSIFY

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec)
        self._arch: str = read_options(spec, {"arch": "mobilenet_v2"})["arch"]
        known = models.list_models(module=models)
        if self._arch not in known:
            raise ConfigError(
                f"model {spec.name!r}: torchvision has no classification network {self._arch!r}; "
                f"{choices(self._arch, known)}"
            )

    def build_network(self) -> nn.Module:
        """The network: logits ``[N, C]``."""
        extra = {"aux_logits": False, "init_weights": False} if self._arch in _OWN_FORM else {}
        network: nn.Module = models.get_model(self._arch, weights=None, num_classes=len(self.spec.classes), **extra)
        return network

    def postprocess(
        self, outputs: tuple[Tensor, ...], metas: Sequence[ImageMeta], params: Sequence[Params]
    ) -> list[Prediction]:
        """The likeliest classes; the probabilities are over all classes, whichever the call keeps."""
        (logits,) = outputs
        check_finite(logits)
        scores = logits.float().softmax(dim=1).cpu().numpy()  # [N, C]
        return [self._classification(row, chosen) for row, chosen in zip(scores, params, strict=True)]

    def _classification(self, scores: Float32Array, params: Params) -> Classification:
        class_ids = np.argsort(-scores, kind="stable")
        if params.class_ids is not None:
            class_ids = class_ids[np.isin(class_ids, list(params.class_ids))]
        class_ids = class_ids[scores[class_ids] >= params.score_threshold][: params.top_k]
        names = tuple(self.spec.classes[i] for i in class_ids)
        return Classification(class_ids.astype(np.int64), names, np.clip(scores[class_ids], 0.0, 1.0))
