"""SegNet: a class for each pixel, by an encoder that remembers where each maximum was and a decoder that puts it back.

The encoder is VGG-16's 13 convolutions in five stages, each followed by batch norm and ReLU, each stage by 2x2 max
pooling whose indices are kept. The decoder mirrors it: unpooling with the kept indices, which leaves zeros wherever no
maximum was, then the stage's convolutions backwards. The last convolution gives the classes, without norm and ReLU.

Source: Badrinarayanan, Kendall, Cipolla, "SegNet: A Deep Convolutional Encoder-Decoder Architecture for Image
Segmentation", IEEE TPAMI 39(12), 2017, sections 3 and 3.1 and figure 2. Odd sides, for which the authors' own framework
rounds a pooled side up, are rounded down here: the last row or column is decoded from its neighbours.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

_DEPTHS = (2, 2, 3, 3, 3)
"""Convolutions in each stage of VGG-16."""


class ConvNormRelu(nn.Module):
    """3x3 convolution, batch norm, ReLU."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm = nn.BatchNorm2d(c_out)
        # He et al. 2015, as in section 3.3 of the paper.
        nn.init.kaiming_normal_(self.conv.weight, nonlinearity="relu")
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]  # it has one

    def forward(self, x: Tensor) -> Tensor:
        """``[N, c_in, h, w]`` to ``[N, c_out, h, w]``."""
        return functional.relu(self.norm(self.conv(x)))


class SegNet(nn.Module):
    """The whole network.

    Args:
        num_classes: channels of the output.
        width: channels of the first stage, 64 as published; the others have 2, 4, 8 and 8 times as many.
    """

    def __init__(self, num_classes: int, width: int = 64) -> None:
        super().__init__()
        widths = [width * factor for factor in (1, 2, 4, 8, 8)]
        self.unpool = nn.MaxUnpool2d(2)
        self.encoder = nn.ModuleList()
        self.decoder = nn.ModuleList()
        for stage, (depth, channels) in enumerate(zip(_DEPTHS, widths, strict=True)):
            before = widths[stage - 1] if stage else 3
            self.encoder.append(_stage([before, *[channels] * depth]))
            if stage:
                self.decoder.insert(0, _stage([*[channels] * depth, before]))
        # The first stage's mirror: its second convolution is the classifier.
        self.decoder.append(_stage([width] * _DEPTHS[0]))
        self.classifier = nn.Conv2d(width, num_classes, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """How sure the network is of each class at each pixel.

        Args:
            x: float ``[N, 3, h, w]`` RGB, normalised; sides of 32 and more.

        Returns:
            Logits ``[N, num_classes, h, w]``.
        """
        kept: list[tuple[Tensor, torch.Size]] = []
        for stage in self.encoder:
            x = stage(x)
            size = x.shape[2:]
            x, indices = functional.max_pool2d(x, 2, return_indices=True)
            kept.append((indices, size))
        for stage in self.decoder:
            indices, size = kept.pop()
            x = stage(self.unpool(x, indices, list(size)))
        logits: Tensor = self.classifier(x)
        return logits


def _stage(channels: list[int]) -> nn.Sequential:
    return nn.Sequential(*(ConvNormRelu(a, b) for a, b in pairwise(channels)))


@torch.no_grad()
def init_encoder_from_vgg16_bn(network: SegNet, state: Mapping[str, Tensor]) -> None:
    """Start the encoder from VGG-16's parameters for ImageNet (section 3 of the paper).

    Args:
        network: of the published width.
        state: a state dict of torchvision's ``vgg16_bn``; its classifier is left out.

    Raises:
        ValueError: it is of another architecture; names the first tensor that does not fit.
    """
    numbers = sorted({int(found[1]) for key in state if (found := re.match(r"features\.(\d+)\.weight$", key))})
    targets = [
        module for block in network.encoder.modules() if isinstance(block, ConvNormRelu) for module in block.children()
    ]
    if len(numbers) != len(targets):
        raise ValueError(f"need the {len(targets)} convolutions and norms of vgg16_bn, got {len(numbers)}")
    copies: list[tuple[Tensor, Tensor]] = []
    for number, target in zip(numbers, targets, strict=True):
        for name, tensor in target.state_dict().items():
            if name == "num_batches_tracked":
                continue
            key = f"features.{number}.{name}"
            if key not in state or state[key].shape != tensor.shape:
                got = list(state[key].shape) if key in state else "nothing"
                raise ValueError(f"{key}: need {list(tensor.shape)}, got {got}")
            copies.append((tensor, state[key]))
    for tensor, source in copies:
        tensor.copy_(source)
