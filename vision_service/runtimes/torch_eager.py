"""Runtime ``torch``: the network as it is written, channels-last."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from vision_service.errors import DeviceOutOfMemory
from vision_service.runtimes.base import Forward, Precision, Runtime, Workload, is_out_of_memory

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class TorchEager(Runtime):
    """Executes a network as it is written.

    Outputs on a CPU in fp32 are those of the network itself, bit for bit for one batch size; between batch sizes
    float32 convolutions differ by rounding (below 1e-5 of the largest value in the tests).
    """

    name = "torch"
    precisions: ClassVar[Mapping[str, tuple[Precision, ...]]] = {
        "cpu": ("fp32", "bf16"),
        "cuda": ("fp32", "bf16", "fp16"),
    }

    def compile(self, network: nn.Module, work: Workload, precision: Precision) -> Forward:
        """See `Runtime.compile`. Takes every network."""
        self.check_precision(precision)
        return run_on(to_device(network, self.device, precision), self.device)


def run_on(function: Callable[[Tensor, Tensor], Sequence[Tensor]], device: torch.device) -> Forward:
    """A function of tensors on a device as a `Forward`.

    Args:
        function: uint8 ``[N, h, w, 3]`` and int64 ``[N, 2]`` to tensors that are its caller's.
        device: where its arguments are to be.
    """

    @torch.inference_mode()
    def forward(images: Tensor, sizes_hw: Tensor) -> tuple[Tensor, ...]:
        try:
            outputs = tuple(function(*(tensor.to(device, non_blocking=True) for tensor in (images, sizes_hw))))
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()
            return outputs
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            if not is_out_of_memory(error):
                raise
            if device.type == "cuda":
                torch.cuda.empty_cache()
        # Raised out here so that it holds no frame that holds the batch's tensors.
        raise does_not_fit(images, device)

    return forward


def to_device(network: nn.Module, device: torch.device, precision: Precision) -> nn.Module:
    """A network ready for inference, on a device, channels-last, in a precision that torch has."""
    module = network.eval().requires_grad_(False).to(device).to(memory_format=torch.channels_last)
    norms = _norms(module) if precision == "bf16" else {}
    module = module.to(DTYPES[precision])
    for name, norm in norms.items():
        module.set_submodule(name, norm)
    return module


def _norms(module: nn.Module) -> dict[str, nn.Module]:
    """Copies of the batch norms, to keep in float32: statistics of eight bits cost classes.

    With them MobileNetV2 saw another class in three of a hundred photos, without them in none. A network takes its
    input in the precision of its first parameter: one that begins with a norm has all of them in bf16.
    """
    found = {name: part for name, part in module.named_modules() if isinstance(part, nn.BatchNorm2d)}
    first = next(module.parameters(), None)
    if any(first is parameter for norm in found.values() for parameter in norm.parameters()):
        return {}
    return {name: copy.deepcopy(norm) for name, norm in found.items() if name}


def does_not_fit(images: Tensor, device: torch.device) -> DeviceOutOfMemory:
    """The error for a batch that the device has no memory for."""
    return DeviceOutOfMemory(
        f"{tuple(images.shape)} does not fit into the free memory of {device}; send a smaller image"
    )
