"""What the rounds of a benchmark come to: spreads, ratios and CPU time by stage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from vision_service.bench.inprocess import Alone, PipelineResult
from vision_service.bench.load import LoadResult
from vision_service.bench.plan import Plan
from vision_service.bench.report import Flow, ModelReport
from vision_service.bench.served import Target
from vision_service.bench.stats import Percentiles, Spread, histogram
from vision_service.engine.threads import usable_cores


@dataclass(frozen=True, slots=True)
class Overload:
    """An open loop, and what the server does at its own pace right before and after it.

    Attributes:
        loop: the open loop.
        before: a closed loop.
        after: likewise.
    """

    loop: LoadResult
    before: LoadResult
    after: LoadResult

    def goodput(self, cores: int = 0) -> float | None:
        """Ratio of what was answered to the closed loops' mean; with cores, the generator's time returned in both.

        ``None`` where the closed loops had no answer within their time.
        """
        capacity = (_speed(self.before, cores) + _speed(self.after, cores)) / 2
        return _speed(self.loop, cores) / capacity if capacity else None


@dataclass(slots=True)
class Rounds:
    """What the rounds of one variant gave, in order; all but the open loops turn by turn.

    Attributes:
        network: by batch size.
        stages: by stage.
        pipeline: closed loops in process.
        served: closed loops over the network.
        streamed: likewise, on one stream of Predict.
        single_pipeline: one at a time.
        single_served: one at a time.
        open: at the plan's rate.
        overload: at a multiple of the closed loop's speed.
        held_overload: likewise, from callers that hold back.
        streamed_overload: as ``overload``, on one stream of Predict.
        streamed_held_overload: likewise, from callers that hold back.
        served_peak_mb: most memory of the server in closed loops, MiB.
    """

    network: list[dict[int, Alone]] = field(default_factory=list)
    stages: list[dict[str, Alone]] = field(default_factory=list)
    pipeline: list[PipelineResult] = field(default_factory=list)
    served: list[LoadResult] = field(default_factory=list)
    streamed: list[LoadResult] = field(default_factory=list)
    single_pipeline: list[PipelineResult] = field(default_factory=list)
    single_served: list[LoadResult] = field(default_factory=list)
    open: list[LoadResult] = field(default_factory=list)
    overload: list[Overload] = field(default_factory=list)
    held_overload: list[Overload] = field(default_factory=list)
    streamed_overload: list[Overload] = field(default_factory=list)
    streamed_held_overload: list[Overload] = field(default_factory=list)
    served_peak_mb: float = 0.0


def summary(plan: Plan, rounds: Rounds, identity: dict[str, str], target: Target | None) -> ModelReport:
    """What a variant's rounds come to.

    Args:
        plan: that was carried out.
        rounds: all of them.
        identity: ``model``, ``task``, ``runtime`` and ``precision``.
        target: the server that was measured, if one was.
    """
    cores = usable_cores()
    best = [max(1000 / alone.wall_ms for alone in one.values()) for one in rounds.network]
    pipeline = [len(one.latencies_s) / one.seconds for one in rounds.pipeline]
    through = [images_per_s(one) for one in rounds.served]
    streamed = [images_per_s(one) for one in rounds.streamed]
    returned = [_speed(one, cores) for one in rounds.served]
    streamed_returned = [_speed(one, cores) for one in rounds.streamed]
    allowed = [1000 * cores / sum(stage.cpu_ms for stage in stages.values()) for stages in rounds.stages]
    in_process = _in_process_flow(rounds.pipeline) if rounds.pipeline else None

    def flow(results: Sequence[LoadResult], peak_mb: float = 0.0) -> Flow | None:
        return _served_flow(results, target, peak_mb, cores) if results else None

    def overload(results: Sequence[Overload]) -> Flow | None:
        found = flow([one.loop for one in results])
        beside = [loop for one in results for loop in (one.before, one.after)]
        return found and replace(
            found, beside_per_s=Spread.of([images_per_s(one) for one in beside]), beside_failed=_failed(beside)
        )

    over_network = flow(rounds.served, rounds.served_peak_mb)
    return ModelReport(
        identity["model"],
        identity["task"],
        identity["runtime"],
        identity["precision"],
        pipeline=in_process,
        served=over_network,
        streamed=flow(rounds.streamed, rounds.served_peak_mb),
        open=flow(rounds.open),
        overload=overload(rounds.overload),
        held_overload=overload(rounds.held_overload),
        streamed_overload=overload(rounds.streamed_overload),
        streamed_held_overload=overload(rounds.streamed_held_overload),
        overload_offered=plan.overload if rounds.overload else None,
        queue_bound_ms=_queue_bound_ms(target, through),
        network_images_per_s={
            size: Spread.of([1000 / one[size].wall_ms for one in rounds.network])
            for size in (rounds.network[0] if rounds.network else ())
        },
        stages_cpu_ms=_stages(rounds, in_process, over_network),
        single_pipeline_ms=Percentiles.of([late for one in rounds.single_pipeline for late in one.latencies_s]),
        single_served_ms=Percentiles.of(
            [late for one in rounds.single_served for late in one.latencies_s.get("OK", ())]
        ),
        single_more_ms=_single_more_ms(rounds),
        offered_per_s=plan.rate if rounds.open else None,
        network_best_per_s=Spread.of(best) if best else None,
        allowed_per_s=Spread.of(allowed).median if allowed else None,
        pipeline_over_network=_ratio(pipeline, best),
        pipeline_over_allowed=_ratio(pipeline, allowed),
        served_over_pipeline=_ratio(through, pipeline),
        served_over_pipeline_without_generator=_ratio(returned, pipeline),
        streamed_over_pipeline=_ratio(streamed, pipeline),
        streamed_over_pipeline_without_generator=_ratio(streamed_returned, pipeline),
        goodput_over_capacity=_goodput(rounds.overload),
        goodput_over_capacity_without_generator=_goodput(rounds.overload, cores),
        held_goodput_over_capacity=_goodput(rounds.held_overload),
        streamed_goodput_over_capacity=_goodput(rounds.streamed_overload),
        streamed_goodput_over_capacity_without_generator=_goodput(rounds.streamed_overload, cores),
        held_goodput_over_capacity_without_generator=_goodput(rounds.held_overload, cores),
        streamed_held_goodput_over_capacity=_goodput(rounds.streamed_held_overload),
        streamed_held_goodput_over_capacity_without_generator=_goodput(rounds.streamed_held_overload, cores),
    )


def _goodput(results: Sequence[Overload], cores: int = 0) -> Spread | None:
    ratios = [ratio for one in results if (ratio := one.goodput(cores)) is not None]
    return Spread.of(ratios) if ratios else None


def _failed(results: Sequence[LoadResult]) -> dict[str, int]:
    """How many calls ended otherwise than well, by status."""
    counts: Counter[str] = Counter()
    for one in results:
        counts.update({status: len(late) for status, late in one.latencies_s.items() if status != "OK"})
    return dict(counts)


def _single_more_ms(rounds: Rounds) -> Spread | None:
    """By how much single calls' median is above the pipeline's, turn by turn, milliseconds."""
    pairs = [
        (Percentiles.of(call.latencies_s.get("OK", ())), Percentiles.of(alone.latencies_s))
        for call, alone in zip(rounds.single_served, rounds.single_pipeline, strict=False)
    ]
    more = [call.p50 - alone.p50 for call, alone in pairs if call and alone]
    return Spread.of(more) if more else None


def images_per_s(result: LoadResult) -> float:
    """Images a second."""
    return result.in_time / result.seconds


def _queue_bound_ms(target: Target | None, through: Sequence[float]) -> float | None:
    """How long the call may take that is let in last.

    What the server says; where it bounds no time, what as many calls as may be under way take at the speed that was
    reached.
    """
    if target is None or not through:
        return None
    if target.info.max_wait_ms:
        return target.info.max_wait_ms
    most = target.info.max_queued_jobs + 4 * target.info.max_batch_size  # see `ModelHost.admit`
    return 1000 * most / Spread.of(through).median


def _ratio(above: Sequence[float], below: Sequence[float]) -> Spread | None:
    """Of two speeds, round by round."""
    if not above or not below:
        return None
    ratios = [one / other for one, other in zip(above, below, strict=True) if other]
    return Spread.of(ratios) if ratios else None


def _speed(result: LoadResult, cores: int = 0) -> float:
    """Images a second; with cores, of a server that had the generator's CPU time as well."""
    speed = images_per_s(result)
    return speed * cores / (cores - result.generator_cpu_s / result.seconds) if cores else speed


