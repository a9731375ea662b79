"""NanoDet-g: a one-stage, anchor-free detector made of plain convolutions.

Backbone (CSP blocks) -> neck (path aggregation by addition) -> one shared head a level -> dense decode.

Sources: the RangiLyu/nanodet project (configuration ``nanodet_g.yml``, Apache-2.0) for the structure; Li et al.,
"Generalized Focal Loss", NeurIPS 2020, section 3 for boxes as distributions of distances; Liu et al., "Path Aggregation
Network for Instance Segmentation", CVPR 2018 for the neck. Batch norms are folded into the convolutions, which is
how the published inference graph carries them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

LEAK = 0.1


class ConvAct(nn.Module):
    """A convolution with bias and a leaky ReLU.

    Args:
        c_in: channels in.
        c_out: channels out.
        stride: of the convolution, whose kernel is 3x3 and which pads by 1.
    """

    def __init__(self, c_in: int, c_out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, 3, stride, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, c_in, h, w]`` to ``[N, c_out, h / stride, w / stride]``."""
        return functional.leaky_relu(self.conv(x), LEAK)


class TinyResBlock(nn.Module):
    """Two convolutions of half the width, concatenated, so that channels in are channels out."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.squeeze = ConvAct(channels, channels // 2)
        self.mix = ConvAct(channels // 2, channels // 2)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, h, w]`` to the same shape."""
        half = self.squeeze(x)  # [N, C/2, h, w]
        return torch.cat((self.mix(half), half), dim=1)


