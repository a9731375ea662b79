"""The network alone, each stage alone, and the pipeline in process; in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import queue
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch

from vision_service.bench.cpu import cpu_s, memory_mb, reset_peak
from vision_service.bench.plan import Setup, Variant
from vision_service.bench.window import Windowed
from vision_service.engine.build import build_pipeline, pull_missing, resolve_specs
from vision_service.engine.garbage import settle_garbage
from vision_service.engine.host import ModelHost
from vision_service.engine.pipeline import Pipeline
from vision_service.errors import VisionError
from vision_service.imaging.decode import decode_for
from vision_service.imaging.preprocess import content_hw, preprocess
from vision_service.types import Result


@dataclass(frozen=True, slots=True)
class Alone:
    """Something done over and over by one caller.

    Attributes:
        wall_ms: an image.
        cpu_ms: CPU time an image, all threads of the process together.
    """

    wall_ms: float
    cpu_ms: float


@dataclass(slots=True)
class PipelineResult:
    """A closed loop over the pipeline.

    Attributes:
        seconds: how long.
        latencies_s: of each image that was answered.
        cpu_s: CPU time of the process, the caller's loop included.
        batch_sizes: of the batch that each image travelled in.
        failed: images that were refused or failed.
        peak_mb: most memory, MiB.
    """

    seconds: float = 0.0
    latencies_s: list[float] = field(default_factory=list)
    cpu_s: float = 0.0
    batch_sizes: list[int] = field(default_factory=list)
    failed: int = 0
    peak_mb: float = 0.0


class Bench:
    """A pipeline with one model, to be measured from inside.

    Args:
        pipeline: with the model loaded.
        host: the model.
        images: encoded files.
    """

    def __init__(self, pipeline: Pipeline, host: ModelHost, images: Sequence[bytes]) -> None:
        self._pipeline = pipeline
        self._host = host
        self._images = images

    def about(self) -> dict[str, Any]:
        """Which runtime and precision were chosen, and the largest batch."""
        info = self._host.info(is_default=True)
        return {
            "task": str(info.task),
            "runtime": info.runtime,
            "precision": info.precision,
            "max_batch_size": info.max_batch_size,
        }

    def network(self, batch_size: int, seconds: float) -> Alone:
        """The network on preprocessed pixels, from memory to outputs."""
        pixels, sizes_hw = self._batch(batch_size)
        return _alone(lambda: self._host.forward(pixels, sizes_hw), batch_size, seconds)

    def stages(self, seconds: float) -> dict[str, Alone]:
        """Each stage by itself, one image after the other; the network and what follows it in the largest batch."""
        host, spec = self._host, self._host.spec
        geometry = spec.preprocess
        decoded = [decode_for(image, geometry) for image in self._images]
        prepared = [preprocess(image, geometry, original_hw) for image, original_hw in decoded]
        most = host.info(is_default=True).max_batch_size
        pixels, sizes_hw = self._batch(most)
        outputs = host.forward(pixels, sizes_hw)
        metas = [prepared[index % len(prepared)][1] for index in range(most)]

        @torch.inference_mode()
        def postprocess() -> None:
            host.backend.postprocess(outputs, metas, [spec.params] * most)

        every = len(self._images)
        share = seconds / 4
        return {
            "decode": _alone(lambda: [decode_for(image, geometry) for image in self._images], every, share),
            "preprocess": _alone(
                lambda: [preprocess(image, geometry, size_hw) for image, size_hw in decoded], every, share
            ),
            "forward": _alone(lambda: host.forward(pixels, sizes_hw), most, share),
            "postprocess": _alone(postprocess, most, share),
        }

    def pipeline(self, in_flight: int, warmup_s: float, seconds: float) -> PipelineResult:
        """As many images in flight as are wanted: each answer sends the next image."""
        return _ClosedLoop(self._pipeline, self._host, self._images, in_flight).run(warmup_s, seconds)

    def _batch(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Images as the network takes them; of models whose inputs differ in size, the first image over and over."""
        spec = self._host.spec
        images = self._images[:1] if spec.preprocess.any_input_size else self._images
        decoded = [decode_for(images[index % len(images)], spec.preprocess) for index in range(size)]
        prepared = [preprocess(image, spec.preprocess, original_hw) for image, original_hw in decoded]
        sizes_hw = torch.tensor([content_hw(meta) for _, meta in prepared])
        return torch.from_numpy(np.stack([pixels for pixels, _ in prepared])), sizes_hw


_AGAIN_S = 0.05
"""How soon an image is offered again to a pipeline that refused one and has none to answer."""


