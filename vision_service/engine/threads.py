"""How many threads do what: decode workers and the runtime's own threads, set together from the usable cores."""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

CGROUP_V2 = Path("/sys/fs/cgroup/cpu.max")
CGROUP_V1 = Path("/sys/fs/cgroup/cpu")


def usable_cores() -> int:
    """Cores this process may use: its affinity mask, cut by the container's CPU quota, at least 1."""
    return max(1, min(len(os.sched_getaffinity(0)), quota_cores(CGROUP_V2, CGROUP_V1)))


def quota_cores(v2: Path, v1: Path) -> int:
    """Cores that a container's CPU quota amounts to, rounded up; very many where there is no quota.

    Args:
        v2: the file ``cpu.max`` of control groups version 2.
        v1: the folder of the ``cpu`` controller of version 1.
    """
    try:
        if v2.is_file():
            quota, period = v2.read_text().split()[:2]
        else:
            quota, period = ((v1 / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        return math.ceil(int(quota) / int(period)) if int(quota) > 0 else 1_000_000
    except (OSError, ValueError):  # no control groups, or "max"
        return 1_000_000


@dataclass(frozen=True, slots=True)
class ThreadBudget:
    """Who gets how many threads.

    Attributes:
        decode_workers: threads that decode and preprocess, each single-threaded inside.
        runtime_threads: threads inside one forward pass on the CPU.
        cores: what is shared out.
    """

    decode_workers: int
    runtime_threads: int
    cores: int = field(default=1, compare=False)

    @classmethod
    def plan(cls, cores: int, *, on_gpu: bool, decode_workers: int = 0, runtime_threads: int = 0) -> ThreadBudget:
        """Split the cores; values above 0 are taken as given.

        On a CPU every core runs the network and as many workers decode: decoding fills the gaps between batches.
        On a GPU the network needs one core to launch kernels and the others decode.
        """
        return cls(
            decode_workers=decode_workers or (max(1, cores - 1) if on_gpu else cores),
            runtime_threads=runtime_threads or (1 if on_gpu else cores),
            cores=cores,
        )

    @property
    def passes(self) -> int:
        """Forward passes that may run on the CPU at one time without more threads than cores."""
        return max(1, self.cores // self.runtime_threads)

    def apply(self) -> None:
        """Set OpenCV to one thread a call, and silent, and torch to the runtime's share, for the whole process."""
        import cv2
        import torch

        cv2.setNumThreads(1)
        # What is wrong with an image is said to its sender, not on stderr.
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
        torch.set_num_threads(self.runtime_threads)


class ForwardGate:
    """Lets so many forward passes run on the CPU at one time, in the order in which they came.

    Each pass uses as many threads as the budget gives it. Two at a time would be twice as many threads as cores, which
    costs more than taking turns, and one model's backlog would slow down all others.

    Args:
        passes: how many at one time.
    """

    def __init__(self, passes: int = 1) -> None:
        self._free = passes
        self._lock = threading.Lock()
        self._waiting: deque[threading.Event] = deque()

    def acquire(self) -> None:
        """Wait for a turn."""
        with self._lock:
            if self._free > 0:
                self._free -= 1
                return
            turn = threading.Event()
            self._waiting.append(turn)
        turn.wait()

    def release(self) -> None:
        """Give the turn to whoever has waited longest."""
        with self._lock:
            if self._waiting:
                self._waiting.popleft().set()
            else:
                self._free += 1

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *exc_info: object) -> None:
        self.release()
