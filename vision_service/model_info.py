"""What may be asked about a model that is served: how to name it, and what there is to know of it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from vision_service.types import Task


class ModelState(StrEnum):
    """Where a model stands."""

    LOADING = "loading"
    """Reading weights or warming up; calls are refused."""
    READY = "ready"
    """Answers calls."""
    DRAINING = "draining"
    """Answers what it has, takes nothing new."""
    FAILED = "failed"
    """Could not be loaded; the reason stands beside it."""


@dataclass(frozen=True, slots=True)
class ModelSelector:
    """Which model is meant.

    Attributes:
        name: as in ListModels; empty: the default model of the task.
        version: of that model; empty: the newest that is ready.
    """

    name: str = ""
    version: str = ""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a client may want to know of a model before calling it. Mirrors ``Model`` of the API.

    Attributes:
        name: what requests say.
        version: its version.
        task: what it does.
        state: where it stands.
        state_reason: why, when it failed; else empty.
        is_default: requests of this task that name no model go here.
        backend: which adapter builds it.
        device: where it runs: ``cpu``, ``cuda:0``, ...
        runtime: how it is executed: ``torch``, ...
        runtime_reason: why it is executed so: what was chosen, or what could not take it.
        precision: ``fp32``, ``fp16``, ...
        licence: of the weights, SPDX where there is one.
        source: where the weights come from.
        class_names: the index is the class id; empty for ``translate`` and in listings.
        preprocess_json: how images are prepared: the `PreprocessSpec` as JSON.
        max_batch_size: largest batch it runs.
        max_queued_jobs: most calls that may wait for it.
        queued_jobs: calls waiting now.
        latency_curve: batch size and milliseconds, measured when it was loaded.
        latency_beside: likewise, of a forward pass beside which others run; empty where none do.
        max_delay_ms: how long the oldest waiting call may be held back for a fuller batch.
        target_p99_ms: objective for the time from a call's decoded image to its answer; ``None``: there is none.
        answer_within_ms: how long the last call that is let in waits for its answer, by the curve and the limits.
        max_wait_ms: how long a call that is let in may take, going by those before it; 0: not bounded.
    """

    name: str
    version: str
    task: Task
    state: ModelState
    state_reason: str = ""
    is_default: bool = False
    backend: str = ""
    device: str = ""
    runtime: str = ""
    runtime_reason: str = ""
    precision: str = ""
    licence: str = ""
    source: str = ""
    class_names: tuple[str, ...] = ()
    preprocess_json: str = ""
    max_batch_size: int = 0
    max_queued_jobs: int = 0
    queued_jobs: int = 0
    latency_curve: tuple[tuple[int, float], ...] = ()
    latency_beside: tuple[tuple[int, float], ...] = ()
    max_delay_ms: float = 0.0
    target_p99_ms: float | None = None
    answer_within_ms: float = 0.0
    max_wait_ms: float = 0.0
