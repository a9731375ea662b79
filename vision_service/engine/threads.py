"""How many threads do what: decode workers and the runtime's own threads, set together from the usable cores."""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from vision_service.engine.slices import usual_slices

T = TypeVar("T")

CGROUP_V2 = Path("/sys/fs/cgroup/cpu.max")
CGROUP_V1 = Path("/sys/fs/cgroup/cpu")

_SPINS = "10000"
"""How often a thread of torch's looks whether there is more to do before it sleeps: enough for the next layer of a
network that torch runs, and no more."""


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
        runtime_threads: threads inside one forward pass on the CPU that runs alone.
        forward_passes: forward passes of one model that may run on the CPU at one time.
        cores: what is shared out.
    """

    decode_workers: int
    runtime_threads: int
    forward_passes: int = 1
    cores: int = field(default=1, compare=False)

    @classmethod
    def plan(
        cls, cores: int, *, on_gpu: bool, decode_workers: int = 0, runtime_threads: int = 0, forward_passes: int = 0
    ) -> ThreadBudget:
        """Split the cores; values above 0 are taken as given.

        On a CPU every core runs the network and as many workers decode: decoding fills the gaps between batches. Under
        load two passes at a time have half of the cores each: the threads of a pass wait for each other at every
        layer, and whatever else needs a core for a moment then holds up half as many of them.
        On a GPU the network needs one core to launch kernels and the others decode.
        """
        if on_gpu:
            passes = 1
        else:
            passes = forward_passes or (max(1, cores // runtime_threads) if runtime_threads else min(2, cores))
        return cls(
            decode_workers=decode_workers or (max(1, cores - 1) if on_gpu else cores),
            runtime_threads=runtime_threads or (1 if on_gpu else cores),
            forward_passes=passes,
            cores=cores,
        )

    @property
    def threads_beside(self) -> int:
        """Threads inside one forward pass on the CPU beside which others run."""
        return min(self.runtime_threads, max(1, self.cores // self.forward_passes))

    def apply(self) -> None:
        """Set OpenCV to one thread a call, and silent, and torch to the runtime's share, for the whole process."""
        import cv2
        import torch

        cv2.setNumThreads(1)
        # What is wrong with an image is said to its sender, not on stderr.
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
        torch.set_num_threads(self.runtime_threads)


def limit_spinning() -> None:
    """Have torch's threads sleep soon after they were needed. Takes effect before torch is imported, and only then.

    Their OpenMP (GNU's) otherwise looks for work for milliseconds after each softmax of a batch, on cores that the
    decoders and OpenVINO have use for. Whoever sets ``GOMP_SPINCOUNT`` or ``OMP_WAIT_POLICY`` decides.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)


def be_nicer(nice: int) -> None:
    """Let other threads have a core before the calling one, and before those that it will start.

    Being nicer also means no `short_slices`, if the thread that started this one has them.

    Args:
        nice: added to the thread's own; 0 changes nothing. It cannot be taken back.
    """
    if nice > 0:
        usual_slices()
        thread = threading.get_native_id()  # on Linux priorities are a thread's, not a process's
        os.setpriority(os.PRIO_PROCESS, thread, min(19, os.getpriority(os.PRIO_PROCESS, thread) + nice))


def in_a_nicer_thread(run: Callable[[], T], nice: int, *, name: str) -> T:
    """Run something in a thread of its own, see `be_nicer`; returns and raises what it does."""
    done: Future[T] = Future()
    threading.Thread(target=_run_nicer, args=(run, nice, done), name=name, daemon=True).start()
    try:
        return done.result()
    finally:
        del done  # an error holds this frame, which would hold the error, and with it what it was about


def _run_nicer(run: Callable[[], T], nice: int, done: Future[T]) -> None:
    try:
        be_nicer(nice)
        done.set_result(run())
    except BaseException as error:
        done.set_exception(error)
    finally:
        del done, run  # as above


class ForwardGate:
    """Lets forward passes have so many cores of the CPU at one time, in the order in which they came.

    Twice as many threads as cores would cost more than taking turns, and one model's backlog would slow down all
    others.

    Args:
        cores: how many; who wants more gets them all.
    """

    def __init__(self, cores: int = 1) -> None:
        self.cores = cores
        self._free = cores
        self._lock = threading.Lock()
        self._waiting: deque[tuple[int, threading.Event]] = deque()

    def acquire(self, wanted: int) -> None:
        """Wait for cores, behind whoever waits already."""
        wanted = min(wanted, self.cores)
        with self._lock:
            if not self._waiting and wanted <= self._free:
                self._free -= wanted
                return
            turn = threading.Event()
            self._waiting.append((wanted, turn))
        turn.wait()

    def try_acquire(self, wanted: int) -> bool:
        """Take cores if they are free and nobody waits."""
        with self._lock:
            if self._waiting or wanted > self._free:
                return False
            self._free -= wanted
            return True

    def release(self, count: int) -> None:
        """Give cores back; they go to whoever has waited longest."""
        with self._lock:
            self._free += min(count, self.cores)
            while self._waiting and self._waiting[0][0] <= self._free:
                wanted, turn = self._waiting.popleft()
                self._free -= wanted
                turn.set()


class GateShare:
    """One model's way through the gate. See `batcher.Gate`.

    Args:
        gate: of all models.
        beside: cores of a pass beside which others run.
        alone: cores of a pass that runs alone.
    """

    def __init__(self, gate: ForwardGate, *, beside: int, alone: int) -> None:
        self._gate = gate
        self._beside = min(beside, gate.cores)
        self._more = min(alone, gate.cores) - self._beside

    def acquire(self) -> None:
        """Wait for a turn beside others."""
        self._gate.acquire(self._beside)

    def widen(self) -> bool:
        """Have the other cores as well, if nobody uses them or waits for any."""
        return self._gate.try_acquire(self._more)

    def release(self, *, wide: bool) -> None:
        """Give the turn back."""
        self._gate.release(self._beside + (self._more if wide else 0))
