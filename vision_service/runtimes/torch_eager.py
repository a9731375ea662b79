"""Plain torch: channels-last, half precision on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vision_service.errors import ConfigError, DeviceOutOfMemory
from vision_service.runtimes.base import Forward, Runtime


class TorchEager(Runtime):
    """Executes a network as it is written.

    Outputs on a CPU are those of the network itself, bit for bit for one batch size; between batch sizes float32
    convolutions differ by rounding (below 1e-5 of the largest value in the tests).
    """

    name = "torch"

    def compile(self, network: nn.Module, example: Tensor, precision: str) -> Forward:
        """See `Runtime.compile`. On a CPU only ``fp32``."""
        if precision == "fp16" and self.device.type == "cpu":
            raise ConfigError("precision fp16 needs a GPU; use fp32 (or auto) with device cpu")
        module = network.eval().requires_grad_(False).to(self.device)
        module = module.to(memory_format=torch.channels_last)
        if precision == "fp16":
            module = module.half()

        @torch.inference_mode()
        def forward(images: Tensor, sizes_hw: Tensor) -> tuple[Tensor, ...]:
            try:
                on_device = (tensor.to(self.device, non_blocking=True) for tensor in (images, sizes_hw))
                outputs: tuple[Tensor, ...] = module(*on_device)
                if self.device.type == "cuda":
                    torch.cuda.current_stream(self.device).synchronize()
                return outputs
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
            # Raised out here so that it holds no frame that holds the batch's tensors.
            raise DeviceOutOfMemory(
                f"{tuple(images.shape)} does not fit into the free memory of {self.device}; send a smaller image"
            )

        return forward
