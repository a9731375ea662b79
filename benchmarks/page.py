"""Write the measured parts of docs/performance.md and its chart from benchmarks/results; say what is met and missed.

    python benchmarks/page.py [--results FOLDER] [--print]

What stands between ``<!-- NAME -->`` and ``<!-- /NAME -->`` in the page is replaced; the rest is written by hand.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vision_service.bench.load import HELD_BACK
from vision_service.bench.report import Flow, ModelReport, Report
from vision_service.bench.stats import Percentiles, Spread

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"
CHART = ROOT / "docs" / "images" / "performance.svg"
NAMES = {"mobilenet_v2": "MobileNetV2", "resnet50": "ResNet-50", "nanodet_g": "NanoDet-g"}
OURS = {"vision-service": "", "vision-service-stream": ", on a stream"}
SYSTEMS = {
    "vision-service": "vision-service",
    "vision-service-stream": "vision-service, on a stream",
    "loop": "bare loop",
    "mosec": "mosec",
    "litserve": "LitServe",
    "ray": "Ray Serve",
}
ROWS = {
    "eager:fp32": "eager torch",
    "openvino:fp32": "OpenVINO fp32",
    "openvino:bf16": "OpenVINO bf16",
    "openvino:int8": "OpenVINO int8",
}
PEERS = ("mosec", "litserve", "ray")
_ON_A_STREAM = ", on a stream"
_HELD_BACK = ", callers hold back"
_REFUSED = "RESOURCE_EXHAUSTED"


@dataclass(frozen=True)
class Verdict:
    """A requirement.

    Attributes:
        text: what is required.
        value: what was measured, as text.
        met: whether that is enough.
        note: what else was measured.
    """

    text: str
    value: str
    met: bool
    note: str = ""


def main() -> None:
    """Read results, write page and chart, print verdicts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--print", action="store_true", help="leave the page as it is")
    arguments = parser.parse_args()
    reports = [Report.read(path) for path in sorted(arguments.results.glob("models-*.json"))]
    models = [model for report in reports for model in report.models]
    # One run for each kind of machine: those that compute in bf16, and those that do not.
    peers = [json.loads(path.read_text()) for path in sorted(arguments.results.glob("peers-*.json"))]
    soak = _load(arguments.results / "soak.json")
    verdicts = [*_own_verdicts(models), *(one for run in peers for one in _peer_verdicts(run)), *_soak_verdicts(soak)]
    for one in verdicts:
        print(f"{'met   ' if one.met else 'MISSED'}  {one.text}: {one.value}" + (f" ({one.note})" if one.note else ""))
    if not arguments.print:
        _write(reports, models, peers, verdicts)


def _write(
    reports: Sequence[Report], models: Sequence[ModelReport], peers: Sequence[dict], verdicts: Sequence[Verdict]
) -> None:
    blocks = {
        "verdicts": _table(
            ("required", "measured", "", "beside it"),
            [(one.text, one.value, "met" if one.met else "**missed**", one.note) for one in verdicts],
        ),
        "machine": _machine(reports),
        "models": _models_table(models),
        "stages": _stages_table(models),
        "peers": _peers(peers),
    }
    text = PAGE.read_text()
    for name, block in blocks.items():
        text, count = re.subn(f"(<!-- {name} -->\n).*?(<!-- /{name} -->)", rf"\g<1>{block}\g<2>", text, flags=re.DOTALL)
        assert count == 1, f"{PAGE} has no place for {name}"
    PAGE.write_text(text)
    if peers:
        draw(peers[0]["rows"], CHART)


def _load(path: Path) -> dict | None:
    return json.loads(path.read_text()) if path.exists() else None


