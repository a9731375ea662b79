"""Darknet's ``.weights``: a header, then every parameter as a little-endian float32, layer by layer.

Layout (AlexeyAB/darknet ``src/parser.c``, ``load_weights_upto`` and ``save_weights_upto``): three int32 (major, minor,
revision) and the number of images seen in training, 64 bits from version 0.2 on and 32 before. Then, for each
convolution: biases; with batch norm its scales, means and variances; the kernel ``[filters, channels / groups, h, w]``.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from vision_service.networks.darknet import Darknet
from vision_service.networks.darknet_layers import Convolution

_PLAUSIBLE_VERSION = 1000
"""Darknet marks files of another layout by larger ones; their counter has 32 bits."""


class DarknetWeightsError(ValueError):
    """A ``.weights`` file does not belong to the network. Says how many values are missing or left, and where."""


@torch.no_grad()
def read_weights(network: Darknet, data: bytes) -> None:
    """Fill a network.

    Args:
        network: not fused.
        data: the whole file.

    Raises:
        DarknetWeightsError: the file is cut off, too long, or holds values that no batch norm can have.
        ValueError: the network is fused.
    """
    header = _header_bytes(data)
    values = np.frombuffer(data, "<f4", count=(len(data) - header) // 4, offset=header)
    _check_length(network, len(values), (len(data) - header) % 4)
    start = 0
    for layer in network.convolutions():
        for tensor in _tensors(layer):
            chunk = torch.from_numpy(values[start : start + tensor.numel()].astype(np.float32))  # native and writable
            tensor.copy_(chunk.view(tensor.shape))
            start += tensor.numel()
        _check_plausible(layer)


def write_weights(network: Darknet, seen: int = 0, version: tuple[int, int, int] = (0, 2, 5)) -> bytes:
    """A network's parameters as Darknet would save them.

    Args:
        network: not fused.
        seen: images seen in training.
        version: major, minor, revision; decides how wide the counter is.

    Raises:
        ValueError: the network is fused.
    """
    header = np.array(version, "<i4").tobytes() + np.array([seen], "<u8" if _wide(*version[:2]) else "<u4").tobytes()
    tensors = (tensor for layer in network.convolutions() for tensor in _tensors(layer))
    return header + b"".join(tensor.detach().cpu().float().numpy().astype("<f4").tobytes() for tensor in tensors)


def _wide(major: int, minor: int) -> bool:
    return major * 10 + minor >= 2 and major < _PLAUSIBLE_VERSION and minor < _PLAUSIBLE_VERSION


def _header_bytes(data: bytes) -> int:
    if len(data) < 16:
        raise DarknetWeightsError(f"the file has {len(data)} bytes, less than the header of a Darknet weight file")
    major, minor, _ = np.frombuffer(data, "<i4", count=3).tolist()
    return 20 if _wide(major, minor) else 16


def _tensors(layer: Convolution) -> Iterator[Tensor]:
    """A layer's parameters in the file's order."""
    norm, bias = layer.norm, layer.conv.bias
    if norm is not None:
        if norm.running_mean is None or norm.running_var is None:
            raise ValueError(f"{layer.where}: its batch norm keeps no statistics")
        yield from (norm.bias, norm.weight, norm.running_mean, norm.running_var)
    elif bias is not None and not layer.fused:
        yield bias
    else:
        raise ValueError(f"{layer.where}: its batch norm is fused, so it no longer is what the file describes")
    yield layer.conv.weight


def _check_length(network: Darknet, found: int, odd_bytes: int) -> None:
    needed, ends_in = 0, ""
    for layer in network.convolutions():
        size = sum(tensor.numel() for tensor in _tensors(layer))
        if not ends_in and found < needed + size:
            ends_in = f"{layer.where}, which needs {size:,} values, {max(0, found - needed):,} of them there"
        needed += size
    told = f"the network has {needed:,} values, the file {found:,}"
    if found < needed:
        raise DarknetWeightsError(
            f"{told}: {needed - found:,} are missing, from {ends_in}. The file is cut off or belongs to another cfg "
            "(other classes or filters)"
        )
    if found > needed or odd_bytes:
        raise DarknetWeightsError(
            f"{told}: {found - needed:,} values and {odd_bytes} bytes are left after the last convolution. The file "
            "belongs to another cfg (other classes or filters)"
        )


def _check_plausible(layer: Convolution) -> None:
    """A file for another cfg may have the right length by chance; then it seldom has variances where they belong."""
    for tensor in _tensors(layer):
        if not bool(torch.isfinite(tensor).all()):
            raise DarknetWeightsError(f"{layer.where}: holds NaN or infinity: the file is damaged or for another cfg")
    if layer.norm is not None and layer.norm.running_var is not None and bool((layer.norm.running_var < 0).any()):
        raise DarknetWeightsError(
            f"{layer.where}: a variance of its batch norm is below 0: the file is damaged or for another cfg"
        )
