"""What was measured, as dataclasses, as JSON and back."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from vision_service.bench.stats import Percentiles, Spread
from vision_service.errors import InvalidInput

FORMAT = 1
"""Of the JSON file; a new number when older files would be misread."""


@dataclass(frozen=True, slots=True)
class Flow:
    """Images through a pipeline or a server.

    Attributes:
        images_per_s: answered.
        latency_ms: of all rounds together.
        batches: how many images travelled in a batch of that size, in a sample of all rounds.
        cpu_ms: CPU time of the pipeline's or the server's process, an image; 0 where it cannot be read.
        peak_mb: most memory of that process, MiB; likewise.
        generator_cpu_ms: CPU time of the load generator, an image, when it is a process of its own.
        generator_share: of all cores' time, what the load generator used.
        failed: calls by their status, and their latency; under ``HELD_BACK`` those that were not made, by callers that
            hold back.
        beside_per_s: under overload, what closed loops right before and after answered.
        beside_failed: calls of those loops by their status, other than OK.
    """

    images_per_s: Spread
    latency_ms: Percentiles | None
    batches: dict[int, int]
    cpu_ms: float = 0.0
    peak_mb: float = 0.0
    generator_cpu_ms: float = 0.0
    generator_share: float = 0.0
    failed: dict[str, int] = field(default_factory=dict)
    failed_latency_ms: dict[str, Percentiles] = field(default_factory=dict)
    beside_per_s: Spread | None = None
    beside_failed: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ModelReport:
    """A model in a runtime and a precision.

    Attributes:
        model: its name.
        task: what it does.
        runtime: how it is executed.
        precision: of the arithmetic.
        network_images_per_s: the network alone, by batch size.
        stages_cpu_ms: CPU time an image, by stage: each by itself (decode, preprocess, forward, postprocess), then
            what the pipeline uses beyond their sum (``pipeline_rest``) and what the server uses beyond the pipeline
            (``server``: gRPC, reading requests and writing replies).
        pipeline: in process, closed loop.
        served: through gRPC, closed loop.
        streamed: likewise, as requests on one stream of Predict instead of calls.
        single_pipeline_ms: latency in process, one image at a time.
        single_served_ms: latency of a call, one at a time.
        single_more_ms: by how much the latter's median is above the former's, as of the same turn.
        offered_per_s: rate of the open loop.
        open: at that rate.
        overload: in open loops at a multiple of what a closed loop right before answered.
        overload_offered: that multiple.
        held_overload: likewise, from ``held_callers`` of the plan, who hold back, each by itself, and never try
            again (`vision_service.client.hold_back`).
        streamed_overload: as ``overload``, on one stream.
        streamed_held_overload: likewise, from callers that hold back.
        queue_bound_ms: how long a call may take that is let in, as the server says; where it bounds no time, what as
            many calls as may be under way take at the closed loop's speed.
        network_best_per_s: the network alone at its best batch size.
        allowed_per_s: what the sum of the stages' CPU time allows on all cores.
        pipeline_over_network: ratio of the pipeline's speed to the network's, both as of the same round.
        pipeline_over_allowed: likewise, to ``allowed_per_s``.
        served_over_pipeline: likewise, of the server's to the pipeline's.
        served_over_pipeline_without_generator: the same if the generator's CPU time were the server's: what a client on
            another machine would see, as long as the processor is what limits.
        streamed_over_pipeline: as ``served_over_pipeline``, of what is ``streamed``.
        streamed_over_pipeline_without_generator: likewise.
        goodput_over_capacity: ratio of what is answered under overload to the closed loop's speed right before and
            after.
        goodput_over_capacity_without_generator: likewise, if the generator's CPU time were the server's in both.
        streamed_goodput_over_capacity: as ``goodput_over_capacity``, on one stream.
        streamed_goodput_over_capacity_without_generator: likewise.
        held_goodput_over_capacity: as ``goodput_over_capacity``, of ``held_overload``.
        held_goodput_over_capacity_without_generator: likewise.
        streamed_held_goodput_over_capacity: as ``held_goodput_over_capacity``, on one stream.
        streamed_held_goodput_over_capacity_without_generator: likewise.
    """

    model: str
    task: str
    runtime: str
    precision: str
    network_images_per_s: dict[int, Spread] = field(default_factory=dict)
    stages_cpu_ms: dict[str, float] = field(default_factory=dict)
    pipeline: Flow | None = None
    served: Flow | None = None
    streamed: Flow | None = None
    single_pipeline_ms: Percentiles | None = None
    single_served_ms: Percentiles | None = None
    single_more_ms: Spread | None = None
    offered_per_s: float | None = None
    open: Flow | None = None
    overload: Flow | None = None
    held_overload: Flow | None = None
    streamed_overload: Flow | None = None
    streamed_held_overload: Flow | None = None
    overload_offered: float | None = None
    queue_bound_ms: float | None = None
    network_best_per_s: Spread | None = None
    allowed_per_s: float | None = None
    pipeline_over_network: Spread | None = None
    pipeline_over_allowed: Spread | None = None
    served_over_pipeline: Spread | None = None
    served_over_pipeline_without_generator: Spread | None = None
    streamed_over_pipeline: Spread | None = None
    streamed_over_pipeline_without_generator: Spread | None = None
    goodput_over_capacity: Spread | None = None
    goodput_over_capacity_without_generator: Spread | None = None
    streamed_goodput_over_capacity: Spread | None = None
    streamed_goodput_over_capacity_without_generator: Spread | None = None
    held_goodput_over_capacity: Spread | None = None
    held_goodput_over_capacity_without_generator: Spread | None = None
    streamed_held_goodput_over_capacity: Spread | None = None
    streamed_held_goodput_over_capacity_without_generator: Spread | None = None

    @property
    def label(self) -> str:
        """For tables."""
        return f"{self.model} {self.runtime} {self.precision}"


@dataclass(frozen=True, slots=True)
class Report:
    """One run of the benchmark.

    Attributes:
        machine: processor, cores, versions, when.
        plan: what was asked for: seconds, rounds, calls in flight, images, callers that hold back.
        models: what was found.
    """

    machine: dict[str, Any]
    plan: dict[str, Any]
    models: list[ModelReport]
    format: int = FORMAT

    def write(self, path: Path) -> None:
        """As JSON."""
        path.write_text(json.dumps(_rounded(asdict(self)), indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Report:
        """From JSON.

        Raises:
            InvalidInput: it is not such a file.
        """
        try:
            report: Report = TypeAdapter(Report).validate_json(path.read_bytes())
        except OSError as error:
            raise InvalidInput("", f"{path} cannot be read: {error.strerror}") from None
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise InvalidInput("", f"{path} is not a report of `bench --json`: {where}: {first['msg']}") from None
        if report.format != FORMAT:
            raise InvalidInput("", f"{path} has format {report.format}, this version reads {FORMAT}; measure again")
        return report


def _rounded(value: Any) -> Any:
    """Five significant digits: what is beyond is noise."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list | tuple) else value
