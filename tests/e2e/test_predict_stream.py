"""Predict on a real server and a real channel: many requests on one stream, each answered by itself."""

import gc
import logging
import queue
import random
import signal
import time
from contextlib import contextmanager, suppress

import grpc
import pytest
from tiny_backend import BATCHES, SEEN

from tests.e2e.test_server import BAD, raw_request, settings
from tests.helpers import red_image, run_server, until
from vision_service.api.v1 import vision_pb2 as pb
from vision_service.api.v1 import vision_pb2_grpc as pb_grpc
from vision_service.config.settings import ServerSettings
from vision_service.engine import call
from vision_service.engine.queue import Job
from vision_service.http2 import gather
from vision_service.server import codec, refusals, streams

pytestmark = pytest.mark.usefixtures("transport")

CODE = {code.value[0]: code.name for code in grpc.StatusCode}


class Stream:
    """A stream's client: requests are sent at once, answers are read when asked for."""

    def __init__(self, channel, **more):
        self._requests = queue.SimpleQueue()
        self.rpc = pb_grpc.VisionServiceStub(channel).Predict(iter(self._requests.get, None), **more)
        self.messages = []  # how many answers travelled in each

    def send(self, number, request=None, **fields):
        kind = {} if request is None else {"classify": request}
        self.send_together(pb.PredictItem(id=number, **kind, **fields))

    def send_together(self, *items):
        self._requests.put(pb.PredictRequest(items=items))

    def end(self):
        self._requests.put(None)

    def answers(self, count):
        """The next answers, by id."""
        found = {}
        while len(found) < count:
            response = next(self.rpc)
            self.messages.append(len(response.answers))
            assert not set(found) & {answer.id for answer in response.answers}
            found |= {answer.id: answer for answer in response.answers}
        return found


@contextmanager
def streaming(port, options=(), **more):
    with grpc.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
        stream = Stream(channel, timeout=60, **more)
        yield stream
        stream.end()


def red_of(answer):
    return answer.classify.classes[0].class_id


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("streams")
    models = {
        "tiny": "batching = {max_wait_ms = 60000}",
        "cruel": "options = {fail_red = 13}",
        "second": 'version = "2"',
    }
    with run_server(settings(folder, models, max_image_bytes=1_000_000, max_message_bytes=2_000_000)) as running:
        yield running


@pytest.fixture
def gated(tmp_path):
    """A stream to a server whose only network waits for a file, with one request in it and a queue of two."""
    gate = tmp_path / "gate"
    gate.touch()
    more = f'options = {{gate = "{gate}"}}\nbatching = {{max_batch_size = 1, max_queued_jobs = 2}}'
    with run_server(settings(tmp_path, {"slow": more})) as running:
        gate.unlink()
        SEEN.clear()
        with streaming(running.port) as stream:
            stream.send(1, raw_request(1))
            until(lambda: SEEN[1])
            yield stream, gate, lambda: running.pipeline.catalog.find("slow").info(is_default=True).queued_jobs
            gate.touch()


def test_every_request_has_its_own_answer_whatever_their_order(server):
    draw = random.Random(4)
    numbers = [draw.randrange(2**64) for _ in range(200)]
    with streaming(server.port) as stream:
        for place, number in enumerate(numbers):
            stream.send(number, raw_request(place))
        answers = stream.answers(200)
        stream.end()
        assert list(stream.rpc) == []
        assert stream.rpc.code() is grpc.StatusCode.OK
    assert {number: red_of(answers[number]) for number in numbers} == {
        number: place for place, number in enumerate(numbers)
    }
    assert len({answer.request_id for answer in answers.values()}) == 200
    assert answers[numbers[0]].classify.info.model_name == "tiny"
    assert answers[numbers[0]].classify.info.timings.forward_ms > 0


@pytest.mark.parametrize("case", [case for case in BAD if case != "message too large"])
def test_what_fails_as_a_call_fails_alike_on_a_stream_which_goes_on(server, case):
    request, status, text = BAD[case]
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel, pytest.raises(grpc.RpcError) as caught:
        pb_grpc.VisionServiceStub(channel).Classify(request, timeout=10)
    with streaming(server.port) as stream:
        stream.send(5, request)
        stream.send(6, raw_request(66))
        answers = stream.answers(2)
    failure = answers[5].failure
    assert (CODE[failure.code], failure.message) == (caught.value.code().name, caught.value.details())
    assert status == CODE[failure.code]
    assert text in failure.message
    assert not failure.HasField("retry_after_ms")
    assert red_of(answers[6]) == 66


