"""Both clients against a real gRPC server whose answers the test writes down beforehand."""

from __future__ import annotations

import asyncio
import inspect
import socket
import threading
import time
from collections import deque
from concurrent import futures
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from vision_service.api.v1 import vision_pb2 as pb
from vision_service.api.v1 import vision_pb2_grpc as pb_grpc
from vision_service.client import AsyncVisionClient, VisionClient
from vision_service.errors import (
    DeadlineExceeded,
    InferenceFailed,
    InvalidImage,
    InvalidInput,
    ModelNotFound,
    ModelUnavailable,
    QueueFull,
    ResourceExhausted,
    SetupError,
    VisionError,
)
from vision_service.imaging.source import RawPixels
from vision_service.server import codec
from vision_service.types import Task

ID = ("x-request-id", "id-7")
HEALTH = health_pb2.HealthCheckResponse


def failing(status, message="", *trailing):
    """An answer: fail."""

    def answer(_request, context):
        context.set_trailing_metadata((ID, *trailing))
        context.abort(grpc.StatusCode[status], message)

    return answer


def giving(response):
    """An answer: this reply."""

    def answer(_request, context):
        context.set_trailing_metadata((ID,))
        return response

    return answer


@dataclass
class Scripted(pb_grpc.VisionServiceServicer, pb_grpc.ModelServiceServicer):
    """Gives the answers of a script in turn, and remembers what it was asked."""

    script: deque[Any] = field(default_factory=deque)
    requests: list[Any] = field(default_factory=list)
    metadata: list[dict[str, Any]] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    remaining_s: list[float] = field(default_factory=list)

    def answer(self, request, context):
        self.times_s.append(time.monotonic())
        self.remaining_s.append(context.time_remaining())
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        return self.script.popleft()(request, context)

    Classify = Detect = Segment = Translate = ListModels = GetModel = answer


@dataclass
class Running:
    address: str
    scripted: Scripted
    health: health.HealthServicer


@pytest.fixture
def server():
    threads = futures.ThreadPoolExecutor(4)
    running = grpc.server(threads)
    scripted, checks = Scripted(), health.HealthServicer()
    pb_grpc.add_VisionServiceServicer_to_server(scripted, running)
    pb_grpc.add_ModelServiceServicer_to_server(scripted, running)
    health_pb2_grpc.add_HealthServicer_to_server(checks, running)
    port = running.add_insecure_port("127.0.0.1:0")
    running.start()
    yield Running(f"127.0.0.1:{port}", scripted, checks)
    running.stop(0).wait()
    threads.shutdown()


class SyncCalls:
    """Calls the sync client."""

    def __init__(self, address, **settings):
        self.address, self.settings = address, settings

    def __call__(self, method, *args, **kwargs):
        with VisionClient(self.address, **self.settings) as client:
            return getattr(client, method)(*args, **kwargs)


class AsyncCalls(SyncCalls):
    """Calls the async client, for tests that are the same for both."""

    def __call__(self, method, *args, **kwargs):
        async def call():
            async with AsyncVisionClient(self.address, **self.settings) as client:
                return await getattr(client, method)(*args, **kwargs)

        return asyncio.run(call())


@pytest.fixture(params=[SyncCalls, AsyncCalls], ids=["sync", "async"])
def calls(request):
    return request.param


def detect_response():
    info = pb.ResponseInfo(model_name="net", model_version="2", image_height=4, image_width=6)
    box = pb.Box(x1=1, y1=2, x2=3, y2=4)
    return pb.DetectResponse(detections=[pb.Detection(class_id=1, class_name="cat", score=0.5, box=box)], info=info)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_both_clients_offer_the_same():
    def methods(client):
        return {
            name: list(inspect.signature(method).parameters.values())
            for name, method in inspect.getmembers(client, inspect.isfunction)
            if not name.startswith("__")
        }

    assert methods(VisionClient) == methods(AsyncVisionClient)
    assert inspect.signature(VisionClient) == inspect.signature(AsyncVisionClient)