def _own_verdicts(models: Iterable[ModelReport]) -> Iterator[Verdict]:
    for model in models:
        name = f"{NAMES.get(model.model, model.model)} {model.runtime} {model.precision}"
        for how, ratio, alone in (
            ("", model.served_over_pipeline, model.served_over_pipeline_without_generator),
            (_ON_A_STREAM, model.streamed_over_pipeline, model.streamed_over_pipeline_without_generator),
        ):
            if ratio is not None:
                yield _at_least(f"{name}{how}: served / pipeline >= 0.95", ratio, 0.95, _elsewhere(alone))
        if model.pipeline_over_allowed is not None:
            yield _at_least(
                f"{name}: pipeline / what the stages' CPU time allows >= 0.95", model.pipeline_over_allowed, 0.95
            )
        if model.single_pipeline_ms and model.single_served_ms:
            more, by = model.single_served_ms.p50 - model.single_pipeline_ms.p50, ""
            if model.single_more_ms is not None:
                more = model.single_more_ms.median
                by = f" ({model.single_more_ms.low:+.1f} to {model.single_more_ms.high:+.1f})"
            note = f"{model.single_served_ms.p50:.1f} ms and {model.single_pipeline_ms.p50:.1f} ms"
            text = f"{name}: one call at a time, p50 <= in process + 2 ms"
            yield Verdict(text, f"{more:+.1f} ms{by}", more <= 2, note)
        for how, overload, ratio, alone in (
            ("", model.overload, model.goodput_over_capacity, model.goodput_over_capacity_without_generator),
            (
                _ON_A_STREAM,
                model.streamed_overload,
                model.streamed_goodput_over_capacity,
                model.streamed_goodput_over_capacity_without_generator,
            ),
            (
                _HELD_BACK,
                model.held_overload,
                model.held_goodput_over_capacity,
                model.held_goodput_over_capacity_without_generator,
            ),
            (
                _ON_A_STREAM + _HELD_BACK,
                model.streamed_held_overload,
                model.streamed_held_goodput_over_capacity,
                model.streamed_held_goodput_over_capacity_without_generator,
            ),
        ):
            if overload is not None:
                at = f"{name}{how}: {model.overload_offered:g} x capacity"
                if ratio is not None:
                    beside = overload.beside_failed
                    note = f"capacity with failures: {beside}" if beside else _elsewhere(alone)
                    found = _at_least(f"{at}: goodput / capacity >= 0.9", ratio, 0.9, note)
                    yield replace(found, met=found.met and not beside)
                yield from _overload_verdicts(at, overload, model.queue_bound_ms)


def _elsewhere(ratio: Spread | None) -> str:
    return f"{ratio.median:.3f} if the load generator ran elsewhere" if ratio else ""


def _overload_verdicts(at: str, overload: Flow, queue_bound_ms: float | None) -> Iterator[Verdict]:
    refused, held = overload.failed_latency_ms.get(_REFUSED), overload.failed.get(HELD_BACK, 0)
    # Whoever calls a client that holds back cannot tell the one from the other.
    rest = [overload.failed_latency_ms[how] for how in (_REFUSED, HELD_BACK) if how in overload.failed_latency_ms]
    slowest_ms = max((late.p99 for late in rest), default=None)
    others = {status: count for status, count in overload.failed.items() if status not in (_REFUSED, HELD_BACK)}
    beside = [f"p50 {refused.p50:.1f} ms"] if refused else []
    if held:
        beside.append(f"{overload.failed.get(_REFUSED, 0)} refused, {held} not sent")
    yield Verdict(
        f"{at}: the rest gets RESOURCE_EXHAUSTED within 50 ms",
        "none refused" if slowest_ms is None else f"p99 {slowest_ms:.0f} ms",
        slowest_ms is not None and slowest_ms <= 50 and not others,
        f"others: {others}" if others else "; ".join(beside),
    )
    if overload.latency_ms is not None and queue_bound_ms is not None:
        yield Verdict(
            f"{at}: p99 of the accepted within the queue's bound",
            f"{overload.latency_ms.p99:.0f} ms",
            overload.latency_ms.p99 <= queue_bound_ms,
            f"bound {queue_bound_ms:.0f} ms",
        )