def test_a_request_of_nothing_and_an_id_that_is_under_way(gated):
    stream, gate, _ = gated
    stream.send(7)
    stream.send(1, raw_request(9))
    messages = {number: answer.failure for number, answer in stream.answers(2).items()}  # they may travel together
    assert {CODE[failure.code] for failure in messages.values()} == {"INVALID_ARGUMENT"}
    assert messages[7].message.startswith("request: is not set")
    assert messages[1].message.startswith("id: 1 is under way")
    gate.touch()
    assert red_of(stream.answers(1)[1]) == 1  # the first of that id is answered all the same


def test_a_refusal_is_about_the_model_that_was_asked_for(tmp_path):
    gate = tmp_path / "gate"
    gate.touch()
    more = f'options = {{gate = "{gate}"}}\nbatching = {{max_batch_size = 1, max_queued_jobs = 1}}'
    with run_server(settings(tmp_path, {"one": more, "other": more})) as running, streaming(running.port) as stream:
        gate.unlink()
        names = {}
        for number in range(10):  # of five to each model at most two find room: one that runs and one that waits
            names[number] = ("one", "other")[number % 2]
            stream.send(number, raw_request(1, model=pb.ModelSelector(name=names[number])))
        stream.send(10, raw_request(1, model=pb.ModelSelector(name="neither")))
        refused = {}
        while 10 not in refused:
            refused |= {number: answer.failure for number, answer in stream.answers(1).items()}
        assert CODE[refused.pop(10).code] == "NOT_FOUND"
        assert {names[number] for number in refused} == {"one", "other"}
        for number, failure in refused.items():
            assert CODE[failure.code] == "RESOURCE_EXHAUSTED"
            assert f"the queue of model {names[number]}:" in failure.message
        gate.touch()


def test_a_full_queue_refuses_with_a_time_to_come_back_and_counts_floods(gated, caplog):
    stream, gate, queued = gated
    caplog.set_level(logging.INFO, "vision_service.access")
    for number in (2, 3):
        stream.send(number, raw_request(number))
    until(lambda: queued() == 2)
    for number in range(10, 60):
        stream.send(number, raw_request(4))
    answers = stream.answers(50)
    assert {CODE[answer.failure.code] for answer in answers.values()} == {"RESOURCE_EXHAUSTED"}
    assert all(answer.failure.retry_after_ms >= 1 for answer in answers.values())
    assert SEEN[4] == 0

    def refused():
        records = [record for record in caplog.records if getattr(record, "status", "") == "RESOURCE_EXHAUSTED"]
        return records, sum(getattr(record, "calls", 1) for record in records)

    until(lambda: refused()[1] == 50)
    assert len(refused()[0]) < 50
    gate.touch()
    assert {red_of(answer) for answer in stream.answers(3).values()} == {1, 2, 3}


@pytest.mark.skipif(not gather.can_gather(), reason="this system's sockets do not gather")
def test_requests_after_refused_ones_are_taken_in_together(gated, transport, monkeypatch):
    """Where the transport is ours."""
    monkeypatch.setattr(refusals, "GATHER_S", 3.0)
    monkeypatch.setattr(refusals, "_BACKLOG_S", 0.0)
    monkeypatch.setattr(gather, "OFTEN_S", 60.0)
    stream, gate, queued = gated
    for number in (2, 3):
        stream.send(number, raw_request(number))
    until(lambda: queued() == 2)
    started_s = time.monotonic()
    for number in (10, 11, 12):  # the last one waits
        stream.send(number, raw_request(4))
        stream.answers(1)
    assert (time.monotonic() - started_s > 2.9) == (transport == "asyncio")
    gate.touch()
    assert {red_of(answer) for answer in stream.answers(3).values()} == {1, 2, 3}


