"""The server in a process of its own, as `vision-service serve` starts it, and calls to it."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from vision_service.api.v1 import vision_pb2 as pb
from vision_service.bench.generators import Generators, run_load
from vision_service.bench.load import Load, LoadResult
from vision_service.bench.plan import Plan, Setup, Variant
from vision_service.bench.stream import StreamConnection
from vision_service.client import VisionClient, codec
from vision_service.errors import ConfigError
from vision_service.model_info import ModelInfo
from vision_service.types import Task

SERVICE = "/vision.v1.VisionService/"
START_S = 600.0
"""How long a server may take to load its model."""

REQUESTS: dict[Task, Any] = {
    Task.CLASSIFY: codec.classify_request,
    Task.DETECT: codec.detect_request,
    Task.SEGMENT: codec.segment_request,
    Task.TRANSLATE: codec.translate_request,
}
RESPONSES: dict[Task, Any] = {
    Task.CLASSIFY: pb.ClassifyResponse,
    Task.DETECT: pb.DetectResponse,
    Task.SEGMENT: pb.SegmentResponse,
    Task.TRANSLATE: pb.TranslateResponse,
}


@dataclass(frozen=True, slots=True)
class Target:
    """A server with the model that is measured.

    Attributes:
        address: ``host:port``.
        info: what the server says about the model.
        pid: of the server; 0 when it is not ours.
        generators: what its load comes from; ``None``: from processes that are started for each.
    """

    address: str
    info: ModelInfo
    pid: int = 0
    generators: Generators | None = None

    def load(self, plan: Plan, *, streamed: bool = False, **more: Any) -> LoadResult:
        """Send a plan's images.

        Args:
            plan: what to send and for how long.
            streamed: as requests on one stream of Predict, instead of a call each.
            **more: other fields of `Load`, and those that are not to be the plan's.
        """
        task = self.info.task.value
        build = partial(REQUESTS[self.info.task], model=self.info.name, version=self.info.version)
        requests = map(build, plan.images)
        if streamed:
            messages = [pb.PredictItem(**{task: request}).SerializeToString() for request in requests]
            more["wire"] = StreamConnection
        else:
            messages = [request.SerializeToString() for request in requests]
        load = Load(
            self.address,
            SERVICE + ("Predict" if streamed else task.capitalize()),
            messages,
            server_pid=self.pid,
            **({"warmup_s": plan.warmup_s, "seconds": plan.seconds} | more),
        )
        return run_load(load, plan.generators) if self.generators is None else self.generators.run(load)

    def batch_sizes(self, result: LoadResult) -> list[int]:
        """Of the batches that the calls of the kept replies travelled in."""
        parse = RESPONSES[self.info.task].FromString
        return [parse(reply).info.timings.batch_size for reply in result.replies]


@contextmanager
def running(address: str, model: str) -> Iterator[Target]:
    """A server that runs already.

    Raises:
        ModelUnavailable, ModelNotFound: as `VisionClient.get_model`.
    """
    with VisionClient(address) as client:
        yield Target(address, client.get_model(model))


@contextmanager
def server(setup: Setup, variant: Variant, beside: Sequence[str] = ()) -> Iterator[Target]:
    """A server on a free port; it is told to stop on the way out.

    Args:
        setup: how models are found and run.
        variant: the model that the target is about.
        beside: further models to serve, in the same runtime and precision.

    Raises:
        ConfigError: it did not start; says what it said.
    """
    command = [sys.executable, "-m", "vision_service", "serve", *_arguments(setup, variant, beside)]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)  # noqa: S603 - ourselves
        try:
            port = _port_of(process)
            if port is None:
                log.seek(0)
                raise ConfigError(f"the server for {variant} did not start: {''.join(log.readlines()[-5:]).strip()}")
            with running(f"127.0.0.1:{port}", variant.model.partition("@")[0]) as target:
                yield Target(target.address, target.info, process.pid)
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdout is not None:
                process.stdout.close()


def _arguments(setup: Setup, variant: Variant, beside: Sequence[str]) -> Sequence[str]:
    flags = {"host": "127.0.0.1", "port": "0", "model": variant.model, **setup.flags(variant)}
    arguments = [part for name, value in flags.items() for part in (f"--{name}", value)]
    if setup.config is not None:
        arguments += ["--config", str(setup.config)]
    arguments += [part for name in beside for part in ("--model", name)]
    return [*arguments, *(part for path in setup.manifests for part in ("--manifest", str(path)))]


def _port_of(process: subprocess.Popen[str]) -> str | None:
    """The port in the line "ready on HOST:PORT with ..."; ``None`` when the process ends first."""
    assert process.stdout is not None, "it is a pipe"
    until_s = time.monotonic() + START_S
    for line in process.stdout:
        if line.startswith("ready on "):
            return line.split()[2].rpartition(":")[2]
        if time.monotonic() > until_s:
            break
    return None
