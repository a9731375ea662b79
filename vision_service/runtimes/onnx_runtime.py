"""Runtime ``onnxruntime``: the network as an ONNX graph in ONNX Runtime, on the CPU."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vision_service.errors import ConfigError
from vision_service.runtimes._exported import check_conversion, export_network, first_line
from vision_service.runtimes.base import (
    CannotCompile,
    Execution,
    Forward,
    Precision,
    Runtime,
    Workload,
    is_out_of_memory,
)
from vision_service.runtimes.cache import CompileCache, copy_into
from vision_service.runtimes.fingerprint import fingerprint
from vision_service.runtimes.torch_eager import does_not_fit

_FILE = "network.onnx"
_NEEDED = ("onnxruntime", "onnxscript")  # the second writes the graph


class OnnxRuntime(Runtime):
    """Writes the network as an ONNX graph, by torch's own exporter, and runs it on the CPU.

    Outputs agree with the network's own to 1e-5 of the largest value in the tests; a conversion that disagrees is
    refused.
    """

    name = "onnxruntime"
    precisions: ClassVar[Mapping[str, tuple[Precision, ...]]] = {"cpu": ("fp32",)}

    def __init__(self, device: torch.device, execution: Execution | None = None) -> None:
        super().__init__(device, execution)
        for package in _NEEDED:
            try:
                import_module(package)
            except ImportError as error:
                raise ConfigError(
                    f"{package} is not installed: pip install 'vision-service[onnxruntime]' ({error})"
                ) from None
        self._library: Any = import_module("onnxruntime")
        self._cache = CompileCache(self.execution.cache_dir)

    @property
    def version(self) -> str:
        """ONNX Runtime's."""
        return str(self._library.__version__)

    def compile(self, network: nn.Module, work: Workload, precision: Precision) -> Forward:
        """See `Runtime.compile`."""
        self.check_precision(precision)
        shape = [-1, -1] if work.any_size else list(work.example.shape[1:3])
        identity = fingerprint(network.eval(), work.identity) if self._cache.folder is not None else ""
        parts = [self.name, self.version, identity, precision, str(shape)]
        entry = self._cache.find(*parts)
        if entry is not None:
            return self._forward(entry / _FILE)
        with tempfile.TemporaryDirectory() as folder:
            made = Path(folder) / _FILE
            _write(network, work, made)
            forward = self._forward(made)
            check_conversion(forward, network, work)
            self._cache.store(lambda entry: copy_into(Path(folder), entry), *parts)
        return forward

    def _forward(self, file: Path) -> Forward:
        options = self._library.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.log_severity_level = 3
        # Threads that wait by spinning take the cores from the decoders.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            session = self._library.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its errors have no base class of their own
            raise CannotCompile(f"ONNX Runtime cannot load the network: {first_line(error)}") from error
        names = [node.name for node in session.get_inputs()]

        def forward(images: Tensor, sizes_hw: Tensor) -> tuple[Tensor, ...]:
            try:
                given = dict(zip(names, (images.contiguous().numpy(), sizes_hw.contiguous().numpy()), strict=True))
                return tuple(torch.from_numpy(output) for output in session.run(None, given))
            except Exception as error:  # as above
                if not is_out_of_memory(error):
                    raise
            raise does_not_fit(images, self.device)

        return forward


def _write(network: nn.Module, work: Workload, file: Path) -> None:
    """The network as an ONNX file; parameters of more than 2 GB go into a second one beside it."""
    exported = export_network(network, work)
    try:
        with warnings.catch_warnings(), _quiet("torch.onnx", "onnxscript", "onnx_ir"):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(exported, verbose=False)
            assert program is not None, "made from an exported program, not written to a file"
            program.save(file)
    except Exception as error:  # of many kinds
        raise CannotCompile(f"torch cannot write the network as ONNX: {first_line(error)}") from error


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Loggers that tell of their own workings, silenced."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
