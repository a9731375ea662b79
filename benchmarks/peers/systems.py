"""What is compared: our server, the peers' servers and a bare loop, each started in processes of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from http_load import HttpConnection

from vision_service.bench import served
from vision_service.bench.generators import Generators
from vision_service.bench.load import Load, LoadResult
from vision_service.bench.plan import Plan, Setup, Variant
from vision_service.bench.stats import Percentiles
from vision_service.engine.threads import usable_cores

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SETUP = Setup(manifests=(ROOT / "benchmarks" / "models.toml",))
START_S = 180

Way = Callable[[int], dict]
"""Loads a system with so many calls in flight for one round; what it measured."""


@dataclass(frozen=True)
class Other:
    """Another system, which runs.

    Attributes:
        load: see `Way`.
        still: a context in which its processes stand still.
    """

    load: Way
    still: Callable[[], contextlib.AbstractContextManager[None]]


@dataclass(frozen=True)
class Peer:
    """Another server.

    Attributes:
        package: on PyPI.
        path: of its method and the kind of body, for `HttpConnection`.
        workers: processes that run the network; what ``--tune`` found best on two cores.
    """

    package: str
    path: str
    workers: int


PEERS = {
    "litserve": Peer("litserve", "/predict#form", 1),
    "mosec": Peer("mosec", "/inference#raw", 1),
    "ray": Peer("ray", "/#raw", 1),
}
LOOP = "loop"
OURS = "vision-service"
STREAM = "vision-service-stream"
"""The same server, whose requests come on one stream of Predict."""


@dataclass(frozen=True)
class Job:
    """What a system is to do.

    Attributes:
        model: its name.
        row: ``RUNTIME:PRECISION`` of its network.
        folder: with the JPEG files that are sent.
        images: these files.
        seconds: of a round.
        generators: whose load comes to all systems.
    """

    model: str
    row: str
    folder: Path
    images: list[bytes]
    seconds: float
    generators: Generators

    @property
    def runtime(self) -> str:
        """The first half of ``row``."""
        return self.row.partition(":")[0]

    @property
    def precision(self) -> str:
        """The second half of ``row``."""
        return self.row.partition(":")[2]


@contextlib.contextmanager
def ours(job: Job) -> Iterator[dict[str, Way]]:
    """Our server, by calls and on a stream."""
    # Runtime torch is eager too, but channels-last: what vision-service does where there is no OpenVINO.
    variant = Variant(job.model, "torch" if job.runtime == "eager" else job.runtime, job.precision)
    plan = Plan([variant], SETUP, job.images, seconds=job.seconds)
    with served.server(SETUP, variant) as target:
        target = replace(target, generators=job.generators)
        yield {
            name: lambda in_flight, streamed=streamed: _figures(
                target.load(plan, streamed=streamed, in_flight=in_flight)
            )
            for name, streamed in ((OURS, False), (STREAM, True))
        }


@contextlib.contextmanager
def other(job: Job, system: str, workers: int) -> Iterator[Other]:
    """A peer's server, or the loop.

    Args:
        job: what it is to do.
        system: one of `PEERS`, or `LOOP`.
        workers: processes that run the network.
    """
    with _process(job, system, workers) as (process, port):
        if system == LOOP:
            yield Other(lambda _: _loop_round(process, job), lambda: _still(process))
            return
        address, path = f"127.0.0.1:{port}", PEERS[system].path
        _check(job, system, _wait(process, address, path, job.images[0]))
        load = Load(address, path, job.images, seconds=job.seconds, wire=HttpConnection)
        yield Other(
            lambda in_flight: _figures(job.generators.run(replace(load, in_flight=in_flight))), lambda: _still(process)
        )


def _figures(result: LoadResult) -> dict:
    late = Percentiles.of(result.latencies_s.get("OK", ()))
    return {
        "images_per_s": result.in_time / result.seconds,
        "p50_ms": late.p50 if late else 0.0,
        "p99_ms": late.p99 if late else 0.0,
        "failed": result.ended - len(result.latencies_s.get("OK", ())),
        "generator_ms": 1000 * result.generator_cpu_s / max(1, result.in_time),
    }


def _loop_round(process: subprocess.Popen, job: Job) -> dict:
    process.stdin.write(f"{job.folder} {job.seconds}\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


ANSWERS: dict[tuple, list[list]] = {}
"""What the first peer of a row said about the first image."""


def _check(job: Job, system: str, answer: list[list]) -> None:
    """Every peer must run the same network: a worker that missed its options would go unnoticed otherwise."""
    if job.model == "resnet50":  # random weights, different ones in each process
        return
    first = ANSWERS.setdefault((job.model, job.row), answer)
    (known, score), (found, another) = first[0], answer[0]
    if known != found or abs(score - another) > 0.002:
        raise SystemExit(f"{system} answers {answer[0]}, another peer answered {first[0]}: not the same network")


@contextlib.contextmanager
def _process(job: Job, system: str, workers: int) -> Iterator[tuple[subprocess.Popen, int]]:
    """A peer's server, or the loop, in a session of its own; all of it is gone on the way out."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = LOOP if system == LOOP else f"{system}_server"
    threads = max(1, usable_cores() // workers)
    flags = {"model": job.model, "runtime": job.runtime, "precision": job.precision, "workers": workers}
    flags |= {"port": port, "threads": threads}
    command = [sys.executable, str(HERE / f"{script}.py"), *(f"--{name}={value}" for name, value in flags.items())]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE if system == LOOP else log,
            stderr=log,
            text=True,
            start_new_session=True,
            cwd=HERE,
            env=os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": str(threads)},
        )
        try:
            if system == LOOP and process.stdout.readline() != "ready\n":
                raise SystemExit("the loop did not start")
            yield process, port
        except BaseException:
            log.seek(0)
            sys.stderr.writelines(log.readlines()[-15:])
            raise
        finally:
            _stop(process)