def test_a_deadline_that_passes_is_that_requests_alone(gated):
    stream, gate, queued = gated
    stream.send(2, raw_request(2), timeout_ms=100)
    stream.send(3, raw_request(3), timeout_ms=60_000)
    (number, late), *_ = stream.answers(1).items()
    assert (number, CODE[late.failure.code]) == (2, "DEADLINE_EXCEEDED")
    until(lambda: queued() == 1)
    gate.touch()
    assert {red_of(answer) for answer in stream.answers(2).values()} == {1, 3}
    assert SEEN[2] == 0
    gate.unlink()
    stream.send(4, raw_request(4), timeout_ms=200)  # this one is in the network when its time is over
    late = stream.answers(1)[4]
    assert (SEEN[4], CODE[late.failure.code]) == (1, "DEADLINE_EXCEEDED")
    assert late.failure.message == "the deadline of 0.2 s passed before there was an answer"


def test_a_request_that_is_cancelled_leaves_the_queue_and_has_no_answer(gated):
    stream, gate, queued = gated
    for number in (2, 3):
        stream.send(number, raw_request(number))
    until(lambda: queued() == 2)
    stream.send(2, cancel=True)
    stream.send(99, cancel=True)  # nobody knows it: nothing happens
    until(lambda: queued() == 1)
    gate.touch()
    assert {red_of(answer) for answer in stream.answers(2).values()} == {1, 3}
    stream.end()
    assert list(stream.rpc) == []
    assert SEEN[2] == 0


def test_an_id_may_be_used_again_once_its_request_was_cancelled(gated):
    stream, gate, queued = gated
    stream.send(1, cancel=True)  # it is in the network, past cancelling
    stream.send(1, raw_request(9))
    until(lambda: queued() == 1)
    gate.touch()
    assert red_of(stream.answers(1)[1]) == 9


def test_hanging_up_takes_everything_out_of_the_queue(gated, caplog):
    stream, _, queued = gated
    caplog.set_level(logging.INFO, "vision_service.access")
    for number in (2, 3):
        stream.send(number, raw_request(number))
    until(lambda: queued() == 2)
    stream.rpc.cancel()
    until(lambda: queued() == 0)
    until(lambda: [record.status for record in caplog.records if hasattr(record, "method")].count("CANCELLED") >= 3)


def test_answers_that_are_done_together_share_a_message_up_to_a_size(tmp_path, monkeypatch):
    gate = tmp_path / "gate"
    gate.touch()
    more = f'options = {{gate = "{gate}"}}\nbatching = {{max_batch_size = 8}}'
    with (
        run_server(settings(tmp_path, {"slow": more})) as running,
        streaming(running.port) as stream,
        streaming(running.port) as other,
    ):
        for most_bytes, messages in ((streams._MESSAGE_BYTES, [8]), (1, [1] * 8)):
            monkeypatch.setattr(streams, "_MESSAGE_BYTES", most_bytes)
            gate.unlink()
            SEEN.clear()
            other.send(0, raw_request(0))  # while it is computed the others become a batch
            until(lambda: SEEN[0])
            for number in range(1, 9):
                stream.send(number, raw_request(number))
            until(lambda: running.pipeline.catalog.find("slow").info(is_default=True).queued_jobs == 8)
            BATCHES.clear()
            stream.messages.clear()
            gate.touch()
            assert {number: red_of(answer) for number, answer in stream.answers(8).items()} == {
                number: number for number in range(1, 9)
            }
            assert list(other.answers(1)) == [0]
            assert BATCHES == [8]
            assert stream.messages == messages


def test_requests_of_one_message_are_each_answered_by_itself(server):
    with streaming(server.port) as stream:
        good = [pb.PredictItem(id=red, classify=raw_request(red)) for red in range(40)]
        wrong = [pb.PredictItem(id=100), pb.PredictItem(id=101, classify=raw_request(1, top_k=0))]
        stream.send_together(*good[:20], *wrong, *good[20:])
        stream.send_together()  # nothing is asked, and nothing answered
        answers = stream.answers(42)
        stream.end()
        assert list(stream.rpc) == []
    assert {number: red_of(answers[number]) for number in range(40)} == {number: number for number in range(40)}
    assert {CODE[answers[number].failure.code] for number in (100, 101)} == {"INVALID_ARGUMENT"}


