"""Runtime ``openvino``: the network as an OpenVINO graph on the CPU."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vision_service.errors import ConfigError
from vision_service.runtimes import _int8
from vision_service.runtimes._buckets import bucket_of, bucket_sizes, fill_up
from vision_service.runtimes._exported import check_conversion, export_network, first_line
from vision_service.runtimes._openvino_library import load_library, logs_as_they_are
from vision_service.runtimes.base import (
    CannotCompile,
    Execution,
    Forward,
    Forwards,
    Precision,
    Runtime,
    Workload,
    is_out_of_memory,
)
from vision_service.runtimes.cache import CompileCache
from vision_service.runtimes.fingerprint import fingerprint
from vision_service.runtimes.torch_eager import does_not_fit

_HINTS = {"fp32": "f32", "bf16": "bf16", "int8": "f32"}
_FILE = "network.xml"


class OpenVino(Runtime):
    """Converts the network by `torch.export` and runs it with as many threads, and passes at a time, as it is given.

    Outputs in fp32 agree with the network's own to 1e-5 of the largest value in the tests; a conversion that disagrees
    is refused. Networks that cannot be exported for any batch size (torchvision's two-stage detectors) are compiled for
    some, and batches are filled up.
    """

    name = "openvino"
    precisions: ClassVar[Mapping[str, tuple[Precision, ...]]] = {"cpu": ("fp32", "bf16", "int8")}

    def __init__(self, device: torch.device, execution: Execution | None = None) -> None:
        super().__init__(device, execution)
        self._openvino = load_library("openvino", "openvino")
        self._core: Any = self._openvino.Core()
        self._cache = CompileCache(self.execution.cache_dir)

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
        if precision == "int8":
            _int8.need_calibration(work)
        identity = fingerprint(network.eval(), work.identity) if self._cache.folder is not None else ""
        try:
            return self._forwards(self._model(network, work, precision, identity, None), precision)
        except CannotCompile:
            if work.any_size:  # as many sizes as the photos have, each to be compiled
                raise
        sizes = bucket_sizes(work.max_batch_size)
        forwards = {
            size: self._forward(self._model(network, work, precision, identity, size), precision) for size in sizes
        }

        def forward(images: Tensor, sizes_hw: Tensor) -> tuple[Tensor, ...]:
            count = len(images)
            size = bucket_of(count, sizes)
            outputs = forwards[size](fill_up(images, size), fill_up(sizes_hw, size))
            return tuple(output[:count] for output in outputs)

        return forward

    def _model(self, network: nn.Module, work: Workload, precision: Precision, identity: str, batch: int | None) -> Any:
        """Takes uint8 ``[?, h, w, 3]`` and int64 ``[?, 2]``; comes from the cache, or is made and kept there."""
        shape = [-1 if batch is None else batch, *([-1, -1] if work.any_size else work.example.shape[1:3]), 3]
        parts = ["openvino", self.version, identity, str(shape)]
        if precision == "int8":
            nncf = load_library("nncf", "int8")
            # Folders may be shared by machines.
            parts += ["int8", f"weights {_int8.weight_bits()}", nncf.__version__, _int8.need_calibration(work).digest()]
        entry = self._cache.find(*parts)
        if entry is not None:
            return self._core.read_model(entry / _FILE)
        model = self._convert(network, work, batch, shape)
        if precision == "int8":
            model = _int8.quantize(model, work)

        def write(folder: Path) -> None:
            self._openvino.save_model(model, folder / _FILE, compress_to_fp16=False)

        self._cache.store(write, *parts)
        return model

    def _convert(self, network: nn.Module, work: Workload, batch: int | None, shape: list[int]) -> Any:
        exported = export_network(network, work, batch)
        try:
            with warnings.catch_warnings(), logs_as_they_are():
                warnings.simplefilter("ignore")
                model = self._openvino.convert_model(exported)
        except Exception as error:  # its errors have no base class of their own
            raise CannotCompile(f"OpenVINO cannot convert the network: {_unknown_operations(error)}") from error
        images, sizes_hw = model.inputs
        model.reshape({images: shape, sizes_hw: [shape[0], 2]})
        check_conversion(self._forward(model, "fp32"), network, work, batch)
        return model

    def _forwards(self, model: Any, precision: Precision) -> Forward:
        """With all threads, and once more with as many streams as passes are wanted, which share their parameters."""
        alone, passes = self._forward(model, precision), self.execution.passes
        if passes < 2:
            return alone
        compiled = self._compiled(model, precision, passes * self.execution.threads_beside, passes)
        return Forwards(alone, tuple(self._function(compiled) for _ in range(passes)))

    def _forward(self, model: Any, precision: Precision) -> Forward:
        return self._function(self._compiled(model, precision, self.threads, 1))

    def _compiled(self, model: Any, precision: Precision, threads: int, streams: int) -> Any:
        hints = {
            "INFERENCE_PRECISION_HINT": _HINTS[precision],  # by itself it takes bf16 where there is any
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": streams,
            "PERFORMANCE_HINT": "LATENCY",
            "ENABLE_CPU_PINNING": False,  # several models, and the decoders, share the cores
        }
        try:
            return self._core.compile_model(model, "CPU", hints)
        except RuntimeError as error:
            raise CannotCompile(f"OpenVINO cannot compile the network: {first_line(error)}") from error

    def _function(self, compiled: Any) -> Forward:
        """One request after the other."""
        request, count = compiled.create_infer_request(), len(compiled.outputs)

        def forward(images: Tensor, sizes_hw: Tensor) -> tuple[Tensor, ...]:
            try:
                # Inputs are read where they lie; outputs are copied out of memory that the next call overwrites.
                found = request.infer([images.numpy(), sizes_hw.numpy()], share_inputs=True, share_outputs=False)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            else:
                return tuple(torch.from_numpy(found[index]) for index in range(count))
            raise does_not_fit(images, self.device)

        return forward


def _unknown_operations(error: BaseException) -> str:
    """What the converter has no rule for, which it says below a line about its own source; else the first line."""
    found = [line.strip(" -") for line in str(error).splitlines() if "No conversion rule found" in line]
    return re.sub(r"<function (\w+) at \w+>", r"\1", "; ".join(found)) or first_line(error)
