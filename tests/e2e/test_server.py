"""A real server and a real channel, on tiny networks: what goes wrong, and how the server says so."""

import json
import logging
import struct
import threading
import time
import zlib

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from tiny_backend import SEEN

from tests.helpers import red_image, run_server, tiny_manifest
from vision_service.api.v1 import vision_pb2 as pb
from vision_service.api.v1 import vision_pb2_grpc as pb_grpc
from vision_service.config.settings import ServerSettings
from vision_service.errors import ConfigError
from vision_service.server.app import VisionServer

pytestmark = pytest.mark.usefixtures("transport")


def settings(folder, models, **fields):
    manifest = tiny_manifest(folder, **models)
    base = {"host": "127.0.0.1", "port": 0, "manifests": (manifest,), "models": tuple(models)}
    return ServerSettings.read(**(base | fields))


def raw_request(red, **fields):
    image = red_image(red)
    raw = pb.RawImage(height=image.shape[0], width=image.shape[1], channels=3, data=image.tobytes())
    return pb.ClassifyRequest(image=pb.Image(raw=raw), **fields)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    models = {"tiny": "", "cruel": "options = {fail_red = 13}", "second": 'version = "2"'}
    with run_server(settings(folder, models, max_image_bytes=1_000_000, max_message_bytes=2_000_000)) as running:
        yield running


@pytest.fixture
def channel(server):
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        yield channel


@pytest.fixture
def vision(channel):
    return pb_grpc.VisionServiceStub(channel)