def test_a_cancellation_in_the_message_of_its_request(gated):
    stream, gate, queued = gated
    items = [pb.PredictItem(id=number, classify=raw_request(number)) for number in (2, 3)]
    stream.send_together(*items, pb.PredictItem(id=2, cancel=True))
    until(lambda: queued() == 1)
    gate.touch()
    assert {red_of(answer) for answer in stream.answers(2).values()} == {1, 3}
    assert SEEN[2] == 0


def test_bounds_hold_within_a_message_too(gated, monkeypatch):
    """Requests beyond the bound are begun once others are answered: these two are not refused for a full queue."""
    monkeypatch.setattr(streams, "MAX_UNANSWERED", 3)
    stream, gate, queued = gated
    stream.send_together(*(pb.PredictItem(id=number, classify=raw_request(number)) for number in range(2, 6)))
    until(lambda: queued() == 2)
    time.sleep(0.2)  # in which the others would be refused, were they begun
    gate.touch()
    assert {number: red_of(answer) for number, answer in stream.answers(5).items()} == {
        number: number for number in range(1, 6)
    }


def test_others_have_a_turn_while_a_message_is_begun(server):
    """So its first answers are written before the last of its requests is begun: all would fit into one message."""
    with streaming(server.port) as stream:
        stream.send_together(*(pb.PredictItem(id=number) for number in range(1000)))
        assert len(stream.answers(1000)) == 1000
    assert len(stream.messages) > 1


def test_a_large_message_of_small_requests_is_answered_whole_and_so_is_a_call_beside_it(server):
    """Twenty thousand requests, all wrong, in one message: many times what may be unanswered."""
    many = [pb.PredictItem(id=number) for number in range(20_000)]
    with streaming(server.port) as stream, grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub = pb_grpc.VisionServiceStub(channel)
        stub.Classify(raw_request(1), timeout=10)
        stream.send_together(*many)
        answers = stream.answers(1)  # they have begun
        assert stub.Classify(raw_request(2), timeout=10).classes[0].class_id == 2
        answers |= stream.answers(20_000 - len(answers))
        assert {CODE[answer.failure.code] for answer in answers.values()} == {"INVALID_ARGUMENT"}


@pytest.mark.parametrize(
    ("limit", "value", "at_least"), [("MAX_UNWRITTEN_BYTES", 1_000_000, 2), ("MAX_UNANSWERED", 4, 4)]
)
def test_a_stream_whose_caller_reads_no_answers_is_not_read_further(
    tmp_path, monkeypatch, caplog, limit, value, at_least
):
    """Its answers, half a megabyte each, are kept up to a bound. When they are read, all come.

    The bound in bytes is one for what is done, so all of the first 20 may be read before any is.
    """
    monkeypatch.setattr(streams, limit, value)
    caplog.set_level(logging.INFO, "vision_service.access")
    table = 'task = "translate"\nbackend = "tiny_translate"\npreprocess.resize = {mode = "native", pad_multiple = 1}\n'
    (tmp_path / "manifest.toml").write_text(f'[[model]]\nname = "mirror"\ndevice = "cpu"\n{table}')
    image = red_image(7, 400, 420)
    raw = pb.RawImage(height=400, width=420, channels=3, data=image.tobytes())
    request = pb.TranslateRequest(image=pb.Image(raw=raw), image_encoding=pb.IMAGE_ENCODING_RAW)

    def done():
        return sum(getattr(record, "status", "") == "OK" for record in caplog.records)

    fields = {"host": "127.0.0.1", "port": 0, "manifests": (tmp_path / "manifest.toml",), "models": ("mirror",)}
    window = (("grpc.http2.bdp_probe", 0),)  # else the client's grows while nobody reads
    with run_server(ServerSettings.read(**fields)) as running, streaming(running.port, window) as stream:
        for number in range(20):
            stream.send(number, translate=request)
        until(lambda: done() >= at_least)
        so_far = 0
        while done() > so_far:  # while the first ones are at work, more may be read
            so_far = done()
            time.sleep(0.5)
        for number in range(20, 60):
            stream.send(number, translate=request)
        time.sleep(1.0)  # many times what the other forty take when they are read
        assert done() < 30
        answers = stream.answers(60)
        assert all(answer.translate.image.raw.data == image.tobytes() for answer in answers.values())


