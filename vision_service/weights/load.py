"""From a weight file to a network's parameters: checked before it is parsed, and strict.

A weight file may come from anywhere. Its sha256 is compared before anything reads it, as far as it is known, and
neither of the two formats can run code: safetensors, and torch's own format with ``weights_only=True``.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn

from vision_service.config import ModelSpec
from vision_service.errors import WeightsError
from vision_service.weights.check import read_checked

_SHOWN = 5


def load_weights(
    network: nn.Module, spec: ModelSpec, adapt: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None
) -> None:
    """Fill a network with the parameters that its spec names.

    Values are cast to the network's precision: files in half precision fill a float32 network.

    Args:
        network: the bare network, as the backend built it.
        spec: whose weights to load; without weights the network stays as it was initialised.
        adapt: makes a state dict of the network's names out of the file's, for files that name their tensors
            otherwise; what it returns must fit as strictly.

    Raises:
        WeightsError: the file is missing, is not the one the spec means, cannot be read, or belongs to another
            architecture (names the first keys and shapes that do not fit).
    """
    if spec.weights is None:
        return
    where = f"model {spec.name!r}: weights {spec.weights.file}"
    data = read_checked(where, spec.weights, spec.weights.source)
    state = _parse(where, Path(spec.weights.file), data)
    if adapt is not None:
        state = adapt(state)
    fill(network, state, where)


def fill(network: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Give a network the parameters of a state dict, strictly.

    Args:
        network: the bare network.
        state: names to tensors.
        where: begins the message.

    Raises:
        WeightsError: they belong to another architecture.
    """
    _check_fit(where, network, state)
    network.load_state_dict(state, strict=False)  # `_check_fit` was stricter, and says more


def _parse(where: str, path: Path, data: bytes) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_safetensors(data)
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise WeightsError(f"{where}: is not a weight file that can be read safely ({reason})") from None
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise WeightsError(
            f"{where}: need a state dict, names to tensors; save `network.state_dict()` instead of what is in it"
        )
    return dict(content)


def _check_fit(where: str, network: nn.Module, state: dict[str, Tensor]) -> None:
    expected = network.state_dict()
    # Counts training steps; inference has no use for it, and many files leave it out.
    missing = [k for k in expected if k not in state and not k.endswith("num_batches_tracked")]
    unexpected = sorted(k for k in state if k not in expected)  # safetensors gives them in no order
    shapes = [
        f"{k} is {list(state[k].shape)}, the network has {list(expected[k].shape)}"
        for k in expected
        if k in state and state[k].shape != expected[k].shape
    ]
    problems = [("missing", missing), ("unknown to the network", unexpected), ("of another shape", shapes)]
    found = [f"{len(keys)} {what}: {_first(keys)}" for what, keys in problems if keys]
    if found:
        raise WeightsError(
            f"{where}: do not fit the network. {'. '.join(found)}. Check the model's backend, options and classes"
        )


def _first(keys: list[str]) -> str:
    return ", ".join(keys[:_SHOWN]) + (", ..." if len(keys) > _SHOWN else "")
