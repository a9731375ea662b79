"""Torchvision's checkpoints as state dicts of the networks that are served."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import Tensor, nn
from torchvision.models.mnasnet import MNASNet

from vision_service.config import ModelSpec
from vision_service.weights.load import load_weights

# DenseNet's layers were called norm.1 and conv.2 when its checkpoints were written (torchvision.models.densenet).
_OLD_DENSE_LAYER = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12])\.")


def load_library_weights(network: nn.Module, spec: ModelSpec, unused: Sequence[str] = ()) -> None:
    """Fill one of torchvision's networks from a checkpoint in torchvision's names, today's or those of older releases.

    Args:
        network: as torchvision built it.
        spec: whose weights to load.
        unused: prefixes of tensors that only training needs and the network was built without.

    Raises:
        WeightsError: as in `load_weights`.
    """

    def adapt(state: dict[str, Tensor]) -> dict[str, Tensor]:
        named = {_OLD_DENSE_LAYER.sub(r"\1\2.", k): v for k, v in state.items() if not k.startswith(tuple(unused))}
        _rename(network, named)
        return named

    load_weights(network, spec, adapt)


def _rename(network: nn.Module, state: dict[str, Tensor]) -> None:
    """Bring tensors' names up to date, in place, by the hooks that torchvision's own layers have for that."""
    for name, module in network.named_modules():
        cls = type(module)
        overrides = cls._load_from_state_dict is not nn.Module._load_from_state_dict
        # MNASNet's hook renames nothing: it rebuilds layers for files of before 2019, which no one publishes any more.
        if overrides and cls.__module__.startswith("torchvision.") and not isinstance(module, MNASNet):
            module._load_from_state_dict(state, f"{name}." if name else "", {}, False, [], [], [])
