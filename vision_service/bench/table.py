"""Reports for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any

from vision_service.bench.load import HELD_BACK
from vision_service.bench.report import Flow, ModelReport, Report
from vision_service.bench.stats import Percentiles, Spread


def lines_of(report: Report) -> Iterator[str]:
    """A report as text, line by line."""
    machine, plan = report.machine, report.plan
    yield f"{machine['processor']}, {machine['cores']} cores; {plan['images']} images, {plan['rounds']} rounds"
    for model in report.models:
        yield ""
        yield from _model_lines(model, plan["in_flight"])


def _model_lines(model: ModelReport, in_flight: int) -> Iterator[str]:
    yield f"{model.label} ({model.task})"
    rows: list[Sequence[str]] = [("", "images/s", "p50", "p95", "p99 ms", "CPU ms/image", "peak MiB")]
    rows += [(f"network alone, batch {size}", _speed(speed)) for size, speed in model.network_images_per_s.items()]
    if model.allowed_per_s is not None:
        rows.append(("all stages' CPU allow", f"{model.allowed_per_s:.1f}"))
    flows = (
        (f"pipeline, {in_flight} in flight", model.pipeline),
        (f"served, {in_flight} in flight", model.served),
        (f"on a stream, {in_flight} in flight", model.streamed),
        (f"served, open loop at {model.offered_per_s or 0:.0f}/s", model.open),
        (f"served, {model.overload_offered or 0:g} x as many", model.overload),
        (f"served, {model.overload_offered or 0:g} x as many, callers hold back", model.held_overload),
        (f"on a stream, {model.overload_offered or 0:g} x as many", model.streamed_overload),
        (f"on a stream, {model.overload_offered or 0:g} x as many, callers hold back", model.streamed_held_overload),
    )
    rows += [_flow_row(name, flow) for name, flow in flows if flow is not None]
    singles = (("pipeline, one at a time", model.single_pipeline_ms), ("served, one at a time", model.single_served_ms))
    rows += [(name, "", *_latency(late)) for name, late in singles if late is not None]
    yield from aligned(rows)
    if model.stages_cpu_ms:
        yield "  CPU ms/image: " + ", ".join(f"{name} {cost:.2f}" for name, cost in model.stages_cpu_ms.items())
    for name, flow in flows:
        if flow is not None:
            yield from _notes(name, flow)
    if model.overload is not None and model.queue_bound_ms is not None:
        yield f"  the queue's bound is {model.queue_bound_ms:.0f} ms"
    for name in RATIOS:
        ratio: Spread | None = getattr(model, name)
        if ratio is not None:
            yield f"  {name} {ratio.median:.3f} ({ratio.low:.3f} to {ratio.high:.3f})"


RATIOS = (
    "pipeline_over_network",
    "pipeline_over_allowed",
    "served_over_pipeline",
    "served_over_pipeline_without_generator",
    "streamed_over_pipeline",
    "streamed_over_pipeline_without_generator",
    "goodput_over_capacity",
    "goodput_over_capacity_without_generator",
    "streamed_goodput_over_capacity",
    "streamed_goodput_over_capacity_without_generator",
    "held_goodput_over_capacity",
    "held_goodput_over_capacity_without_generator",
    "streamed_held_goodput_over_capacity",
    "streamed_held_goodput_over_capacity_without_generator",
)
"""Fields of `ModelReport`, in the order in which they are shown."""


def _flow_row(name: str, flow: Flow) -> Sequence[str]:
    return (
        name,
        _speed(flow.images_per_s),
        *_latency(flow.latency_ms),
        f"{flow.cpu_ms:.2f}" if flow.cpu_ms else "-",
        f"{flow.peak_mb:.0f}" if flow.peak_mb else "-",
    )


def _notes(name: str, flow: Flow) -> Iterator[str]:
    """What does not fit into a row."""
    batches = ", ".join(f"{count} in {size}" for size, count in flow.batches.items())
    yield f"  {name}: batches: {batches}"
    if flow.generator_cpu_ms:
        share = 100 * flow.generator_share
        yield f"  {name}: load generator: {flow.generator_cpu_ms:.2f} CPU ms/image, {share:.1f} % of all cores' time"
    for status, count in flow.failed.items():
        late = flow.failed_latency_ms.get(status)
        how = "calls were held back" if status == HELD_BACK else f"calls ended {status}"
        yield f"  {name}: {count} {how}" + (f", p99 after {late.p99:.1f} ms" if late else "")


def _speed(speed: Spread) -> str:
    return f"{speed.median:.1f} ({speed.low:.1f} to {speed.high:.1f})"


def _latency(latency: Percentiles | None) -> tuple[str, str, str]:
    return ("-", "-", "-") if latency is None else (f"{latency.p50:.1f}", f"{latency.p95:.1f}", f"{latency.p99:.1f}")


def aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Rows of cells under each other; the first column to the left, the others to the right."""
    columns = list(zip_longest(*rows, fillvalue=""))
    widths = [max(map(len, column)) for column in columns]
    for row in zip(*columns, strict=True):
        first, *rest = row
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))]
        yield "  ".join(("", *cells)).rstrip()


FIGURES = {
    "network images/s": "network_best_per_s.median",
    "pipeline images/s": "pipeline.images_per_s.median",
    "served images/s": "served.images_per_s.median",
    "streamed images/s": "streamed.images_per_s.median",
    "served p99 ms": "served.latency_ms.p99",
    "served CPU ms/image": "served.cpu_ms",
    "served peak MiB": "served.peak_mb",
    "single served p50 ms": "single_served_ms.p50",
    "pipeline_over_network": "pipeline_over_network.median",
    "served_over_pipeline": "served_over_pipeline.median",
    "streamed_over_pipeline": "streamed_over_pipeline.median",
}
"""What two runs are compared in: a name, and where in a `ModelReport` it is."""


def _figure(model: ModelReport, path: str) -> float | None:
    """A figure by its place; ``None`` when it was not measured."""
    value: Any = model
    for name in path.split("."):
        value = None if value is None else getattr(value, name)
    return None if value is None else float(value)


def compare(before: Report, after: Report) -> Iterator[str]:
    """Two runs side by side, line by line; models are matched by name, runtime and precision."""
    old = {model.label: model for model in before.models}
    new = {model.label: model for model in after.models}
    for label in [*old, *(label for label in new if label not in old)]:
        if label not in old or label not in new:
            yield f"{label}: only in the {'second' if label in new else 'first'}"
            continue
        yield label
        rows: list[Sequence[str]] = [("", "first", "second", "change")]
        for name, path in FIGURES.items():
            was, now = _figure(old[label], path), _figure(new[label], path)
            if was and now:
                rows.append((name, f"{was:.4g}", f"{now:.4g}", f"{100 * (now / was - 1):+.1f} %"))
        yield from aligned(rows)
    for name in ("processor", "cores"):
        if before.machine.get(name) != after.machine.get(name):
            yield f"not the same {name}: {before.machine.get(name)} and {after.machine.get(name)}"
