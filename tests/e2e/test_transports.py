"""gRPC's own server and ours, one beside the other: what a real gRPC client sees has to be the same."""

import asyncio
import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import grpc
import pytest

from tests.helpers import until
from vision_service.rpc.server import RpcServer

MOST = 1_000_000
"""Largest message of both servers."""

FIXED = (("grpc.http2.bdp_probe", 0), ("grpc.max_receive_message_length", -1))

SEEN = []
"""What handlers have to tell, as (transport, event)."""


class Handlers(grpc.GenericRpcHandler):
    """Methods that do one thing each, without a schema: messages are bytes."""

    def __init__(self, transport):
        self.transport = transport

    def service(self, details):
        name = details.method.rpartition("/")[2]
        kind, method = METHODS.get(name, (None, None))
        # gRPC's server looks at what kind of function it is, and sees through `partial`.
        return None if kind is None else KINDS[kind](partial(method, self.transport))


async def echo(transport, request, context):
    context.set_trailing_metadata((("x-tail", "a"), ("tail-bin", b"\x00\xff")))
    return request


async def first_metadata(transport, request, context):
    await context.send_initial_metadata((("x-head", "b"), ("head-bin", b"\x01\xfe")))
    return request


async def fail(transport, request, context):
    await context.abort(grpc.StatusCode.INVALID_ARGUMENT, request.decode(), (("x-why", "because"),))


async def crash(transport, request, context):
    raise ValueError("something broke")


async def cancel_itself(transport, request, context):
    raise asyncio.CancelledError


async def with_code(transport, request, context):
    context.set_code(grpc.StatusCode.NOT_FOUND)
    context.set_details("nowhere")
    return b"not seen"


async def metadata(transport, request, context):
    found = [(key, value) for key, value in context.invocation_metadata() if key.startswith("x-")]
    return repr(sorted(found)).encode()


async def big(transport, request, context):
    return bytes(int(request))


async def slow(transport, request, context):
    SEEN.append((transport, "begun"))
    context.add_done_callback(lambda _: SEEN.append((transport, "over")))
    try:
        await asyncio.sleep(30)
    except asyncio.CancelledError:
        SEEN.append((transport, "cancelled"))
        raise
    return b"late"


async def half_a_second(transport, request, context):
    SEEN.append((transport, "begun"))
    await asyncio.sleep(0.5)
    return b"done"


async def remaining(transport, request, context):
    left_s = context.time_remaining()
    return b"none" if left_s is None else b"%d" % round(left_s)


async def who(transport, request, context):
    return context.peer().encode()


async def count(transport, request, context):
    for number in range(int(request)):
        await context.write(b"%d" % number)


async def yielding(transport, request, context):
    for number in range(int(request)):
        yield b"%d" % number


async def total(transport, requests, context):
    return b"%d" % sum([int(request) async for request in requests])


async def first_only(transport, requests, context):
    return await context.read()


async def chat(transport, requests, context):
    while (message := await context.read()) is not grpc.aio.EOF:
        await context.write(message)


async def flood(transport, request, context):
    for _ in range(200):
        await context.write(bytes(100_000))
        SEEN.append((transport, "written"))


KINDS = {
    "unary": grpc.unary_unary_rpc_method_handler,
    "answers": grpc.unary_stream_rpc_method_handler,
    "requests": grpc.stream_unary_rpc_method_handler,
    "both": grpc.stream_stream_rpc_method_handler,
}
METHODS = {
    "Echo": ("unary", echo),
    "FirstMetadata": ("unary", first_metadata),
    "Fail": ("unary", fail),
    "Crash": ("unary", crash),
    "CancelItself": ("unary", cancel_itself),
    "WithCode": ("unary", with_code),
    "Metadata": ("unary", metadata),
    "Big": ("unary", big),
    "Slow": ("unary", slow),
    "HalfASecond": ("unary", half_a_second),
    "Remaining": ("unary", remaining),
    "Who": ("unary", who),
    "Count": ("answers", count),
    "Yielding": ("answers", yielding),
    "Flood": ("answers", flood),
    "Total": ("requests", total),
    "FirstOnly": ("requests", first_only),
    "Chat": ("both", chat),
}