def png(width, height, *, whole=True):
    """A PNG that claims a size and has hardly a pixel to show for it."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"") if whole else header


def encoded(data, **fields):
    return pb.ClassifyRequest(image=pb.Image(encoded=data), **fields)


def truncated_jpeg():
    import cv2

    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    data = cv2.imencode(".jpg", noise)[1].tobytes()
    return data[: len(data) // 2]


BAD = {
    "no image": (pb.ClassifyRequest(), "INVALID_ARGUMENT", "image: is not set"),
    "empty bytes": (encoded(b""), "INVALID_ARGUMENT", "empty"),
    "text": (encoded(b"hello, is this an image?"), "INVALID_ARGUMENT", "image"),
    "truncated JPEG": (encoded(truncated_jpeg()), "INVALID_ARGUMENT", "truncated"),
    "huge PNG": (encoded(png(60000, 60000)), "INVALID_ARGUMENT", "60000 x 60000 is 3600000000 pixels; at most"),
    "huge PNG, header only": (encoded(png(60000, 60000, whole=False)), "INVALID_ARGUMENT", "truncated PNG file"),
    "raw of wrong length": (
        pb.ClassifyRequest(image=pb.Image(raw=pb.RawImage(height=4, width=4, channels=3, data=b"123"))),
        "INVALID_ARGUMENT",
        "48",
    ),
    "NaN threshold": (raw_request(1, score_threshold=float("nan")), "INVALID_ARGUMENT", "score_threshold"),
    "threshold above one": (raw_request(1, score_threshold=1.5), "INVALID_ARGUMENT", "score_threshold"),
    "top_k zero": (raw_request(1, top_k=0), "INVALID_ARGUMENT", "top_k"),
    "unknown model": (raw_request(1, model=pb.ModelSelector(name="tinny")), "NOT_FOUND", "did you mean 'tiny'"),
    "unknown version": (raw_request(1, model=pb.ModelSelector(name="tiny", version="7")), "NOT_FOUND", "version '7'"),
    "unknown class": (
        raw_request(1, classes=pb.ClassFilter(class_names=["red 2x"])),
        "INVALID_ARGUMENT",
        "classes: the model has no class 'red 2x'; did you mean",
    ),
    "endless model name": (
        raw_request(1, model=pb.ModelSelector(name="a" * 30_000)),
        "INVALID_ARGUMENT",
        "model.name: has 30000 characters; names have at most 100",
    ),
    "endless class name": (
        raw_request(1, classes=pb.ClassFilter(class_names=["b" * 30_000])),
        "INVALID_ARGUMENT",
        "classes: the model has no class 'bbb",
    ),
    "endless list of classes": (
        raw_request(1, classes=pb.ClassFilter(class_ids=[1] * 6000)),
        "INVALID_ARGUMENT",
        "lists 6000 classes; at most 5000",
    ),
    "unknown class id": (raw_request(1, classes=pb.ClassFilter(class_ids=[999])), "INVALID_ARGUMENT", "999"),
    "too many bytes": (encoded(b"\xff\xd8\xff" + bytes(1_500_000)), "INVALID_ARGUMENT", "1000000"),
    "message too large": (encoded(bytes(3_000_000)), "RESOURCE_EXHAUSTED", "message larger than max"),
    "network raises": (raw_request(13, model=pb.ModelSelector(name="cruel")), "INTERNAL", "failed on this image"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_has_its_status_and_message_and_the_server_goes_on(vision, case):
    request, status, message = BAD[case]
    with pytest.raises(grpc.RpcError) as caught:
        vision.Classify(request, timeout=10)
    assert (caught.value.code().name, message in caught.value.details()) == (status, True), caught.value.details()
    assert "not to my taste" not in caught.value.details()
    assert vision.Classify(raw_request(42), timeout=10).classes[0].class_name == "red 42"


def test_a_task_without_a_model_lists_what_there_is(vision):
    with pytest.raises(grpc.RpcError, match="no model is served for detect; cruel, second, tiny"):
        vision.Detect(pb.DetectRequest(image=raw_request(1).image), timeout=10)
    with pytest.raises(grpc.RpcError, match="'tiny' is a classify model"):
        vision.Detect(pb.DetectRequest(image=raw_request(1).image, model=pb.ModelSelector(name="tiny")), timeout=10)


def test_reply_says_who_answered_and_where_the_time_went(vision):
    info = vision.Classify(raw_request(7), timeout=10).info
    assert (info.model_name, info.model_version, info.image_height, info.image_width) == ("tiny", "1", 16, 24)
    assert info.timings.batch_size == 1
    assert info.timings.forward_ms > 0


def test_models_are_listed_and_shown(channel):
    models = pb_grpc.ModelServiceStub(channel)
    listed = models.ListModels(pb.ListModelsRequest(), timeout=10).models
    assert [(m.name, m.version, m.is_default, m.state) for m in listed] == [
        ("cruel", "1", False, pb.MODEL_STATE_READY),
        ("second", "2", False, pb.MODEL_STATE_READY),
        ("tiny", "1", True, pb.MODEL_STATE_READY),
    ]
    assert not listed[0].class_names
    assert list(models.ListModels(pb.ListModelsRequest(task=pb.TASK_DETECT), timeout=10).models) == []
    model = models.GetModel(pb.GetModelRequest(name="second"), timeout=10).model
    assert (model.device, model.runtime, model.precision, model.task) == ("cpu", "torch", "fp32", pb.TASK_CLASSIFY)
    assert model.class_names[3] == "red 3"
    assert json.loads(model.preprocess_json)["resize"] == {"mode": "stretch", "size_hw": [8, 8]}
    with pytest.raises(grpc.RpcError, match="there is no model 'third'"):
        models.GetModel(pb.GetModelRequest(name="third"), timeout=10)


def test_reflection_lists_services_and_their_methods(channel):
    database = ProtoReflectionDescriptorDatabase(channel)
    assert set(database.get_services()) == {
        "vision.v1.VisionService",
        "vision.v1.ModelService",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }
    file = database.FindFileContainingSymbol("vision.v1.VisionService")
    service = next(service for service in file.service if service.name == "VisionService")
    assert [method.name for method in service.method] == [
        "Classify",
        "Detect",
        "Segment",
        "Translate",
        "Predict",
    ]
    assert any(message.name == "DetectRequest" for message in file.message_type)


def test_request_id_is_kept_when_fit_for_a_log_and_made_otherwise(vision, caplog):
    def request_id(metadata):
        _, call = vision.Classify.with_call(raw_request(1), timeout=10, metadata=metadata)
        return dict(call.trailing_metadata())["x-request-id"]

    assert request_id([("x-request-id", "order-66")]) == "order-66"
    assert request_id([("x-request-id", "two words")]) != "two words"
    assert len(request_id([])) == 16
    with pytest.raises(grpc.RpcError) as caught:
        vision.Classify(encoded(b""), timeout=10, metadata=[("x-request-id", "bad-1")])
    assert dict(caught.value.trailing_metadata())["x-request-id"] == "bad-1"


def test_access_log_has_a_line_a_call(vision, caplog):
    caplog.set_level(logging.INFO, "vision_service.access")
    vision.Classify(raw_request(1), timeout=10, metadata=[("x-request-id", "log-1")])
    with pytest.raises(grpc.RpcError):
        vision.Classify(encoded(b""), timeout=10, metadata=[("x-request-id", "log-2")])
    lines = {}
    for _ in range(100):  # the line is written after the reply
        lines = {r.request_id: (r.method, r.status, r.duration_ms >= 0) for r in caplog.records if hasattr(r, "method")}
        if {"log-1", "log-2"} <= set(lines):
            break
        time.sleep(0.01)
    assert lines["log-1"] == ("/vision.v1.VisionService/Classify", "OK", True)
    assert lines["log-2"] == ("/vision.v1.VisionService/Classify", "INVALID_ARGUMENT", True)


@pytest.fixture
def gated(tmp_path):
    """A server whose only network waits for a file, with a queue of two."""
    gate = tmp_path / "gate"
    gate.touch()
    more = f'options = {{gate = "{gate}"}}\nbatching = {{max_batch_size = 1, max_queued_jobs = 2}}'
    with run_server(settings(tmp_path, {"slow": more})) as running:
        gate.unlink()
        SEEN.clear()
        with grpc.insecure_channel(f"127.0.0.1:{running.port}") as channel:
            vision = pb_grpc.VisionServiceStub(channel)
            first = vision.Classify.future(raw_request(1), timeout=30)
            while not SEEN[1]:
                time.sleep(0.005)
            yield vision, gate, first, running
        gate.touch()


def queued(running):
    return running.pipeline.catalog.find("slow").info(is_default=True).queued_jobs


def test_deadline_shorter_than_the_queue(gated):
    vision, gate, first, running = gated
    with pytest.raises(grpc.RpcError) as caught:
        vision.Classify(raw_request(66), timeout=0.1)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    for _ in range(200):
        if queued(running) == 0:
            break
        time.sleep(0.01)
    assert queued(running) == 0  # it left while the network was busy
    gate.touch()
    assert first.result().classes[0].class_name == "red 1"
    assert vision.Classify(raw_request(2), timeout=10).classes[0].class_name == "red 2"
    assert SEEN == {1: 1, 2: 1}


def test_a_caller_that_hangs_up_frees_its_place(gated):
    vision, gate, first, running = gated
    call = vision.Classify.future(raw_request(66), timeout=30)
    while queued(running) == 0:
        time.sleep(0.005)
    call.cancel()
    while queued(running):
        time.sleep(0.005)
    gate.touch()
    first.result()
    vision.Classify(raw_request(2), timeout=10)
    assert SEEN[66] == 0


def test_a_full_queue_refuses_with_a_time_to_come_back(gated):
    vision, gate, first, running = gated
    waiting = [vision.Classify.future(raw_request(red), timeout=30) for red in (2, 3)]
    while queued(running) < 2:
        time.sleep(0.005)
    started = time.monotonic()
    with pytest.raises(grpc.RpcError) as caught:
        vision.Classify(raw_request(4), timeout=10)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "2 calls are waiting and the limit is 2" in caught.value.details()
    assert int(dict(caught.value.trailing_metadata())["grpc-retry-pushback-ms"]) > 0
    assert time.monotonic() - started < 5
    gate.touch()
    assert [call.result().classes[0].class_name for call in (first, *waiting)] == ["red 1", "red 2", "red 3"]
    assert SEEN[4] == 0


def test_a_full_server_refuses_before_it_reads_the_message(gated):
    vision, gate, first, running = gated
    waiting = [vision.Classify.future(raw_request(red), timeout=30) for red in (2, 3)]
    while queued(running) < 2:
        time.sleep(0.005)
    no_message = b"\xff\xff"  # whoever reads it fails
    with grpc.insecure_channel(f"127.0.0.1:{running.port}") as channel:
        classify = channel.unary_unary("/vision.v1.VisionService/Classify")
        detect = channel.unary_unary("/vision.v1.VisionService/Detect")
        with pytest.raises(grpc.RpcError) as caught:
            classify(no_message, timeout=10)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "2 calls are waiting and the limit is 2" in caught.value.details()
        trailing = dict(caught.value.trailing_metadata())
        assert trailing["x-request-id"]
        assert int(trailing["grpc-retry-pushback-ms"]) > 0
        with pytest.raises(grpc.RpcError) as caught:  # its sender is told while it is still sending
            classify(bytes(4_000_000), timeout=10)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "2 calls are waiting and the limit is 2" in caught.value.details()
        with pytest.raises(grpc.RpcError) as caught:
            detect(no_message, timeout=10)  # no model of this task is full
        assert caught.value.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED
        gate.touch()
        for call in (first, *waiting):
            call.result()
        with pytest.raises(grpc.RpcError) as caught:
            classify(no_message, timeout=10)
        assert caught.value.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("level", [logging.INFO, logging.DEBUG])
def test_a_flood_of_refusals_is_counted_in_the_log(gated, caplog, level):
    vision, gate, first, running = gated
    waiting = [vision.Classify.future(raw_request(red), timeout=30) for red in (2, 3)]
    while queued(running) < 2:
        time.sleep(0.005)
    caplog.clear()
    caplog.set_level(level, "vision_service.access")
    ids = [f"flood-{number}" for number in range(200)]
    calls = [vision.Classify.future(raw_request(4), timeout=10, metadata=[("x-request-id", one)]) for one in ids]
    for call, request_id in zip(calls, ids, strict=True):
        assert call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert dict(call.trailing_metadata())["x-request-id"] == request_id

    def logged():
        records = [record for record in caplog.records if getattr(record, "status", "") == "RESOURCE_EXHAUSTED"]
        own = [record for record in records if hasattr(record, "request_id")]
        counted = sum(getattr(record, "calls", 0) for record in records)
        return [record for record in own if record.levelno == logging.INFO], own, counted

    for _ in range(300):  # the rest is counted when the second is over
        lines, own, counted = logged()
        if len(lines) + counted == 200:
            break
        time.sleep(0.01)
    assert len(lines) + counted == 200
    assert counted > 0
    assert {record.request_id for record in lines} <= set(ids)
    assert lines[0].method == "/vision.v1.VisionService/Classify"
    assert len(own) == (200 if level == logging.DEBUG else len(lines))
    gate.touch()
    for call in (first, *waiting):
        call.result()


def test_refusals_that_were_not_logged_yet_are_when_the_server_stops(tmp_path, caplog):
    gate = tmp_path / "gate"
    gate.touch()
    more = f'options = {{gate = "{gate}"}}\nbatching = {{max_batch_size = 1, max_queued_jobs = 1}}'
    caplog.set_level(logging.INFO, "vision_service.access")
    with run_server(settings(tmp_path, {"slow": more})) as running:
        gate.unlink()
        with grpc.insecure_channel(f"127.0.0.1:{running.port}") as channel:
            vision = pb_grpc.VisionServiceStub(channel)
            calls = [vision.Classify.future(raw_request(1), timeout=30) for _ in range(60)]
            while sum(call.done() for call in calls) < 50:
                time.sleep(0.005)
            gate.touch()
            refused = sum(call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED for call in calls)
    records = [record for record in caplog.records if getattr(record, "status", "") == "RESOURCE_EXHAUSTED"]
    assert sum(getattr(record, "calls", 1) for record in records) == refused >= 50


def test_while_one_model_is_full_the_others_of_its_task_take_calls(tmp_path):
    gate = tmp_path / "gate"
    gate.touch()
    one = "batching = {max_batch_size = 1, max_queued_jobs = 1}"
    with run_server(settings(tmp_path, {"slow": f'options = {{gate = "{gate}"}}\n{one}', "quick": one})) as running:
        gate.unlink()
        SEEN.clear()
        with grpc.insecure_channel(f"127.0.0.1:{running.port}") as channel:
            vision = pb_grpc.VisionServiceStub(channel)
            slow, quick = (pb.ModelSelector(name=name) for name in ("slow", "quick"))
            calls = [vision.Classify.future(raw_request(1, model=slow), timeout=30)]
            while not SEEN[1]:
                time.sleep(0.005)
            calls.append(vision.Classify.future(raw_request(2, model=slow), timeout=30))
            while queued(running) < 1:
                time.sleep(0.005)
            with pytest.raises(grpc.RpcError) as caught:
                vision.Classify(raw_request(3, model=slow), timeout=10)
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            calls.append(vision.Classify.future(raw_request(4, model=quick), timeout=30))  # waits for a turn on the CPU
            gate.touch()
            assert [call.result().classes[0].class_name for call in calls] == ["red 1", "red 2", "red 4"]


def health(channel, service):
    stub = health_pb2_grpc.HealthStub(channel)
    status = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10).status
    return health_pb2.HealthCheckResponse.ServingStatus.Name(status)


def test_health_is_serving_only_when_models_are_ready(tmp_path):
    gate = tmp_path / "gate"
    server_settings = settings(tmp_path, {"slow": f'options = {{gate = "{gate}"}}'})
    ports, done = [], threading.Event()

    def run():
        with run_server(server_settings, prepare=lambda server: ports.append(server)) as running:
            ready_port.append(running.port)
            done.wait(30)

    ready_port = []
    thread = threading.Thread(target=run)
    thread.start()
    while not (ports and ports[0].port):
        time.sleep(0.01)
    with grpc.insecure_channel(f"127.0.0.1:{ports[0].port}") as channel:
        names = ["", "classify", "vision.v1.VisionService", "vision.v1.ModelService"]
        assert {health(channel, name) for name in names} == {"NOT_SERVING"}
        with pytest.raises(grpc.RpcError) as caught:
            pb_grpc.VisionServiceStub(channel).Classify(raw_request(1), timeout=10)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "slow:1 is loading" in caught.value.details()
        listed = pb_grpc.ModelServiceStub(channel).ListModels(pb.ListModelsRequest(), timeout=10).models
        assert [m.state for m in listed] == [pb.MODEL_STATE_LOADING]
        gate.touch()
        while not ready_port:
            time.sleep(0.01)
        assert {health(channel, name) for name in names} == {"SERVING"}
        assert health(channel, "detect") == "NOT_SERVING"  # no model does that
        with pytest.raises(grpc.RpcError):
            health(channel, "nonsense")
    done.set()
    thread.join(30)


def test_a_model_that_fails_stops_the_start_or_is_left_out(tmp_path):
    models = {"good": "", "bad": "options = {refuse_to_build = true}"}
    with pytest.raises(ConfigError, match="bad:1 could not be loaded"), run_server(settings(tmp_path, models)):
        pass
    with (
        run_server(settings(tmp_path, models, require_all_models=False)) as running,
        grpc.insecure_channel(f"127.0.0.1:{running.port}") as channel,
    ):
        assert (health(channel, ""), health(channel, "classify")) == ("NOT_SERVING", "SERVING")
        vision = pb_grpc.VisionServiceStub(channel)
        assert vision.Classify(raw_request(5), timeout=10).classes[0].class_name == "red 5"
        with pytest.raises(grpc.RpcError, match="bad:1 is failed"):
            vision.Classify(raw_request(5, model=pb.ModelSelector(name="bad")), timeout=10)


def test_a_server_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="name at least one model to serve"):
        VisionServer(ServerSettings.read(models=()))


def test_a_taken_port_is_a_clear_error(server, tmp_path):
    other = VisionServer(settings(tmp_path, {"tiny": ""}, port=server.port))
    import asyncio

    async def start_and_stop():
        try:
            await other.start()
        finally:
            await other.stop()

    with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{server.port}"):
        asyncio.run(start_and_stop())