class _ClosedLoop(Windowed):
    """Counts what the load generator of `vision_service.bench.load` counts: what is answered within the window."""

    def __init__(self, pipeline: Pipeline, host: ModelHost, images: Sequence[bytes], in_flight: int) -> None:
        self._pipeline, self._host, self._images, self._in_flight = pipeline, host, images, in_flight
        self._done: queue.SimpleQueue[tuple[float, Future[Result[Any]]]] = queue.SimpleQueue()
        self._begun = 0
        self._flying = 0
        self._counting = False
        self._result = PipelineResult()

    def run(self, warmup_s: float, seconds: float) -> PipelineResult:
        """Warm up, measure without a pause between, and wait for what is under way."""
        result, pid = self._result, os.getpid()
        self.until(time.perf_counter() + warmup_s)
        self.settle()
        reset_peak(pid)
        started_s, used_s = time.perf_counter(), cpu_s(pid)
        self._counting = True
        self.until(started_s + seconds)
        self.settle()
        result.seconds, result.cpu_s = time.perf_counter() - started_s, cpu_s(pid) - used_s
        result.peak_mb = memory_mb(pid, "VmHWM")
        while self._flying:
            self._done.get()
            self._flying -= 1
        return result

    def _turn(self, end_s: float) -> bool:
        while self._flying < self._in_flight:
            refusal = self._begin()
            if refusal is not None:  # the next one comes after the next answer: asking on and on takes a core
                self._count(0.0, refusal)
                break
        try:
            started_s, answer = self._done.get(timeout=max(0.0, min(end_s - time.perf_counter(), _AGAIN_S)))
        except queue.Empty:
            return False
        self._flying -= 1
        self._count(time.perf_counter() - started_s, answer)
        return answer.exception() is None

    def _begin(self) -> Future[Result[Any]] | None:
        """Send an image. Returns its refusal, if it was not let in."""
        image = self._images[self._begun % len(self._images)]
        self._begun += 1
        started_s = time.perf_counter()
        spec = self._host.spec
        try:
            future = self._pipeline.submit(image, task=spec.task, model=spec.name, version=spec.version)
        except VisionError as error:
            refusal: Future[Result[Any]] = Future()
            refusal.set_exception(error)
            return refusal
        self._flying += 1
        future.add_done_callback(lambda future: self._done.put((started_s, future)))
        return None

    def _count(self, latency_s: float, answer: Future[Result[Any]]) -> None:
        if not self._counting:
            return
        try:
            result = answer.result()
        except VisionError:
            self._result.failed += 1
        else:
            self._result.latencies_s.append(latency_s)
            self._result.batch_sizes.append(result.timings.batch_size)


def _alone(run: Callable[[], object], images: int, seconds: float) -> Alone:
    """Run over and over; ``images`` are done by one run."""
    run()
    times = 0
    started_s, used_s = time.perf_counter(), cpu_s(os.getpid())
    while time.perf_counter() - started_s < seconds or times == 0:
        run()
        times += 1
    done_s, done_cpu_s = time.perf_counter(), cpu_s(os.getpid())
    per_image = 1000 / (times * images)
    return Alone(per_image * (done_s - started_s), per_image * (done_cpu_s - used_s))


class Worker:
    """`Bench` in a process of its own; its methods are called by name.

    Args:
        pipe: to the process.
        about: what `Bench.about` said.
    """

    def __init__(self, pipe: Connection, about: dict[str, Any]) -> None:
        self._pipe = pipe
        self.about = about

    def __call__(self, method: str, *args: Any) -> Any:
        """What the method of `Bench` returns; raises what it raises."""
        self._pipe.send((method, args))
        return _received(self._pipe)


@contextmanager
def worker(setup: Setup, variant: Variant, images: Sequence[bytes], batch: int = 0) -> Iterator[Worker]:
    """A process with the model loaded; it ends on the way out.

    Args:
        setup: how models are found and run.
        variant: the model.
        images: encoded files.
        batch: most images in a batch, instead of what is chosen at start; 0: what is chosen.

    Raises:
        VisionError: the model could not be loaded.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_main, args=(theirs, setup, variant, images, batch), daemon=True)
    process.start()
    theirs.close()
    try:
        yield Worker(ours, _received(ours))
    finally:
        ours.close()
        process.join(30)
        if process.is_alive():
            process.kill()


def _received(pipe: Connection) -> Any:
    answer = pipe.recv()
    if isinstance(answer, BaseException):
        raise answer
    return answer


def _main(pipe: Connection, setup: Setup, variant: Variant, images: Sequence[bytes], batch: int) -> None:
    try:
        settings = setup.settings(variant)
        specs = resolve_specs(settings)
        pull_missing(specs, settings)
        with build_pipeline(settings, specs) as pipeline:
            host = pipeline.catalog.load(specs[0])
            if batch:
                host.fix_batch(batch)
            bench = Bench(pipeline, host, images)
            settle_garbage()  # as `serve` does
            pipe.send(bench.about())
            while True:
                method, args = pipe.recv()
                pipe.send(getattr(bench, method)(*args))
    except EOFError:  # the other end has what it wanted
        return
    except Exception as error:
        pipe.send(error)