class Running:
    """A server on the thread of an event loop."""

    def __init__(self, transport, loop):
        self.transport = transport
        self.loop = loop
        self.server, self.port = self.wait(self._start())

    async def _start(self):
        if self.transport == "asyncio":
            server = RpcServer(MOST)
        else:
            options = [("grpc.max_receive_message_length", MOST), ("grpc.max_send_message_length", MOST)]
            server = grpc.aio.server(options=options)
        server.add_generic_rpc_handlers((Handlers(self.transport),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        return server, port

    def wait(self, coroutine, timeout_s=60):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(timeout_s)

    def stop(self, grace_s=None):
        return asyncio.run_coroutine_threadsafe(self.server.stop(grace_s), self.loop)

    def channel(self, **more):
        return grpc.insecure_channel(f"127.0.0.1:{self.port}", options=FIXED, **more)

    def saw(self, event):
        return SEEN.count((self.transport, event))


@pytest.fixture(scope="module")
def loop():
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    loop.close()


@pytest.fixture(scope="module")
def both(loop):
    """gRPC's server and ours."""
    pair = [Running(transport, loop) for transport in ("grpcio", "asyncio")]
    yield pair
    for running in pair:
        running.stop().result(20)


@pytest.fixture(params=["grpcio", "asyncio"])
def server(request, loop):
    """One server, to be stopped by the test."""
    SEEN.clear()
    running = Running(request.param, loop)
    yield running
    running.stop().result(20)


def outcome(method, request, channel, *, streamed=False, **more):
    """All that a caller sees of a unary call: reply, status, message, metadata."""
    begin = channel.stream_unary(f"/t.T/{method}") if streamed else channel.unary_unary(f"/t.T/{method}")
    call = begin.future(iter(request) if streamed else request, timeout=more.pop("timeout", 20), **more)
    reply = call.result() if call.exception() is None else None
    tail = [(key, value) for key, value in call.trailing_metadata() if not key.startswith("grpc-")]
    head = [(key, value) for key, value in call.initial_metadata() if key.endswith("-bin") or key.startswith("x-")]
    return call.code(), call.details(), reply, head, tail


def ask(running, *asked, **more):
    """The same on a channel of its own, which is closed: one that Python collects later may end others' calls."""
    with running.channel() as channel:
        return outcome(*asked, channel, **more)


def same(both, method, request, **more):
    """What both servers answer; they must agree."""
    seen = [ask(running, method, request, **more) for running in both]
    assert seen[0] == seen[1]
    return seen[1]


@pytest.mark.parametrize("size", [0, 1, 16_379, 16_384, 70_000, MOST])
def test_messages_of_any_size_and_trailing_metadata(both, size):
    message = bytes(i % 251 for i in range(size))
    code, _, reply, _, tail = same(both, "Echo", message)
    assert (code, reply) == (grpc.StatusCode.OK, message)
    assert tail == [("x-tail", "a"), ("tail-bin", b"\x00\xff")]


def test_metadata_before_the_answer(both):
    code, _, _, head, _ = same(both, "FirstMetadata", b"x")
    assert (code, head) == (grpc.StatusCode.OK, [("x-head", "b"), ("head-bin", b"\x01\xfe")])


@pytest.mark.parametrize(
    "message",
    ["plain", "50 % größer", "two\nlines\tand 日本", "", "%41", *("x" * length for length in (126, 127, 128, 4000))],
)
def test_the_message_of_a_status(both, message):
    code, details, reply, _, tail = same(both, "Fail", message.encode())
    assert (code, details, reply, tail) == (grpc.StatusCode.INVALID_ARGUMENT, message, None, [("x-why", "because")])


def test_a_handler_that_crashes(both):
    code, details, *_ = same(both, "Crash", b"x")
    assert code is grpc.StatusCode.UNKNOWN
    assert "something broke" in details


def test_a_status_that_was_set(both):
    assert same(both, "WithCode", b"x")[:3] == (grpc.StatusCode.NOT_FOUND, "nowhere", None)


def test_the_callers_metadata(both):
    sent = (("x-plain", "a, b"), ("x-some-bin", b"\x00\x01\xfe,"), ("x-plain", "again"), ("x-none-bin", b""))
    code, _, reply, *_ = same(both, "Metadata", b"x", metadata=sent)
    assert (code, reply) == (grpc.StatusCode.OK, repr(sorted(sent)).encode())


def test_a_method_that_is_not_there(both):
    assert [ask(running, "Nothing", b"x")[0] for running in both] == [grpc.StatusCode.UNIMPLEMENTED] * 2


def test_a_request_that_is_too_large(both):
    codes_and_texts = [ask(running, "Echo", bytes(MOST + 1))[:2] for running in both]
    for code, text in codes_and_texts:
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert f"larger than max ({MOST + 1} vs. {MOST})" in text


def test_a_reply_that_is_too_large(both):
    for running in both:
        code, text, *_ = ask(running, "Big", b"%d" % (MOST + 1))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "larger than max" in text


@pytest.mark.parametrize("compression", [grpc.Compression.Gzip, grpc.Compression.Deflate])
def test_compressed_requests(both, compression):
    code, _, reply, *_ = same(both, "Echo", b"a" * 300_000, compression=compression)
    assert (code, reply) == (grpc.StatusCode.OK, b"a" * 300_000)


@pytest.mark.parametrize("compression", [grpc.Compression.Gzip, grpc.Compression.Deflate])
def test_a_request_that_is_too_large_once_it_is_decompressed(both, compression):
    for running in both:
        code, text, *_ = ask(running, "Echo", b"0" * 100 * MOST, compression=compression)
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "larger than max" in text


def test_a_deadline_reaches_the_handler(both):
    assert [ask(running, "Remaining", b"", timeout=20)[2] for running in both] == [b"20", b"20"]
    assert [ask(running, "Remaining", b"", timeout=None)[2] for running in both] == [b"none", b"none"]


def test_who_calls(both):
    for running in both:
        kind, host, port = ask(running, "Who", b"")[2].decode().split(":")
        assert (kind, host) == ("ipv4", "127.0.0.1")
        assert port.isdigit()


@pytest.mark.parametrize("method", ["Count", "Yielding"])
def test_many_answers(both, method):
    for running in both:
        with running.channel() as channel:
            answers = list(channel.unary_stream(f"/t.T/{method}")(b"500", timeout=20))
        assert answers == [b"%d" % number for number in range(500)]


@pytest.mark.parametrize("numbers", [[], [7], range(1000)])
def test_many_requests(both, numbers):
    code, _, reply, *_ = same(both, "Total", [b"%d" % number for number in numbers], streamed=True)
    assert (code, reply) == (grpc.StatusCode.OK, b"%d" % sum(numbers))


def test_an_answer_before_the_requests_end(both):
    """The rest of the requests is not wanted, and never comes."""
    for running in both:
        release = threading.Event()

        def requests(release=release):
            yield b"first"
            release.wait(20)

        with running.channel() as channel:
            call = channel.stream_unary("/t.T/FirstOnly").future(requests(), timeout=20)
            assert call.result() == b"first"
        release.set()


def test_both_sides_at_once(both):
    sent = [bytes([i % 256]) * (i * 997 % 60_000) for i in range(200)]
    for running in both:
        with running.channel() as channel:
            assert list(channel.stream_stream("/t.T/Chat")(iter(sent), timeout=60)) == sent


def test_many_calls_at_once_on_one_connection(both):
    """None is lost, and none has another's answer."""
    for running in both:
        with running.channel() as channel:
            calls = [channel.unary_unary("/t.T/Echo").future(b"%d" % i * (i % 3000), timeout=60) for i in range(2000)]
            assert [call.result() for call in calls] == [b"%d" % i * (i % 3000) for i in range(2000)]


def test_a_caller_who_does_not_read_holds_up_the_handler_and_nobody_else(server):
    with server.channel() as channel:
        answers = channel.unary_stream("/t.T/Flood")(b"", timeout=60)
        first = next(answers)
        time.sleep(0.5)
        stuck = server.saw("written")
        assert stuck < 150  # the client's window and the sockets' buffers; all of it is 20 MB
        assert channel.unary_unary("/t.T/Echo")(b"x", timeout=20) == b"x"
        assert len(first) + sum(len(answer) for answer in answers) == 200 * 100_000
    assert server.saw("written") == 200


def test_a_deadline_that_passes_stops_the_handler(server):
    with server.channel() as channel:
        grpc.channel_ready_future(channel).result(20)
        code, *_ = outcome("Slow", b"", channel, timeout=1)
        assert code is grpc.StatusCode.DEADLINE_EXCEEDED
    until(lambda: server.saw("over"))
    assert server.saw("cancelled") == 1


@pytest.mark.parametrize("how", ["cancel", "close"])
def test_a_caller_who_goes_stops_the_handler(server, how):
    channel = server.channel()
    call = channel.unary_unary("/t.T/Slow").future(b"", timeout=60)
    until(lambda: server.saw("begun"))
    call.cancel() if how == "cancel" else channel.close()
    until(lambda: server.saw("cancelled"))
    channel.close()


def test_a_stop_waits_for_calls_and_takes_no_more(server):
    with server.channel() as channel:
        call = channel.unary_unary("/t.T/HalfASecond").future(b"", timeout=20)
        until(lambda: server.saw("begun"))
        stopping = server.stop(10)
        until(lambda: outcome("Echo", b"x", channel)[0] is grpc.StatusCode.UNAVAILABLE)
        assert call.result() == b"done"
    began_s = time.monotonic()
    stopping.result(20)
    assert time.monotonic() - began_s < 5  # not the whole grace period


def test_a_handler_that_is_cancelled_from_within_ends_its_call(loop):
    """With gRPC's own server such a call has no end."""
    server = Running("asyncio", loop)
    assert ask(server, "CancelItself", b"x")[0] is grpc.StatusCode.CANCELLED
    assert ask(server, "Echo", b"x")[0] is grpc.StatusCode.OK
    began_s = time.monotonic()
    server.stop(10).result(20)
    assert time.monotonic() - began_s < 5  # it does not count as under way


def test_a_stop_ends_calls_when_the_grace_period_is_over(server):
    with server.channel() as channel:
        call = channel.unary_unary("/t.T/Slow").future(b"", timeout=60)
        until(lambda: server.saw("begun"))
        long = server.stop(60)
        server.stop(0.2).result(20)
        long.result(20)  # the earlier end counts
        assert call.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
        assert server.saw("cancelled") == 1


def test_clients_on_many_threads(both):
    """Each with a connection of its own."""

    def ask(number):
        running = both[1]
        with running.channel() as channel:
            return [channel.unary_unary("/t.T/Echo")(b"%d-%d" % (number, i), timeout=60) for i in range(20)]

    with ThreadPoolExecutor(16) as threads:
        answers = list(threads.map(ask, range(32)))
    assert answers == [[b"%d-%d" % (number, i) for i in range(20)] for number in range(32)]


def test_a_taken_port_and_an_unknown_host_are_told(loop, both):
    async def listen(address):
        RpcServer(MOST).add_insecure_port(address)

    for address in (f"127.0.0.1:{both[1].port}", "no.such.host.invalid:0", "127.0.0.1:x"):
        with pytest.raises(RuntimeError, match=address.partition(":")[0]):
            asyncio.run_coroutine_threadsafe(listen(address), loop).result(20)


@pytest.mark.parametrize("family", ["127.0.0.1", "[::1]"])
def test_every_address_is_of_both_families(loop, family):
    async def listen():
        server = RpcServer(MOST)
        server.add_generic_rpc_handlers((Handlers("asyncio"),))
        port = server.add_insecure_port("[::]:0")
        await server.start()
        return server, port

    try:
        server, port = asyncio.run_coroutine_threadsafe(listen(), loop).result(20)
    except RuntimeError as error:
        pytest.skip(f"this machine has no IPv6: {error}")
    with contextlib.closing(grpc.insecure_channel(f"{family}:{port}", options=FIXED)) as channel:
        assert outcome("Who", b"", channel)[2].startswith(b"ipv")
    asyncio.run_coroutine_threadsafe(server.stop(None), loop).result(20)