def test_a_prediction_with_its_request_id(server, calls):
    server.scripted.script.append(giving(detect_response()))
    choices = {"model": "net", "max_detections": 3, "mask_encoding": "png"}
    result = calls(server.address, metadata=[("who", "me")])("detect", b"jpeg", **choices)
    assert result.prediction.boxes_xyxy.tolist() == [[1, 2, 3, 4]]
    assert (result.model_name, result.original_hw, result.request_id) == ("net", (4, 6), "id-7")
    (request,) = server.scripted.requests
    assert (request.model.name, request.max_detections, request.image.encoded) == ("net", 3, b"jpeg")
    assert request.mask_encoding == pb.MASK_ENCODING_PNG
    assert server.scripted.metadata[0]["who"] == "me"


def test_every_task(server, calls):
    info = pb.ResponseInfo(image_height=1, image_width=2)
    image = pb.Image(raw=pb.RawImage(data=bytes(6)))
    server.scripted.script += [
        giving(pb.ClassifyResponse(classes=[pb.ScoredClass(class_name="cat", score=0.5)], info=info)),
        giving(pb.SegmentResponse(info=info)),
        giving(pb.TranslateResponse(image=image, height=1, width=2, info=info)),
    ]
    call = calls(server.address)
    assert call("classify", b"x", top_k=2, classes=["cat"]).prediction.class_names == ("cat",)
    assert call("segment", b"x", mask_encoding="png").prediction.class_map.tolist() == [[255, 255]]
    assert call("translate", b"x", image_encoding="raw").prediction.image.shape == (1, 2, 3)
    classify, segment, translate = server.scripted.requests
    assert (classify.top_k, list(classify.classes.class_names)) == (2, ["cat"])
    assert segment.mask_encoding == pb.MASK_ENCODING_PNG
    assert translate.image_encoding == pb.IMAGE_ENCODING_RAW


@pytest.mark.parametrize("order", ["rgb", "bgr"])
def test_arrays_arrive_as_pixels_with_their_order(server, calls, order):
    server.scripted.script.append(giving(detect_response()))
    array = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    calls(server.address)("detect", array, color_order=order)
    assert codec.read_detect(server.scripted.requests[0]).image == RawPixels(array.tobytes(), 2, 4, 3, order)


def test_paths_are_read(server, calls, tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"jpeg")
    server.scripted.script += [giving(detect_response())] * 2
    for path in (tmp_path / "photo.jpg", str(tmp_path / "photo.jpg")):
        calls(server.address)("detect", path)
    assert [request.image.encoded for request in server.scripted.requests] == [b"jpeg", b"jpeg"]
    with pytest.raises(InvalidImage, match=r"cannot read .*missing\.jpg: No such file"):
        calls(server.address)("detect", tmp_path / "missing.jpg")


def test_models(server, calls):
    model = pb.Model(name="net", version="1", task=pb.TASK_DETECT, state=pb.MODEL_STATE_READY, class_names=["cat"])
    server.scripted.script += [giving(pb.ListModelsResponse(models=[model])), giving(pb.GetModelResponse(model=model))]
    call = calls(server.address)
    (info,) = call("list_models", Task.DETECT)
    assert (info.name, info.task) == ("net", Task.DETECT)
    assert call("get_model", "net", "1").class_names == ("cat",)
    assert [request.task for request in server.scripted.requests[:1]] == [pb.TASK_DETECT]
    assert (server.scripted.requests[1].name, server.scripted.requests[1].version) == ("net", "1")


