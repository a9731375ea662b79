"""Real Ray nodes on this machine, each a process of its own that can be killed."""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.helpers import PLUGINS, ROOT

RAY = Path(sys.executable).with_name("ray")
_PR_SET_PDEATHSIG = 1


class TwoNodes:
    """A head and a worker with two cores each; the driver is on the head's."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ray"))  # short: sockets lie in it, whose paths are limited
        self.environment = os.environ | {
            "HOME": str(self.folder),
            "PYTHONPATH": os.pathsep.join((str(PLUGINS), str(ROOT))),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_TMPDIR": str(self.folder),
            "RAY_USAGE_STATS_ENABLED": "0",
            # A killed node is missed after seconds instead of half a minute.
            "RAY_health_check_period_ms": "500",
            "RAY_health_check_timeout_ms": "2000",
        }
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{probe.getsockname()[1]}"
        self._processes: list[subprocess.Popen] = []

    def start(self) -> None:
        """Returns when both say that they run."""
        head = ["--head", f"--port={self.address.partition(':')[2]}", "--include-dashboard=false"]
        self._start("head", *head)
        self._wait_for("head")
        self.worker = self._start("worker", f"--address={self.address}")
        self._wait_for("worker")

    def _start(self, name: str, *arguments: str) -> subprocess.Popen:
        common = ["--num-cpus=2", "--object-store-memory=100000000", "--node-ip-address=127.0.0.1", "--block"]
        with (self.folder / f"{name}.log").open("w") as log:
            command = [RAY, "start", *arguments, *common]
            process = subprocess.Popen(
                command, stdout=log, stderr=log, env=self.environment, start_new_session=True, preexec_fn=_end_with_us
            )
        self._processes.append(process)
        return process

    def _wait_for(self, name: str) -> None:
        """Until a node says that it runs."""
        deadline_s = time.monotonic() + 110
        log = self.folder / f"{name}.log"
        while "Ray runtime started" not in log.read_text():
            assert time.monotonic() < deadline_s, log.read_text()
            time.sleep(0.1)

    def kill(self, process: subprocess.Popen) -> None:
        """At once and with all that it started, as when a machine loses power."""
        for pid in [*descendants(process.pid), process.pid]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        process.wait()

    def close(self) -> None:
        for process in reversed(self._processes):
            if process.poll() is None:
                self.kill(process)
        shutil.rmtree(self.folder, ignore_errors=True)


def _end_with_us() -> None:
    """Have the kernel send SIGTERM when whoever runs the tests is killed, and can clean up nothing (prctl(2))."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


@contextmanager
def two_nodes() -> Iterator[TwoNodes]:
    """A cluster that is gone afterwards, whatever happens."""
    cluster = TwoNodes()
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.close()


def descendants(pid: int) -> list[int]:
    """Process ids of children and theirs."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [found for child in map(int, children) for found in (child, *descendants(child))]
