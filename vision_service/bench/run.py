"""Measures a plan: every measurement in turn, round after round, so that what disturbs one round disturbs them all."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from vision_service.bench import inprocess, served
from vision_service.bench.cpu import cpu_model, memory_mb, reset_peak
from vision_service.bench.inprocess import Alone, PipelineResult, Worker
from vision_service.bench.load import LoadResult
from vision_service.bench.plan import Plan, Variant
from vision_service.bench.report import Flow, ModelReport, Report
from vision_service.bench.served import Target
from vision_service.bench.stats import Percentiles, Spread, histogram
from vision_service.engine.build import resolve_specs
from vision_service.engine.threads import usable_cores
from vision_service.errors import InvalidInput

PACKAGES = ("vision-service", "torch", "openvino", "onnxruntime", "grpcio", "numpy", "opencv-python")

_TURNS = 4
"""Into so many turns a round is cut, but for the open loops, whose queue has to fill first. What is compared is
measured within seconds: a shared machine's speed changes by a quarter within a minute."""

Say = Callable[[str], None]


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
        streamed_overload: likewise, on one stream of Predict.
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
    overload: list[LoadResult] = field(default_factory=list)
    streamed_overload: list[LoadResult] = field(default_factory=list)
    served_peak_mb: float = 0.0


def measure(plan: Plan, say: Say) -> Report:
    """Measure everything in a plan.

    Args:
        plan: what.
        say: told what is being done.

    Raises:
        InvalidInput: the plan contradicts itself.
        ConfigError, ModelNotFound: a model or a setting is unknown.
        VisionError: a model or the server could not be started.
    """
    if "open" in plan.measures and not plan.rate:
        raise InvalidInput("rate", "an open loop needs one, such as --rate 100")
    if "overload" in plan.measures and not (plan.overload and "served" in plan.measures):
        raise InvalidInput("overload", "needs a factor, such as --overload 3, and the measure served to multiply")
    if not plan.address:
        for variant in plan.variants:  # a slip in the last one is not found out when all others are done
            resolve_specs(plan.setup.settings(variant))
    models = [_measure_one(plan, variant, say) for variant in plan.variants]
    return Report(_machine(), _about(plan), models)


def _measure_one(plan: Plan, variant: Variant, say: Say) -> ModelReport:
    in_process = not plan.address and bool({"network", "pipeline", "single"} & set(plan.measures))
    over_network = bool({"served", "streamed", "single", "open", "overload"} & set(plan.measures))
    with ExitStack() as stack:
        worker = target = None
        if over_network:
            say(f"{variant}: {'asking' if plan.address else 'starting'} the server")
            target = stack.enter_context(
                served.running(plan.address, variant.model) if plan.address else served.server(plan.setup, variant)
            )
        if in_process:
            say(f"{variant}: loading it in process")
            # The server chooses the batch: where sizes cost about the same, two starts may choose different ones, and
            # it is not they that are to be compared.
            batch = target.info.max_batch_size if target is not None else 0
            worker = stack.enter_context(inprocess.worker(plan.setup, variant, plan.images, batch))
        rounds = Rounds()
        for number in range(plan.rounds):
            say(f"{variant}: round {number + 1} of {plan.rounds}")
            if target is not None and target.pid:
                reset_peak(target.pid)
            turn = replace(plan, seconds=plan.seconds / _TURNS)
            for _ in range(_TURNS):
                if worker is not None:
                    _in_process_turn(turn, worker, rounds)
                if target is not None:
                    _served_turn(turn, target, rounds)
            if target is not None:
                if target.pid:  # before the open loops, whose queues are another load
                    rounds.served_peak_mb = max(rounds.served_peak_mb, memory_mb(target.pid, "VmHWM"))
                _open_round(plan, target, rounds)
        return _summary(plan, rounds, _identity(variant, worker, target), target)


def _in_process_turn(plan: Plan, worker: Worker, rounds: Rounds) -> None:
    if "network" in plan.measures:
        sizes = plan.batch_sizes or _batch_sizes(worker.about["max_batch_size"])
        share = plan.seconds / len(sizes)
        rounds.network.append({size: worker("network", size, share) for size in sizes})
    if "pipeline" in plan.measures:
        rounds.stages.append(worker("stages", plan.seconds))
        rounds.pipeline.append(worker("pipeline", plan.in_flight, plan.warmup_s, plan.seconds))
    if "single" in plan.measures:
        rounds.single_pipeline.append(worker("pipeline", 1, plan.warmup_s / 2, plan.seconds / 2))


def _served_turn(plan: Plan, target: Target, rounds: Rounds) -> None:
    if "served" in plan.measures:
        rounds.served.append(target.load(plan, in_flight=plan.in_flight))
    if "streamed" in plan.measures:
        rounds.streamed.append(target.load(plan, streamed=True, in_flight=plan.in_flight))
    if "single" in plan.measures:
        warmup_s, seconds = plan.warmup_s / 2, plan.seconds / 2
        rounds.single_served.append(target.load(plan, in_flight=1, warmup_s=warmup_s, seconds=seconds))


