"""`vision-service bench` on tiny models: every option has its effect. No figure is compared with a clock."""

from __future__ import annotations

import multiprocessing
import os

import cv2
import pytest
from typer.testing import CliRunner

from tests.helpers import PLUGINS, red_image, run_server, tiny_manifest
from vision_service.api.v1 import vision_pb2 as pb
from vision_service.bench import inprocess, load
from vision_service.bench import run as bench_run
from vision_service.bench.generators import Generators
from vision_service.bench.http2 import GrpcConnection
from vision_service.bench.load import Load, generate
from vision_service.bench.plan import Setup, Variant
from vision_service.bench.report import Report
from vision_service.bench.served import Target
from vision_service.bench.stream import StreamConnection
from vision_service.cli import app
from vision_service.client import codec
from vision_service.config.settings import ServerSettings
from vision_service.errors import ModelUnavailable

CLASSIFY = "/vision.v1.VisionService/Classify"
PREDICT = "/vision.v1.VisionService/Predict"


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    few = "batching = {max_batch_size = 2, max_queued_jobs = 2}\noptions = {sleep_s = 0.02}"
    linear = "batching = {max_batch_size = 4}\noptions = {sleep_each_s = 0.06}"
    late = "options = {sleep_s = 0.3}"
    return tiny_manifest(tmp_path_factory.mktemp("models"), tiny="", slow=few, linear=linear, late=late)


@pytest.fixture(scope="module")
def address(manifest):
    settings = ServerSettings.read(host="127.0.0.1", port=0, manifests=(manifest,), models=("tiny", "slow", "late"))
    with run_server(settings) as server:
        yield f"127.0.0.1:{server.port}"


@pytest.fixture
def gated(tmp_path):
    """The address of a server whose network waits, and what lets it go on."""
    gate = tmp_path / "gate"
    gate.touch()
    manifest = tiny_manifest(tmp_path, gated=f'options = {{gate = "{gate}"}}')
    settings = ServerSettings.read(host="127.0.0.1", port=0, manifests=(manifest,), models=("gated",))
    with run_server(settings) as server:
        gate.unlink()
        yield f"127.0.0.1:{server.port}", gate.touch
        gate.touch()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for red in range(1, 6):
        cv2.imwrite(str(folder / f"{red}.png"), red_image(red)[..., ::-1])
    return folder


@pytest.fixture
def bench(photos, tmp_path):
    """Runs the command with short measurements; returns its result and its report."""

    def run(*arguments):
        file = tmp_path / "report.json"
        short = ("--images", photos, "--seconds", 0.2, "--warmup", 0.1, "--rounds", 1, "--json", file)
        result = CliRunner().invoke(app, [str(part) for part in ("bench", *short, *arguments)])
        return result, Report.read(file) if file.exists() else None

    return run


@pytest.fixture
def in_process(manifest, monkeypatch):
    """Starts a worker with a model and a batch."""
    monkeypatch.setenv("PYTHONPATH", os.fspath(PLUGINS))
    photo = cv2.imencode(".png", red_image(5)[..., ::-1])[1].tobytes()
    setup = Setup(manifests=(manifest,), device="cpu")
    return lambda model, batch: inprocess.worker(setup, Variant(model), [photo], batch)


def test_everything_is_measured_in_processes_of_its_own(bench, manifest, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.fspath(PLUGINS))  # for the server, which is a program of its own
    config = tmp_path / "service.toml"
    config.write_text("[model.tiny.batching]\nmax_batch_size = 3\n")
    where = ("--model", "tiny", "--manifest", manifest, "--config", config, "--device", "cpu")
    result, report = bench(*where, "--runtime", "torch", "--precision", "bf16", "--in-flight", 4, "--rounds", 2)
    assert result.exit_code == 0, result.output
    assert "tiny torch bf16: round 2 of 2" in result.stderr
    (model,) = report.models
    assert (model.model, model.task, model.runtime, model.precision) == ("tiny", "classify", "torch", "bf16")
    assert list(model.network_images_per_s) == [1, 2, 3]  # as the config says
    assert set(model.stages_cpu_ms) == {"decode", "preprocess", "forward", "postprocess", "pipeline_rest", "server"}
    for flow in (model.pipeline, model.served, model.streamed):
        assert flow.images_per_s.median > 0
        assert max(flow.batches) <= 3
        assert flow.peak_mb > 10
        assert not flow.failed
    assert model.served.generator_cpu_ms > 0
    assert 0 < model.served_over_pipeline.median < model.served_over_pipeline_without_generator.median
    assert 0 < model.streamed_over_pipeline.median < model.streamed_over_pipeline_without_generator.median
    assert model.pipeline_over_network.median > 0
    assert model.single_pipeline_ms.p50 <= model.single_pipeline_ms.p99
    assert model.single_served_ms.p50 > 0
    assert report.plan["images"] == 5
    assert "served, 4 in flight" in result.stdout
    assert "on a stream, 4 in flight" in result.stdout