@pytest.mark.parametrize(
    ("status", "message", "trailing", "kind", "attributes"),
    [
        ("INVALID_ARGUMENT", "score_threshold: no", (), InvalidInput, {"field": "score_threshold"}),
        ("INVALID_ARGUMENT", "image: truncated", (), InvalidImage, {"field": "image"}),
        ("NOT_FOUND", "there are: 'a'", (), ModelNotFound, {}),
        ("UNAVAILABLE", "loading", (("grpc-retry-pushback-ms", "-1"),), ModelUnavailable, {}),
        ("RESOURCE_EXHAUSTED", "does not fit", (), ResourceExhausted, {}),
        ("RESOURCE_EXHAUSTED", "full", (("grpc-retry-pushback-ms", "60000"),), QueueFull, {"retry_after_s": 60.0}),
        ("RESOURCE_EXHAUSTED", "full", (("grpc-retry-pushback-ms", "-1"),), ResourceExhausted, {}),
        ("RESOURCE_EXHAUSTED", "full", (("grpc-retry-pushback-ms", "soon"),), ResourceExhausted, {}),
        ("DEADLINE_EXCEEDED", "in the queue", (), DeadlineExceeded, {}),
        ("INTERNAL", "nan", (), InferenceFailed, {}),
        ("FAILED_PRECONDITION", "weights", (), SetupError, {}),
        ("PERMISSION_DENIED", "no", (), VisionError, {}),
    ],
)
def test_a_status_becomes_the_servers_error_and_is_not_retried(
    server, calls, status, message, trailing, kind, attributes
):
    server.scripted.script.append(failing(status, message, *trailing))
    with pytest.raises(VisionError) as caught:
        calls(server.address)("detect", b"x")
    error = caught.value
    assert type(error) is kind
    assert str(error) == (f"{status}: {message}" if kind is VisionError else message)
    assert vars(error).items() >= {**attributes, "request_id": "id-7", "address": server.address}.items()
    assert isinstance(error.__cause__, grpc.RpcError)
    assert error.__cause__.code().name == status
    assert len(server.scripted.requests) == 1


def test_a_full_queue_is_tried_again_when_the_server_says(server, calls):
    full = failing("RESOURCE_EXHAUSTED", "full", ("grpc-retry-pushback-ms", "300"))
    server.scripted.script += [full, full, giving(detect_response())]
    assert len(calls(server.address)("detect", b"x").prediction) == 1
    first, second, third = server.scripted.times_s
    assert second - first >= 0.3
    assert third - second >= 0.3


def test_a_server_that_is_away_is_tried_again(server, calls):
    server.scripted.script += [failing("UNAVAILABLE", "loading"), giving(detect_response())]
    assert len(calls(server.address)("detect", b"x").prediction) == 1
    first, second = server.scripted.times_s
    assert second - first >= 0.2


def test_attempts_are_counted(server, calls):
    server.scripted.script += [failing("UNAVAILABLE", f"no {i}") for i in range(5)]
    with pytest.raises(ModelUnavailable, match="no 1"):
        calls(server.address, max_attempts=2)("detect", b"x")
    assert len(server.scripted.requests) == 2
    with pytest.raises(InvalidInput, match="max_attempts"):
        calls(server.address, max_attempts=0)("health")


def test_all_attempts_share_one_deadline(server, calls):
    full = failing("RESOURCE_EXHAUSTED", "full", ("grpc-retry-pushback-ms", "400"))
    server.scripted.script += [full] * 4
    with pytest.raises(QueueFull) as caught:  # sooner than the deadline: the next attempt would come after it
        calls(server.address)("detect", b"x", timeout_s=1.0)
    assert caught.value.retry_after_s == 0.4
    first_s, second_s, *more_s = server.scripted.remaining_s
    assert 0.3 < first_s <= 1.0 + 0.01  # from a second on, gRPC writes what is left in hundredths, rounded up
    assert second_s <= first_s - 0.4
    assert len(more_s) <= 1


