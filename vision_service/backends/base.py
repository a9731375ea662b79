"""What a backend promises: to build a network and to read its output."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from vision_service.config import ModelSpec, PreprocessSpec
from vision_service.types import ImageMeta, Params, Prediction, Task


class Backend(ABC):
    """An adapter for one family of networks.

    The constructor is cheap: it reads the spec and refuses what it does not understand. Preprocessing is data in the
    spec and happens elsewhere.

    Attributes:
        task: what models of this backend do.
        spec: the model it was made for.
    """

    task: ClassVar[Task]

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

    def build(self) -> nn.Module:
        """The network as it is run: uint8 RGB images in, a tuple of dense tensors out."""
        return ServedNetwork(self.build_network(), self.spec.preprocess)


class ServedNetwork(nn.Module):
    """A network with its normalisation in front, so that uint8 and not float32 crosses to the device.

    Args:
        network: takes normalised float ``[N, 3, h, w]``.
        preprocess: whose mean, std and colour order to apply.
    """

    mean: Tensor
    inverse_std: Tensor

    def __init__(self, network: nn.Module, preprocess: PreprocessSpec) -> None:
        super().__init__()
        self.network = network
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

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Normalise and run.

        Args:
            images: uint8 ``[N, h, w, 3]`` RGB.

        Returns:
            The network's outputs, always as a tuple.
        """
        x = images.permute(0, 3, 1, 2)  # [N, 3, h, w], a view: its memory stays channels-last
        if self.preprocess.color_order == "bgr":
            x = x.flip(1)
        parameter = next(self.network.parameters(), self.mean)
        x = ((x.float() - self.mean) * self.inverse_std).to(parameter.dtype)
        outputs = self.network(x.contiguous(memory_format=torch.channels_last))
        return outputs if isinstance(outputs, tuple) else (outputs,)
