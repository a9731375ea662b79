"""What `make bench` calls met and missed, and the tables it writes."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest

from tests.helpers import ROOT
from vision_service.bench.report import Flow, ModelReport
from vision_service.bench.stats import Percentiles, Spread

sys.path.insert(0, str(ROOT / "benchmarks"))
import page


def same(value):
    return Spread(value, value, value)


def model(**fields):
    flow = Flow(same(100.0), Percentiles(1.0, 2.0, 3.0), {})
    base = {"pipeline": flow, "served": flow, "served_over_pipeline": same(0.96), "pipeline_over_allowed": same(0.9)}
    return ModelReport(
        **{"model": "mobilenet_v2", "task": "classify", "runtime": "r", "precision": "p", **base, **fields}
    )


def row(system, speed, model="mobilenet_v2", runtime="openvino", precision="bf16", workers=1):
    loads = {"32": {"images_per_s": speed, "lowest": speed, "highest": speed, "p50_ms": 1, "p99_ms": 2}}
    for found in loads.values():
        found["generator_ms"] = 0.1
    names = {"system": system, "model": model, "runtime": runtime, "precision": precision, "workers": workers}
    return {**names, "loads": loads}


def met(verdicts):
    return {one.text.partition(": ")[2]: one.met for one in verdicts}


def test_ratios_and_single_calls():
    late = {"single_pipeline_ms": Percentiles(5.0, 6, 7), "single_served_ms": Percentiles(7.5, 8, 9)}
    found = met(page._own_verdicts([model(**late)]))
    assert found["served / pipeline >= 0.95"]
    assert not found["pipeline / what the stages' CPU time allows >= 0.95"]
    assert not found["one call at a time, p50 <= in process + 2 ms"]
    late["single_served_ms"] = Percentiles(7.0, 8, 9)
    assert met(page._own_verdicts([model(**late)]))["one call at a time, p50 <= in process + 2 ms"]
    late["single_served_ms"] = Percentiles(4.5, 8, 9)
    values = {one.value for one in page._own_verdicts([model(**late)])}
    assert "-0.5 ms" in values
    late["single_more_ms"] = Spread(2.5, 1.0, 4.0)  # turn by turn, which the machine's speed does not blur
    verdicts = list(page._own_verdicts([model(**late)]))
    assert not met(verdicts)["one call at a time, p50 <= in process + 2 ms"]
    assert "+2.5 ms (+1.0 to +4.0)" in {one.value for one in verdicts}


@pytest.mark.parametrize(
    ("failed", "refused_p99_ms", "accepted_p99_ms", "goodput", "expected"),
    [
        ({"RESOURCE_EXHAUSTED": 5}, 50.0, 900.0, 0.9, [True, True, True]),
        ({"RESOURCE_EXHAUSTED": 5}, 51.0, 1001.0, 0.89, [False, False, False]),
        ({"RESOURCE_EXHAUSTED": 5, "INTERNAL": 1}, 1.0, 900.0, 0.95, [True, False, True]),
        ({}, None, 900.0, 0.95, [True, False, True]),
    ],
)
def test_overload(failed, refused_p99_ms, accepted_p99_ms, goodput, expected):
    late = {} if refused_p99_ms is None else {"RESOURCE_EXHAUSTED": Percentiles(1, 2, refused_p99_ms)}
    flow = Flow(same(90.0), Percentiles(1, 2, accepted_p99_ms), {}, failed=failed, failed_latency_ms=late)
    overloaded = model(overload=flow, overload_offered=3.0, queue_bound_ms=1000.0, goodput_over_capacity=same(goodput))
    assert [one.met for one in page._own_verdicts([overloaded]) if "3 x" in one.text] == expected


def test_a_capacity_with_failures_is_none():
    flow = Flow(same(90.0), Percentiles(1, 2, 3), {}, beside_failed={"INTERNAL": 2})
    overloaded = model(overload=flow, overload_offered=3.0, goodput_over_capacity=same(0.95))
    (found,) = [one for one in page._own_verdicts([overloaded]) if "goodput" in one.text]
    assert not found.met
    assert "INTERNAL" in found.note


def test_what_is_streamed_has_verdicts_of_its_own():
    refused = {"RESOURCE_EXHAUSTED": Percentiles(1, 2, 3)}
    calls = Flow(same(80.0), Percentiles(1, 2, 3), {}, failed={"INTERNAL": 1}, failed_latency_ms=refused)
    flow = Flow(same(90.0), Percentiles(1, 2, 3), {}, failed={"RESOURCE_EXHAUSTED": 5}, failed_latency_ms=refused)
    both = model(
        streamed=flow,
        served_over_pipeline=same(0.9),
        streamed_over_pipeline=same(0.97),
        overload=calls,
        streamed_overload=flow,
        overload_offered=3.0,
        queue_bound_ms=2.0,
        goodput_over_capacity=same(0.8),
        streamed_goodput_over_capacity=same(0.92),
        streamed_goodput_over_capacity_without_generator=same(0.95),
    )
    found = {one.text.removeprefix("MobileNetV2 r p"): one for one in page._own_verdicts([both])}
    assert {text: one.met for text, one in found.items()} == {
        ": served / pipeline >= 0.95": False,
        ", on a stream: served / pipeline >= 0.95": True,
        ": pipeline / what the stages' CPU time allows >= 0.95": False,
        ": 3 x capacity: goodput / capacity >= 0.9": False,
        ": 3 x capacity: the rest gets RESOURCE_EXHAUSTED within 50 ms": False,
        ": 3 x capacity: p99 of the accepted within the queue's bound": False,
        ", on a stream: 3 x capacity: goodput / capacity >= 0.9": True,
        ", on a stream: 3 x capacity: the rest gets RESOURCE_EXHAUSTED within 50 ms": True,
        ", on a stream: 3 x capacity: p99 of the accepted within the queue's bound": False,
    }
    assert found[", on a stream: 3 x capacity: goodput / capacity >= 0.9"].note.startswith("0.950")


@pytest.mark.parametrize(("held_p99_ms", "in_time"), [(2, True), (51, False)])
def test_callers_that_hold_back_have_verdicts_of_their_own(held_p99_ms, in_time):
    late = {"RESOURCE_EXHAUSTED": Percentiles(1, 2, 3), "HELD_BACK": Percentiles(1, 2, held_p99_ms)}
    failed = {"RESOURCE_EXHAUSTED": 5, "HELD_BACK": 400}
    flow = Flow(same(90.0), Percentiles(1, 2, 3), {}, failed=failed, failed_latency_ms=late)
    never = replace(flow, failed={"HELD_BACK": 400}, failed_latency_ms={"HELD_BACK": Percentiles(1, 2, held_p99_ms)})
    held = model(
        held_overload=flow,
        streamed_held_overload=never,  # all were refused before it was measured
        overload_offered=3.0,
        held_goodput_over_capacity=same(0.96),
        held_goodput_over_capacity_without_generator=same(0.97),
        streamed_held_goodput_over_capacity=same(0.89),
    )
    found = {one.text.removeprefix("MobileNetV2 r p"): one for one in page._own_verdicts([held])}
    assert {text: one.met for text, one in found.items() if "3 x" in text} == {
        ", callers hold back: 3 x capacity: goodput / capacity >= 0.9": True,
        ", callers hold back: 3 x capacity: the rest gets RESOURCE_EXHAUSTED within 50 ms": in_time,
        ", on a stream, callers hold back: 3 x capacity: goodput / capacity >= 0.9": False,
        ", on a stream, callers hold back: 3 x capacity: the rest gets RESOURCE_EXHAUSTED within 50 ms": in_time,
    }
    assert found[", callers hold back: 3 x capacity: goodput / capacity >= 0.9"].note.startswith("0.970")
    note = found[", callers hold back: 3 x capacity: the rest gets RESOURCE_EXHAUSTED within 50 ms"].note
    assert note == "p50 1.0 ms; 5 refused, 400 not sent"


def run_of(*rows):
    machine = {"processor": "A processor", "cores": 2, "versions": {"mosec": "1.0"}}
    return {"machine": machine, "rows": [{**row, "measured": "2026-01-02T03:04:05+00:00"} for row in rows]}


def slow(*systems, **names):
    """Peers that are measured, and do not matter."""
    return [row(system, 1.0, **names) for system in systems]


def test_the_best_peer_counts_and_the_loop_is_none():
    rows = [row("vision-service", 125.0), row("mosec", 90.0), row("mosec", 100.0, workers=2), row("loop", 400.0)]
    (found,) = page._peer_verdicts(run_of(*rows))
    assert not found.met
    assert "LitServe not measured; Ray Serve not measured" in found.note
    rows += slow("litserve", "ray")
    (found,) = page._peer_verdicts(run_of(*rows))
    assert (found.value, found.met) == ("1.25", True)
    assert "A processor" in found.note
    rows[-1] = row("ray", 101.0)
    (found,) = page._peer_verdicts(run_of(*rows))
    assert not found.met
    assert "Ray Serve" in found.note
    rows += slow("mosec", "ray", runtime="eager", precision="fp32")
    rows.append(row("litserve", 30.0, runtime="eager", precision="fp32"))
    eager = list(page._peer_verdicts(run_of(*rows)))[-1]
    assert (eager.value, eager.met) == ("4.17", False)


def test_what_is_served_on_a_stream_is_compared_as_well_and_is_no_peer():
    rows = [row("vision-service", 120.0), row("vision-service-stream", 130.0), row("mosec", 100.0)]
    rows += slow("litserve", "ray")
    calls, stream = page._peer_verdicts(run_of(*rows))
    assert (calls.value, calls.met) == ("1.20", False)
    assert (stream.value, stream.met) == ("1.30", True)
    assert ", on a stream" in stream.text


def test_eager_peers_are_compared_with_our_fastest_precision():
    eager = [row("mosec", 20.0, runtime="eager", precision="fp32")]
    eager += slow("litserve", "ray", runtime="eager", precision="fp32")
    in_fp32 = [row("vision-service", 90.0, precision="fp32"), row("mosec", 80.0, precision="fp32")]
    found = met(page._peer_verdicts(run_of(*eager, *in_fp32)))
    assert found == {"served / best peer >= 1.25": False, "served / best peer >= 5": False}
    assert "ours in fp32" in list(page._peer_verdicts(run_of(*eager, *in_fp32)))[-1].text
    *_, last = page._peer_verdicts(run_of(*eager, *in_fp32, row("vision-service", 110.0), row("mosec", 85.0)))
    assert (last.value, last.met) == ("5.50", True)
    assert "ours in bf16" in last.text


def test_eager_peers_are_compared_with_int8_by_itself():
    eager = [row("mosec", 20.0, runtime="eager", precision="fp32")]
    eager += slow("litserve", "ray", runtime="eager", precision="fp32")
    ours = [row("vision-service", 90.0, precision="fp32"), row("vision-service", 130.0, precision="int8")]
    in_fp32, in_int8 = page._peer_verdicts(run_of(*eager, *ours))
    assert "ours in fp32, theirs eager" in in_fp32.text
    assert "ours in int8, theirs eager" in in_int8.text
    assert [(one.value, one.met) for one in (in_fp32, in_int8)] == [("4.50", False), ("6.50", True)]
    assert "| OpenVINO int8 |" in page._peers_table(ours)


def beside(system, ratio, runtime="openvino", failed=0):
    """A peer that took turns with our server in fp32."""
    spread = {"median": ratio, "low": ratio - 0.1, "high": ratio + 0.1, "ours": 100 * ratio, "theirs": 100.0}
    found = row(system, 90.0, runtime=runtime, precision="fp32")
    found["loads"]["32"]["failed"] = failed
    return found | {"ours_over": {"openvino:fp32": {"vision-service": {"32": spread}}}}


def test_peers_that_took_turns_are_compared_by_turns():
    ours, litserve = row("vision-service", 200.0, precision="fp32"), beside("litserve", 1.4)
    (found,) = page._peer_verdicts(run_of(ours, beside("mosec", 1.3), beside("ray", 1.2), litserve))
    assert (found.value, found.met) == ("1.200 (1.100 to 1.300)", False)  # the speeds of all turns would have said 2.2
    assert found.note == "120 and 100 images/s, Ray Serve; A processor without bf16"
    (found,) = page._peer_verdicts(run_of(ours, beside("mosec", 1.3), beside("ray", 1.4), litserve))
    assert (found.value, found.met) == ("1.300 (1.200 to 1.400)", True)
    old = row("ray", 100.0, precision="fp32")
    (found,) = page._peer_verdicts(run_of(ours, beside("mosec", 1.3), old, litserve))
    assert "not in turns" in found.note
    assert "| OpenVINO fp32 1.40 |" in page._peers_table([litserve])
    others = beside("mosec", 1.3), beside("ray", 1.4), litserve
    for one, count in zip(others, (3, 3, 2), strict=True):
        assert "starts of each" not in next(page._peer_verdicts(run_of(ours, *others))).note
        one["ours_over"]["openvino:fp32"]["vision-service"]["32"]["starts"] = [1.3] * count
    assert "2 starts of each" in next(page._peer_verdicts(run_of(ours, *others))).note
    eager = [beside(system, 5.1, "eager") for system in page.PEERS]
    assert [one.value for one in page._peer_verdicts(run_of(ours, *eager))] == ["5.100 (5.000 to 5.200)"]


def test_a_peer_that_failed_is_not_surpassed():
    ours, others = row("vision-service", 200.0, precision="fp32"), [beside("mosec", 1.3), beside("litserve", 1.4)]
    (found,) = page._peer_verdicts(run_of(ours, *others, beside("ray", 1.5, failed=3)))
    assert not found.met
    assert "Ray Serve: 3 calls failed" in found.note
    (found,) = page._peer_verdicts(run_of(ours, *others, row("ray", 0.0, precision="fp32")))
    assert "Ray Serve not measured" in found.note


def test_memory():
    base = {"calls": 20000, "rss_after_warmup_mb": 100.0, "rss_at_end_mb": 103.0}
    assert [one.met for one in page._soak_verdicts({**base, "growth": 0.029})] == [True]
    assert [one.met for one in page._soak_verdicts({**base, "growth": 0.03})] == [False]
    assert list(page._soak_verdicts(None)) == []


def test_tables_and_chart(tmp_path):
    rows = [row("vision-service", 125.0), row("mosec", 90.0), row("loop", 200.0, model="resnet50")]
    table = page._peers_table(rows)
    assert "| MobileNetV2 | OpenVINO bf16 | mosec | 32 | 90.0 (90.0 to 90.0) | 1 / 2 | 0.10 |  |" in table
    assert "| ResNet-50 | OpenVINO bf16 | bare loop |  | 200.0" in table
    page.draw(rows, tmp_path / "chart.svg")
    assert "<svg" in (tmp_path / "chart.svg").read_text()
    runs = page._peers([run_of(*rows), run_of(row("ray", 1.0, precision="fp32"))])
    assert runs.count("A processor, 2 cores; mosec 1.0; 2026-01-02:") == 1
    assert runs.count("A processor without bf16, 2 cores; mosec 1.0; 2026-01-02:") == 1
    assert "| MobileNetV2 | OpenVINO fp32 | Ray Serve |" in runs
    assert "no result yet" in page._peers([])
    stages = {"decode": 1.0, "forward": 2.5}
    assert "| 3.50 |" in page._stages_table([model(stages_cpu_ms=stages)])
    assert "100.0 (100.0 to 100.0)" in page._models_table([model()])


def test_the_page_has_a_place_for_everything():
    text = page.PAGE.read_text()
    for name in ("verdicts", "machine", "models", "stages", "peers"):
        assert text.index(f"<!-- {name} -->") < text.index(f"<!-- /{name} -->")