def _at_least(text: str, ratio: Spread, needed: float, note: str = "") -> Verdict:
    return Verdict(text, f"{ratio.median:.3f} ({ratio.low:.3f} to {ratio.high:.3f})", ratio.median >= needed, note)


def _peer_verdicts(run: dict) -> Iterator[Verdict]:
    rows, processor = run["rows"], _processor(run)
    loads = sorted({load for row in rows for load in row["loads"]}, key=int)
    measured = {row["precision"] for row in rows if row["runtime"] == "openvino"}
    precisions = [precision for precision in ("fp32", "bf16") if precision in measured]
    for load in loads if precisions else ():
        for system, how in OURS.items():
            name = f"MobileNetV2, {load} in flight{how}"
            for precision in precisions:
                row = f"openvino:{precision}"
                beside = _beside(rows, row, system, row, load)
                yield from _times(f"{name}, OpenVINO {precision}", beside, 1.25, processor)
            # The fastest of them, and int8, which wants a user's photos to be calibrated, by itself.
            for precision in (precisions[-1], "int8"):
                beside = _beside(rows, "eager:fp32", system, f"openvino:{precision}", load)
                yield from _times(f"{name}, ours in {precision}, theirs eager", beside, 5, processor)


def _processor(run: dict) -> str:
    """Its name, which says little of virtual ones, and whether it computes in bf16."""
    without = not any(row["precision"] == "bf16" for row in run["rows"])
    return run["machine"]["processor"] + (" without bf16" if without else "")


@dataclass(frozen=True)
class _Beside:
    """Our server beside a peer.

    Attributes:
        system: the peer.
        ratio: ours divided by the peer's, images a second.
        speeds: ours, where it is known for these turns, and the peer's.
        in_turns: whether the two were measured in turns, and not one some minutes after the other.
        starts: of the servers; ``ratio`` is the median of as many medians.
        failed: calls to the peer that did, which make it slower than it is.
    """

    system: str
    ratio: Spread
    speeds: tuple[float | None, float]
    in_turns: bool
    starts: int
    failed: int


def _beside(rows: Sequence[dict], their_row: str, system: str, our_row: str, load: str) -> Iterator[_Beside]:
    """Our server beside each peer that was measured."""
    ours = _speeds(rows, "mobilenet_v2", our_row, load).get(system)
    for one in rows:
        if (one["model"], _row(one)) != ("mobilenet_v2", their_row) or one["system"] not in PEERS:
            continue
        theirs = one["loads"].get(load, {})
        if ours is None or not theirs.get("images_per_s"):
            continue
        turns = one.get("ours_over", {}).get(our_row, {}).get(system, {}).get(load)
        failed = int(theirs.get("failed", 0))
        if turns:
            ratio = Spread(turns["median"], turns["low"], turns["high"])
            speeds = turns.get("ours"), turns.get("theirs", theirs["images_per_s"])
        else:
            ratio, speeds = Spread.of([ours / theirs["images_per_s"]]), (ours, theirs["images_per_s"])
        starts = len((turns or {}).get("starts", [ratio]))
        yield _Beside(one["system"], ratio, speeds, turns is not None, starts, failed)


def _times(what: str, peers: Iterable[_Beside], needed: float, processor: str) -> Iterator[Verdict]:
    """The peer that comes nearest to us decides; where one is missing, or failed, nothing is met."""
    every = list(peers)
    if not every:
        return
    best = min(every, key=lambda one: one.ratio.median)
    ours, theirs = best.speeds
    notes = [f"{theirs:.0f} images/s, {SYSTEMS[best.system]}", processor]
    if ours is not None:
        notes[0] = f"{ours:.0f} and {notes[0]}"
    if not all(one.in_turns for one in every):
        notes.append("not in turns")
    elif (starts := min(one.starts for one in every)) > 1:
        notes.append(f"{starts} starts of each")
    faults = [f"{SYSTEMS[name]} not measured" for name in PEERS if name not in {one.system for one in every}]
    faults += [f"{SYSTEMS[one.system]}: {one.failed} calls failed" for one in every if one.failed]
    found = _at_least(f"{what}: served / best peer >= {needed:g}", best.ratio, needed, "; ".join([*notes, *faults]))
    if not best.in_turns:
        found = replace(found, value=f"{best.ratio.median:.2f}")
    yield replace(found, met=found.met and not faults)


