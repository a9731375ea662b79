"""Which runtimes there are. A module is imported when a model asks for it."""

from __future__ import annotations

from importlib import import_module

import torch

from vision_service.errors import ConfigError, choices
from vision_service.runtimes.base import Execution, Runtime

RUNTIMES: dict[str, str] = {
    "torch": "vision_service.runtimes.torch_eager:TorchEager",
    "torch_compile": "vision_service.runtimes.torch_compiled:TorchCompile",
    "torch_cuda_graphs": "vision_service.runtimes.torch_cuda_graphs:TorchCudaGraphs",
    "openvino": "vision_service.runtimes.openvino_cpu:OpenVino",
    "onnxruntime": "vision_service.runtimes.onnx_runtime:OnnxRuntime",
    "tensorrt": "vision_service.runtimes.tensorrt:TensorRt",
}

AUTO: dict[str, tuple[str, ...]] = {"cpu": ("openvino", "torch"), "cuda": ("torch",)}
"""What ``auto`` tries, in order, by the kind of device. The last one takes every network."""


def create_runtime(name: str, device: torch.device, execution: Execution | None = None) -> Runtime:
    """A runtime by its name.

    Args:
        name: a key of `RUNTIMES`.
        device: where it is to run.
        execution: what it may use.

    Raises:
        ConfigError: there is no such runtime, its package is missing, or it cannot use the device.
    """
    if name not in RUNTIMES:
        raise ConfigError(f"there is no runtime {name!r}; {choices(name, RUNTIMES)}")
    module, _, cls = RUNTIMES[name].partition(":")
    runtime: Runtime = getattr(import_module(module), cls)(device, execution)
    return runtime
