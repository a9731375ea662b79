"""LeNet-5 as published, for handwritten characters.

What follows the paper: 32 x 32 grey input; C1, S2, C3, S4, C5, F6 with the published sizes; C3's table of which maps
are joined with which; subsampling with a trainable coefficient and bias; the scaled tanh; an output of Euclidean radial
basis functions with fixed centres of -1 and +1, chosen at random as the paper allows (section II.B, where the authors
drew theirs by hand). 60,000 trainable parameters, the paper's count. The common modern form has average or max pooling,
a C3 joined with everything, ReLU and a linear output instead; torchvision's and timm's small networks cover that use.

What differs: the input comes as RGB and is turned into luminance (ITU-R BT.601) inside.

Source: LeCun, Bottou, Bengio, Haffner, "Gradient-Based Learning Applied to Document Recognition", Proc. IEEE 86(11),
1998, section II.B (layers, table I), appendix A (the tanh) and equation 7 (the output).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

C3_TABLE = (
    (0, 1, 2),
    (1, 2, 3),
    (2, 3, 4),
    (3, 4, 5),
    (0, 4, 5),
    (0, 1, 5),
    (0, 1, 2, 3),
    (1, 2, 3, 4),
    (2, 3, 4, 5),
    (0, 3, 4, 5),
    (0, 1, 4, 5),
    (0, 1, 2, 5),
    (0, 1, 3, 4),
    (1, 2, 4, 5),
    (0, 2, 3, 5),
    (0, 1, 2, 3, 4, 5),
)
"""Table I: which maps of S2 each of the 16 maps of C3 sees."""

LUMINANCE = (0.299, 0.587, 0.114)
"""ITU-R BT.601."""

BLACK_PLUS_WHITE = 1.175 - 0.1
"""The paper's ink is 1.175 and its paper -0.1; what is subtracted from here has the two exchanged."""

_CENTRES_SEED = 1998


def scaled_tanh(x: Tensor) -> Tensor:
    """1.7159 tanh(2 x / 3), which maps +1 to +1 and -1 to -1 (appendix A)."""
    return 1.7159 * torch.tanh(x * (2.0 / 3.0))


class Subsampling(nn.Module):
    """Half the size: the sum of 2 x 2, times a trainable coefficient a map, plus a trainable bias, squashed."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.coefficient = nn.Parameter(torch.full((channels,), 0.25))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, h, w]`` to ``[N, C, h/2, w/2]``."""
        summed = 4.0 * functional.avg_pool2d(x, 2)
        return scaled_tanh(summed * self.coefficient[:, None, None] + self.bias[:, None, None])


class PartialConvolution(nn.Module):
    """C3: 5 x 5 convolutions, each over the maps that `C3_TABLE` names, and no weight for the others."""

    places: Tensor

    def __init__(self) -> None:
        super().__init__()
        places = [6 * row + column for row, maps in enumerate(C3_TABLE) for column in maps]
        self.register_buffer("places", torch.tensor(places), persistent=False)
        self.weight = nn.Parameter(torch.empty(len(places), 5, 5))
        self.bias = nn.Parameter(torch.zeros(len(C3_TABLE)))
        for kernels in torch.split(self.weight.detach(), [len(maps) for maps in C3_TABLE]):
            _init_uniform(kernels, fan_in=kernels.numel())

    def forward(self, x: Tensor) -> Tensor:
        """``[N, 6, 14, 14]`` to ``[N, 16, 10, 10]``."""
        dense = self.weight.new_zeros(16 * 6, 5, 5).index_copy(0, self.places, self.weight)
        return functional.conv2d(x, dense.view(16, 6, 5, 5), self.bias)


class RadialBasis(nn.Module):
    """Squared distances to each class's centre, fixed at -1 and +1 (equation 7)."""

    centres: Tensor

    def __init__(self, features: int, num_classes: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(_CENTRES_SEED)
        signs = torch.randint(0, 2, (num_classes, features), generator=generator) * 2 - 1
        self.register_buffer("centres", signs.float())

    def forward(self, x: Tensor) -> Tensor:
        """``[N, features]`` to ``[N, num_classes]``, each 0 and above."""
        return (x[:, None, :] - self.centres).square().sum(dim=2)


class LeNet5(nn.Module):
    """The whole network.

    Args:
        num_classes: outputs, 10 as published.
        dark_ink: the characters are darker than the paper they stand on, so light and dark are exchanged.
    """

    luminance: Tensor

    def __init__(self, num_classes: int = 10, *, dark_ink: bool = False) -> None:
        super().__init__()
        self.dark_ink = dark_ink
        self.register_buffer("luminance", torch.tensor(LUMINANCE).view(1, 3, 1, 1), persistent=False)
        self.c1 = nn.Conv2d(1, 6, 5)
        self.s2 = Subsampling(6)
        self.c3 = PartialConvolution()
        self.s4 = Subsampling(16)
        self.c5 = nn.Conv2d(16, 120, 5)
        self.f6 = nn.Linear(120, 84)
        self.output = RadialBasis(84, num_classes)
        for layer in (self.c1, self.c5, self.f6):
            _init_uniform(layer.weight, fan_in=layer.weight[0].numel())
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]  # each has one

    def forward(self, x: Tensor) -> Tensor:
        """How near an image is to each class.

        Args:
            x: float ``[N, 3, 32, 32]`` RGB, normalised so that the background is -0.1 and the ink 1.175 (light ink on
                dark: mean 20, std 200); with ``dark_ink`` the other way round.

        Returns:
            Logits ``[N, num_classes]``: minus the squared distances, so that softmax gives the posterior of the
            paper's section II.C.
        """
        grey = (x * self.luminance).sum(dim=1, keepdim=True)  # [N, 1, 32, 32]
        if self.dark_ink:
            grey = BLACK_PLUS_WHITE - grey
        x = self.s2(scaled_tanh(self.c1(grey)))  # [N, 6, 14, 14]
        x = self.s4(scaled_tanh(self.c3(x)))  # [N, 16, 5, 5]
        x = scaled_tanh(self.c5(x)).flatten(1)  # [N, 120]
        distances: Tensor = self.output(scaled_tanh(self.f6(x)))
        return -distances


def _init_uniform(weight: Tensor, fan_in: int) -> None:
    """Between -2.4 and 2.4 over the number of inputs (appendix A)."""
    nn.init.uniform_(weight, -2.4 / fan_in, 2.4 / fan_in)