def test_the_pipeline_has_the_batch_that_it_is_given(in_process):
    for batch, expected in ((0, 1), (3, 3)):  # in which its images cost no less than one by one
        with in_process("linear", batch) as worker:
            assert worker.about["max_batch_size"] == expected
            assert max(worker("pipeline", 9, 0.1, 1.0).batch_sizes) == expected


def test_a_call_that_the_pipeline_refuses_is_counted(in_process):
    with in_process("slow", 0) as worker:  # lets two wait
        found = worker("pipeline", 30, 0.1, 0.3)
    assert found.failed > 0
    assert found.latencies_s


def test_a_server_that_runs_already(bench, address):
    result, report = bench("--address", address, "--model", "tiny", "--model", "slow", "--in-flight", 1)
    assert result.exit_code == 0, result.output
    assert [model.model for model in report.models] == ["tiny", "slow"]
    assert report.models[0].served.batches.keys() == {1}  # one in flight makes no batches
    assert report.models[0].pipeline is None
    result, report = bench("--address", address, "--model", "slow", "--in-flight", 3, "--generators", 2)
    assert max(report.models[0].served.batches) == 2
    assert report.plan["generators"] == 2


def test_only_what_was_asked_for(bench, address, manifest):
    result, report = bench("--address", address, "--model", "tiny", "--measure", "single")
    assert result.exit_code == 0, result.output
    assert report.models[0].served is report.models[0].streamed is None
    result, report = bench("--address", address, "--model", "tiny", "--measure", "streamed")
    assert result.exit_code == 0, result.output
    assert report.models[0].streamed.images_per_s.median > 0
    assert report.models[0].served is None
    result, report = bench("--model", "tiny", "--manifest", manifest, "--measure", "network", "--batch-size", 5)
    assert result.exit_code == 0, result.output
    assert list(report.models[0].network_images_per_s) == [5]
    assert report.models[0].served is None


@pytest.fixture
def few_callers(monkeypatch):
    """So few callers hold back that each has calls to make in the 20 ms that the small models here name."""
    monkeypatch.setattr(bench_run, "HELD_CALLERS", 2)


@pytest.mark.usefixtures("few_callers")
def test_open_loops(bench, address, monkeypatch):
    order, measure = [], Target.load

    def load(target, plan, **more):
        order.append(more.get("held_callers", "at its own pace" if "in_flight" in more else "at a given rate"))
        return measure(target, plan, **more)

    monkeypatch.setattr(Target, "load", load)
    arguments = ("--address", address, "--model", "slow", "--measure", "served", "--in-flight", 2, "--seconds", 0.5)
    result, report = bench(*arguments, "--rate", 20, "--overload", 5, "--rounds", 2, "--turns", 3)
    assert result.exit_code == 0, result.output
    beside = "at its own pace"  # before and after each of the two kinds, which take turns
    one_round = [beside] * 3 + ["at a given rate"] + [beside, 0, beside, 2, beside, 2, beside, 0, beside]
    assert order == 2 * one_round
    (model,) = report.models
    assert model.offered_per_s == 20
    assert model.open.images_per_s.median < 60  # whatever the server could do, no more was sent
    assert model.overload.failed.keys() == {"RESOURCE_EXHAUSTED"}  # its queue takes two
    assert model.overload.failed_latency_ms["RESOURCE_EXHAUSTED"].p50 > 0
    assert model.queue_bound_ms > 0
    assert model.goodput_over_capacity.median > 0
    assert model.held_overload.failed.keys() == {"RESOURCE_EXHAUSTED", "HELD_BACK"}
    assert model.held_goodput_over_capacity.median > 0
    assert model.streamed_overload is model.streamed_held_overload is None  # it was not asked for
    assert "RESOURCE_EXHAUSTED" in result.stdout


def test_every_other_turn_goes_the_other_way_round(bench, address, monkeypatch):
    order, measure = [], Target.load

    def load(target, plan, **more):
        order.append(("stream" if more.get("streamed") else "call", more["in_flight"]))
        return measure(target, plan, **more)

    monkeypatch.setattr(Target, "load", load)
    result, report = bench("--address", address, "--model", "tiny", "--in-flight", 2, "--rounds", 2, "--turns", 3)
    assert result.exit_code == 0, result.output
    turn = [("call", 2), ("stream", 2), ("call", 1)]
    assert order == 3 * (turn + turn[::-1])
    assert report.plan["turns"] == 3


def test_the_clock_starts_and_stops_with_an_answer(address, in_process):
    request = pb.ClassifyRequest(image=pb.Image(encoded=cv2.imencode(".png", red_image(5))[1].tobytes()))
    request.model.name = "late"
    found = generate(Load(address, CLASSIFY, [request.SerializeToString()], in_flight=1, warmup_s=0.4, seconds=0.4))
    assert found.seconds > 0.5
    assert sum(found.latencies_s["OK"]) == pytest.approx(found.seconds, rel=0.1)  # whole calls, one after the other
    with in_process("late", 0) as worker:
        alone = worker("pipeline", 1, 0.4, 0.4)
    assert alone.seconds > 0.5
    assert sum(alone.latencies_s) == pytest.approx(alone.seconds, rel=0.1)


