"""Both clients with their predictions on a stream: against real servers, and against one whose answers are written down
beforehand."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest
from tiny_backend import SEEN

from tests.e2e.test_server import settings
from tests.helpers import red_image, run_server, until
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
    VisionError,
)

CODES = {code.name: code.value[0] for code in grpc.StatusCode}


class Threads:
    """The sync client: each prediction on a thread."""

    def __init__(self, address, **more):
        self.client = VisionClient(address, **{"stream": True} | more)
        self._pool = ThreadPoolExecutor(100)

    def start(self, method, *args, **kwargs):
        return self._pool.submit(getattr(self.client, method), *args, **kwargs)

    def close(self):
        self.client.close()
        self._pool.shutdown()


class Tasks:
    """The async client: each prediction a task, of an event loop on a thread."""

    def __init__(self, address, **more):
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

        async def make():
            return AsyncVisionClient(address, **{"stream": True} | more)

        self.client = self.run(make())

    def run(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(60)

    def start(self, method, *args, **kwargs):
        return asyncio.run_coroutine_threadsafe(getattr(self.client, method)(*args, **kwargs), self.loop)

    async def _alone(self):
        """Wait until there is no other task."""
        async with asyncio.timeout(10):
            while asyncio.all_tasks() - {asyncio.current_task()}:
                await asyncio.sleep(0.005)

    def close(self):
        if self.loop.is_closed():
            return
        self.run(self.client.close())
        self.run(self._alone())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


@pytest.fixture(params=[Threads, Tasks], ids=["sync", "async"])
def connect(request):
    """Makes clients; gives what starts their methods."""
    with ExitStack() as stack:

        def make(address, **more):
            client = request.param(address, **more)
            stack.callback(client.close)
            return client

        yield make


def red_of(future):
    return future.result(30).prediction.class_ids.tolist()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    models = {"tiny": "", "cruel": "options = {fail_red = 13}"}
    with run_server(settings(tmp_path_factory.mktemp("server"), models)) as running:
        yield f"127.0.0.1:{running.port}"


@contextmanager
def serve_gated(folder, queued=2, **more):
    """A server whose only network waits for a file, one image at a time. Gives it with ``open()`` and ``shut()`` of the
    gate."""
    gate = folder / "gate"
    gate.touch()
    table = f'options = {{gate = "{gate}"}}\nbatching = {{max_batch_size = 1, max_queued_jobs = {queued}}}'
    with run_server(settings(folder, {"slow": table}, **more)) as running:
        SEEN.clear()
        try:
            yield SimpleNamespace(
                address=f"127.0.0.1:{running.port}",
                queued=lambda: running.pipeline.catalog.find("slow").info(is_default=True).queued_jobs,
                open=gate.touch,
                shut=gate.unlink,
            )
        finally:
            gate.touch()


@pytest.fixture
def gated(tmp_path):
    """Such a server, its gate shut."""
    with serve_gated(tmp_path) as gated:
        gated.shut()
        yield gated


def answer(request, **fields):
    """The red that was asked for, in the reply to a request to classify; or another answer."""
    red = request.classify.image.raw.data[0] if request.WhichOneof("request") == "classify" else 0
    fields = fields or {"classify": pb.ClassifyResponse(classes=[pb.ScoredClass(class_id=red)])}
    return pb.PredictResponse(answers=[pb.PredictAnswer(id=request.id, request_id=f"id-{red}", **fields)])


def failure(status, message="", **fields):
    return {"failure": pb.PredictFailure(code=CODES[status], message=message, **fields)}


def answer_all(requests, _context):
    for request in requests:
        if not request.cancel:
            yield answer(request)


@dataclass
class Scripted(pb_grpc.VisionServiceServicer):
    """Answers each stream by the next function of a script, or the last one, and remembers what it was asked."""

    script: list[Callable] = field(default_factory=lambda: [answer_all])
    streams: list[dict[str, Any]] = field(default_factory=list)  # the metadata with which each was opened
    requests: list[pb.PredictItem] = field(default_factory=list)
    messages: list[int] = field(default_factory=list)  # how many requests travelled in each
    calls: int = 0

    def Predict(self, request_iterator, context):  # noqa: N802
        behave = self.script[min(len(self.streams), len(self.script) - 1)]
        self.streams.append(dict(context.invocation_metadata()))
        yield from behave(self._noted(request_iterator), context)

    def _noted(self, messages):
        for message in messages:
            self.messages.append(len(message.items))
            for item in message.items:
                self.requests.append(item)
                yield item

    def Classify(self, request, context):  # noqa: N802
        self.calls += 1
        context.set_trailing_metadata((("x-request-id", "by call"),))
        return pb.ClassifyResponse(classes=[pb.ScoredClass(class_id=request.image.raw.data[0])])


@contextmanager
def serve_scripted(servicer):
    threads = ThreadPoolExecutor(8)
    running = grpc.server(threads, options=[("grpc.max_receive_message_length", -1)])
    pb_grpc.add_VisionServiceServicer_to_server(servicer, running)
    pb_grpc.add_ModelServiceServicer_to_server(Models(), running)
    port = running.add_insecure_port("127.0.0.1:0")
    running.start()
    yield f"127.0.0.1:{port}"
    running.stop(0).wait()
    threads.shutdown()


class Models(pb_grpc.ModelServiceServicer):
    def ListModels(self, request, context):  # noqa: N802
        return pb.ListModelsResponse(models=[pb.Model(name="net", task=pb.TASK_DETECT, state=pb.MODEL_STATE_READY)])


@pytest.fixture
def scripted():
    servicer = Scripted()
    with serve_scripted(servicer) as address:
        servicer.address = address
        yield servicer


def test_the_same_as_by_calls_with_request_ids(server, connect):
    by_stream = [connect(server).start("classify", red_image(red), top_k=1).result(30) for red in (0, 42)]
    by_call = [connect(server, stream=False).start("classify", red_image(red), top_k=1).result(30) for red in (0, 42)]
    for one, other in zip(by_stream, by_call, strict=True):
        assert one.prediction.class_names == other.prediction.class_names
        assert one.prediction.scores.tolist() == other.prediction.scores.tolist()
        assert (one.model_name, one.model_version) == (other.model_name, other.model_version) == ("tiny", "1")
        assert one.original_hw == other.original_hw == (16, 24)
        assert one.timings.batch_size == other.timings.batch_size == 1
    ids = [result.request_id for result in by_stream + by_call]
    assert all(ids)
    assert len(set(ids)) == 4


def test_predictions_share_a_stream_and_the_rest_stays_calls(scripted, connect):
    client = connect(scripted.address, metadata=[("who", "me")], timeout_s=7)
    assert not scripted.streams  # opened by the first prediction
    assert [red_of(client.start("classify", red_image(red))) for red in (1, 2, 3)] == [[1], [2], [3]]
    (metadata,) = scripted.streams
    assert metadata["who"] == "me"
    assert [request.WhichOneof("request") for request in scripted.requests] == ["classify"] * 3
    assert len({request.id for request in scripted.requests}) == 3
    assert all(5000 < request.timeout_ms <= 7000 for request in scripted.requests)
    (model,) = client.start("list_models").result(30)
    assert model.name == "net"
    assert (len(scripted.streams), scripted.calls) == (1, 0)


def test_every_task(scripted, connect):
    info = pb.ResponseInfo(image_height=1, image_width=2)
    raw = pb.Image(raw=pb.RawImage(data=bytes(6)))
    replies = {
        "detect": pb.DetectResponse(info=info),
        "segment": pb.SegmentResponse(info=info),
        "translate": pb.TranslateResponse(image=raw, height=1, width=2, info=info),
    }

    def by_task(requests, _context):
        for request in requests:
            kind = request.WhichOneof("request")
            yield answer(request, **{kind: replies[kind]})

    scripted.script = [by_task]
    client = connect(scripted.address)
    for task in replies:
        assert client.start(task, b"x", model=f"my {task}").result(30).original_hw == (1, 2)
    detect, segment, translate = scripted.requests
    assert detect.detect.model.name == "my detect"
    assert segment.segment.model.name == "my segment"
    assert translate.translate.model.name == "my translate"


def test_many_at_one_time_each_get_their_own_answer(server, connect):
    client = connect(server, max_attempts=20, timeout_s=60)
    reds = [index % 256 for index in range(400)]
    futures = [client.start("classify", red_image(red), top_k=1) for red in reds]
    assert [red_of(future) for future in futures] == [[red] for red in reds]
    assert len({future.result().request_id for future in futures}) == 400


def test_answers_in_another_order_and_several_in_a_message(scripted, connect):
    def backwards(requests, _context):
        ten = [answer(next(requests)).answers[0] for _ in range(10)]
        yield pb.PredictResponse(answers=ten[:-4:-1])
        yield pb.PredictResponse(answers=ten[-4::-1])
        yield from answer_all(requests, None)

    scripted.script = [backwards]
    client = connect(scripted.address)
    futures = [client.start("classify", red_image(red)) for red in range(10)]
    assert [red_of(future) for future in futures] == [[red] for red in range(10)]


def test_what_is_wrong_with_one_is_its_own_error(server, connect):
    client = connect(server)
    good, junk, missing, cruel, more = (
        client.start("classify", image, **choices)
        for image, choices in [
            (red_image(3), {}),
            (b"hello, is this an image?", {}),
            (red_image(4), {"model": "tinny"}),
            (red_image(13), {"model": "cruel"}),
            (red_image(5), {}),
        ]
    )
    assert (red_of(good), red_of(more)) == ([3], [5])
    for future, kind, message in [
        (junk, InvalidImage, "image: "),
        (missing, ModelNotFound, "did you mean 'tiny'"),
        (cruel, InferenceFailed, "failed on this image"),
    ]:
        with pytest.raises(VisionError, match=message) as caught:
            future.result(30)
        error = caught.value
        assert type(error) is kind
        assert error.address == server
        assert error.request_id
        assert error.__notes__ == [f"{error.status} from {server}, request {error.request_id}, attempt 1"]
        assert error.__cause__ is None
    assert red_of(client.start("classify", red_image(6))) == [6]


@pytest.mark.parametrize(
    ("answered", "kind", "text"),
    [
        (failure("INVALID_ARGUMENT", "top_k: no"), InvalidInput, "top_k: no"),
        (failure("RESOURCE_EXHAUSTED", "does not fit"), ResourceExhausted, "does not fit"),
        (failure("RESOURCE_EXHAUSTED", "full", retry_after_ms=60_000), QueueFull, "full"),
        (failure("DEADLINE_EXCEEDED", "in the queue"), DeadlineExceeded, "in the queue"),
        (failure("PERMISSION_DENIED", "no"), VisionError, "PERMISSION_DENIED: no"),
        ({"failure": pb.PredictFailure(code=99, message="new")}, VisionError, "UNKNOWN: new"),
        ({"detect": pb.DetectResponse()}, VisionError, "UNKNOWN: the server's answer to classify is detect"),
        ({"answer": None}, VisionError, "UNKNOWN: the server's answer to classify is empty"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_failure_is_the_servers_error_and_is_not_retried(scripted, connect, answered, kind, text):
    def fail(requests, _context):
        for request in requests:
            if "answer" in answered:
                yield pb.PredictResponse(answers=[pb.PredictAnswer(id=request.id, request_id="id-8")])
            else:
                yield answer(request, **answered)

    scripted.script = [fail]
    with pytest.raises(VisionError) as caught:
        connect(scripted.address, timeout_s=20).start("classify", red_image(8)).result(30)
    assert type(caught.value) is kind
    assert (str(caught.value), caught.value.request_id) == (text, "id-8")
    if kind is QueueFull:
        assert caught.value.retry_after_s == 60
    assert (len(scripted.requests), scripted.calls) == (1, 0)


@pytest.mark.parametrize(
    ("refusal", "pause_s"),
    [(failure("RESOURCE_EXHAUSTED", "full", retry_after_ms=300), 0.3), (failure("UNAVAILABLE", "loading"), 0.2)],
    ids=["full", "loading"],
)
def test_a_request_that_is_refused_for_now_is_sent_again(scripted, connect, refusal, pause_s):
    times_s = []

    def refuse_first(requests, _context):
        for request in requests:
            times_s.append(time.monotonic())
            yield answer(request, **refusal if len(times_s) == 1 else {})

    scripted.script = [refuse_first]
    assert red_of(connect(scripted.address).start("classify", red_image(9))) == [9]
    first_s, second_s = times_s
    assert second_s - first_s >= pause_s
    assert (len(scripted.streams), scripted.calls) == (1, 0)
    first, second = scripted.requests
    assert first.id != second.id
    assert second.timeout_ms <= first.timeout_ms - 1000 * pause_s  # one deadline for all attempts


def test_a_full_queue_is_waited_for(gated, connect):
    client = connect(gated.address, max_attempts=20)
    futures = [client.start("classify", red_image(1))]
    until(lambda: SEEN[1])
    futures += [client.start("classify", red_image(red)) for red in (2, 3)]
    until(lambda: gated.queued() == 2)
    with pytest.raises(QueueFull):
        connect(gated.address, max_attempts=1).start("classify", red_image(4)).result(30)
    futures.append(client.start("classify", red_image(5)))
    gated.open()
    assert [red_of(future) for future in futures] == [[1], [2], [3], [5]]


def test_a_deadline_ends_one_request_and_the_client_works_on(gated, connect):
    client = connect(gated.address)
    first = client.start("classify", red_image(1))
    until(lambda: SEEN[1])
    with pytest.raises(DeadlineExceeded) as caught:
        client.start("classify", red_image(2), timeout_s=0.2).result(30)
    assert caught.value.address == gated.address
    until(lambda: gated.queued() == 0)
    last = client.start("classify", red_image(3))
    gated.open()
    assert (red_of(first), red_of(last)) == ([1], [3])
    assert SEEN[2] == 0
    with pytest.raises(InvalidInput, match="timeout_s: must be above 0"):
        client.start("classify", red_image(4), timeout_s=0).result(30)


def test_a_late_answer_is_ignored_and_the_server_told_to_stop(scripted, connect):
    def late(requests, _context):
        first = next(requests)
        told = next(requests)
        assert (told.WhichOneof("request"), told.id) == ("cancel", first.id)
        yield answer(first)
        yield from answer_all(requests, None)

    scripted.script = [late]
    client = connect(scripted.address)
    with pytest.raises(DeadlineExceeded, match="Deadline Exceeded"):
        client.start("classify", red_image(1), timeout_s=0.2).result(30)
    assert red_of(client.start("classify", red_image(2))) == [2]
    assert scripted.requests[0].timeout_ms <= 200
    assert (len(scripted.streams), scripted.calls) == (1, 0)


LARGE = np.zeros((2000, 2000, 3), np.uint8)
"""An image that flow control does not let pass unread."""


def after(go_on):
    """A server's behaviour: it reads nothing until then."""

    def behave(requests, _context):
        go_on.wait(20)
        yield from answer_all(requests, None)

    return behave


