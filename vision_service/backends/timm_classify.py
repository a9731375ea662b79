"""Backend ``timm_classifier``: every classification network of timm."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from importlib import import_module
from typing import Any, ClassVar

from torch import Tensor, nn

from vision_service.backends._classification import logits_to_classifications
from vision_service.backends._options import read_options
from vision_service.backends.base import Backend
from vision_service.config import ModelSpec
from vision_service.errors import ConfigError, WeightsError, choices
from vision_service.types import ImageMeta, Params, Prediction, Task
from vision_service.weights.load import load_weights

State = dict[str, Tensor]


class TimmClassifier(Backend):
    """Builds a network by its name in timm, with as many outputs as the spec has classes. Needs the extra ``timm``.

    Options:
        arch: any name that ``timm.list_models()`` or ``timm.list_pretrained()`` has (``resnet50``).
        match: how the weight file's tensors find their places. ``names``: by timm's names, after the conversions that
            timm itself makes for files of its networks' authors. ``order``: by their order, each of the right shape:
            for files of the same network from another implementation.
    """

    task: ClassVar[Task] = Task.CLASSIFY

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec)
        options = read_options(spec, {"arch": "resnet50", "match": "names"})
        self._arch, self._match = options["arch"], options["match"]
        where = f"model {spec.name!r}"
        try:
            self._timm: Any = import_module("timm")
        except ImportError as error:
            raise ConfigError(
                f"{where}: backend 'timm_classifier' needs timm: pip install 'vision-service[timm]' ({error})"
            ) from None
        if not self._timm.is_model(self._arch):
            near = choices(self._arch, self._timm.list_models())
            raise ConfigError(f"{where}: timm has no network {self._arch!r}; {near}")
        if self._match not in ("names", "order"):
            raise ConfigError(f"{where}: option 'match' must be 'names' or 'order', got {self._match!r}")

    def build_network(self) -> nn.Module:
        """The network: logits ``[N, C]``.

        Raises:
            ConfigError: timm has no such weights' tag, or refuses.
        """
        try:
            network: nn.Module = self._timm.create_model(
                self._arch, pretrained=False, num_classes=len(self.spec.classes)
            )
        except (RuntimeError, TypeError, ValueError) as error:
            raise ConfigError(f"model {self.spec.name!r}: timm cannot build {self._arch!r}: {error}") from None
        return network

    def load_weights(self, network: nn.Module) -> None:
        """As in the base class, after the conversion that the options say."""
        if self._match == "order":
            load_weights(network, self.spec, lambda state: self._by_order(network, state))
        else:
            load_weights(network, self.spec, lambda state: self._by_names(network, state))

    def postprocess(
        self, outputs: tuple[Tensor, ...], metas: Sequence[ImageMeta], params: Sequence[Params]
    ) -> list[Prediction]:
        """The likeliest classes; the probabilities are over all classes, whichever the call keeps."""
        (logits,) = outputs
        return list(logits_to_classifications(logits, params, self.spec.classes))

    def _by_order(self, network: nn.Module, state: State) -> State:
        """The file's tensors under the network's names, position by position."""
        expected = network.state_dict()
        where = f"model {self.spec.name!r}: weights {self.spec.weights.file if self.spec.weights else ''}"
        if len(state) != len(expected):
            raise WeightsError(
                f"{where}: {len(state)} tensors cannot be matched by order with the {len(expected)} of "
                f"{self._arch}: another architecture, or other classes"
            )
        for (theirs, value), (ours, wanted) in zip(state.items(), expected.items(), strict=True):
            if value.shape != wanted.shape:
                raise WeightsError(
                    f"{where}: matched by order, {theirs} {list(value.shape)} would become {ours} "
                    f"{list(wanted.shape)}: another architecture, or other classes"
                )
        return dict(zip(expected, state.values(), strict=True))

    def _by_names(self, network: nn.Module, state: State) -> State:
        """What timm does to a file before it loads it: the filter of the network's own module, where it has one."""
        convert = getattr(import_module(type(network).__module__), "checkpoint_filter_fn", None)
        if convert is None or set(state) >= set(network.state_dict()):
            return state
        try:
            arguments = (state, network) if len(inspect.signature(convert).parameters) > 1 else (state,)
            return dict(convert(*arguments))
        except (KeyError, RuntimeError, AttributeError, ValueError):
            return state  # of another architecture: the strict check says how