def test_generators_go_on_with_the_next_load(address):
    request = pb.ClassifyRequest(image=pb.Image(encoded=cv2.imencode(".png", red_image(5))[1].tobytes()))
    one = Load(address, CLASSIFY, [request.SerializeToString()], in_flight=2, warmup_s=0.0, seconds=0.1)
    with Generators(2) as generators:
        begun = {child.pid for child in multiprocessing.active_children()}
        assert len(begun) >= 2
        for _ in range(2):
            assert generators.run(one).in_time > 0
        assert {child.pid for child in multiprocessing.active_children()} == begun


@pytest.mark.usefixtures("few_callers")
def test_overload_on_a_stream(bench, address):
    measures = ("--measure", "served", "--measure", "streamed", "--overload", 5)
    result, report = bench("--address", address, "--model", "slow", *measures, "--in-flight", 2, "--seconds", 0.5)
    assert result.exit_code == 0, result.output
    (model,) = report.models
    assert model.streamed_overload.failed.keys() == {"RESOURCE_EXHAUSTED"}
    assert model.streamed_goodput_over_capacity.median > 0
    assert model.streamed_held_overload.failed.keys() == {"RESOURCE_EXHAUSTED", "HELD_BACK"}
    assert model.streamed_held_goodput_over_capacity.median > 0
    assert "on a stream, 5 x as many, callers hold back" in result.stdout


def test_calls_that_are_never_answered_are_counted(gated, monkeypatch):
    monkeypatch.setattr(load, "DRAIN_S", 0.2)
    address, open_gate = gated
    request = pb.ClassifyRequest(image=pb.Image(encoded=cv2.imencode(".png", red_image(5))[1].tobytes()))
    found = generate(Load(address, CLASSIFY, [request.SerializeToString()], in_flight=3, warmup_s=0.1, seconds=0.2))
    open_gate()
    assert len(found.latencies_s["UNANSWERED"]) == 3
    assert min(found.latencies_s["UNANSWERED"]) > 0.2
    assert found.in_time == 0


def test_compare(bench, address, tmp_path):
    for name in ("a.json", "b.json"):
        bench("--address", address, "--model", "tiny", "--measure", "served", "--json", tmp_path / name)
    result, _ = bench("--compare", tmp_path / "a.json", tmp_path / "b.json")
    assert result.exit_code == 0
    assert "served images/s" in result.stdout
    assert " %" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--measure", "serve"), "there is no 'serve'; did you mean 'served'"),
        (("--address", "127.0.0.1:1", "--measure", "network"), "address: a server that runs already"),
        (("--overload", 3, "--measure", "single"), "overload: needs a factor"),
        (("--model", "mobilenet_v3"), "mobilenet_v3"),
        (("--model", "mobilenet_v2", "--device", "cuda:99"), "cuda:99"),
        (("--model", "mobilenet_v2", "--measure", "served", "--precision", "fp64"), "precision"),
    ],
)
def test_mistakes_are_named(bench, arguments, says):
    result, report = bench(*arguments)
    assert result.exit_code != 0
    assert says in result.stderr
    assert report is None


def test_large_messages_and_refusals_over_bare_http2(address):
    """Messages far above the first window of HTTP/2, and a reply without a message."""
    big = codec.classify_request(red_image(7, 400, 500), model="tiny").SerializeToString()
    result = generate(Load(address, CLASSIFY, [big], in_flight=8, warmup_s=0.1, seconds=0.3))
    assert result.latencies_s.keys() == {"OK"}
    assert result.generator_cpu_s > 0
    wrong = codec.classify_request(b"no image", model="tiny").SerializeToString()
    result = generate(Load(address, CLASSIFY, [wrong], in_flight=1, warmup_s=0.0, seconds=0.1))
    assert result.latencies_s.keys() == {"INVALID_ARGUMENT"}
    assert result.in_time == 0


def test_large_messages_and_refusals_on_a_stream(address):
    """The same, on one stream, whose window they share."""
    big = codec.classify_request(red_image(7, 400, 500), model="tiny")
    wrong = codec.classify_request(b"no image", model="tiny")
    messages = [pb.PredictItem(classify=one).SerializeToString() for one in (big, wrong)]
    load = Load(address, PREDICT, messages, in_flight=8, warmup_s=0.1, seconds=0.3, wire=StreamConnection)
    result = generate(load)
    assert result.latencies_s.keys() == {"OK", "INVALID_ARGUMENT"}
    assert abs(len(result.latencies_s["OK"]) - len(result.latencies_s["INVALID_ARGUMENT"])) <= 16
    assert pb.ClassifyResponse.FromString(result.replies[0]).classes


def test_a_stream_that_the_server_ends_is_an_error(address):
    connection = StreamConnection(address, PREDICT)
    connection.start(connection.prepare(b"\xff"))  # no protobuf message
    connection.flush()

    def listen():
        for _ in range(10):  # settings, headers, and then the end
            connection.replies(10)

    with pytest.raises(ModelUnavailable, match="the server ended the stream"):
        listen()
    connection.close()


def test_nobody_there():
    with pytest.raises(ModelUnavailable, match=r"127\.0\.0\.1:1"):
        GrpcConnection("127.0.0.1:1", CLASSIFY)
