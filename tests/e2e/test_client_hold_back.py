"""Clients that hold back: what reaches a server, and when."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import grpc
import pytest
from tiny_backend import SEEN

from tests.e2e.test_client_stream import Tasks, Threads, red_of, serve_gated, serve_scripted
from tests.helpers import red_image, until
from vision_service.api.v1 import vision_pb2 as pb
from vision_service.api.v1 import vision_pb2_grpc as pb_grpc
from vision_service.bench.load import Load, generate
from vision_service.bench.stream import StreamConnection
from vision_service.errors import QueueFull


@dataclass
class Full(pb_grpc.VisionServiceServicer):
    """Has no room for so many requests, by calls or on a stream, and remembers what it was asked and when."""

    refusals: int
    retry_after_ms: int
    asked: list[tuple[str, str]] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)

    def _note(self, kind, request):
        self.asked.append((kind, request.model.name))
        self.times_s.append(time.monotonic())
        return len(self.asked) <= self.refusals

    def Classify(self, request, context):  # noqa: N802
        if self._note("classify", request):
            context.set_trailing_metadata((("grpc-retry-pushback-ms", str(self.retry_after_ms)),))
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")
        return pb.ClassifyResponse(classes=[pb.ScoredClass(class_id=request.image.raw.data[0])])

    def Detect(self, request, context):  # noqa: N802
        self._note("detect", request)
        return pb.DetectResponse()

    def Predict(self, request_iterator, context):  # noqa: N802
        for item in (item for message in request_iterator for item in message.items):
            kind = item.WhichOneof("request")
            request = getattr(item, kind)
            full = self._note(kind, request)
            if full:
                code = grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
                fields = {"failure": pb.PredictFailure(code=code, message="full", retry_after_ms=self.retry_after_ms)}
            elif kind == "detect":
                fields = {"detect": pb.DetectResponse()}
            else:
                red = request.image.raw.data[0]
                fields = {"classify": pb.ClassifyResponse(classes=[pb.ScoredClass(class_id=red)])}
            yield pb.PredictResponse(answers=[pb.PredictAnswer(id=item.id, **fields)])


@pytest.fixture(params=[Threads, Tasks], ids=["sync", "async"])
def kind(request):
    return request.param


@pytest.fixture(params=[False, True], ids=["calls", "stream"])
def connect(request, kind):
    """Makes clients of an address."""
    with ExitStack() as stack:

        def make(address, **more):
            client = kind(address, stream=request.param, **more)
            stack.callback(client.close)
            return client

        yield make


@pytest.fixture
def serve():
    """Serves what is given; returns the address."""
    with ExitStack() as stack:
        yield lambda servicer: stack.enter_context(serve_scripted(servicer))


@pytest.mark.parametrize(("callers", "asked_at_least"), [(0, 200), (1, 1), (4, 4)])
@pytest.mark.parametrize("streamed", [False, True], ids=["calls", "stream"])
def test_the_load_generator_holds_back_as_clients_do(serve, streamed, callers, asked_at_least):
    server = Full(refusals=10**9, retry_after_ms=60_000)
    request = pb.ClassifyRequest(image=pb.Image(encoded=b"x"))
    message = pb.PredictItem(classify=request) if streamed else request
    method = "/vision.v1.VisionService/" + ("Predict" if streamed else "Classify")
    how = {"wire": StreamConnection} if streamed else {}
    load = Load(serve(server), method, [message.SerializeToString()], rate=200.0, warmup_s=0.0, seconds=2.0, **how)
    found = generate(replace(load, held_callers=callers))
    asked, held = (len(found.latencies_s.get(status, ())) for status in ("RESOURCE_EXHAUSTED", "HELD_BACK"))
    assert len(server.asked) == asked >= asked_at_least
    if callers:
        assert asked < held
    else:
        assert held == 0


def test_a_refusal_holds_back_what_is_like_it(serve, connect):
    server = Full(refusals=1, retry_after_ms=60_000)
    client = connect(serve(server), max_attempts=1, hold_back=True)
    with pytest.raises(QueueFull, match=r"^full"):
        client.start("classify", red_image(1), model="net").result(30)
    for _ in range(3):
        with pytest.raises(QueueFull, match=r'^not sent: .* The server had said: "full"') as caught:
            client.start("classify", red_image(2), model="net").result(30)
        assert 0 < caught.value.retry_after_s <= 10
        assert caught.value.request_id == ""
    assert server.asked == [("classify", "net")]
    assert red_of(client.start("classify", red_image(3), model="other")) == [3]
    client.start("detect", red_image(4), model="net").result(30)
    assert server.asked[1:] == [("classify", "other"), ("detect", "net")]


def test_without_it_every_request_is_sent(serve, connect):
    server = Full(refusals=4, retry_after_ms=60_000)
    client = connect(serve(server), max_attempts=1)
    for _ in range(4):
        with pytest.raises(QueueFull, match=r"^full"):
            client.start("classify", red_image(1)).result(30)
    assert len(server.asked) == 4


def test_what_is_held_back_is_tried_again_in_time(serve, connect):
    server = Full(refusals=1, retry_after_ms=1500)
    client = connect(serve(server), hold_back=True)
    first = client.start("classify", red_image(1))
    until(lambda: client.client._transport._held._refusals, "it has not heard of the refusal")
    others = [client.start("classify", red_image(red)) for red in (2, 3)]
    assert [red_of(future) for future in (first, *others)] == [[1], [2], [3]]
    refused_s, *answered_s = server.times_s
    assert len(answered_s) == 3
    assert min(answered_s) >= refused_s + 1.5


def test_a_full_server_is_asked_again_when_it_has_room(tmp_path, connect):
    with serve_gated(tmp_path) as gated:
        gated.shut()
        client = connect(gated.address, max_attempts=1, hold_back=True)
        under_way = [client.start("classify", red_image(1))]
        until(lambda: SEEN[1])
        under_way += [client.start("classify", red_image(red)) for red in (2, 3)]
        until(lambda: gated.queued() == 2)
        with pytest.raises(QueueFull, match="is full") as caught:
            client.start("classify", red_image(4)).result(30)

        def refused():
            with pytest.raises(QueueFull) as caught:
                client.start("classify", red_image(4)).result(30)
            return str(caught.value)

        until(lambda: refused().startswith("not sent: "))  # the server names 20 ms, which may be over by then
        gated.open()
        assert [red_of(future) for future in under_way] == [[1], [2], [3]]
        time.sleep(caught.value.retry_after_s)
        assert red_of(client.start("classify", red_image(5))) == [5]