def test_what_was_given_up_before_it_could_be_sent_is_never_sent(scripted, connect):
    go_on = threading.Event()
    scripted.script = [after(go_on)]
    client = connect(scripted.address)
    futures = [client.start("classify", LARGE, timeout_s=2.0) for _ in range(4)]  # in which the first one is begun
    for future in futures:
        with pytest.raises(DeadlineExceeded):
            future.result(30)
    small = client.start("classify", red_image(7))
    go_on.set()
    assert red_of(small) == [7]
    kinds = [request.WhichOneof("request") for request in scripted.requests]
    assert kinds == ["classify", "cancel", "classify"]


def test_requests_that_come_while_one_is_written_share_a_message_up_to_a_size(scripted, connect):
    go_on = threading.Event()
    scripted.script = [after(go_on)]
    client = connect(scripted.address, timeout_s=60)
    stream = client.client._transport._stream

    def unwritten():
        return None if stream._open is None else len(stream._open.requests._unwritten)

    futures = [client.start("classify", LARGE)]
    until(lambda: unwritten() == 0)  # it is being written
    futures += [client.start("classify", red_image(red, 200, 300)) for red in range(1, 8)]  # 180 kB each
    until(lambda: unwritten() == 7)
    go_on.set()
    assert [red_of(future) for future in futures] == [[red] for red in range(8)]
    assert scripted.messages == [1, 2, 2, 2, 1]  # three would be more than half a megabyte


