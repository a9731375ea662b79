"""What a runtime promises: the same network, executed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from vision_service.errors import ConfigError
from vision_service.runtimes.calibration import Calibration

Precision = Literal["fp32", "bf16", "fp16", "int8"]

Forward = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
"""uint8 images ``[N, h, w, 3]`` and int64 sizes ``[N, 2]`` (height and width of each picture, the rest is padding), on
the CPU, in; dense tensors, batch first, on the runtime's device out.

The input may be a view of memory that is written again as soon as the call has returned: no output shares it, and
nothing is pending on the device. Outputs are the caller's: a later call does not change them. One call at a time.
"""


@dataclass(frozen=True, slots=True)
class Forwards:
    """A network as several functions; called itself, it is the first.

    Attributes:
        alone: has the threads of a pass that runs alone.
        beside: have each the threads of a pass beside which others run, and may be called at the same time: one call
            of each, and none of ``alone``.
    """

    alone: Forward
    beside: tuple[Forward, ...]

    def __call__(self, images: Tensor, sizes_hw: Tensor) -> tuple[Tensor, ...]:
        """See `Forward`."""
        return self.alone(images, sizes_hw)


class CannotCompile(ConfigError):
    """This network, in this precision, is not for this runtime; another one may do. The message is the reason."""


@dataclass(frozen=True, slots=True)
class Execution:
    """What the process gives its runtimes.

    Attributes:
        threads: inside one forward pass on the CPU; 0: as many as torch uses in this process.
        cache_dir: where compiled networks are kept for the next start; ``None``: nowhere.
        passes: how many forward passes of a network shall be possible at one time, on the CPU.
        threads_beside: inside each of those.
        nice: by how much the threads that compute are nicer than the one that loads the model, see `nice(2)`.
    """

    threads: int = 0
    cache_dir: Path | None = None
    passes: int = 1
    threads_beside: int = 1
    nice: int = 0


@dataclass(frozen=True, slots=True)
class Workload:
    """What a network will be given, and what is known of it.

    Attributes:
        example: images of the kind it will see, ``[1, h, w, 3]``, uint8 or, for ``bilinear_float``, float32.
        max_batch_size: the largest batch.
        any_size: whether heights and widths other than the example's will come.
        described: what decides how the network was built, such as its options; with its parameters and its code, what
            tells it from others in the cache.
        calibration: the images that an int8 network's scales are measured on; ``None``: there are none.
    """

    example: Tensor
    max_batch_size: int = 8
    any_size: bool = False
    described: str = ""
    calibration: Calibration | None = None

    @property
    def identity(self) -> str:
        """`described`, and the type of the pixels: a graph compiled for one type silently rounds the other."""
        return f"{self.described} {self.example.dtype}"


class Runtime(ABC):
    """One way to execute a network on one device.

    Attributes:
        name: in the table of runtimes.
        precisions: what it can run in, by the kind of device; a kind that is not there it cannot use.

    Args:
        device: where it runs.
        execution: what it may use.

    Raises:
        ConfigError: a package is missing (the message says how to install it), or the device is not for it.
    """

    name: ClassVar[str]
    precisions: ClassVar[Mapping[str, tuple[Precision, ...]]]

    def __init__(self, device: torch.device, execution: Execution | None = None) -> None:
        self.device = device
        self.execution = execution or Execution()
        if device.type not in self.precisions:
            kinds = " or ".join(self.precisions)
            raise ConfigError(f"runtime {self.name} runs on {kinds}, not on {device}; use runtime auto")

    @property
    def threads(self) -> int:
        """Threads inside one forward pass on the CPU."""
        return self.execution.threads or torch.get_num_threads()

    @property
    def version(self) -> str:
        """Of the library that executes."""
        return torch.__version__

    def check_precision(self, precision: Precision) -> None:
        """Refuse what this runtime has not got.

        Raises:
            ConfigError: says what there is.
        """
        have = self.precisions[self.device.type]
        if precision not in have:
            advice = "; fp16 needs a GPU" if precision == "fp16" and self.device.type == "cpu" else ""
            raise ConfigError(
                f"runtime {self.name} has no precision {precision} on {self.device}: "
                f"use {', '.join(have)} or auto{advice}"
            )

    @abstractmethod
    def compile(self, network: nn.Module, work: Workload, precision: Precision) -> Forward:
        """Make a network ready to run.

        Args:
            network: takes uint8 ``[N, h, w, 3]`` RGB and int64 sizes ``[N, 2]``, returns a tuple of dense tensors.
            work: what it will be given.
            precision: of the arithmetic; one of `precisions`.

        Returns:
            The network as a function; `Forwards` where several passes are wanted and this runtime has them.

        Raises:
            CannotCompile: the network is not for this runtime.
            ConfigError: this runtime cannot run in that precision on its device.
            DeviceOutOfMemory: from the returned function, when the batch does not fit.
        """


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a library's error says that memory ran short: on the CPU they have no class of their own for it."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    said = ("DefaultCPUAllocator: can't allocate memory", "std::bad_alloc", "bad allocation")
    return isinstance(error, RuntimeError) and any(words in str(error) for words in said)
