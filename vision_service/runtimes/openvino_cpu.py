"""Runtime ``openvino``: the network as an OpenVINO graph on the CPU."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vision_service.errors import ConfigError
from vision_service.runtimes._exported import export_network, first_line
from vision_service.runtimes._openvino_library import load_library
from vision_service.runtimes.base import (
    CannotCompile,
    Execution,
    Forward,
    Precision,
    Runtime,
    Workload,
    is_out_of_memory,
)
from vision_service.runtimes.torch_eager import does_not_fit

_HINTS = {"fp32": "f32", "bf16": "bf16"}


class OpenVino(Runtime):
    """Converts the network by `torch.export` and runs it with as many threads as it is given, one request at a time."""

    name = "openvino"
    precisions: ClassVar[Mapping[str, tuple[Precision, ...]]] = {"cpu": ("fp32", "bf16")}

    def __init__(self, device: torch.device, execution: Execution | None = None) -> None:
        super().__init__(device, execution)
        self._openvino = load_library("openvino", "openvino")
        self._core: Any = self._openvino.Core()

    @property
    def version(self) -> str:
        """OpenVINO's."""
        return str(self._openvino.get_version())

    def check_precision(self, precision: Precision) -> None:
        """bf16 only where the processor has it: elsewhere OpenVINO would silently take fp32."""
        super().check_precision(precision)
        if precision == "bf16" and "BF16" not in self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise ConfigError("runtime openvino: this processor has no bf16 instructions; use precision fp32")

    def compile(self, network: nn.Module, work: Workload, precision: Precision) -> Forward:
        """See `Runtime.compile`."""
        self.check_precision(precision)
        model = self._convert(network, work)
        hints = {
            "INFERENCE_PRECISION_HINT": _HINTS[precision],  # by itself it takes bf16 where there is any
            "INFERENCE_NUM_THREADS": self.threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "ENABLE_CPU_PINNING": False,  # several models, and the decoders, share the cores
        }
        try:
            compiled = self._core.compile_model(model, "CPU", hints)
        except RuntimeError as error:
            raise CannotCompile(f"OpenVINO cannot compile the network ({first_line(error)})") from error
        return self._forward(compiled)

    def _convert(self, network: nn.Module, work: Workload) -> Any:
        """An OpenVINO model: uint8 ``[?, h, w, 3]`` and int64 ``[?, 2]`` in."""
        exported = export_network(network, work)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = self._openvino.convert_model(exported)
        except Exception as error:  # its errors have no base class of their own
            raise CannotCompile(f"OpenVINO cannot convert the network ({first_line(error)})") from error
        height, width = (-1, -1) if work.any_size else work.example.shape[1:3]
        images, sizes_hw = model.inputs
        model.reshape({images: [-1, height, width, 3], sizes_hw: [-1, 2]})
        return model

    def _forward(self, compiled: Any) -> Forward:
        request = compiled.create_infer_request()

        def forward(images: Tensor, sizes_hw: Tensor) -> tuple[Tensor, ...]:
            try:
                # Inputs are read where they lie; outputs are copied out of memory that the next call overwrites.
                found = request.infer([images.numpy(), sizes_hw.numpy()], share_inputs=True, share_outputs=False)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            else:
                return tuple(torch.from_numpy(found[index]) for index in range(len(compiled.outputs)))
            raise does_not_fit(images, self.device)

        return forward