async def test_cancelling_an_await_takes_the_request_off_the_queue(gated):
    async with AsyncVisionClient(gated.address, stream=True) as client:
        first = asyncio.create_task(client.classify(red_image(1)))
        await asyncio.to_thread(until, lambda: SEEN[1])
        second, third = (asyncio.create_task(client.classify(red_image(red))) for red in (2, 3))
        await asyncio.to_thread(until, lambda: gated.queued() == 2)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        await asyncio.to_thread(until, lambda: gated.queued() == 1)
        gated.open()
        assert [(await task).prediction.class_ids.tolist() for task in (first, third)] == [[1], [3]]
        assert SEEN[2] == 0


async def test_cancelling_an_await_leaves_the_stream_open(scripted):
    cancelled = 0
    async with AsyncVisionClient(scripted.address, stream=True) as client:
        for answered in range(20):
            before = len(scripted.requests)
            tasks = [asyncio.create_task(client.classify(red_image(red))) for red in range(100)]
            while len(scripted.requests) - before <= answered:
                await asyncio.sleep(0)
            for task in tasks:  # some have not been written, some are being written, some have an answer on its way
                task.cancel()
            await asyncio.wait(tasks)
            cancelled += sum(task.cancelled() for task in tasks)
        assert (await client.classify(red_image(60))).prediction.class_ids.tolist() == [60]
    assert cancelled
    assert (len(scripted.streams), scripted.calls) == (1, 0)


