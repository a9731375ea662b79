"""A network with its backend: what a host runs. Knows nothing of queues."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import cast

import numpy as np
import torch
from torch import Tensor

from vision_service.backends.table import create_backend
from vision_service.config import ModelSpec, Native
from vision_service.engine.staging import Staging
from vision_service.engine.tuning import LatencyCurve
from vision_service.errors import ConfigError, InferenceFailed
from vision_service.imaging.preprocess import content_hw, preprocess
from vision_service.runtimes import Calibration, Execution, Forward, Workload, choose_precision, compile_network
from vision_service.types import PREDICTION_OF_TASK, ImageMeta, InputArray, Params, Prediction

logger = logging.getLogger(__name__)

_TIMED_RUNS, _MOST_TIMED_RUNS, _TIMED_S = 5, 25, 1.0
"""Runs of each batch size that are timed at warm-up, the first one, which is slower, left out: at least so many, and up
to so many until about so many seconds are over. A neighbour that is busy for a moment shall not choose the batch."""

_LONG_S = 0.5
"""A first run that takes longer than this is taken for the measurement: a large network shall not take minutes more."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """An image ready for the network.

    Attributes:
        pixels: ``[h, w, 3]`` RGB of the network's input size, from `preprocess`.
        meta: how to go back.
        params: what the call chose.
    """

    pixels: InputArray
    meta: ImageMeta
    params: Params


@dataclass(frozen=True, slots=True)
class Answer:
    """A prediction and what its batch cost.

    Attributes:
        prediction: in pixels of the original.
        forward_ms: the network on the whole batch, transfers included.
        postprocess_ms: outputs to predictions, for the whole batch.
    """

    prediction: Prediction
    forward_ms: float
    postprocess_ms: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the network made of a batch.

    Attributes:
        outputs: dense tensors, one row an image.
        forward_ms: how long it took, transfers included.
    """

    outputs: tuple[Tensor, ...]
    forward_ms: float


def pick_device(wanted: str) -> torch.device:
    """A device by its name in a spec; ``auto`` is the first GPU, else the CPU.

    Raises:
        ConfigError: there is no such device.
    """
    if wanted == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    device = torch.device(wanted)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise ConfigError(f"device {wanted}: torch sees {count} CUDA devices here; use auto or cpu")
    return device


