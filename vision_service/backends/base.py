"""What a backend promises: to build a network and to read its output."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from vision_service.config import Limit, ModelSpec, PreprocessSpec
from vision_service.types import ImageMeta, Params, Prediction, Task
from vision_service.weights.load import load_weights


class Backend(ABC):
    """An adapter for one family of networks.

    The constructor is cheap: it reads the spec and refuses what it does not understand. Preprocessing is data in the
    spec and happens elsewhere.

    Attributes:
        task: what models of this backend do.
        mixes_sizes: whether inputs of different sizes share a batch, padded right and bottom to the largest. The
            network then gets the size of each picture as a second argument, int64 ``[N, 2]`` height and width.
        own_runtime: the runtime that its networks call themselves; empty: any runtime may execute them.
        spec: the model it was made for.
    """

    task: ClassVar[Task]
    mixes_sizes: ClassVar[bool] = False
    own_runtime: ClassVar[str] = ""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec

    @abstractmethod
    def build_network(self) -> nn.Module:
        """The network with initial parameters, on the CPU, in float32.

        Its input is float ``[N, 3, h, w]``, normalised by the spec's mean and std in the spec's colour order. Its
        output is one dense tensor or a tuple of them, the batch first, so that any runtime can execute it: no lists
        of unequal lengths, no dictionaries, no Python values.
        """

    @abstractmethod
    def postprocess(
        self, outputs: tuple[Tensor, ...], metas: Sequence[ImageMeta], params: Sequence[Params]
    ) -> list[Prediction]:
        """The network's output as predictions in pixels of the originals.

        Args:
            outputs: what the network returned, on its device, in its precision, the batch first.
            metas: how to go back to the original, one an image.
            params: what each call chose, one an image; they may differ within a batch.

        Returns:
            One prediction an image, in the order of ``metas``.
        """

    def load_weights(self, network: nn.Module) -> None:
        """Fill a network with the spec's parameters. A family with a file format of its own overrides this.

        Args:
            network: from `build_network`.

        Raises:
            WeightsError: the file is missing, altered, or of another architecture.
        """
        load_weights(network, self.spec)

    def build(self) -> ServedNetwork:
        """The network as it is run, with its parameters: uint8 RGB images in, a tuple of dense tensors out.

        Raises:
            WeightsError: as in `load_weights`.
        """
        network = self.build_network()
        if self.spec.weights is not None:
            self.load_weights(network)
        return ServedNetwork(network, self.spec.preprocess, with_sizes=self.mixes_sizes)


class ServedNetwork(nn.Module):
    """A network with its normalisation in front, so that uint8 and not float32 crosses to the device.

    Args:
        network: takes normalised float ``[N, 3, h, w]``.
        preprocess: whose mean, std and colour order to apply.
        with_sizes: give the network the pictures' sizes as a second argument.
    """

    mean: Tensor
    inverse_std: Tensor

    def __init__(self, network: nn.Module, preprocess: PreprocessSpec, *, with_sizes: bool = False) -> None:
        super().__init__()
        self.network = network
        self.with_sizes = with_sizes
        self.preprocess = preprocess
        self._set_constants(torch.device("cpu"))

    def _set_constants(self, device: torch.device) -> None:
        mean = torch.tensor(self.preprocess.mean, dtype=torch.float32, device=device)
        inverse_std = 1.0 / torch.tensor(self.preprocess.std, dtype=torch.float32, device=device)
        self.register_buffer("mean", mean.view(1, 3, 1, 1), persistent=False)
        self.register_buffer("inverse_std", inverse_std.view(1, 3, 1, 1), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # `.half()` casts every buffer, but 255 - mean loses bits in half: these stay float32 wherever they go.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._set_constants(self.mean.device)
        return self

    def forward(self, images: Tensor, sizes_hw: Tensor) -> tuple[Tensor, ...]:
        """Normalise and run.

        Args:
            images: uint8 ``[N, h, w, 3]`` RGB, or float32 in 0..255 as ``bilinear_float`` gives.
            sizes_hw: int64 ``[N, 2]``, how far each picture reaches; the rest is padding.

        Returns:
            The network's outputs, always as a tuple.
        """
        x = images.permute(0, 3, 1, 2)  # [N, 3, h, w], a view: its memory stays channels-last
        if self.preprocess.color_order == "bgr":
            x = x.flip(1)
        parameter = next(self.network.parameters(), self.mean)
        x = (x.float() - self.mean) * self.inverse_std
        if isinstance(self.preprocess.resize, Limit):
            x = x * _inside(sizes_hw, x.shape[2], x.shape[3])
        x = x.to(parameter.dtype).contiguous(memory_format=torch.channels_last)
        outputs = self.network(x, sizes_hw) if self.with_sizes else self.network(x)
        return outputs if isinstance(outputs, tuple) else (outputs,)


def _inside(sizes_hw: Tensor, height: int, width: int) -> Tensor:
    """True where the pictures are: bool ``[N, 1, height, width]``."""
    rows = torch.arange(height, device=sizes_hw.device) < sizes_hw[:, :1]  # [N, height]
    columns = torch.arange(width, device=sizes_hw.device) < sizes_hw[:, 1:]  # [N, width]
    return (rows[:, :, None] & columns[:, None, :])[:, None]