def test_too_large_a_request_fails_alone(scripted, connect):
    release = threading.Event()

    def wait(requests, context):
        for request in requests:
            release.wait(20)
            yield answer(request)

    scripted.script = [wait]
    client = connect(scripted.address, max_message_bytes=2000)
    other = client.start("classify", red_image(1))
    until(lambda: scripted.requests)
    with pytest.raises(ResourceExhausted, match="larger than max"):
        client.start("classify", red_image(2, 30, 30)).result(30)
    assert not other.done()
    release.set()
    assert red_of(other) == [1]
    assert red_of(client.start("classify", red_image(3))) == [3]
    assert (len(scripted.streams), scripted.calls) == (1, 0)


def test_a_request_that_is_too_large_for_the_server_fails_alone(tmp_path, connect):
    with serve_gated(tmp_path, queued=9, max_message_bytes=100_000, max_image_bytes=100_000) as gated:
        gated.shut()
        client = connect(gated.address)
        others = [client.start("classify", red_image(red)) for red in (1, 2)]
        until(lambda: gated.queued() == 1)
        with pytest.raises(ResourceExhausted, match="larger than max"):
            client.start("classify", red_image(9, 400, 400)).result(30)
        gated.open()
        assert [red_of(future) for future in others] == [[1], [2]]
        assert red_of(client.start("classify", red_image(3))) == [3]


