"""MediaPipe Selfie Segmentation (general model): which pixels of a photo show a person.

An encoder like MobileNetV3-small's, a LR-ASPP block on its last map, and a decoder that weighs each skip connection
by attention over channels. 106 thousand parameters.

Sources: the graph in npm package ``@mediapipe/selfie_segmentation`` (``selfie_segmentation.tflite``, Apache-2.0);
Howard et al., "Searching for MobileNetV3", ICCV 2019, sections 5.2 (blocks, hard swish) and 6.4 (LR-ASPP). Batch norms
are folded into the convolutions, as in that graph.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class SameConv2d(nn.Conv2d):
    """A convolution that pads as TensorFlow's "SAME" does on even sizes: at stride 2 more at the end than the start."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(c_in, c_out, kernel, stride, groups=groups)
        missing = kernel - stride
        self.before, self.after = missing // 2, missing - missing // 2

    def forward(self, x: Tensor) -> Tensor:
        """``[N, c_in, h, w]`` to ``[N, c_out, h / stride, w / stride]``; h and w are multiples of the stride."""
        return super().forward(functional.pad(x, (self.before, self.after, self.before, self.after)))


class ChannelAttention(nn.Module):
    """Squeeze-and-excitation: a weight in 0..1 for each channel, from their means over the image."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, hidden, 1)
        self.expand = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, h, w]`` to ``[N, C, 1, 1]``."""
        hidden = functional.relu(self.reduce(functional.adaptive_avg_pool2d(x, 1)))
        return torch.sigmoid(self.expand(hidden))


class InvertedResidual(nn.Module):
    """Expand, filter each channel, weigh the channels, project; added to its input where the shapes agree.

    Args:
        c_in: channels in.
        expanded: channels inside.
        c_out: channels out.
        kernel: of the depthwise convolution.
        stride: of the depthwise convolution.
        attention: hidden channels of the squeeze-and-excitation; 0 leaves it out.
        hard_swish: activation; ReLU otherwise.
    """

    def __init__(
        self, c_in: int, expanded: int, c_out: int, *, kernel: int, stride: int, attention: int, hard_swish: bool
    ) -> None:
        super().__init__()
        self.expand = nn.Conv2d(c_in, expanded, 1)
        self.filter = SameConv2d(expanded, expanded, kernel, stride, groups=expanded)
        self.attention = ChannelAttention(expanded, attention) if attention else None
        self.project = nn.Conv2d(expanded, c_out, 1)
        self.activation: nn.Module = nn.Hardswish() if hard_swish else nn.ReLU()
        self.residual = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        """``[N, c_in, h, w]`` to ``[N, c_out, h / stride, w / stride]``."""
        y: Tensor = self.activation(self.filter(self.activation(self.expand(x))))
        if self.attention is not None:
            y = y * self.attention(y)
        y = self.project(y)
        return x + y if self.residual else y


class LiteAspp(nn.Module):
    """LR-ASPP: features times a weight for each channel that saw the whole image."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.features = nn.Conv2d(c_in, c_out, 1)
        self.context = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, c_in, h, w]`` to ``[N, c_out, h, w]``."""
        context = self.context(functional.adaptive_avg_pool2d(x, 1))  # [N, c_out, 1, 1]
        return functional.relu(self.features(x)) * torch.sigmoid(context)


class DecoderStage(nn.Module):
    """Double the size and join a skip connection of the encoder, weighed by attention that saw both."""

    def __init__(self, c_in: int, c_skip: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(c_in, c_skip, 1)
        self.attention = ChannelAttention(c_skip, c_skip)
        self.mix = nn.Conv2d(c_skip, c_skip, 1)
        self.filter = SameConv2d(c_skip, c_skip, 3, groups=c_skip)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """``[N, c_in, h, w]`` and ``[N, c_skip, 2 h, 2 w]`` to the latter's shape."""
        up = self.reduce(functional.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False))
        joined = skip * self.attention(skip + up) + up
        mixed = functional.relu(self.mix(joined))
        return mixed + functional.relu(self.filter(mixed))


class SelfieSegmentation(nn.Module):
    """The whole network."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = SameConv2d(3, 16, 3, stride=2)
        self.encoder4 = InvertedResidual(16, 16, 16, kernel=3, stride=2, attention=8, hard_swish=False)
        self.encoder8 = nn.Sequential(
            InvertedResidual(16, 72, 24, kernel=3, stride=2, attention=0, hard_swish=False),
            InvertedResidual(24, 88, 24, kernel=3, stride=1, attention=0, hard_swish=False),
        )
        self.encoder16 = nn.Sequential(
            InvertedResidual(24, 96, 32, kernel=5, stride=2, attention=24, hard_swish=True),
            InvertedResidual(32, 128, 32, kernel=5, stride=1, attention=32, hard_swish=True),
            InvertedResidual(32, 128, 32, kernel=5, stride=1, attention=32, hard_swish=True),
            InvertedResidual(32, 96, 32, kernel=5, stride=1, attention=24, hard_swish=True),
            InvertedResidual(32, 96, 32, kernel=5, stride=1, attention=24, hard_swish=True),
        )
        self.aspp = LiteAspp(32, 128)
        self.decoder8 = DecoderStage(128, 24)
        self.decoder4 = DecoderStage(24, 16)
        self.decoder2 = DecoderStage(16, 16)
        self.predict = nn.ConvTranspose2d(16, 1, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """How sure the network is that a pixel shows a person.

        Args:
            x: float ``[N, 3, h, w]`` RGB in 0..1; made for 256x256, h and w multiples of 16.

        Returns:
            Logits ``[N, 1, h, w]``. The original graph ends in a sigmoid, which is left to the reader of the output
            so that it runs in float32 whatever the network's precision.
        """
        s2 = functional.hardswish(self.stem(x))  # [N, 16, h/2, w/2]
        s4 = self.encoder4(s2)  # [N, 16, h/4, w/4]
        s8 = self.encoder8(s4)  # [N, 24, h/8, w/8]
        y = self.aspp(self.encoder16(s8))  # [N, 128, h/16, w/16]
        y = self.decoder2(self.decoder4(self.decoder8(y, s8), s4), s2)  # [N, 16, h/2, w/2]
        logits: Tensor = self.predict(y)
        return logits
