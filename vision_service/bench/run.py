"""Measures a plan: every measurement in turn, round after round, so that what disturbs one round disturbs them all."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from vision_service.bench import inprocess, served
from vision_service.bench.cpu import cpu_model, memory_mb, reset_peak
from vision_service.bench.generators import Generators
from vision_service.bench.inprocess import Alone, Worker
from vision_service.bench.load import HELD_CALLERS, LoadResult
from vision_service.bench.plan import Plan, Variant
from vision_service.bench.report import ModelReport, Report
from vision_service.bench.served import Target
from vision_service.bench.summary import Overload, Rounds, images_per_s, summary
from vision_service.engine.build import resolve_specs
from vision_service.engine.threads import usable_cores
from vision_service.errors import InvalidInput

PACKAGES = ("vision-service", "torch", "openvino", "onnxruntime", "grpcio", "numpy", "opencv-python")

Say = Callable[[str], None]


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
        if target is not None:
            target = replace(target, generators=stack.enter_context(Generators(plan.generators)))
        rounds = Rounds()
        for number in range(plan.rounds):
            say(f"{variant}: round {number + 1} of {plan.rounds}")
            if target is not None and target.pid:
                reset_peak(target.pid)
            steps = _steps(replace(plan, seconds=plan.seconds / plan.turns), worker, target, rounds)
            for turn in range(number * plan.turns, (number + 1) * plan.turns):
                for step in steps[:: -1 if turn % 2 else 1]:
                    step()
            if target is not None:
                if target.pid:  # before the open loops, whose queues are another load
                    rounds.served_peak_mb = max(rounds.served_peak_mb, memory_mb(target.pid, "VmHWM"))
                _open_round(plan, target, rounds)
        return summary(plan, rounds, _identity(variant, worker, target), target)


def _steps(plan: Plan, worker: Worker | None, target: Target | None, rounds: Rounds) -> list[Callable[[], None]]:
    """What is measured in a turn. What the server does stands beside what the pipeline does."""
    wanted = set(plan.measures)
    single = replace(plan, warmup_s=plan.warmup_s / 2, seconds=plan.seconds / 2)
    steps: list[Callable[[], None]] = []

    def add(where: list[Any], measure: Callable[..., Any], *args: Any, **more: Any) -> None:
        steps.append(lambda: where.append(measure(*args, **more)))

    if worker is not None and "network" in wanted:
        add(rounds.network, _network, plan, worker)
    if worker is not None and "pipeline" in wanted:
        add(rounds.stages, worker, "stages", plan.seconds)
        add(rounds.pipeline, worker, "pipeline", plan.in_flight, plan.warmup_s, plan.seconds)
    if target is not None and "served" in wanted:
        add(rounds.served, target.load, plan, in_flight=plan.in_flight)
    if target is not None and "streamed" in wanted:
        add(rounds.streamed, target.load, plan, streamed=True, in_flight=plan.in_flight)
    if target is not None and "single" in wanted:
        add(rounds.single_served, target.load, single, in_flight=1)
    if worker is not None and "single" in wanted:
        add(rounds.single_pipeline, worker, "pipeline", 1, single.warmup_s, single.seconds)
    return steps


def _network(plan: Plan, worker: Worker) -> dict[int, Alone]:
    sizes = plan.batch_sizes or _batch_sizes(worker.about["max_batch_size"])
    return {size: worker("network", size, plan.seconds / len(sizes)) for size in sizes}


def _open_round(plan: Plan, target: Target, rounds: Rounds) -> None:
    if "open" in plan.measures:
        rounds.open.append(target.load(plan, rate=plan.rate))
    if "overload" in plan.measures:
        _overload(plan, target, {0: rounds.overload, HELD_CALLERS: rounds.held_overload})
    if "overload" in plan.measures and "streamed" in plan.measures:
        loops = {0: rounds.streamed_overload, HELD_CALLERS: rounds.streamed_held_overload}
        _overload(plan, target, loops, streamed=True)


def _overload(plan: Plan, target: Target, loops: Mapping[int, list[Overload]], *, streamed: bool = False) -> None:
    """Overload from callers that go on asking, and from callers that hold back, each time with closed loops beside it.

    A queue is full before it is measured, so an open loop takes seconds, within which a shared machine's speed changes:
    each is compared with what the server reaches right before and right after it, at its own pace.

    Args:
        plan: how many times the speed of the closed loop before it.
        target: the server.
        loops: where results go, by how many callers hold back.
        streamed: see `Target.load`.
    """

    def closed_loop() -> LoadResult:
        return target.load(plan, streamed=streamed, in_flight=plan.in_flight, seconds=plan.seconds / plan.turns)

    before = closed_loop()
    kinds = list(loops)
    for callers in kinds + kinds[::-1]:  # whatever drifts meanwhile drifts for both
        loop = target.load(
            plan,
            streamed=streamed,
            rate=plan.overload * max(images_per_s(before), _LEAST_PER_S),
            held_callers=callers,
            warmup_s=2 * plan.warmup_s,
            seconds=plan.seconds / 4,
        )
        after = closed_loop()
        loops[callers].append(Overload(loop, before, after))
        before = after


_LEAST_PER_S = 0.1
"""What a server is taken to reach that answered nothing in the closed loop: an open loop needs a rate."""


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
        "held_callers": HELD_CALLERS,
        "seconds": plan.seconds,
        "warmup_s": plan.warmup_s,
        "rounds": plan.rounds,
        "turns": plan.turns,
        "generators": plan.generators,
        "address": plan.address,
    }