@pytest.mark.parametrize("status", ["RESOURCE_EXHAUSTED", "INTERNAL", "CANCELLED", "DEADLINE_EXCEEDED", "UNKNOWN"])
def test_what_waits_on_a_stream_that_breaks_is_sent_as_calls(scripted, connect, status):
    def break_off(requests, context):
        for _ in range(3):
            next(requests)
        context.abort(grpc.StatusCode[status], "somebody's fault")
        yield

    scripted.script = [break_off, answer_all]
    client = connect(scripted.address, max_attempts=1)
    futures = [client.start("classify", red_image(red)) for red in (1, 2, 3)]
    assert [red_of(future) for future in futures] == [[1], [2], [3]]
    assert [future.result().request_id for future in futures] == ["by call"] * 3
    assert client.start("classify", red_image(4)).result(30).request_id == "id-4"
    assert (len(scripted.streams), scripted.calls) == (2, 3)


@pytest.mark.parametrize("way", ["UNAVAILABLE", "OK"])
def test_what_waits_when_the_server_ends_the_stream_goes_on_another(scripted, connect, way):
    def leave(requests, context):
        next(requests)
        if way == "UNAVAILABLE":
            context.abort(grpc.StatusCode.UNAVAILABLE, "stopping")
        yield from ()

    scripted.script = [leave, leave, answer_all]
    with pytest.raises(ModelUnavailable, match=r"stopping|the server ended the stream") as caught:
        connect(scripted.address, max_attempts=1).start("classify", red_image(1)).result(30)
    assert isinstance(caught.value.__cause__, grpc.RpcError) is (way == "UNAVAILABLE")
    assert red_of(connect(scripted.address, max_attempts=2).start("classify", red_image(2))) == [2]
    assert (len(scripted.streams), scripted.calls) == (3, 0)


class Older(pb_grpc.VisionServiceServicer):
    """A server from before there was Predict."""

    def Classify(self, request, context):  # noqa: N802
        return pb.ClassifyResponse(classes=[pb.ScoredClass(class_id=request.image.raw.data[0])])


class CountStreams(grpc.ServerInterceptor):
    def __init__(self):
        self.streams = 0

    def intercept_service(self, continuation, details):
        self.streams += details.method.endswith("/Predict")
        return continuation(details)


def test_a_server_without_streams_is_called(connect):
    asked = CountStreams()
    threads = ThreadPoolExecutor(8)
    running = grpc.server(threads, interceptors=[asked])
    pb_grpc.add_VisionServiceServicer_to_server(Older(), running)
    port = running.add_insecure_port("127.0.0.1:0")
    running.start()
    client = connect(f"127.0.0.1:{port}", max_attempts=1)
    assert red_of(client.start("classify", red_image(1))) == [1]
    assert asked.streams == 1
    futures = [client.start("classify", red_image(red)) for red in (2, 3)]
    assert [red_of(future) for future in futures] == [[2], [3]]
    assert asked.streams == 1
    with pytest.raises(VisionError, match="UNIMPLEMENTED"):
        client.start("detect", red_image(1)).result(30)
    running.stop(0).wait()
    threads.shutdown()


