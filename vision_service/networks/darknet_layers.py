"""The layers of Darknet that are not plain torch modules, and what its words for activations mean.

Sources: AlexeyAB/darknet ``src/activations.h``, ``convolutional_layer.c``, ``maxpool_layer.c``, ``shortcut_layer.c``,
``route_layer.c``; Misra, "Mish", BMVC 2020.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

BATCH_NORM_EPS = 1e-6
"""OpenCV's reader and the original Darknet, which adds it to the deviation (later ones have 1e-5)."""

LEAK = 0.1


def _linear(x: Tensor) -> Tensor:
    return x


def _leaky(x: Tensor) -> Tensor:
    return functional.leaky_relu(x, LEAK)


def _gelu(x: Tensor) -> Tensor:
    return functional.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": _linear,
    "leaky": _leaky,
    "relu": functional.relu,
    "relu6": functional.relu6,
    "logistic": torch.sigmoid,
    "tanh": torch.tanh,
    "mish": functional.mish,
    "swish": functional.silu,
    "silu": functional.silu,
    "selu": functional.selu,
    "elu": functional.elu,
    "gelu": _gelu,
}
"""By their name in a cfg. ``silu`` is what Darknet's descendants in PyTorch write for ``swish``."""


class Convolution(nn.Module):
    """Convolution, then batch norm or bias, then activation.

    Args:
        conv: with a bias exactly if there is no batch norm.
        batch_normalize: whether a batch norm follows.
        activation: a key of `ACTIVATIONS`.
        where: the layer's place in the cfg, for messages.

    Attributes:
        norm: the batch norm; ``None`` when there is none or `fuse` took it in.
        fused: whether `fuse` took it in.
    """

    def __init__(self, conv: nn.Conv2d, batch_normalize: bool, activation: str, where: str) -> None:
        super().__init__()
        self.conv = conv
        self.norm = nn.BatchNorm2d(conv.out_channels, eps=BATCH_NORM_EPS) if batch_normalize else None
        self.activation = activation
        self.where = where
        self.fused = False

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, h, w]`` to ``[N, filters, h', w']``."""
        x = self.conv(x)
        if self.norm is not None:
            x = self.norm(x)
        return ACTIVATIONS[self.activation](x)

    @torch.no_grad()
    def fuse(self) -> None:
        """Put the batch norm into weight and bias, in float64: inference then has one operation less."""
        norm = self.norm
        if norm is None or norm.running_var is None or norm.running_mean is None:
            return
        scale = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)  # [filters]
        bias = norm.bias.double() - norm.running_mean.double() * scale
        weight = self.conv.weight.double() * scale[:, None, None, None]
        self.conv.weight.copy_(weight)
        self.conv.bias = nn.Parameter(bias.to(self.conv.weight.dtype))
        self.norm = None
        self.fused = True


class MaxPool(nn.Module):
    """Largest value in a window; what lies outside the image does not count.

    The padding is a total, of which the smaller half goes left and above; ``stride=1`` thus keeps the size, also for
    even windows.

    Args:
        size: side of the window.
        stride_hw: steps down and to the right.
        padding: of both sides together.
    """

    def __init__(self, size: int, stride_hw: tuple[int, int], padding: int) -> None:
        super().__init__()
        self.size = size
        self.stride_hw = stride_hw
        self.padding = padding

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, h, w]`` to ``[N, C, (h + padding - size) // stride + 1, ...]``."""
        before = self.padding // 2
        if self.padding % 2 == 0 and before <= self.size // 2:
            return functional.max_pool2d(x, self.size, self.stride_hw, before)
        after = self.padding - before
        padded = functional.pad(x, (before, after, before, after), value=float("-inf"))
        return functional.max_pool2d(padded, self.size, self.stride_hw)


class AveragePool(nn.Module):
    """The mean of each channel."""

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, h, w]`` to ``[N, C, 1, 1]``."""
        return x.mean(dim=(2, 3), keepdim=True)


class Upsample(nn.Module):
    """Each pixel repeated.

    Args:
        stride: how often, each way.
        scale: factor on the values.
    """

    def __init__(self, stride: int, scale: float) -> None:
        super().__init__()
        self.stride = stride
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, h, w]`` to ``[N, C, h * stride, w * stride]``."""
        x = functional.interpolate(x, scale_factor=float(self.stride), mode="nearest")
        return x if self.scale == 1 else x * self.scale


class Route(nn.Module):
    """Layers side by side, of each only one of equal groups of channels.

    Args:
        groups: into how many the channels are cut.
        group_id: which one is taken.
    """

    def __init__(self, groups: int, group_id: int) -> None:
        super().__init__()
        self.groups = groups
        self.group_id = group_id

    def forward(self, *inputs: Tensor) -> Tensor:
        """``[N, C_i, h, w]`` to ``[N, sum of C_i / groups, h, w]``."""
        parts = [x.chunk(self.groups, dim=1)[self.group_id] for x in inputs]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


class Shortcut(nn.Module):
    """The sum of layers. One with fewer channels adds to the first ones; of one with more, the first ones are added.

    Args:
        activation: a key of `ACTIVATIONS`.
    """

    def __init__(self, activation: str) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        """``[N, C, h, w]`` and further ``[N, C_i, h, w]`` to ``[N, C, h, w]``."""
        channels = x.shape[1]
        for other in others:
            if other.shape[1] < channels:
                other = functional.pad(other, (0, 0, 0, 0, 0, channels - other.shape[1]))
            x = x + other[:, :channels]
        return ACTIVATIONS[self.activation](x)


class Scale(nn.Module):
    """A layer times another: ``scale_channels`` (one factor a channel) and ``sam`` (one a value).

    Args:
        activation: a key of `ACTIVATIONS`.
    """

    def __init__(self, activation: str) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, factors: Tensor, x: Tensor) -> Tensor:
        """``[N, C, 1, 1]`` or ``[N, C, h, w]``, and ``[N, C, h, w]`` to ``[N, C, h, w]``."""
        return ACTIVATIONS[self.activation](x * factors)