@contextlib.contextmanager
def _still(process: subprocess.Popen) -> Iterator[None]:
    """Let a session of processes wait: LitServe and Ray use 8 to 10 % of two cores while nobody calls them."""
    try:
        while running := [pid for pid, state in _session(process.pid).items() if state not in "TtZX"]:
            _signal(running, signal.SIGSTOP)  # which takes a moment, and meanwhile one may have started another
            time.sleep(0.01)
        yield
    finally:
        _signal(_session(process.pid), signal.SIGCONT)


def _session(leader: int) -> dict[int, str]:
    """The state of each of its processes, by number; proc_pid_stat(5)."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            # The name stands in brackets and may have any character; then state, parent, group, session.
            state, _, _, session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(session) == leader:
                found[int(folder.name)] = state
    return found


def _signal(members: Iterable[int], number: signal.Signals) -> None:
    for pid in members:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _stop(process: subprocess.Popen) -> None:
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(20)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _wait(process: subprocess.Popen, address: str, path: str, image: bytes) -> list[list]:
    """Until it answers an image; returns the answer, best class first."""
    connection = HttpConnection(address, path)
    request = connection.prepare(image)
    head, _, body = request.partition(b"\r\n\r\n")
    kind = head.partition(b"Content-Type: ")[2].split(b"\r\n")[0].decode()
    until_s = time.monotonic() + START_S
    while time.monotonic() < until_s and process.poll() is None:
        asked = urllib.request.Request(f"http://{address}{path.partition('#')[0]}", body, {"Content-Type": kind})
        try:
            with urllib.request.urlopen(asked, timeout=60) as reply:  # noqa: S310 - our own address
                return json.loads(reply.read())["classes"]
        except urllib.error.HTTPError as error:
            if error.code not in (404, 503):  # not up yet
                break
            time.sleep(0.5)
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.5)
    raise SystemExit(f"{address}{path} does not answer")