def test_a_server_that_was_started_anew(tmp_path, connect):
    with run_server(settings(tmp_path, {"tiny": ""})) as running:
        port = running.port
        client = connect(f"127.0.0.1:{port}", timeout_s=60)
        first = client.start("classify", red_image(1)).result(30)
    with pytest.raises(ModelUnavailable):
        client.start("classify", red_image(2), timeout_s=0.5).result(30)
    with run_server(settings(tmp_path, {"tiny": ""}, port=port)):
        client.start("wait_ready").result(60)
        again = client.start("classify", red_image(3)).result(60)
    assert again.prediction.class_ids.tolist() == [3]
    assert first.prediction.class_ids.tolist() == [1]


def test_a_server_that_stops_answers_what_it_has(tmp_path, connect):
    with serve_gated(tmp_path, queued=9) as gated:
        gated.shut()
        client = connect(gated.address, max_attempts=1)
        futures = [client.start("classify", red_image(red)) for red in range(1, 6)]
        until(lambda: gated.queued() == 4)
        opening = threading.Timer(0.3, gated.open)
        opening.start()
    opening.join()
    assert [red_of(future) for future in futures] == [[red] for red in range(1, 6)]
    with pytest.raises(ModelUnavailable):
        client.start("classify", red_image(7)).result(30)


def test_a_server_that_dies_leaves_nobody_waiting(serve, tmp_path, connect):
    (tmp_path / "gate").touch()
    process, port, _ = serve(f'options = {{gate = "{tmp_path / "gate"}"}}')
    (tmp_path / "gate").unlink()
    (tmp_path / "gate.entered").unlink()
    client = connect(f"127.0.0.1:{port}", max_attempts=1)
    futures = [client.start("classify", red_image(red)) for red in range(5)]
    until((tmp_path / "gate.entered").exists)
    process.kill()
    for future in futures:
        with pytest.raises(ModelUnavailable) as caught:
            future.result(30)
        assert isinstance(caught.value.__cause__, grpc.RpcError)


def test_a_server_that_is_not_there(connect):
    client = connect("127.0.0.1:1", max_attempts=2)
    with pytest.raises(ModelUnavailable) as caught:
        client.start("classify", red_image(1)).result(30)
    assert caught.value.__notes__ == ["UNAVAILABLE from 127.0.0.1:1, attempt 2"]


def test_close_fails_what_waits_and_leaves_nothing_behind(gated, connect):
    by_call = connect(gated.address, stream=False)
    of_calls = by_call.start("classify", red_image(1))
    until(lambda: SEEN[1])
    before = set(threading.enumerate())
    by_stream = connect(gated.address)
    of_stream = by_stream.start("classify", red_image(2))
    until(lambda: gated.queued() == 1)
    outcomes = []
    for client, future in [(by_call, of_calls), (by_stream, of_stream)]:
        client.close()
        with pytest.raises((VisionError, CancelledError)) as caught:
            future.result(30)
        outcomes.append((type(caught.value), str(caught.value)))
    assert outcomes[0] == outcomes[1]
    until(lambda: gated.queued() == 0)
    until(lambda: not set(threading.enumerate()) - before)


def test_a_closed_client_says_so(server):
    client = VisionClient(server, stream=True)
    client.classify(red_image(1))
    assert "predict-stream" in [thread.name for thread in threading.enumerate()]
    client.close()
    assert "predict-stream" not in [thread.name for thread in threading.enumerate()]
    with pytest.raises(ModelUnavailable, match=f"the client of {server} is closed; open another"):
        client.classify(red_image(1))
    client.close()


async def test_a_closed_async_client_says_so(server):
    def ours():
        return [task for task in asyncio.all_tasks() if "PredictStream" in task.get_coro().__qualname__]

    client = AsyncVisionClient(server, stream=True)
    await client.classify(red_image(1))
    assert len(ours()) == 2
    await client.close()
    assert not ours()
    with pytest.raises(ModelUnavailable, match=f"the client of {server} is closed; open another"):
        await client.classify(red_image(1))
    await client.close()
