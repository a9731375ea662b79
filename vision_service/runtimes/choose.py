"""Which runtime a network runs in: the one that was asked for, or what ``auto`` finds, with the reason."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from vision_service.errors import ConfigError
from vision_service.runtimes.base import CannotCompile, Execution, Forward, Forwards, Precision, Workload
from vision_service.runtimes.table import AUTO, create_runtime

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Compiled:
    """A network in a runtime.

    Attributes:
        forward: runs it.
        runtime: name of the runtime.
        precision: of the arithmetic.
        reason: why this runtime, for people.
    """

    forward: Forward
    runtime: str
    precision: Precision
    reason: str

    @property
    def beside(self) -> tuple[Forward, ...]:
        """Functions for passes at one time, see `Forwards`; none where the network runs alone only."""
        return self.forward.beside if isinstance(self.forward, Forwards) else ()

    def __str__(self) -> str:
        return f"runtime {self.runtime}, {self.precision} ({self.reason})"


def choose_precision(wanted: Literal["auto", "fp32", "bf16", "fp16", "int8"], device: torch.device) -> Precision:
    """``auto`` is fp32 on a CPU, so that what is served is what the libraries compute, and fp16 on a GPU."""
    if wanted != "auto":
        return wanted
    return "fp16" if device.type == "cuda" else "fp32"


def compile_network(
    network: nn.Module,
    work: Workload,
    *,
    runtime: str,
    precision: Precision,
    device: torch.device,
    execution: Execution | None = None,
    own_runtime: str = "",
) -> Compiled:
    """Compile a network with a runtime, or with the first that ``auto`` may use and that can.

    Args:
        network: see `Runtime.compile`.
        work: see `Runtime.compile`.
        runtime: a name, or ``auto``.
        precision: see `Runtime.compile`.
        device: where it is to run.
        execution: what it may use.
        own_runtime: the runtime that the network brings with it and calls itself; empty: none.

    Raises:
        ConfigError: the named runtime cannot run it, or none of ``auto``'s can; says why and what to do.
    """
    if own_runtime:
        return _run_by_itself(network, work, runtime, precision, device, execution, own_runtime)
    if runtime != "auto":
        forward = create_runtime(runtime, device, execution).compile(network, work, precision)
        return Compiled(forward, runtime, precision, "chosen by name")
    refusals: list[str] = []
    for name in AUTO[device.type]:
        try:
            candidate = create_runtime(name, device, execution)
            candidate.check_precision(precision)
            forward = candidate.compile(network, work, precision)
        except ConfigError as error:
            if isinstance(error, CannotCompile):
                logger.warning("runtime %s cannot take the network, another is tried: %s", name, str(error))
            refusals.append(f"not {name}: {error}")
            continue
        return Compiled(forward, name, precision, "; ".join((f"auto on {device.type}", *refusals)))
    raise ConfigError(f"no runtime can run this in {precision} on {device}: {'; '.join(refusals)}")


def _run_by_itself(
    network: nn.Module,
    work: Workload,
    runtime: str,
    precision: Precision,
    device: torch.device,
    execution: Execution | None,
    own_runtime: str,
) -> Compiled:
    if runtime not in ("auto", own_runtime):
        raise ConfigError(f"this model's file is run by {own_runtime} itself; use runtime auto or {own_runtime}")
    if precision in ("bf16", "int8"):
        raise ConfigError(f"this model's file, run by {own_runtime}, has its own precision; use precision auto")
    forward = create_runtime("torch", device, execution).compile(network, work, precision)
    return Compiled(forward, own_runtime, precision, f"the backend runs its file in {own_runtime} itself")
