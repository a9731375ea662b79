"""The benchmark's arithmetic, its reports and its HTTP/2."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace

import pytest

from vision_service.bench import run as bench_run
from vision_service.bench import summary as bench_summary
from vision_service.bench.cpu import cpu_s, memory_mb, reset_peak
from vision_service.bench.generators import _share, merged
from vision_service.bench.http2 import INTERNAL, _number_in, _request_headers, status_of
from vision_service.bench.inprocess import PipelineResult
from vision_service.bench.load import Load, LoadResult
from vision_service.bench.plan import Plan, Setup, Variant
from vision_service.bench.report import Flow, ModelReport, Report
from vision_service.bench.stats import Percentiles, Spread, histogram
from vision_service.bench.table import compare, lines_of
from vision_service.errors import InvalidInput


def report(**fields) -> Report:
    base = {
        "model": "m",
        "task": "classify",
        "runtime": "torch",
        "precision": "fp32",
        "served": Flow(Spread.of([100.0, 110.0, 90.0]), Percentiles(1.0, 2.0, 3.0), {1: 4, 8: 2}, generator_cpu_ms=0.5),
        "served_over_pipeline": Spread(0.9, 0.8, 1.0),
    }
    machine = {"processor": "P", "cores": 2}
    return Report(machine, {"images": 3, "rounds": 3, "in_flight": 32}, [ModelReport(**{**base, **fields})])


def test_percentiles_are_values_that_were_measured():
    assert Percentiles.of([]) is None
    assert Percentiles.of([0.002]) == Percentiles(2.0, 2.0, 2.0)
    late = Percentiles.of([number / 1000 for number in range(1, 101)])
    assert (late.p50, late.p95, late.p99) == pytest.approx((50, 95, 99))


def test_spread_and_histogram():
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0)
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)
    assert histogram([]) == {}
    assert list(histogram([8, 1, 8]).items()) == [(1, 1), (8, 2)]


def test_ratios_are_taken_round_by_round():
    # The machine was half as fast in the second round: both were, so the ratio is the same.
    assert bench_summary._ratio([90, 45], [100, 50]) == Spread(0.9, 0.9, 0.9)
    assert bench_summary._ratio([], [100]) is None


def test_a_window_in_which_nothing_came_back_has_no_ratio():
    assert bench_summary._ratio([1.0, 3.0], [0.0, 2.0]).median == 1.5
    assert bench_summary._ratio([1.0], [0.0]) is None


def test_what_the_generator_used_is_given_back():
    # It used half a core of two: the server had three quarters of the machine.
    result = LoadResult(2.0, generator_cpu_s=1.0, in_time=60)
    assert bench_summary._speed(result) == 30
    assert bench_summary._speed(result, cores=2) == pytest.approx(40)


def test_goodput_is_of_the_capacity_around_it():
    # The machine got slower meanwhile, from 100 a second to 60.
    before, after = LoadResult(2.0, in_time=200), LoadResult(2.0, generator_cpu_s=1.0, in_time=120)
    overload = bench_summary.Overload(LoadResult(4.0, generator_cpu_s=4.0, in_time=288), before, after)
    assert overload.goodput() == pytest.approx(72 / 80)
    assert overload.goodput(cores=2) == pytest.approx(144 / 90)
    nothing = LoadResult(2.0)
    unknown = bench_summary.Overload(overload.loop, nothing, nothing)
    assert unknown.goodput() is None
    assert bench_summary._goodput([overload, unknown]) == Spread.of([0.9])
    assert bench_summary._goodput([unknown]) is None


def test_each_overload_stands_between_the_closed_loops_beside_it():
    class Numbered:
        """A server that gets faster."""

        def __init__(self):
            self.loads = []

        def load(self, plan, **load):
            self.loads.append(load)
            return LoadResult(1.0, in_time=len(self.loads))

    target, loops = Numbered(), {0: [], 16: []}
    plan = Plan([], Setup(None, ()), [], overload=3.0, seconds=8.0, turns=8, warmup_s=1.0)
    bench_run._overload(plan, target, loops)
    found = [(one.before.in_time, one.loop.in_time, one.after.in_time) for kind in loops.values() for one in kind]
    assert found == [(1, 2, 3), (7, 8, 9), (3, 4, 5), (5, 6, 7)]
    assert [load["rate"] for load in target.loads if "rate" in load] == [3.0, 9.0, 15.0, 21.0]
    assert {load["seconds"] for load in target.loads} == {1.0, 2.0}
    assert {load["warmup_s"] for load in target.loads if "rate" in load} == {2.0}


def test_what_failed_beside_an_overload_is_told():
    loops = [LoadResult(1.0, {"OK": [1.0], "INTERNAL": [0.1] * 2}), LoadResult(1.0, {"INTERNAL": [0.1]})]
    assert bench_summary._failed(loops) == {"INTERNAL": 3}


def test_single_calls_are_compared_turn_by_turn():
    rounds = bench_summary.Rounds()
    assert bench_summary._single_more_ms(rounds) is None
    for pipeline_s, call_s in ((0.010, 0.011), (0.020, 0.023), (0.010, 0.012)):  # the second turn was slow for both
        rounds.single_pipeline.append(PipelineResult(1.0, [pipeline_s] * 3))
        rounds.single_served.append(LoadResult(1.0, {"OK": [call_s] * 3}))
    found = bench_summary._single_more_ms(rounds)
    assert (found.median, found.low, found.high) == pytest.approx((2, 1, 3))


def test_speed_counts_what_ended_in_time():
    assert bench_summary.images_per_s(LoadResult(2.0, {"OK": [0.1] * 30}, in_time=20)) == 10


def test_batch_sizes_of_the_network():
    assert bench_run._batch_sizes(1) == (1,)
    assert bench_run._batch_sizes(6) == (1, 2, 4, 6)
    assert bench_run._batch_sizes(8) == (1, 2, 4, 8)


def test_generators_share_calls_rate_and_images():
    load = Load("here:1", "/m", [b"a", b"b", b"c"], in_flight=5, rate=10.0, held_callers=5)
    first, second = _share(load, 0, 2), _share(load, 1, 2)
    assert (first.in_flight, second.in_flight) == (3, 2)
    assert (first.rate, second.rate) == (5.0, 5.0)
    assert (first.held_callers, second.held_callers) == (3, 2)
    assert _share(replace(load, held_callers=1), 1, 2).held_callers == 1  # never 0, which is: nobody
    assert _share(replace(load, held_callers=0), 0, 2).held_callers == 0
    assert (first.messages, second.messages) == ([b"a", b"b", b"c"], [b"b", b"c", b"a"])
    one = LoadResult(1.0, {"OK": [1.0]}, server_cpu_s=4.0, generator_cpu_s=1.0, in_time=1, replies=[b"x"])
    two = LoadResult(2.0, {"OK": [2.0], "INTERNAL": [3.0]}, server_cpu_s=6.0, generator_cpu_s=2.0, in_time=3)
    both = merged([one, two])
    assert both.latencies_s == {"OK": [1.0, 2.0], "INTERNAL": [3.0]}
    # 1 and 1.5 images a second are 2.5, so 4 are 1.6 seconds' worth.
    assert (both.seconds, both.server_cpu_s, both.generator_cpu_s, both.in_time) == pytest.approx((1.6, 5.6, 3.2, 4))
    assert both.ended == 3


def test_a_report_survives_its_file(tmp_path):
    written = report(network_images_per_s={8: Spread(1 / 3, 0.1, 0.5)})
    written.write(tmp_path / "a.json")
    read = Report.read(tmp_path / "a.json")
    assert read.models[0].served == written.models[0].served
    assert read.models[0].network_images_per_s[8].median == 0.33333  # five digits
    assert json.loads((tmp_path / "a.json").read_text())["models"][0]["served_over_pipeline"]["median"] == 0.9


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot be read"),
        ("", "not a report"),
        ('{"machine": {}, "plan": {}, "models": [{"model": "m"}]}', "task"),
        ('{"machine": {}, "plan": {}, "models": [], "format": 99}', "format 99"),
    ],
)
def test_a_file_that_is_no_report_is_refused(tmp_path, content, says):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InvalidInput, match=says) as caught:
        Report.read(path)
    assert str(path) in str(caught.value)


def test_table_shows_every_figure():
    text = "\n".join(lines_of(report(stages_cpu_ms={"decode": 1.25, "server": 0.5}, allowed_per_s=123.0)))
    for part in ("m torch fp32", "100.0 (90.0 to 110.0)", "decode 1.25", "123.0", "0.50 CPU ms", "4 in 1, 2 in 8"):
        assert part in text
    assert "served_over_pipeline 0.900 (0.800 to 1.000)" in text


def test_two_runs_are_compared_model_by_model():
    faster = report(served=Flow(Spread.of([150.0]), None, {}))
    other = report(model="n")
    text = "\n".join(compare(report(), faster))
    assert "+50.0 %" in text
    assert "network" not in text, "was not measured"
    text = "\n".join(compare(report(), other))
    assert "m torch fp32: only in the first" in text
    assert "n torch fp32: only in the second" in text
    faster.machine["cores"] = 64
    assert "not the same cores: 2 and 64" in "\n".join(compare(report(), faster))


@pytest.mark.parametrize(
    ("measures", "fields", "says"),
    [
        (("open",), {}, "rate"),
        (("overload",), {"overload": 3.0}, "served"),
        (("served", "overload"), {}, "factor"),
    ],
)
def test_a_plan_that_contradicts_itself_is_refused(measures, fields, says):
    with pytest.raises(InvalidInput, match=says):
        bench_run.measure(Plan([Variant("m")], Setup(), [b"x"], measures=measures, **fields), print)


def test_cpu_time_and_memory_are_those_of_the_process():
    before_s = cpu_s(os.getpid())
    assert before_s == pytest.approx(time.process_time(), abs=0.5)
    while time.process_time() < before_s + 0.05:
        pass
    assert cpu_s(os.getpid()) >= before_s + 0.04
    with pytest.raises(OSError, match="Invalid argument"):
        cpu_s(2**22 + 1)  # above any number that Linux gives
    reset_peak(os.getpid())
    assert memory_mb(os.getpid(), "VmHWM") >= memory_mb(os.getpid()) - 1 > 0
    assert memory_mb(os.getpid(), "NoSuchField") == 0


def test_status_of_a_block_of_header_fields():
    assert status_of(b"\x88\x00\x0bgrpc-status\x010") == 0
    assert status_of(b"\x00\x0bgrpc-status\x0214\x00\x0cgrpc-message\x02no") == 14
    assert status_of(b"\x88") == INTERNAL
    assert status_of(b"grpc-status\x02no") == INTERNAL


def test_when_to_come_back_in_a_block_of_header_fields():
    name = b"grpc-retry-pushback-ms"
    assert _number_in(b"\x00\x0bgrpc-status\x018\x00\x16" + name + b"\x04" + b"1250", name) == 1250
    assert _number_in(b"\x00\x0bgrpc-status\x018", name) is None
    assert _number_in(name, name) is None


def test_a_field_that_would_need_a_longer_length_is_refused():
    with pytest.raises(ValueError, match="too long"):
        _request_headers("a" * 127, "/m")