def _row(one: dict) -> str:
    return f"{one['runtime']}:{one['precision']}"


def _speeds(rows: Sequence[dict], model: str, row: str, load: str) -> dict[str, float]:
    """Images a second, by system; of a peer that was tried with several numbers of workers, the best."""
    found: dict[str, float] = {}
    for one in rows:
        if one["model"] == model and _row(one) == row and load in one["loads"]:
            speed = one["loads"][load]["images_per_s"]
            found[one["system"]] = max(speed, found.get(one["system"], 0.0))
    return found


def _soak_verdicts(soak: dict | None) -> Iterator[Verdict]:
    if soak is not None:
        text = f"{soak['calls']} mixed images: memory after warm-up grows by less than 3 %"
        note = f"{soak['rss_after_warmup_mb']:.0f} to {soak['rss_at_end_mb']:.0f} MiB"
        yield Verdict(text, f"{100 * soak['growth']:.1f} %", soak["growth"] < 0.03, note)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _machine(reports: Sequence[Report]) -> str:
    lines = []
    for report in reports:
        machine, plan = report.machine, report.plan
        kilobytes = plan["mean_image_bytes"] / 1000
        versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
        lines.append(
            f"* {', '.join(sorted({model.label for model in report.models}))}: {machine['processor']}, "
            f"{machine['cores']} cores, {versions}; {plan['images']} images of {kilobytes:.0f} kB, "
            f"{plan['rounds']} rounds of {plan['seconds']:g} s, {plan['in_flight']} in flight, {machine['measured']}\n"
        )
    return "".join(lines)


def _models_table(models: Iterable[ModelReport]) -> str:
    head = ("model", "network alone", "stages allow", "pipeline", "served, a call each", "p50 / p95 / p99 ms")
    return _table(
        (
            *head,
            "on a stream",
            "p50 / p95 / p99 ms",
            "one at a time, p50",
            "peak MiB, in process / server",
            "generator's share of the cores",
        ),
        [
            (
                f"{NAMES.get(model.model, model.model)} {model.runtime} {model.precision}",
                _speed(model.network_best_per_s),
                f"{model.allowed_per_s:.1f}" if model.allowed_per_s else "",
                _speed(model.pipeline and model.pipeline.images_per_s),
                _speed(model.served and model.served.images_per_s),
                _late(model.served.latency_ms) if model.served else "",
                _speed(model.streamed and model.streamed.images_per_s),
                _late(model.streamed.latency_ms) if model.streamed else "",
                " / ".join(
                    f"{late.p50:.1f}" for late in (model.single_pipeline_ms, model.single_served_ms) if late is not None
                ),
                " / ".join(f"{flow.peak_mb:.0f}" for flow in (model.pipeline, model.served) if flow is not None),
                f"{100 * model.served.generator_share:.1f} %" if model.served else "",
            )
            for model in models
        ],
    )


def _speed(speed: Spread | None) -> str:
    return f"{speed.median:.1f} ({speed.low:.1f} to {speed.high:.1f})" if speed else ""


def _late(late: Percentiles | None) -> str:
    return f"{late.p50:.0f} / {late.p95:.0f} / {late.p99:.0f}" if late else ""


