"""Runtime ``tensorrt``: the network as TensorRT engines, by torch-tensorrt.

Never run: no machine with a GPU and torch-tensorrt was at hand. ``tests/gpu`` has its tests.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from vision_service.errors import ConfigError
from vision_service.runtimes._exported import export_network, first_line
from vision_service.runtimes.base import CannotCompile, Execution, Forward, Precision, Runtime, Workload
from vision_service.runtimes.cache import CompileCache, copy_into
from vision_service.runtimes.fingerprint import fingerprint
from vision_service.runtimes.torch_eager import run_on, to_device

logger = logging.getLogger(__name__)

_FILE = "network.ep"


class TensorRt(Runtime):
    """Compiles the exported network for batches from one to the largest; what TensorRT has not got stays in torch."""

    name = "tensorrt"
    precisions: ClassVar[Mapping[str, tuple[Precision, ...]]] = {"cuda": ("fp32", "bf16", "fp16")}

    def __init__(self, device: torch.device, execution: Execution | None = None) -> None:
        super().__init__(device, execution)
        try:
            self._library: Any = import_module("torch_tensorrt")
        except ImportError as error:
            raise ConfigError(
                f"torch_tensorrt is not installed: pip install 'vision-service[tensorrt]' ({error})"
            ) from None
        self._cache = CompileCache(self.execution.cache_dir)

    @property
    def version(self) -> str:
        """Torch-TensorRT's."""
        return str(self._library.__version__)

    def compile(self, network: nn.Module, work: Workload, precision: Precision) -> Forward:
        """See `Runtime.compile`."""
        self.check_precision(precision)
        if work.any_size:
            raise CannotCompile("engines are built for one input size, and this model's inputs differ in size")
        identity = fingerprint(network.eval(), work.identity) if self._cache.folder is not None else ""
        gpu = torch.cuda.get_device_name(self.device)  # an engine is for one kind of GPU
        shape = [work.max_batch_size, *work.example.shape[1:3]]
        parts = [self.name, self.version, torch.__version__, identity, precision, str(shape), gpu]
        entry = self._cache.find(*parts)
        if entry is not None:
            return run_on(self._library.load(str(entry / _FILE)).module(), self.device)
        module = self._compile(to_device(network, self.device, precision), work)
        with tempfile.TemporaryDirectory() as folder:
            try:
                self._library.save(module, str(Path(folder) / _FILE), output_format="exported_program", retrace=False)
                self._cache.store(lambda entry: copy_into(Path(folder), entry), *parts)
            except Exception as error:  # engines that cannot be saved can be run all the same
                logger.warning("the TensorRT engines are built anew at the next start: %s", first_line(error))
        return run_on(module, self.device)

    def _compile(self, module: nn.Module, work: Workload) -> Any:
        height, width = work.example.shape[1:3]
        most = work.max_batch_size

        def bounds(*rest: int) -> dict[str, tuple[int, ...]]:
            return {"min_shape": (1, *rest), "opt_shape": (max(1, most // 2), *rest), "max_shape": (most, *rest)}

        inputs = [
            self._library.Input(dtype=work.example.dtype, **bounds(height, width, 3)),
            self._library.Input(dtype=torch.int64, **bounds(2)),
        ]
        try:
            # Parameters have the precision already: "explicit typing" keeps float32 where the network asks for it.
            return self._library.dynamo.compile(
                export_network(module, work), inputs=inputs, use_explicit_typing=True, min_block_size=1
            )
        except CannotCompile:
            raise
        except Exception as error:  # of many kinds
            raise CannotCompile(f"torch-tensorrt cannot compile the network: {first_line(error)}") from error