class LoadedModel:
    """Builds a network, loads its weights and compiles it; then runs batches.

    Args:
        spec: the model.
        device: where it runs.
        execution: what the process gives its runtimes.

    Raises:
        VisionError: the model cannot be built.
    """

    def __init__(self, spec: ModelSpec, device: torch.device, execution: Execution | None) -> None:
        self.spec = spec
        self.device = device
        self.backend = create_backend(spec)
        network = self.backend.build()
        self._example = self._make_example()
        self.compiled = compile_network(
            network,
            Workload(
                torch.from_numpy(self._example.pixels).unsqueeze(0),
                max_batch_size=spec.batching.max_batch_size,
                any_size=spec.preprocess.any_input_size,
                described=spec.model_dump_json(include={"backend", "options", "preprocess", "classes"}),
                calibration=Calibration(spec.calibration_folder, spec.preprocess) if spec.calibration_folder else None,
            ),
            runtime=spec.runtime,
            precision=choose_precision(spec.precision, device),
            device=device,
            execution=execution,
            own_runtime=self.backend.own_runtime,
        )
        self.forward = self._pass(self.compiled.forward)
        """One forward pass, alone."""
        self.forwards_beside = tuple(self._pass(forward) for forward in self.compiled.beside)
        """Forward passes that may run at the same time."""
        # Postprocessing of one batch shall not queue behind the forward pass of the next.
        self._beside = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def _pass(self, forward: Forward) -> Callable[[Sequence[Prepared]], Outcome]:
        """A function of the network, with memory of its own for its batches. One call at a time."""
        staging = Staging(pinned=self.device.type == "cuda")

        def run(batch: Sequence[Prepared]) -> Outcome:
            started_s = time.perf_counter()
            sizes_hw = torch.tensor([content_hw(item.meta) for item in batch])
            outputs = forward(staging.stack([item.pixels for item in batch]), sizes_hw)
            for output in outputs:
                if len(output) != len(batch):
                    raise InferenceFailed(f"the network made {len(output)} rows of {len(batch)} images")
            return Outcome(outputs, 1000 * (time.perf_counter() - started_s))

        return run

    def answers(self, batch: Sequence[Prepared], outcome: Outcome, start: int) -> list[Answer]:
        """Answers of some images of a forward pass. One call at a time, beside `forward`.

        Args:
            batch: neighbours in the batch.
            outcome: of the whole batch.
            start: place of the first of them.
        """
        started_s = time.perf_counter()
        outputs = tuple(output[start : start + len(batch)] for output in outcome.outputs)
        stream = nullcontext() if self._beside is None else torch.cuda.stream(self._beside)
        with torch.inference_mode(), stream:
            predictions = self.backend.postprocess(
                outputs, [item.meta for item in batch], [item.params for item in batch]
            )
            if self._beside is not None:
                self._beside.synchronize()  # the outputs' memory may be used again from here on
        self._check(predictions, len(batch))
        postprocess_ms = 1000 * (time.perf_counter() - started_s)
        return [Answer(prediction, outcome.forward_ms, postprocess_ms) for prediction in predictions]

    def warm_up(self) -> LatencyCurve:
        """Run each batch size that will be run, and measure it: alone, and beside others where that is done."""
        sizes, largest = [1], self.spec.batching.max_batch_size
        while sizes[-1] < largest:
            sizes.append(min(2 * sizes[-1], largest))
        first_s = {size: self._time(size) for size in sizes}
        short = [size for size in sizes if first_s[size] <= _LONG_S]
        alone_s = first_s | {size: min(times_s) for size, times_s in _timed(self._time, short).items()}
        beside_s: dict[int, float] = {}
        if self.forwards_beside:
            with ThreadPoolExecutor(len(self.forwards_beside)) as pool:
                self._time_beside(largest, pool)
                if short == sizes:
                    beside = _timed(partial(self._time_beside, pool=pool), sizes)
                    beside_s = {size: median(times_s) for size, times_s in beside.items()}
        return LatencyCurve(_in_ms(alone_s), _in_ms(beside_s))

    def _time(self, size: int) -> float:
        batch = [self._example] * size
        started_s = time.perf_counter()
        self.answers(batch, self.forward(batch), 0)
        return time.perf_counter() - started_s

    def _time_beside(self, size: int, pool: Executor) -> float:
        """Seconds of forward passes that begin together, until the last one's end."""
        batch = [self._example] * size
        started_s = time.perf_counter()
        for running in [pool.submit(forward, batch) for forward in self.forwards_beside]:
            running.result()
        return time.perf_counter() - started_s

    def _make_example(self) -> Prepared:
        """A grey image, prepared as callers' images will be."""
        hw = (64, 64) if isinstance(self.spec.preprocess.resize, Native) else (480, 640)
        pixels, meta = preprocess(np.full((*hw, 3), 127, np.uint8), self.spec.preprocess)
        return Prepared(pixels, meta, self.spec.params)

    def _check(self, predictions: Sequence[Prediction], expected: int) -> None:
        """Hold the backend to its contract: list in, list out, of its task's type."""
        if len(predictions) != expected:
            raise InferenceFailed(
                f"backend {self.spec.backend} made {len(predictions)} predictions of {expected} images"
            )
        wanted = PREDICTION_OF_TASK[self.spec.task]
        for prediction in predictions:
            if not isinstance(cast(object, prediction), wanted):
                raise InferenceFailed(
                    f"backend {self.spec.backend} made a {type(prediction).__name__}, a {self.spec.task} model makes "
                    f"{wanted.__name__}"
                )


def _timed(run: Callable[[int], float], sizes: Sequence[int]) -> dict[int, list[float]]:
    """Several runs of each size, seconds; in turn, so that what slows the machine down slows them all down.

    Their shortest is what a size takes undisturbed. To compare sizes their median is better: a machine that is twice as
    fast for a moment is so for one of them.
    """
    times_s: dict[int, list[float]] = {size: [] for size in sizes}
    until_s = time.monotonic() + _TIMED_S
    runs = 0
    while runs < _TIMED_RUNS or (runs < _MOST_TIMED_RUNS and time.monotonic() < until_s):
        runs += 1
        for size in sizes:
            times_s[size].append(run(size))
    return times_s


def _in_ms(seconds: Mapping[int, float]) -> tuple[tuple[int, float], ...]:
    return tuple((size, 1000 * seconds[size]) for size in sorted(seconds))