def _stages_table(models: Iterable[ModelReport]) -> str:
    names = ("decode", "preprocess", "forward", "postprocess", "pipeline_rest", "server")
    return _table(
        ("model", *names, "sum"),
        [
            (
                f"{NAMES.get(model.model, model.model)} {model.runtime} {model.precision}",
                *(f"{model.stages_cpu_ms[name]:.2f}" if name in model.stages_cpu_ms else "" for name in names),
                f"{sum(model.stages_cpu_ms.values()):.2f}",
            )
            for model in models
            if model.stages_cpu_ms
        ],
    )


def _peers(runs: Sequence[dict]) -> str:
    """The chart, which is of the first run, and a table for each run."""
    if not runs:
        return "There is no result yet: the comparison needs the machine to itself, which it has not had.\n"
    tables = []
    for run in runs:
        machine, days = run["machine"], sorted({row["measured"][:10] for row in run["rows"]})
        versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
        when = " to ".join(dict.fromkeys((days[0], days[-1])))
        tables.append(
            f"{_processor(run)}, {machine['cores']} cores; {versions}; {when}:\n\n{_peers_table(run['rows'])}"
        )
    return f"![Images a second of each system](images/{CHART.name})\n\n" + "\n".join(tables)


def _peers_table(rows: Sequence[dict]) -> str:
    lines = []
    for one in sorted(rows, key=lambda one: (one["model"], list(ROWS).index(_row(one)))):
        for load, found in one["loads"].items():
            looped = one["system"] == "loop"
            if looped and load != min(one["loads"], key=int) and "ours_over" not in one:  # one measurement, twice
                continue
            lines.append(
                (
                    NAMES[one["model"]],
                    ROWS[_row(one)],
                    SYSTEMS[one["system"]] + (f", {one['workers']} workers" if one["workers"] > 1 else ""),
                    "" if looped else load,
                    f"{found['images_per_s']:.1f} ({found['lowest']:.1f} to {found['highest']:.1f})",
                    "" if looped else f"{found['p50_ms']:.0f} / {found['p99_ms']:.0f}",
                    "" if looped else f"{found['generator_ms']:.2f}",
                    "; ".join(_ours_over(one, load)),
                )
            )
    head = ("model", "network", "system", "in flight", "images/s", "p50 / p99 ms", "generator, CPU ms/image")
    return _table((*head, "ours / this one, in turns: calls, stream"), lines)


def _ours_over(one: dict, load: str) -> Iterator[str]:
    """Our server in each of its rows, divided by a system that it was measured beside."""
    for row, systems in one.get("ours_over", {}).items():
        ratios = ", ".join(f"{systems[name][load]['median']:.2f}" for name in OURS if load in systems.get(name, {}))
        yield f"{ROWS[row]} {ratios}"


def draw(rows: Sequence[dict], path: Path, load: str = "32") -> None:
    """Bars: images a second of every system, in groups by network, a panel for each model."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "vision-service"  # the same data makes the same file
    from matplotlib import pyplot

    models = [name for name in NAMES if any(row["model"] == name for row in rows)]
    figure, panels = pyplot.subplots(1, len(models), figsize=(5.5 * len(models), 4.2), squeeze=False)
    names = [name for name in ROWS if any(_row(row) == name for row in rows)]
    colours = ("#1b6ca8", "#4f9bd1", "#9aa5b1", "#e0a458", "#7a9e7e", "#b56576")
    for panel, model in zip(panels[0], models, strict=True):
        for index, (system, colour) in enumerate(zip(SYSTEMS, colours, strict=True)):
            speeds = [_speeds(rows, model, row, load).get(system, 0.0) for row in names]
            places = [group + 0.14 * (index - 2.5) for group in range(len(names))]
            bars = panel.bar(places, speeds, 0.13, color=colour, label=SYSTEMS[system])
            panel.bar_label(bars, [f"{speed:.0f}" if speed else "" for speed in speeds], fontsize=7, padding=1)
        panel.set_xticks(range(len(names)), [ROWS[name] for name in names])
        panel.set_title(NAMES[model])
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel(f"images/s, {load} calls in flight")
    panels[0][0].legend(frameon=False, loc="upper left")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
