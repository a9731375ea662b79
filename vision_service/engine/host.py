"""One loaded model: its network, its queue, its thread and its state."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch

from vision_service.backends.base import Backend
from vision_service.backends.table import create_backend
from vision_service.config import ModelSpec, Native
from vision_service.engine.batcher import Batcher
from vision_service.engine.queue import BatchLimits, Ride
from vision_service.errors import (
    ConfigError,
    DeviceOutOfMemory,
    InferenceFailed,
    ModelUnavailable,
    QueueFull,
    VisionError,
)
from vision_service.imaging.preprocess import content_hw, preprocess, stack
from vision_service.model_info import ModelInfo, ModelState
from vision_service.runtimes import (
    Calibration,
    Compiled,
    Execution,
    Forward,
    Workload,
    choose_precision,
    compile_network,
)
from vision_service.types import PREDICTION_OF_TASK, ImageMeta, Params, Prediction, UInt8Array

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Prepared:
    """An image ready for the network.

    Attributes:
        pixels: uint8 ``[h, w, 3]`` RGB of the network's input size.
        meta: how to go back.
        params: what the call chose.
    """

    pixels: UInt8Array
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


class ModelHost:
    """Loads a model, runs it in batches on a thread of its own, and drains it.

    LOADING -> READY -> DRAINING, or FAILED with its reason. READY only after the batch sizes it will run were run.

    Args:
        spec: the model.
        execution: what the process gives its runtimes.
    """

    def __init__(self, spec: ModelSpec, execution: Execution | None = None) -> None:
        self.spec = spec
        self._execution = execution
        self._state = ModelState.LOADING
        self._state_reason = ""
        self._state_lock = threading.Lock()
        self._admitted = 0
        self._empty = threading.Condition(self._state_lock)
        self._backend: Backend | None = None
        self._forward: Forward | None = None
        self._batcher: Batcher[Prepared, Answer] | None = None
        self._device: torch.device | None = None
        self._compiled: Compiled | None = None

    @property
    def state(self) -> ModelState:
        """Where the model stands."""
        return self._state

    @property
    def label(self) -> str:
        """Name and version, for messages."""
        return f"{self.spec.name}:{self.spec.version}"

    def load(self) -> None:
        """Build, load weights, compile, warm up. Blocks; on failure everything is freed.

        Raises:
            VisionError: the model could not be loaded; the state is FAILED and keeps the reason.
        """
        started_s = time.monotonic()
        try:
            self._load()
        except Exception as error:
            reason = str(error) if isinstance(error, VisionError) else f"{type(error).__name__}: {error}"
            self._free()
            self._state, self._state_reason = ModelState.FAILED, reason
            if isinstance(error, VisionError):
                raise
            raise ConfigError(f"model {self.label} could not be loaded: {reason}") from error
        limits = self.spec.batching
        self._batcher = Batcher(
            self._execute,
            BatchLimits(
                limits.max_batch_size, limits.max_delay_ms / 1000, limits.max_queued_jobs, limits.max_queued_bytes
            ),
            name=f"model {self.label}",
            expected=(DeviceOutOfMemory,),
        )
        self._state = ModelState.READY
        logger.info("model %s is ready on %s after %.1f s", self.label, self._device, time.monotonic() - started_s)

    def admit(self) -> None:
        """Let a call in, before work goes into its image. Every call let in must `release` in the end.

        The model is not closed while a call that was let in is on its way.

        Raises:
            ModelUnavailable: not READY.
            QueueFull: the queue is full.
        """
        with self._state_lock:
            if self._state is not ModelState.READY or self._batcher is None:
                why = f" ({self._state_reason})" if self._state_reason else ""
                raise ModelUnavailable(f"model {self.label} is {self._state}{why}; ListModels shows which are ready")
            self._batcher.check_room()
            batching = self.spec.batching
            most = batching.max_queued_jobs + 4 * batching.max_batch_size
            if self._admitted >= most:  # decoding, running and being written included
                raise QueueFull(
                    f"{self._admitted} calls to model {self.label} are under way and the limit is {most}; "
                    "call again in 0.10 s",
                    retry_after_s=0.1,
                )
            self._admitted += 1

    def release(self) -> None:
        """A call that was let in has its answer."""
        with self._state_lock:
            self._admitted -= 1
            if self._admitted == 0:
                self._empty.notify_all()

    def submit(self, prepared: Prepared, deadline_s: float | None = None) -> Future[Ride[Answer]]:
        """Queue an image.

        Args:
            prepared: from `preprocess` with this model's spec.
            deadline_s: on `time.monotonic`'s clock.

        Raises:
            ModelUnavailable: closed, or never loaded.
            QueueFull: the queue is full.
            DeadlineExceeded: the deadline has passed.
        """
        if self._batcher is None:
            raise ModelUnavailable(f"model {self.label} is {self._state}")
        key = None if self._backend is not None and self._backend.mixes_sizes else prepared.pixels.shape
        return self._batcher.submit(prepared, key=key, nbytes=prepared.pixels.nbytes, deadline_s=deadline_s)

    def close(self, timeout_s: float | None = None) -> bool:
        """Answer what is queued, take nothing new, free the network.

        Returns:
            Whether everything queued was answered in time.
        """
        started_s = time.monotonic()
        with self._state_lock:
            if self._state is ModelState.READY:
                self._state = ModelState.DRAINING
            drained = self._empty.wait_for(lambda: self._admitted == 0, timeout_s)
        if self._batcher is not None:
            left_s = None if timeout_s is None else max(0.0, timeout_s - (time.monotonic() - started_s))
            drained = self._batcher.close(left_s) and drained
        self._free()
        return drained

    def info(self, *, is_default: bool) -> ModelInfo:
        """What clients may know.

        Args:
            is_default: whether calls that name no model come here.
        """
        spec = self.spec
        return ModelInfo(
            name=spec.name,
            version=spec.version,
            task=spec.task,
            state=self._state,
            state_reason=self._state_reason,
            is_default=is_default,
            backend=spec.backend,
            device=str(self._device or spec.device),
            runtime=self._compiled.runtime if self._compiled is not None else spec.runtime,
            runtime_reason=self._compiled.reason if self._compiled is not None else "",
            precision=self._compiled.precision if self._compiled is not None else spec.precision,
            licence=spec.weights.licence if spec.weights is not None else "",
            source=spec.weights.source if spec.weights is not None else "",
            class_names=spec.classes,
            preprocess_json=spec.preprocess.model_dump_json(),
            max_batch_size=spec.batching.max_batch_size,
            max_queued_jobs=spec.batching.max_queued_jobs,
            queued_jobs=self._batcher.queued_jobs if self._batcher is not None else 0,
        )

    def _load(self) -> None:
        spec = self.spec
        self._device = pick_device(spec.device)
        self._backend = create_backend(spec)
        network = self._backend.build()
        example = self._example()
        self._compiled = compile_network(
            network,
            Workload(
                torch.from_numpy(example.pixels).unsqueeze(0),
                max_batch_size=spec.batching.max_batch_size,
                any_size=spec.preprocess.any_input_size,
                described=spec.model_dump_json(include={"backend", "options", "preprocess", "classes"}),
                calibration=Calibration(spec.calibration_folder, spec.preprocess) if spec.calibration_folder else None,
            ),
            runtime=spec.runtime,
            precision=choose_precision(spec.precision, self._device),
            device=self._device,
            execution=self._execution,
            own_runtime=self._backend.own_runtime,
        )
        self._forward = self._compiled.forward
        logger.info("model %s: %s", self.label, self._compiled)
        size = 1
        while size < 2 * spec.batching.max_batch_size:
            self._execute([example] * min(size, spec.batching.max_batch_size))
            size *= 2

    def _example(self) -> Prepared:
        """A grey image, prepared as callers' images will be."""
        hw = (64, 64) if isinstance(self.spec.preprocess.resize, Native) else (480, 640)
        pixels, meta = preprocess(np.full((*hw, 3), 127, np.uint8), self.spec.preprocess)
        return Prepared(pixels, meta, self.spec.params)

    def _execute(self, batch: Sequence[Prepared]) -> list[Answer]:
        """One forward pass. Runs on the batcher's thread (and once on the loader's, for warm-up)."""
        assert self._forward is not None, "set by load()"
        assert self._backend is not None, "set by load()"
        started_s = time.perf_counter()
        sizes_hw = torch.tensor([content_hw(item.meta) for item in batch])
        outputs = self._forward(torch.from_numpy(stack([item.pixels for item in batch])), sizes_hw)
        forward_s = time.perf_counter()
        with torch.inference_mode():
            predictions = self._backend.postprocess(
                outputs, [item.meta for item in batch], [item.params for item in batch]
            )
        self._check(predictions, len(batch))
        done_s = time.perf_counter()
        forward_ms, postprocess_ms = 1000 * (forward_s - started_s), 1000 * (done_s - forward_s)
        return [Answer(prediction, forward_ms, postprocess_ms) for prediction in predictions]

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

    def _free(self) -> None:
        was_on_gpu = self._device is not None and self._device.type == "cuda"
        self._forward = None
        self._backend = None
        if was_on_gpu:
            torch.cuda.empty_cache()