def test_images_that_did_not_fit_into_memory_have_a_line_each(tmp_path, caplog):
    caplog.set_level(logging.INFO, "vision_service.access")
    with run_server(settings(tmp_path, {"tiny": "options = {oom_red = 13}"})) as running:
        with streaming(running.port) as stream:
            for number in range(30):
                stream.send(number, raw_request(13))
            answers = stream.answers(30)
            assert {CODE[answer.failure.code] for answer in answers.values()} == {"RESOURCE_EXHAUSTED"}
        wanted = {answer.request_id for answer in answers.values()}
        until(lambda: wanted <= {r.request_id for r in caplog.records if hasattr(r, "duration_ms")})


@pytest.mark.parametrize("streamed", [False, True])
def test_what_was_asked_for_is_freed_when_it_is_answered(server, streamed):
    """Without Python's collector, which comes late: the images of hundreds of requests would wait for it."""
    requests = [raw_request(1), raw_request(1, top_k=0), BAD["truncated JPEG"][0], raw_request(1)]
    kinds = codec.Call, call.Call, streams._Request, Job

    def kept():
        return sum(type(one) in kinds for one in gc.get_objects())

    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub = pb_grpc.VisionServiceStub(channel)
        gc.collect()
        gc.disable()
        try:
            if streamed:
                with streaming(server.port) as stream:
                    for number in range(40):
                        stream.send(number, requests[number % 4])
                    assert len(stream.answers(40)) == 40
            else:
                for number in range(40):
                    with suppress(grpc.RpcError):
                        stub.Classify(requests[number % 4])
            until(lambda: kept() <= 2, "requests are kept")  # a thread may have the last one in hand
        finally:
            gc.enable()


def test_each_request_has_a_line_in_the_log_and_so_has_the_stream(server, caplog):
    caplog.set_level(logging.INFO, "vision_service.access")
    with streaming(server.port, metadata=[("x-request-id", "stream-1")]) as stream:
        stream.send(1, raw_request(1))
        stream.send(2, raw_request(1, top_k=0))
        answers = stream.answers(2)
        stream.end()
        list(stream.rpc)
        assert dict(stream.rpc.trailing_metadata())["x-request-id"] == "stream-1"

    def lines():
        return {r.request_id: (r.method, r.status, r.duration_ms >= 0) for r in caplog.records if hasattr(r, "method")}

    until(lambda: {"stream-1", answers[1].request_id, answers[2].request_id} <= set(lines()))
    assert lines()[answers[1].request_id] == ("/vision.v1.VisionService/Classify", "OK", True)
    assert lines()[answers[2].request_id] == ("/vision.v1.VisionService/Classify", "INVALID_ARGUMENT", True)
    assert lines()["stream-1"] == ("/vision.v1.VisionService/Predict", "OK", True)


def test_sigterm_answers_what_was_read_and_then_ends_the_stream(serve, tmp_path):
    process, port, _ = serve("options = {sleep_s = 0.15}\nbatching = {max_batch_size = 4}")
    with streaming(port) as stream, streaming(port) as idle:
        idle.send(1, raw_request(1))
        assert red_of(idle.answers(1)[1]) == 1
        for number in range(32):
            stream.send(number, raw_request(number))
        answers = stream.answers(1)
        process.send_signal(signal.SIGTERM)
        with pytest.raises(grpc.RpcError) as idles:
            next(idle.rpc)  # from now on nothing is read
        stream.send(99, raw_request(99))
        answers |= stream.answers(32 - len(answers))
        with pytest.raises(grpc.RpcError) as caught:
            next(stream.rpc)
    for ended in (caught, idles):
        assert ended.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "the server is stopping; send what has no answer again" in ended.value.details()
    assert {number: red_of(answer) for number, answer in answers.items()} == {number: number for number in range(32)}
    assert process.wait(20) == 0
    assert "Traceback" not in (tmp_path / "log").read_text()
