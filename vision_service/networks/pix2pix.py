"""pix2pix: a generator that turns an image into an image, and the discriminator that it was trained against.

The generator is a U-Net: eight convolutions of stride 2 down to one pixel, eight transposed ones up, each joined with
the map of its size on the way down. The discriminator judges patches of 70 x 70 pixels of an image and its translation.

Source: Isola, Zhu, Zhou, Efros, "Image-to-Image Translation with Conditional Adversarial Networks", CVPR 2017, sections
3.2 and 6.1 (of arXiv:1611.07004v3, whose errata leave the norm at the bottleneck out). Parameters are named as in the
authors' PyTorch release (``pytorch-CycleGAN-and-pix2pix``, generator ``unet_256``), so that its files load.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Norm2d(nn.BatchNorm2d):
    """Batch norm that may take an image's own statistics at inference instead of those kept from training.

    Args:
        channels: of the map.
        per_image: normalise each image by itself while not training. The paper runs its generators so: trained and run
            with batches of one, a batch's statistics are the image's.
    """

    def __init__(self, channels: int, *, per_image: bool) -> None:
        super().__init__(channels)
        self.per_image = per_image
        # Section 6.2: weights from a Gaussian of 0.02.
        nn.init.normal_(self.weight, 1.0, 0.02)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, h, w]`` to the same shape."""
        if self.per_image and not self.training:
            return functional.instance_norm(x, weight=self.weight, bias=self.bias, eps=self.eps)
        return super().forward(x)


class SkipBlock(nn.Module):
    """One level of the U-Net with everything below it: halve, go down, double, and join with what came in.

    Args:
        c_outer: channels that come in, and that its own way up returns.
        c_inner: channels after halving.
        below: the next level; ``None`` at the bottleneck.
        per_image: see `Norm2d`.
        outermost: without norms, ended by tanh, and not joined with what came in.
        dropout: zero half of the result while training.
    """

    def __init__(
        self,
        c_outer: int,
        c_inner: int,
        below: SkipBlock | None,
        *,
        per_image: bool,
        outermost: bool = False,
        dropout: bool = False,
    ) -> None:
        super().__init__()
        self.outermost = outermost
        layers: list[nn.Module] = [] if outermost else [nn.LeakyReLU(0.2)]
        layers.append(_gaussian(nn.Conv2d(c_outer, c_inner, 4, 2, 1, bias=False)))
        if below is not None:
            if not outermost:
                layers.append(Norm2d(c_inner, per_image=per_image))
            layers.append(below)
        c_up = c_inner if below is None else 2 * c_inner
        layers.append(nn.ReLU())
        layers.append(_gaussian(nn.ConvTranspose2d(c_up, c_outer, 4, 2, 1, bias=outermost)))
        layers.append(nn.Tanh() if outermost else Norm2d(c_outer, per_image=per_image))
        if dropout:
            layers.append(nn.Dropout(0.5))
        self.model = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, c_outer, h, w]`` to ``[N, 2 c_outer, h, w]``; the outermost to ``[N, c_outer, h, w]``."""
        y: Tensor = self.model(x)
        return y if self.outermost else torch.cat((x, y), dim=1)


class Generator(nn.Module):
    """The U-Net. In evaluation mode there is no dropout, which the paper keeps as its only source of chance.

    Args:
        width: channels of the outermost level, 64 as published.
        levels: how often the size is halved, 8 as published (made for 256 x 256); 5 or more.
        per_image: see `Norm2d`.
    """

    def __init__(self, width: int = 64, levels: int = 8, *, per_image: bool = False) -> None:
        super().__init__()
        if levels < 5:
            raise ValueError(f"need 5 levels or more, got {levels}")
        widths = [width * min(2**level, 8) for level in range(levels)]
        block: SkipBlock | None = None
        for level in range(levels - 1, 0, -1):
            block = SkipBlock(
                widths[level - 1], widths[level], block, per_image=per_image, dropout=4 <= level < levels - 1
            )
        self.model = SkipBlock(3, width, block, per_image=per_image, outermost=True)

    def forward(self, x: Tensor) -> Tensor:
        """Translate.

        Args:
            x: float ``[N, 3, h, w]`` RGB in -1..1; h and w multiples of ``2 ** levels``.

        Returns:
            ``[N, 3, h, w]`` in -1..1.
        """
        translated: Tensor = self.model(x)
        return translated


class PatchDiscriminator(nn.Module):
    """The 70 x 70 PatchGAN: whether each patch of a translation looks real beside its original. Training only.

    Args:
        width: channels of the first layer, 64 as published.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = [_gaussian(nn.Conv2d(6, width, 4, 2, 1)), nn.LeakyReLU(0.2)]
        for c_in, c_out, stride in ((width, 2 * width, 2), (2 * width, 4 * width, 2), (4 * width, 8 * width, 1)):
            layers += [
                _gaussian(nn.Conv2d(c_in, c_out, 4, stride, 1, bias=False)),
                Norm2d(c_out, per_image=False),
                nn.LeakyReLU(0.2),
            ]
        layers.append(_gaussian(nn.Conv2d(8 * width, 1, 4, 1, 1)))
        self.model = nn.Sequential(*layers)

    def forward(self, original: Tensor, translated: Tensor) -> Tensor:
        """Judge the patches.

        Args:
            original: ``[N, 3, h, w]`` in -1..1.
            translated: likewise.

        Returns:
            Logits ``[N, 1, h / 8 - 2, w / 8 - 2]``; above 0 is real.
        """
        logits: Tensor = self.model(torch.cat((original, translated), dim=1))
        return logits


def _gaussian(conv: nn.Conv2d | nn.ConvTranspose2d) -> nn.Module:
    nn.init.normal_(conv.weight, 0.0, 0.02)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv
