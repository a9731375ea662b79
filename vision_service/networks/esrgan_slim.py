"""ESRGAN-slim: a small residual dense network that doubles an image's size.

Sources: Zhang et al., "Residual Dense Network for Image Super-Resolution", CVPR 2018 for the structure (one layer a
block, two blocks, growth 4, 64 features), idealo/image-super-resolution for the "RDN" generator that the published
weights were trained with, npm package ``@upscalerjs/esrgan-slim`` 1.0.0 (MIT) for the weights.

The original maps 0..255 to 0..255. It is built of convolutions, ReLU, sums and copies only, so dividing every bias by
255 gives the same function from 0..1 to 0..1, and keeps activations small enough for half precision. The converted
weights are divided so.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class ResidualDenseBlock(nn.Module):
    """Grow a few features, then fuse them with what came in, as a residual (RDN, section 3.2)."""

    def __init__(self, features: int, growth: int) -> None:
        super().__init__()
        self.grow = nn.Conv2d(features, growth, 3, padding=1)
        self.fuse = nn.Conv2d(features + growth, features, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, F, h, w]`` to the same shape."""
        fused: Tensor = self.fuse(torch.cat((x, functional.relu(self.grow(x))), dim=1))
        return fused + x


class EsrganSlim(nn.Module):
    """The generator, for a factor of 2.

    Args:
        features: channels of the trunk; 64 is the published network.
        growth: channels that a block adds.
        blocks: residual dense blocks.
    """

    scale = 2

    def __init__(self, features: int = 64, growth: int = 4, blocks: int = 2) -> None:
        super().__init__()
        self.shallow = nn.Conv2d(3, features, 3, padding=1)
        self.enter = nn.Conv2d(features, features, 3, padding=1)
        self.blocks = nn.ModuleList(ResidualDenseBlock(features, growth) for _ in range(blocks))
        self.fuse = nn.Sequential(
            nn.Conv2d(blocks * features, features, 1), nn.Conv2d(features, features, 3, padding=1)
        )
        self.refine = nn.Sequential(
            nn.Conv2d(features, features, 5, padding=2),
            nn.ReLU(),
            nn.Conv2d(features, features // 2, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(features // 2, 3 * self.scale**2, 3, padding=1),
        )
        self.reconstruct = nn.Conv2d(3 * self.scale**2, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Twice the size.

        Args:
            x: float ``[N, 3, h, w]`` RGB in 0..1, any h and w.

        Returns:
            float ``[N, 3, 2 h, 2 w]`` RGB, about 0..1 but not clipped, in the precision of the network.
        """
        shallow = self.shallow(x)  # [N, F, h, w]
        hidden = self.enter(shallow)
        kept = []
        for block in self.blocks:
            hidden = block(hidden)
            kept.append(hidden)
        hidden = self.refine(self.fuse(torch.cat(kept, dim=1)) + shallow)  # [N, 12, h, w]
        image: Tensor = self.reconstruct(functional.interpolate(hidden, scale_factor=float(self.scale), mode="nearest"))
        return image
