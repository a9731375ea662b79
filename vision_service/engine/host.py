"""One loaded model: its network, its queue, its threads and its state."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial

import torch

from vision_service.backends.base import Backend
from vision_service.config import BatchingSpec, ModelSpec
from vision_service.engine.batcher import Batcher, Gate, OpenGate
from vision_service.engine.loaded import Answer, LoadedModel, Outcome, Prepared, pick_device
from vision_service.engine.pace import USUAL_S, USUALLY_AT_LEAST, Entry, Pace
from vision_service.engine.queue import Ride
from vision_service.engine.threads import ForwardGate, GateShare, in_a_nicer_thread
from vision_service.engine.tuning import Tuner
from vision_service.errors import ConfigError, DeviceOutOfMemory, ModelUnavailable, QueueFull, VisionError
from vision_service.model_info import ModelInfo, ModelState
from vision_service.runtimes import Execution, Forward

logger = logging.getLogger(__name__)


class ModelHost:
    """Loads a model, runs it in batches on threads of its own, and drains it.

    LOADING -> READY -> DRAINING, or FAILED with its reason. READY only after the batch sizes it will run were run.

    Args:
        spec: the model.
        execution: what the process gives its runtimes.
        cpu_gate: whose turn a forward pass on the CPU waits for; ``None``: none of its own.

    Attributes:
        spec: the model.
        label: its name and version, for messages.
    """

    def __init__(
        self, spec: ModelSpec, execution: Execution | None = None, cpu_gate: ForwardGate | None = None
    ) -> None:
        self.spec = spec
        self.label = f"{spec.name}:{spec.version}"
        self._execution = execution
        self._cpu_gate = cpu_gate
        self._state = ModelState.LOADING
        self._state_reason = ""
        self._state_lock = threading.Lock()
        self._admitted = 0
        self._coming = 0  # admitted and not yet queued
        self._empty = threading.Condition(self._state_lock)
        self._model: LoadedModel | None = None
        self._tuner: Tuner | None = None
        self._pace = Pace(None, 1, 0.0)
        self._batcher: Batcher[Prepared, Answer] | None = None
        # What is known of it stays known once it is freed.
        self._device = spec.device
        self._execution_names = {"runtime": str(spec.runtime), "precision": str(spec.precision), "runtime_reason": ""}

    @property
    def state(self) -> ModelState:
        """Where the model stands."""
        return self._state

    @property
    def forward(self) -> Forward:
        """The network alone, for those who measure it; everyone else calls `submit`.

        Raises:
            ModelUnavailable: not loaded.
        """
        if self._model is None:
            raise ModelUnavailable(f"model {self.label} is {self._state}")
        return self._model.compiled.forward

    @property
    def backend(self) -> Backend:
        """What reads the network's outputs, for those who measure it. Errors as in `forward`."""
        if self._model is None:
            raise ModelUnavailable(f"model {self.label} is {self._state}")
        return self._model.backend

    def load(self) -> None:
        """Build, load weights, compile, warm up. Blocks; on failure everything is freed.

        Raises:
            VisionError: the model could not be loaded; the state is FAILED and keeps the reason.
        """
        started_s = time.monotonic()
        nice = self._execution.nice if self._execution is not None else 0
        try:
            # The threads of the runtime and of the batcher are started by this one, and are as nice.
            in_a_nicer_thread(self._load, nice, name=f"load {self.label}")
        except Exception as error:
            reason = str(error) if isinstance(error, VisionError) else f"{type(error).__name__}: {error}"
            self._free()
            self._state, self._state_reason = ModelState.FAILED, reason
            if isinstance(error, VisionError):
                raise
            raise ConfigError(f"model {self.label} could not be loaded: {reason}") from error
        self._state = ModelState.READY
        logger.info("model %s is ready on %s after %.1f s", self.label, self._device, time.monotonic() - started_s)

    def admit(self) -> Entry:
        """Let a call in, before work goes into its image. Every call let in must `release` in the end.

        The model is not closed while a call that was let in is on its way.

        Returns:
            What `release` is to be given.

        Raises:
            ModelUnavailable: not READY.
            QueueFull: the queue is full, or the call would take too long.
        """
        with self._state_lock:
            self._check_room()
            self._admitted += 1
            self._coming += 1
            return self._pace.enter(self._admitted)

    def check_room(self) -> None:
        """Whether a call would be let in now. Errors as in `admit`."""
        with self._state_lock:
            self._check_room()

    def _check_room(self) -> None:
        if self._state is not ModelState.READY or self._batcher is None:
            why = f" ({self._state_reason})" if self._state_reason else ""
            raise ModelUnavailable(f"model {self.label} is {self._state}{why}; ListModels shows which are ready")
        self._batcher.check_room(self._coming)
        limits = self._batcher.limits
        most = limits.max_queued_jobs + 4 * limits.max_batch_size
        if self._admitted >= most:  # decoding, running and being written included
            raise QueueFull(
                f"{self._admitted} calls to model {self.label} are under way and the limit is {most}; "
                "call again in 0.10 s",
                retry_after_s=0.1,
            )
        self._pace.check(self._admitted, f"model {self.label}")

    def not_coming(self) -> None:
        """A call that was let in will not `submit`: its image could not be prepared, or it was cancelled."""
        self._not_coming()
        if self._batcher is not None:
            self._batcher.reconsider()  # it may have waited for this one to fill a batch

    def _not_coming(self) -> None:
        with self._state_lock:
            self._coming -= 1

    def release(self, entry: Entry, *, answered: bool) -> None:
        """A call that was let in is over.

        Args:
            entry: from `admit`.
            answered: whether it has a result; from calls that failed, nothing is learnt of how long one takes.
        """
        with self._state_lock:
            self._admitted -= 1
            if answered:
                self._pace.answered(entry)
            if self._admitted == 0:
                self._empty.notify_all()

    def submit(self, prepared: Prepared, deadline_s: float | None = None) -> Future[Ride[Answer]]:
        """Queue the image of a call that was let in.

        Args:
            prepared: from `preprocess` with this model's spec.
            deadline_s: on `time.monotonic`'s clock.

        Raises:
            ModelUnavailable: closed, or never loaded.
            QueueFull: the queue is full.
            DeadlineExceeded: the deadline has passed.
        """
        self._not_coming()  # the queue counts it from here on
        model = self._model
        if self._batcher is None or model is None:
            raise ModelUnavailable(f"model {self.label} is {self._state}")
        key = None if model.backend.mixes_sizes else prepared.pixels.shape
        try:
            return self._batcher.submit(prepared, key=key, nbytes=prepared.pixels.nbytes, deadline_s=deadline_s)
        except VisionError:
            self._batcher.reconsider()  # it may have waited for this one to fill a batch
            raise

    def fix_batch(self, size: int) -> None:
        """Have batches of at most so many images instead of what was chosen at start, for those who compare.

        Raises:
            ModelUnavailable: not loaded.
        """
        if self._batcher is None:
            raise ModelUnavailable(f"model {self.label} is {self._state}")
        self._batcher.set_limits(replace(self._batcher.limits, max_batch_size=size))

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
        spec, tuner = self.spec, self._tuner
        limits = self._batcher.limits if self._batcher is not None else None
        return ModelInfo(
            name=spec.name,
            version=spec.version,
            task=spec.task,
            state=self._state,
            state_reason=self._state_reason,
            is_default=is_default,
            backend=spec.backend,
            device=self._device,
            **self._execution_names,
            licence=spec.weights.licence if spec.weights is not None else "",
            source=spec.weights.source if spec.weights is not None else "",
            class_names=spec.classes,
            preprocess_json=spec.preprocess.model_dump_json(),
            max_batch_size=limits.max_batch_size if limits is not None else spec.batching.max_batch_size,
            max_queued_jobs=limits.max_queued_jobs if limits is not None else spec.batching.max_queued_jobs,
            queued_jobs=self._batcher.queued_jobs if self._batcher is not None else 0,
            latency_curve=tuner.curve.points if tuner is not None else (),
            latency_beside=tuner.curve.beside if tuner is not None else (),
            max_delay_ms=1000 * limits.max_delay_s if limits is not None else spec.batching.max_delay_ms or 0.0,
            target_p99_ms=spec.batching.target_p99_ms,
            answer_within_ms=tuner.choice.within_ms if tuner is not None else 0.0,
            max_wait_ms=1000 * (self._pace.max_wait_s or 0.0),
        )

    def _load(self) -> None:
        device = pick_device(self.spec.device)
        execution = self._execution
        if execution is not None and self.spec.batching.target_p99_ms is not None:
            # What an objective promises is computed from passes that run alone.
            execution = replace(execution, passes=1)
        self._model = model = LoadedModel(self.spec, device, execution)
        compiled = model.compiled
        self._device = str(device)
        self._execution_names = {
            "runtime": compiled.runtime,
            "precision": compiled.precision,
            "runtime_reason": compiled.reason,
        }
        logger.info("model %s: %s", self.label, compiled)
        gate = self._gate(alone=True)
        gate.acquire()  # other models go on answering, in turns with this one
        try:
            self._tuner = Tuner(self.spec.batching, model.warm_up())
        finally:
            gate.release(wide=False)
        self._warn_if_not_kept(self._tuner)
        self._pace = _pace(self.spec.batching, self._tuner)
        passes = len(model.forwards_beside)
        self._batcher = Batcher(
            self._forward,
            self._tuner.choice.limits,
            name=f"model {self.label}",
            expected=(DeviceOutOfMemory,),
            finish=self._answers,
            gate=self._gate(alone=passes == 0),
            beside=[partial(self._forward_beside, number) for number in range(passes)],
            coming=lambda: self._coming,
        )

    def _gate(self, *, alone: bool) -> Gate:
        """The way to the cores.

        Args:
            alone: for passes that always run alone.
        """
        if self._cpu_gate is None or torch.device(self._device).type != "cpu":
            return OpenGate()
        execution = self._execution or Execution()
        all_threads = execution.threads or self._cpu_gate.cores
        return GateShare(self._cpu_gate, beside=all_threads if alone else execution.threads_beside, alone=all_threads)

    def _forward(self, batch: Sequence[Prepared]) -> Outcome:
        """The first stage of a batch, alone."""
        return self._loaded().forward(batch)

    def _forward_beside(self, number: int, batch: Sequence[Prepared]) -> Outcome:
        """The first stage of a batch, beside others."""
        return self._loaded().forwards_beside[number](batch)

    def _loaded(self) -> LoadedModel:
        model = self._model
        if model is None:  # a close() did not wait for this batch any longer
            raise ModelUnavailable(f"model {self.label} was stopped before this call was answered; call again")
        return model

    def _answers(self, batch: Sequence[Prepared], outcome: Outcome, start: int) -> list[Answer]:
        """The second stage of a batch, and what is learnt of it."""
        answers = self._loaded().answers(batch, outcome, start)
        took_ms = answers[0].forward_ms + answers[0].postprocess_ms
        if self._tuner is not None and self._batcher is not None and self._tuner.observe(len(batch), took_ms):
            self._batcher.set_limits(self._tuner.choice.limits)
            self._warn_if_not_kept(self._tuner)
        return answers

    def _warn_if_not_kept(self, tuner: Tuner) -> None:
        if not tuner.choice.kept:
            logger.warning(
                "model %s: target_p99_ms %g cannot be kept: a call that comes while another one runs has its answer "
                "after %.1f ms; raise the target to that, or use a faster runtime or precision",
                self.label,
                self.spec.batching.target_p99_ms,
                tuner.choice.within_ms,
            )

    def _free(self) -> None:
        model, self._model = self._model, None
        if model is not None and model.device.type == "cuda":
            del model
            torch.cuda.empty_cache()


def _pace(batching: BatchingSpec, tuner: Tuner) -> Pace:
    """How long calls may take. Until one was answered, the curve says how long one takes."""
    size = tuner.choice.limits.max_batch_size
    call_s = tuner.curve.ms(size) / size / 1000
    if batching.max_wait_ms is not None:
        return Pace(batching.max_wait_ms / 1000, 1, call_s)
    return Pace(USUAL_S if batching.target_p99_ms is None else None, USUALLY_AT_LEAST, call_s)
