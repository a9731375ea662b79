"""CPU time and memory of processes on this machine, from the kernel's own counters."""

from __future__ import annotations

import contextlib
import platform
import time
from pathlib import Path


def cpu_s(pid: int) -> float:
    """CPU time that a process used so far, all its threads together, seconds; nanosecond resolution.

    Args:
        pid: of a process on this machine.

    Raises:
        OSError: there is no such process.
    """
    # clock_getcpuclockid(3): the process's number, inverted, shifted by three, and 2 for "time on the scheduler".
    return time.clock_gettime((~pid << 3) | 2)


def memory_mb(pid: int, field: str = "VmRSS") -> float:
    """Memory of a process, MiB.

    Args:
        pid: of a process on this machine.
        field: of ``/proc/PID/status``: ``VmRSS`` is now, ``VmHWM`` the most since the start or `reset_peak`.

    Returns:
        0 where the kernel does not say.
    """
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    return 0.0


def reset_peak(pid: int) -> None:
    """Let ``VmHWM`` count from now; where the kernel does not allow it, it goes on from the start of the process."""
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/clear_refs").write_text("5")


def cpu_model() -> str:
    """What the processor calls itself."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