class CspBlock(nn.Module):
    """One way goes through residual blocks, the other goes around them; both are kept, so the channels double."""

    def __init__(self, channels: int, blocks: int, stride: int) -> None:
        super().__init__()
        self.enter = ConvAct(channels, channels, stride)
        self.blocks = nn.Sequential(*(TinyResBlock(channels) for _ in range(blocks)))
        self.leave = ConvAct(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, h, w]`` to ``[N, 2 C, h / stride, w / stride]``."""
        around = self.enter(x)
        return torch.cat((self.leave(self.blocks(around)), around), dim=1)


class CspBackbone(nn.Module):
    """Features at strides 8, 16 and 32.

    Args:
        width: channels of the stem; the levels have 4, 8 and 16 times as many.
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.stem = ConvAct(3, width, stride=2)
        self.stage4 = CspBlock(width, blocks=1, stride=1)
        self.stage8 = CspBlock(2 * width, blocks=2, stride=2)
        self.stage16 = CspBlock(4 * width, blocks=2, stride=2)
        self.stage32 = CspBlock(8 * width, blocks=3, stride=2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``[N, 3, h, w]`` to three maps, finest first."""
        x = functional.max_pool2d(self.stem(x), 3, stride=2, padding=1)  # [N, W, h/4, w/4]
        c8 = self.stage8(self.stage4(x))  # [N, 4 W, h/8, w/8]
        c16 = self.stage16(c8)  # [N, 8 W, h/16, w/16]
        return c8, c16, self.stage32(c16)  # [N, 16 W, h/32, w/32]


def _resize_to(x: Tensor, like: Tensor) -> Tensor:
    return functional.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=False)


class AddPan(nn.Module):
    """Path aggregation by addition: coarse features flow down, then fine ones up, without convolutions of their own."""

    def __init__(self, channels_in: Sequence[int], channels: int) -> None:
        super().__init__()
        self.laterals = nn.ModuleList(nn.Conv2d(c, channels, 1) for c in channels_in)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Maps of the backbone, finest first, to as many maps of one width."""
        maps = [lateral(x) for lateral, x in zip(self.laterals, features, strict=True)]
        for fine, coarse in reversed(list(pairwise(range(len(maps))))):
            maps[fine] = maps[fine] + _resize_to(maps[coarse], maps[fine])
        for fine, coarse in pairwise(range(len(maps))):
            maps[coarse] = maps[coarse] + _resize_to(maps[fine], maps[coarse])
        return maps


class Head(nn.Module):
    """What a level predicts for each of its cells: class logits and four distributions of distances.

    Classes and boxes share the convolution before them; levels share nothing.
    """

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.shared = ConvAct(channels, channels)
        self.predict = nn.Conv2d(channels, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, h, w]`` to ``[N, h * w, outputs]``, row by row."""
        predicted: Tensor = self.predict(self.shared(x))
        return predicted.flatten(2).transpose(1, 2)


def cell_centres(height: int, width: int, stride: int, device: torch.device) -> Tensor:
    """Middles of a level's cells in pixels of the input: float32 ``[height * width, 2]`` as x, y, row by row."""
    x = (torch.arange(width, device=device, dtype=torch.float32) + 0.5) * stride
    y = (torch.arange(height, device=device, dtype=torch.float32) + 0.5) * stride
    return torch.stack((x.repeat(height), y.repeat_interleave(width)), dim=1)


def decode_boxes(distributions: Tensor, centres: Tensor, stride: int) -> Tensor:
    """Boxes from distributions of the distances to their four sides.

    A distance is the expectation over the bins 0..reg_max, in strides ("Generalized Focal Loss", equation 4).

    Args:
        distributions: logits ``[N, A, 4 * (reg_max + 1)]``: left, top, right, bottom.
        centres: ``[A, 2]`` as x, y.
        stride: pixels a unit.

    Returns:
        float32 ``[N, A, 4]`` as x1, y1, x2, y2 in pixels of the network's input; not clipped to it.
    """
    # In float32 whatever the network's precision is: half has steps of a quarter pixel beyond 256.
    logits = distributions.float().reshape(*distributions.shape[:2], 4, -1)  # [N, A, 4, bins]
    bins = torch.arange(logits.shape[-1], device=logits.device, dtype=torch.float32)
    distances = (logits.softmax(dim=-1) * bins).sum(dim=-1) * stride  # [N, A, 4]
    return torch.cat((centres - distances[..., :2], centres + distances[..., 2:]), dim=-1)


class NanoDet(nn.Module):
    """NanoDet-g.

    Args:
        num_classes: classes to tell apart; each has a sigmoid of its own.
        width: channels of the backbone's stem; 32 is the published network.
        neck_channels: channels of neck and heads.
        reg_max: largest distance in strides that a side can have.
    """

    strides = (8, 16, 32)

    def __init__(self, num_classes: int = 80, width: int = 32, neck_channels: int = 128, reg_max: int = 10) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.backbone = CspBackbone(width)
        self.neck = AddPan((4 * width, 8 * width, 16 * width), neck_channels)
        outputs = num_classes + 4 * (reg_max + 1)
        self.heads = nn.ModuleList(Head(neck_channels, outputs) for _ in self.strides)

    def raw(self, x: Tensor) -> tuple[list[Tensor], list[tuple[int, int]]]:
        """The heads' own output, before the decode.

        Args:
            x: normalised float ``[N, 3, h, w]``.

        Returns:
            For each stride ``[N, A, num_classes + 4 * (reg_max + 1)]`` logits, and the level's height and width.
        """
        maps = self.neck(self.backbone(x))
        sizes = [(m.shape[-2], m.shape[-1]) for m in maps]
        return [head(m) for head, m in zip(self.heads, maps, strict=True)], sizes

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes and scores of every cell.

        Args:
            x: normalised float ``[N, 3, h, w]``, BGR for the published weights; h and w multiples of 32.

        Returns:
            Boxes, float32 ``[N, A, 4]`` as x1, y1, x2, y2 in pixels of the input, and scores after the sigmoid,
            float32 ``[N, A, num_classes]``. A counts the cells of all strides, the finest first: 3549 at 416x416.
        """
        levels, sizes = self.raw(x)
        boxes, scores = [], []
        for raw, (height, width), stride in zip(levels, sizes, self.strides, strict=True):
            logits, distributions = raw[..., : self.num_classes], raw[..., self.num_classes :]
            centres = cell_centres(height, width, stride, raw.device)
            boxes.append(decode_boxes(distributions, centres, stride))
            scores.append(logits.float().sigmoid())
        return torch.cat(boxes, dim=1), torch.cat(scores, dim=1)