def _open_round(plan: Plan, target: Target, rounds: Rounds) -> None:
    if "open" in plan.measures:
        rounds.open.append(target.load(plan, rate=plan.rate))
    if "overload" in plan.measures:
        capacity = _by_round([_speed(one) for one in rounds.served])[-1]
        rounds.overload.append(target.load(plan, rate=plan.overload * capacity))
    if "overload" in plan.measures and "streamed" in plan.measures:
        capacity = _by_round([_speed(one) for one in rounds.streamed])[-1]
        rounds.streamed_overload.append(target.load(plan, streamed=True, rate=plan.overload * capacity))


def _by_round(turns: Sequence[float]) -> list[float]:
    """The mean of each round's turns."""
    return [sum(turns[at : at + _TURNS]) / _TURNS for at in range(0, len(turns), _TURNS)]


def _batch_sizes(most: int) -> tuple[int, ...]:
    """Powers of two up to the largest batch, and that."""
    return tuple(sorted({2**power for power in range(most.bit_length()) if 2**power <= most} | {most}))


def _identity(variant: Variant, worker: Worker | None, target: Target | None) -> dict[str, str]:
    if target is not None:
        info = target.info
        return {"model": info.name, "task": str(info.task), "runtime": info.runtime, "precision": info.precision}
    assert worker is not None, "something is measured"
    about = {name: worker.about[name] for name in ("task", "runtime", "precision")}
    return {"model": variant.model, **about}


def _summary(plan: Plan, rounds: Rounds, identity: dict[str, str], target: Target | None) -> ModelReport:
    cores = usable_cores()
    best = [max(1000 / alone.wall_ms for alone in one.values()) for one in rounds.network]
    pipeline = [len(one.latencies_s) / one.seconds for one in rounds.pipeline]
    through = [_speed(one) for one in rounds.served]
    streamed = [_speed(one) for one in rounds.streamed]
    returned = [speed * _without(one, cores) for speed, one in zip(through, rounds.served, strict=True)]
    streamed_returned = [speed * _without(one, cores) for speed, one in zip(streamed, rounds.streamed, strict=True)]
    allowed = [1000 * cores / sum(stage.cpu_ms for stage in stages.values()) for stages in rounds.stages]
    in_process = _in_process_flow(rounds.pipeline) if rounds.pipeline else None

    def flow(results: Sequence[LoadResult], peak_mb: float = 0.0) -> Flow | None:
        return _served_flow(results, target, peak_mb, cores) if results else None

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
        overload=flow(rounds.overload),
        streamed_overload=flow(rounds.streamed_overload),
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
        offered_per_s=plan.rate if rounds.open else None,
        network_best_per_s=Spread.of(best) if best else None,
        allowed_per_s=Spread.of(allowed).median if allowed else None,
        pipeline_over_network=_ratio(pipeline, best),
        pipeline_over_allowed=_ratio(pipeline, allowed),
        served_over_pipeline=_ratio(through, pipeline),
        served_over_pipeline_without_generator=_ratio(returned, pipeline),
        streamed_over_pipeline=_ratio(streamed, pipeline),
        streamed_over_pipeline_without_generator=_ratio(streamed_returned, pipeline),
        goodput_over_capacity=_goodput(rounds.overload, through),
        goodput_over_capacity_without_generator=_goodput(rounds.overload, returned, cores),
        streamed_goodput_over_capacity=_goodput(rounds.streamed_overload, streamed),
        streamed_goodput_over_capacity_without_generator=_goodput(rounds.streamed_overload, streamed_returned, cores),
    )


def _goodput(overload: Sequence[LoadResult], capacity: Sequence[float], cores: int = 0) -> Spread | None:
    """Of what is answered under overload to the closed loop's speed; with cores, the generator's time returned."""
    return _ratio([_speed(one) * (_without(one, cores) if cores else 1.0) for one in overload], _by_round(capacity))


def _speed(result: LoadResult) -> float:
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
    return Spread.of([one / other for one, other in zip(above, below, strict=True)])


def _without(result: LoadResult, cores: int) -> float:
    """How much faster a server would be that had the generator's CPU time."""
    return cores / (cores - result.generator_cpu_s / result.seconds)


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
        Spread.of([_speed(one) for one in results]),
        Percentiles.of(latencies_s.get("OK", ())),
        histogram(size for one in results for size in target.batch_sizes(one)),
        cpu_ms=Spread.of([1000 * one.server_cpu_s / max(1, one.in_time) for one in results]).median,
        peak_mb=peak_mb,
        generator_cpu_ms=Spread.of([1000 * one.generator_cpu_s / max(1, one.in_time) for one in results]).median,
        generator_share=Spread.of([one.generator_cpu_s / one.seconds / cores for one in results]).median,
        failed={status: len(values) for status, values in failed.items()},
        failed_latency_ms={status: late for status, values in failed.items() if (late := Percentiles.of(values))},
    )


def _machine() -> dict[str, Any]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": cpu_model(),
        "cores": usable_cores(),
        "python": platform.python_version(),
        "versions": versions,
    }


def _about(plan: Plan) -> dict[str, Any]:
    return {
        "images": len(plan.images),
        "mean_image_bytes": round(sum(map(len, plan.images)) / len(plan.images)),
        "measures": list(plan.measures),
        "in_flight": plan.in_flight,
        "rate": plan.rate,
        "overload": plan.overload,
        "seconds": plan.seconds,
        "warmup_s": plan.warmup_s,
        "rounds": plan.rounds,
        "generators": plan.generators,
        "address": plan.address,
    }
