"""Runtime ``torch_compile``: the network compiled ahead of time by torch's inductor, with its parameters frozen in."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import _inductor as inductor
from torch import nn
from torch.export import ExportedProgram

from vision_service.errors import ConfigError
from vision_service.runtimes._exported import check_conversion, export_network, first_line
from vision_service.runtimes.base import CannotCompile, Execution, Forward, Precision, Runtime, Workload
from vision_service.runtimes.cache import CompileCache, copy_into
from vision_service.runtimes.fingerprint import fingerprint
from vision_service.runtimes.torch_eager import run_on, to_device

_FILE = "network.pt2"


class TorchCompile(Runtime):
    """Exports the network for any batch size and lets inductor write and compile C++ (or Triton) for it.

    The first start takes a C++ compiler and some minutes of it; the next ones read what came out from the cache.
    """

    name = "torch_compile"
    precisions: ClassVar[Mapping[str, tuple[Precision, ...]]] = {
        "cpu": ("fp32", "bf16"),
        "cuda": ("fp32", "bf16", "fp16"),
    }

    def __init__(self, device: torch.device, execution: Execution | None = None) -> None:
        super().__init__(device, execution)
        if shutil.which("g++") is None and shutil.which("clang++") is None:
            raise ConfigError("runtime torch_compile needs a C++ compiler: apt-get install g++, or use runtime torch")
        self._cache = CompileCache(self.execution.cache_dir)

    def compile(self, network: nn.Module, work: Workload, precision: Precision) -> Forward:
        """See `Runtime.compile`."""
        self.check_precision(precision)
        shape = [-1, -1] if work.any_size else list(work.example.shape[1:3])
        identity = fingerprint(network.eval(), work.identity) if self._cache.folder is not None else ""
        # The number of threads stands in the code that is made.
        parts = [self.name, self.version, identity, precision, str(self.device), str(shape), str(self.threads)]
        entry = self._cache.find(*parts)
        if entry is not None:
            return run_on(_load(entry / _FILE), self.device)
        with tempfile.TemporaryDirectory() as folder:
            made = Path(folder) / _FILE
            _compile(export_network(to_device(network, self.device, precision), work), made)
            forward = run_on(_load(made), self.device)
            if precision == "fp32" and self.device.type == "cpu":
                check_conversion(forward, network, work)
            self._cache.store(lambda entry: copy_into(Path(folder), entry), *parts)
            return forward


def _compile(exported: ExportedProgram, to: Path) -> None:
    try:
        with torch.no_grad(), inductor.config.patch(freezing=True), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the libraries' own code
            inductor.aoti_compile_and_package(exported, package_path=str(to))
    except Exception as error:  # of many kinds, the C++ compiler's among them
        raise CannotCompile(f"inductor cannot compile the network: {first_line(error)}") from error


def _load(package: Path) -> Any:
    """The function in a package; the file may go once it is loaded."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return inductor.aoti_load_package(str(package))
