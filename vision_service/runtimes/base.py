"""What a runtime promises: the same network, executed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

Forward = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
"""uint8 images ``[N, h, w, 3]`` and int64 sizes ``[N, 2]`` (height and width of each picture, the rest is padding), on
the CPU, in; dense tensors, batch first, on the runtime's device out."""


class Runtime(ABC):
    """One way to execute a network on one device.

    Args:
        device: where it runs.
    """

    name: str

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @abstractmethod
    def compile(self, network: nn.Module, example: Tensor, precision: str) -> Forward:
        """Make a network ready to run.

        Args:
            network: takes uint8 ``[N, h, w, 3]`` RGB and int64 sizes ``[N, 2]``, returns a tuple of dense tensors.
            example: images of the kind it will see, uint8 ``[1, h, w, 3]``.
            precision: ``fp32`` or ``fp16``.

        Returns:
            The network as a function. When it returns, the outputs are there (nothing is pending on the device).

        Raises:
            ConfigError: this runtime cannot run in that precision on its device.
            DeviceOutOfMemory: from the returned function, when the batch does not fit.
        """