def test_the_deadline_ends_a_call_that_takes_too_long(server, calls):
    woken = threading.Event()

    def slow(_request, context):
        context.add_callback(woken.set)
        woken.wait(10)
        return detect_response()

    server.scripted.script.append(slow)
    start = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        calls(server.address)("detect", b"x", timeout_s=0.3)
    assert 0.25 < time.monotonic() - start < 8
    assert woken.wait(5)
    with pytest.raises(InvalidInput, match="timeout_s: must be above 0"):
        calls(server.address)("detect", b"x", timeout_s=0)


def test_a_server_that_is_not_there(calls):
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(ModelUnavailable) as caught:
        calls(address, max_attempts=2)("detect", b"x")
    assert caught.value.__notes__ == [f"UNAVAILABLE from {address}, attempt 2"]
    assert calls(address)("health") is False


def test_large_messages(server, calls):
    server.scripted.script += [giving(detect_response())]
    with pytest.raises(ResourceExhausted, match="larger than max"):
        calls(server.address, max_message_bytes=1000)("detect", bytes(2000))
    assert not server.scripted.requests
    calls(server.address)("detect", bytes(3_900_000))
    server.scripted.script += [giving(pb.DetectResponse(info=pb.ResponseInfo(model_name="n" * 5_000_000)))]
    assert len(calls(server.address)("detect", b"x").model_name) == 5_000_000  # gRPC's own limit is 4 MiB


def test_a_reply_that_breaks_the_promise(server, calls):
    server.scripted.script += [giving(pb.DetectResponse(detections=[pb.Detection(score=2.0)]))]
    with pytest.raises(VisionError, match=r"DetectResponse .*'id-7'.* cannot be read: .*scores must lie in"):
        calls(server.address)("detect", b"x")


def test_health(server, calls):
    call = calls(server.address)
    for status, expected in [(HEALTH.SERVING, True), (HEALTH.NOT_SERVING, False)]:
        server.health.set("", status)
        server.health.set("detect", status)
        assert call("health") is expected
        assert call("health", "detect") is expected
    with pytest.raises(ModelNotFound):
        call("health", "nobody")


def test_wait_ready(server, calls):
    call = calls(server.address)
    server.health.set("", HEALTH.NOT_SERVING)
    start = time.monotonic()
    with pytest.raises(DeadlineExceeded, match=f"{server.address} was not ready within 0.3 s"):
        call("wait_ready", 0.3)
    assert 0.3 <= time.monotonic() - start < 8
    timer = threading.Timer(0.4, server.health.set, ("", HEALTH.SERVING))
    timer.start()
    call("wait_ready", 10)
    assert 0.4 <= time.monotonic() - start - 0.3 < 9
    timer.join()


def test_wait_ready_for_a_server_that_is_yet_to_start(calls):
    port = free_port()
    server = grpc.server(futures.ThreadPoolExecutor(1))
    health_pb2_grpc.add_HealthServicer_to_server(health.HealthServicer(), server)
    server.add_insecure_port(f"127.0.0.1:{port}")
    timer = threading.Timer(0.5, server.start)
    timer.start()
    try:
        calls(f"127.0.0.1:{port}")("wait_ready", 15)
    finally:
        timer.join()
        server.stop(0).wait()


async def test_async_calls_run_side_by_side(server):
    barrier = threading.Barrier(3)

    def together(_request, _context):
        barrier.wait(10)
        return detect_response()

    server.scripted.script += [together] * 3
    async with AsyncVisionClient(server.address) as client:
        results = await asyncio.gather(*(client.detect(b"x") for _ in range(3)))
    assert [len(result.prediction) for result in results] == [1, 1, 1]


async def test_cancelling_an_async_call_reaches_the_server(server):
    called, cancelled = threading.Event(), threading.Event()

    def wait(_request, context):
        context.add_callback(cancelled.set)
        called.set()
        cancelled.wait(10)
        return detect_response()

    server.scripted.script.append(wait)
    async with AsyncVisionClient(server.address) as client:
        task = asyncio.create_task(client.detect(b"x"))
        assert await asyncio.to_thread(called.wait, 5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(cancelled.wait, 5)