def _stages(rounds: Rounds, pipeline: Flow | None, through: Flow | None) -> dict[str, float]:
    """CPU milliseconds an image, by stage; medians of the rounds."""
    if not rounds.stages or pipeline is None:
        return {}
    stages = {name: Spread.of([one[name].cpu_ms for one in rounds.stages]).median for name in rounds.stages[0]}
    stages["pipeline_rest"] = pipeline.cpu_ms - sum(stages.values())
    if through is not None and through.cpu_ms:
        stages["server"] = through.cpu_ms - pipeline.cpu_ms
    return stages


def _in_process_flow(results: Sequence[PipelineResult]) -> Flow:
    failed = sum(one.failed for one in results)
    return Flow(
        Spread.of([len(one.latencies_s) / one.seconds for one in results]),
        Percentiles.of([late for one in results for late in one.latencies_s]),
        histogram(size for one in results for size in one.batch_sizes),
        cpu_ms=Spread.of([1000 * one.cpu_s / max(1, len(one.latencies_s)) for one in results]).median,
        peak_mb=max(one.peak_mb for one in results),
        failed={"failed": failed} if failed else {},
    )


def _served_flow(results: Sequence[LoadResult], target: Target | None, peak_mb: float, cores: int) -> Flow:
    assert target is not None, "it was called"
    latencies_s: dict[str, list[float]] = {}
    for one in results:
        for status, values in one.latencies_s.items():
            latencies_s.setdefault(status, []).extend(values)
    failed = {status: values for status, values in latencies_s.items() if status != "OK"}
    return Flow(
        Spread.of([images_per_s(one) for one in results]),
        Percentiles.of(latencies_s.get("OK", ())),
        histogram(size for one in results for size in target.batch_sizes(one)),
        cpu_ms=Spread.of([1000 * one.server_cpu_s / max(1, one.in_time) for one in results]).median,
        peak_mb=peak_mb,
        generator_cpu_ms=Spread.of([1000 * one.generator_cpu_s / max(1, one.in_time) for one in results]).median,
        generator_share=Spread.of([one.generator_cpu_s / one.seconds / cores for one in results]).median,
        failed=_failed(results),
        failed_latency_ms={status: late for status, values in failed.items() if (late := Percentiles.of(values))},
    )
