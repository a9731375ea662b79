"""What a network computes, as a hash: parameters, structure and code."""

from __future__ import annotations

import hashlib
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import vision_service

_PLAIN = (bool, int, float, str, bytes, type(None))


def fingerprint(network: nn.Module, described: str) -> str:
    """Equal for networks that compute the same; unequal ones differ in some parameter, attribute or line of code.

    Args:
        network: on the CPU.
        described: what decides how it was built, such as its options.

    Returns:
        Lower-case hex.
    """
    digest = hashlib.sha256()
    for text in (described, torch.__version__, vision_service.__version__, _own_code()):
        digest.update(text.encode() + b"\0")
    files = set()
    for name, module in network.named_modules():
        kind = type(module)
        plain = {key: value for key, value in sorted(vars(module).items()) if _is_plain(value)}
        digest.update(f"{name}={kind.__module__}.{kind.__qualname__}({module.extra_repr()}) {plain}\n".encode())
        files.add(getattr(sys.modules.get(kind.__module__), "__file__", None) or "")
    for code in sorted(_file_hash(file) for file in files if file):
        digest.update(code.encode())
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_plain(item) for item in value)
    return isinstance(value, _PLAIN)


def _bytes(tensor: Tensor) -> memoryview:
    flat: NDArray[np.uint8] = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return flat.data


@cache
def _own_code() -> str:
    """Of everything that builds networks here: a function beside a network's class counts as well."""
    root = Path(vision_service.__file__).parent
    files = sorted(file for room in ("networks", "backends", "runtimes") for file in (root / room).rglob("*.py"))
    return "".join(_file_hash(str(file)) for file in files)


@cache
def _file_hash(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
