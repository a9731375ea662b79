"""HTTP/2 as RFC 9113 has it: a real server on a real socket, and clients that behave, or do not.

Frames are built by hand and read by the package hyperframe; header fields are written and read by hpack, and whole
conversations are led by h2, all of which know nothing of ours. Sections are of RFC 9113 unless another is named.
"""

import asyncio
import contextlib
import gzip
import socket
import struct
import threading
import time
from contextlib import contextmanager

import grpc
import h2.config
import h2.connection
import h2.events
import hpack
import pytest
from hyperframe import frame as hf

from tests.helpers import until
from vision_service.http2 import connection as connection_module
from vision_service.http2 import gather
from vision_service.http2 import receiver as receiver_module
from vision_service.rpc import server as server_module
from vision_service.rpc.server import RpcServer

DATA, HEADERS, PRIORITY, RST, SETTINGS, PUSH, PING, GOAWAY, WINDOW, CONTINUATION = range(10)
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
END_STREAM, END_HEADERS, PADDED, PRIORITISED = 1, 4, 8, 0x20
FIELDS = [
    (":method", "POST"),
    (":scheme", "http"),
    (":path", "/t.T/Echo"),
    (":authority", "here"),
    ("te", "trailers"),
    ("content-type", "application/grpc"),
]
NO_ERROR, PROTOCOL, INTERNAL, FLOW, _, CLOSED, SIZE, REFUSED, CANCEL, COMPRESSION, _, CALM = range(12)

SEEN = []
LET_GO = threading.Event()


class AtOnce(grpc.RpcMethodHandler):
    """Answers by the header fields; ours alone asks it to, and does not call what gRPC's own server would."""

    request_streaming = True
    response_streaming = False
    gather_s = 0.0

    def __init__(self, fails):
        self.fails = fails

    def answer_at_once(self, context):
        if self.gather_s:
            context.gather(self.gather_s)
        context.set_trailing_metadata((("x-tail", "once"),))
        context.set_code(8)
        context.set_details("no room")
        if self.fails:
            raise ZeroDivisionError("in between")


class Handlers(grpc.GenericRpcHandler):
    def service(self, details):
        async def echo(request, context):
            return request

        async def wait(request, context):
            SEEN.append("begun")
            try:
                await asyncio.sleep(60)
            finally:
                SEEN.append("over")

        async def stubborn(request, context):
            """Does not hear that it is cancelled, until it is let go."""
            SEEN.append("begun")
            while not LET_GO.is_set():
                try:
                    await asyncio.sleep(0.02)
                except asyncio.CancelledError:
                    SEEN.append("cancelled")
            SEEN.append("over")
            return b"at last"

        async def big(request, context):
            return bytes(int(request))

        async def bad_tail(request, context):
            context.set_trailing_metadata((("x-tail", "größer"),))
            return request

        async def abort_by_number(request, context):
            await context.abort(5, "by its number")

        async def deaf(requests, context):
            await asyncio.sleep(60)

        async def reader(requests, context):
            found = [request async for request in requests]
            SEEN.append("read")
            return found[0]

        if details.method.endswith("Broken"):
            raise ZeroDivisionError
        if "AtOnce" in details.method:
            return AtOnce(details.method.endswith("Fails"))
        streaming = {"Deaf": deaf, "Reader": reader}.get(details.method.rpartition("/")[2])
        if streaming is not None:
            return grpc.stream_unary_rpc_method_handler(streaming)
        methods = {"Echo": echo, "Wait": wait, "Stubborn": stubborn, "Big": big, "BadTail": bad_tail}
        methods["AbortByNumber"] = abort_by_number
        method = methods.get(details.method.rpartition("/")[2])
        return None if method is None else grpc.unary_unary_rpc_method_handler(method)


@contextmanager
def running():
    """A server, its port and its event loop."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def start():
        server = RpcServer(40_000_000)
        server.add_generic_rpc_handlers((Handlers(),))
        bound = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        return server, bound

    server, bound = asyncio.run_coroutine_threadsafe(start(), loop).result(20)
    try:
        yield server, bound, loop
    finally:
        LET_GO.set()
        asyncio.run_coroutine_threadsafe(server.stop(None), loop).result(20)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


def on(loop, ask):
    """What a question is answered on a server's event loop, where nothing moves meanwhile."""

    async def asked():
        return ask()

    return asyncio.run_coroutine_threadsafe(asked(), loop).result(20)


@pytest.fixture(scope="module")
def served():
    with running() as found:
        yield found


@pytest.fixture(scope="module")
def server(served):
    return served[0]


@pytest.fixture(scope="module")
def port(served):
    return served[1]


def f(kind, flags, stream, payload=b""):
    """A frame."""
    return struct.pack(">L", len(payload))[1:] + struct.pack(">BBL", kind, flags, stream) + payload


def setting(name, value):
    return struct.pack(">HL", name, value)


def u32(value):
    return struct.pack(">L", value)


def block(*more, fields=FIELDS, encoder=None):
    return (encoder or hpack.Encoder()).encode([*fields, *more], huffman=False)


def path(name):
    return [*FIELDS[:2], (":path", f"/t.T/{name}"), *FIELDS[3:]]


def message(body):
    return b"\x00" + u32(len(body)) + body


def call(stream, body=b"hello", fields=FIELDS):
    """A whole call."""
    return f(HEADERS, END_HEADERS, stream, block(fields=fields)) + f(DATA, END_STREAM, stream, message(body))


class Raw:
    """A client that sends what it is told."""

    def __init__(self, port, greet=True, receive_bytes=None):
        self.socket = socket.socket()
        if receive_bytes is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        self.socket.settimeout(20)
        self.socket.connect(("127.0.0.1", port))
        self.decoder = hpack.Decoder()
        self.bytes = b""
        self.closed = False
        if greet:
            self.send(PREFACE, f(SETTINGS, 0, 0))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    def send(self, *parts):
        self.socket.sendall(b"".join(parts))

    def frame(self):
        """The next frame; None when the server has hung up."""
        while len(self.bytes) < 9 or len(self.bytes) < 9 + int.from_bytes(self.bytes[:3]):
            try:
                more = self.socket.recv(65536)
            except ConnectionResetError:
                more = b""
            if not more:
                self.closed = True
                return None
            self.bytes += more
        found, length = hf.Frame.parse_frame_header(memoryview(self.bytes[:9]))
        found.parse_body(memoryview(self.bytes[9 : 9 + length]))
        self.bytes = self.bytes[9 + length :]
        return found

    def next(self, *kinds):
        """The next frame of one of these kinds; others are passed over."""
        while (found := self.frame()) is not None:
            if isinstance(found, kinds):
                return found
        return None

    def answer(self, stream):
        """Status, body and HTTP status of a stream, or ("reset", code)."""
        fields, body = {}, b""
        while True:
            found = self.next(hf.HeadersFrame, hf.DataFrame, hf.RstStreamFrame, hf.GoAwayFrame)
            assert found is not None, "the server hung up"
            if isinstance(found, hf.GoAwayFrame):
                pytest.fail(f"GOAWAY {found.error_code}: {found.additional_data}")
            if isinstance(found, hf.HeadersFrame):
                decoded = self.decoder.decode(found.data)
                fields |= dict(decoded) if found.stream_id == stream else {}
            elif found.stream_id == stream and isinstance(found, hf.RstStreamFrame):
                return ("reset", found.error_code)
            elif found.stream_id == stream:
                body += found.data
            if found.stream_id == stream and "END_STREAM" in found.flags:
                return fields.get("grpc-status"), body[5:], fields.get(":status")

    def hung_up(self):
        """The code of GOAWAY, and that the connection is closed after it."""
        found = self.next(hf.GoAwayFrame)
        assert found is not None, "no GOAWAY"
        assert self.next(hf.PushPromiseFrame) is None
        assert found.additional_data, "without a reason"
        return found.error_code


def test_a_call(port):
    with Raw(port) as client:
        client.send(call(1))
        assert client.answer(1) == ("0", b"hello", "200")


def test_the_server_speaks_first_and_acknowledges(port):
    """3.4: its settings come first; 6.5.3: each of the client's is acknowledged."""
    with Raw(port) as client:
        first = client.frame()
        assert isinstance(first, hf.SettingsFrame)
        assert "ACK" not in first.flags
        assert first.settings[hf.SettingsFrame.MAX_CONCURRENT_STREAMS] >= 100
        assert "ACK" in client.next(hf.SettingsFrame).flags
        client.send(f(SETTINGS, 0, 0, setting(0x77, 5)))  # unknown ones are ignored
        assert "ACK" in client.next(hf.SettingsFrame).flags
        client.send(f(PING, 0, 0, b"12345678"))
        pong = client.next(hf.PingFrame)
        assert (pong.opaque_data, "ACK" in pong.flags) == (b"12345678", True)


BROKEN = {
    "6.1 DATA on the connection": (f(DATA, 0, 0, b"x"), PROTOCOL),
    "5.1 DATA on an idle stream": (f(DATA, 0, 1, b"x"), PROTOCOL),
    "5.1 RST_STREAM on an idle stream": (f(RST, 0, 1, u32(8)), PROTOCOL),
    "5.1 WINDOW_UPDATE on an idle stream": (f(WINDOW, 0, 1, u32(1)), PROTOCOL),
    "5.1.1 an even number": (f(HEADERS, END_HEADERS, 2, block()), PROTOCOL),
    "6.2 HEADERS on the connection": (f(HEADERS, END_HEADERS, 0, block()), PROTOCOL),
    "6.2 padding longer than the frame": (f(HEADERS, END_HEADERS | PADDED, 1, b"\xff" + block()), PROTOCOL),
    "6.2 a priority that is cut off": (f(HEADERS, END_HEADERS | PRIORITISED, 1, b"\x00"), SIZE),
    "6.3 PRIORITY on the connection": (f(PRIORITY, 0, 0, bytes(5)), PROTOCOL),
    "6.3 PRIORITY of four bytes": (f(PRIORITY, 0, 1, bytes(4)), SIZE),
    "6.4 RST_STREAM on the connection": (f(RST, 0, 0, u32(8)), PROTOCOL),
    "6.4 RST_STREAM of three bytes": (f(HEADERS, END_HEADERS, 1, block()) + f(RST, 0, 1, bytes(3)), SIZE),
    "6.5 SETTINGS on a stream": (f(SETTINGS, 0, 1), PROTOCOL),
    "6.5 SETTINGS of five bytes": (f(SETTINGS, 0, 0, bytes(5)), SIZE),
    "6.5 an acknowledgement with settings": (f(SETTINGS, 1, 0, setting(1, 1)), SIZE),
    "6.5.2 ENABLE_PUSH of 2": (f(SETTINGS, 0, 0, setting(2, 2)), PROTOCOL),
    "6.5.2 INITIAL_WINDOW_SIZE of 2^31": (f(SETTINGS, 0, 0, setting(4, 2**31)), FLOW),
    "6.5.2 MAX_FRAME_SIZE of 2^14 - 1": (f(SETTINGS, 0, 0, setting(5, 2**14 - 1)), PROTOCOL),
    "6.5.2 MAX_FRAME_SIZE of 2^24": (f(SETTINGS, 0, 0, setting(5, 2**24)), PROTOCOL),
    "6.6 PUSH_PROMISE": (f(PUSH, END_HEADERS, 1, u32(2) + block()), PROTOCOL),
    "6.7 PING on a stream": (f(PING, 0, 1, bytes(8)), PROTOCOL),
    "6.7 PING of seven bytes": (f(PING, 0, 0, bytes(7)), SIZE),
    "6.8 GOAWAY on a stream": (f(GOAWAY, 0, 1, bytes(8)), PROTOCOL),
    "6.9 WINDOW_UPDATE of three bytes": (f(WINDOW, 0, 0, bytes(3)), SIZE),
    "6.9 WINDOW_UPDATE by 0": (f(WINDOW, 0, 0, u32(0)), PROTOCOL),
    "6.9.1 a window beyond 2^31 - 1": (f(WINDOW, 0, 0, u32(2**31 - 1)), FLOW),
    "6.9.2 a window beyond 2^31 - 1 by settings": (
        f(HEADERS, END_HEADERS, 1, block()) + f(WINDOW, 0, 1, u32(2**30)) + f(SETTINGS, 0, 0, setting(4, 2**31 - 1)),
        FLOW,
    ),
    "6.10 CONTINUATION of nothing": (f(CONTINUATION, END_HEADERS, 1, block()), PROTOCOL),
    "6.10 another frame within header fields": (f(HEADERS, 0, 1, block()[:5]) + f(PING, 0, 0, bytes(8)), PROTOCOL),
    "6.10 an unknown frame within header fields": (f(HEADERS, 0, 1, block()[:5]) + f(0x42, 0, 0), PROTOCOL),
    "6.10 CONTINUATION of another stream": (
        f(HEADERS, 0, 1, block()[:5]) + f(CONTINUATION, END_HEADERS, 3, block()[5:]),
        PROTOCOL,
    ),
    "4.2 a frame beyond what was announced": (f(0x42, 0, 0, bytes(256 * 1024 + 1)), SIZE),
    "4.2 DATA beyond what was announced": (f(DATA, 0, 1, bytes(256 * 1024 + 1)), SIZE),
    "4.3 header fields that cannot be decoded": (f(HEADERS, END_HEADERS, 1, b"\xff\xff\xff\xff\xff\x7f"), COMPRESSION),
    "4.3 header fields that are cut off": (f(HEADERS, END_HEADERS, 1, b"\x00\x05ab"), COMPRESSION),
    "4.3 a name that is cut off": (f(HEADERS, END_HEADERS, 1, b"\x00"), COMPRESSION),
    "RFC 7541, 4.2 a table larger than allowed": (f(HEADERS, END_HEADERS, 1, b"\x3f\xe2\x1f" + block()), COMPRESSION),
    "RFC 7541, 4.2 changes of the table's size, over and over": (
        f(HEADERS, END_HEADERS, 1, b"\x20" * 3 + block()),
        COMPRESSION,
    ),
    "10.5.1 one field, thousands of times": (f(HEADERS, END_HEADERS, 1, block() + b"\x83" * 10_000), CALM),
}


@pytest.mark.parametrize(("sent", "code"), BROKEN.values(), ids=BROKEN)
def test_a_broken_rule_ends_the_connection_and_no_other(port, sent, code):
    with Raw(port) as other, Raw(port) as client:
        client.send(sent)
        assert client.hung_up() == code
        other.send(call(1))
        assert other.answer(1) == ("0", b"hello", "200")


BODY = message(b"hello")
RESET = {
    "8.2.1 a name in upper case": (block(("X-Up", "a")), PROTOCOL),
    "8.2.1 a line break in a value": (block(("x", "a\nb")), PROTOCOL),
    "8.2.2 connection": (block(("connection", "close")), PROTOCOL),
    "8.2.2 te with more than trailers": (block(fields=[*FIELDS[:4], ("te", "gzip"), FIELDS[5]]), PROTOCOL),
    "8.3 an unknown pseudo-header": (block(fields=[(":x", "1"), *FIELDS]), PROTOCOL),
    "8.3 a response's pseudo-header": (block(fields=[(":status", "200"), *FIELDS]), PROTOCOL),
    "8.3 a pseudo-header after others": (block((":path", "/a")), PROTOCOL),
    "8.3.1 no path": (block(fields=FIELDS[:2] + FIELDS[3:]), PROTOCOL),
    "8.3.1 an empty path": (block(fields=[*FIELDS[:2], (":path", ""), *FIELDS[3:]]), PROTOCOL),
    "8.3.1 no scheme": (block(fields=FIELDS[:1] + FIELDS[2:]), PROTOCOL),
    "10.5.1 more fields than the server takes": (block(*[(f"x-{i}", "") for i in range(500)]), CALM),
    "8.3.1 two methods": (block(fields=[FIELDS[0], *FIELDS]), PROTOCOL),
}


@pytest.mark.parametrize(("fields", "code"), RESET.values(), ids=RESET)
def test_a_request_that_is_none_is_reset_and_the_connection_goes_on(port, fields, code):
    with Raw(port) as client:
        client.send(f(HEADERS, END_HEADERS | END_STREAM, 1, fields))
        assert client.answer(1) == ("reset", code)
        client.send(call(3))
        assert client.answer(3) == ("0", b"hello", "200")


OF_A_STREAM = {
    "5.1 DATA after the end": (f(DATA, 0, 1, b"x"), CLOSED),
    "5.1 HEADERS after the end": (f(HEADERS, END_HEADERS | END_STREAM, 1, block()), CLOSED),
    "6.9 WINDOW_UPDATE by 0": (f(WINDOW, 0, 1, u32(0)), PROTOCOL),
    "6.9.1 a window beyond 2^31 - 1": (f(WINDOW, 0, 1, u32(2**31 - 1)), FLOW),
}


@pytest.mark.parametrize(("sent", "code"), OF_A_STREAM.values(), ids=OF_A_STREAM)
def test_a_rule_broken_on_a_stream_resets_it(port, sent, code):
    SEEN.clear()
    with Raw(port) as client:
        client.send(call(1, fields=path("Wait")))
        until(lambda: SEEN == ["begun"])
        client.send(sent)
        assert client.answer(1) == ("reset", code)
        until(lambda: SEEN == ["begun", "over"])  # its handler was stopped
        client.send(call(3))
        assert client.answer(3)[:2] == ("0", b"hello")


def test_a_second_block_of_fields_has_to_be_the_last(port):
    with Raw(port) as client:
        client.send(f(HEADERS, END_HEADERS, 1, block()), f(HEADERS, END_HEADERS, 1, block()))
        assert client.answer(1) == ("reset", PROTOCOL)
        trailers = hpack.Encoder().encode([("x-tail", "a")])
        client.send(
            f(HEADERS, END_HEADERS, 3, block()),
            f(DATA, 0, 3, BODY),
            f(HEADERS, END_HEADERS | END_STREAM, 3, trailers),
        )
        assert client.answer(3)[:2] == ("0", b"hello")


@pytest.mark.parametrize(
    ("fields", "status"),
    [([("GET",), *FIELDS[1:]], "405"), ([*FIELDS[:5], ("content-type", "text/html")], "415"), (FIELDS[:5], "415")],
)
def test_a_request_that_is_not_grpcs_is_told_by_http(port, fields, status):
    fields = [(":method", "GET") if field == ("GET",) else field for field in fields]
    with Raw(port) as client:
        client.send(f(HEADERS, END_HEADERS | END_STREAM, 1, block(fields=fields)))
        assert client.answer(1) == (None, b"", status)


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        (path("Nothing"), "12"),
        (path("Broken"), "13"),
        ([*FIELDS, ("grpc-timeout", "soon")], "13"),
        ([*FIELDS, ("grpc-encoding", "snappy")], "12"),
        ([*FIELDS, ("x-bin", "?")], "13"),
        ([*FIELDS, ("grpc-timeout", "0n")], "4"),
    ],
)
def test_calls_that_end_with_a_status_before_they_begin(port, fields, status):
    with Raw(port) as client:
        client.send(f(HEADERS, END_HEADERS, 1, block(fields=fields)))
        assert client.answer(1)[::2] == (status, "200")
        found = client.next(hf.RstStreamFrame)  # 8.1: the rest of the request is not wanted
        assert (found.stream_id, found.error_code) == (1, NO_ERROR)
        client.send(f(DATA, END_STREAM, 1, BODY))  # it was on its way
        client.send(call(3))
        assert client.answer(3)[:2] == ("0", b"hello")


@pytest.mark.parametrize("content", [b"", BODY[:3], BODY[:-1], BODY + BODY])
def test_a_unary_call_has_one_whole_message(port, content):
    with Raw(port) as client:
        client.send(f(HEADERS, END_HEADERS, 1, block()), f(DATA, END_STREAM, 1, content))
        assert client.answer(1)[0] == "13"


def test_a_request_without_content(port):
    with Raw(port) as client:
        client.send(f(HEADERS, END_HEADERS | END_STREAM, 1, block()))
        assert client.answer(1)[0] == "13"


def test_padding_priorities_and_pieces(port):
    """6.1, 6.2, 6.10: all that a request may be cut into."""
    fields = block()
    with Raw(port) as client:
        pieces = [fields[i : i + 10] for i in range(0, len(fields), 10)]
        head = b"\x03" + bytes(5) + pieces[0] + bytes(3)
        client.send(f(HEADERS, PADDED | PRIORITISED, 1, head))
        for piece in pieces[1:]:
            client.send(f(CONTINUATION, 0, 1, piece))
        client.send(f(CONTINUATION, END_HEADERS, 1))
        for byte in BODY:
            client.send(f(DATA, PADDED, 1, b"\x02" + bytes([byte]) + bytes(2)))
        client.send(f(PRIORITY, 0, 1, bytes(5)), f(0x42, 0xFF, 1, b"unknown"), f(DATA, END_STREAM, 1))
        assert client.answer(1) == ("0", b"hello", "200")


@pytest.mark.parametrize("padding", [b"", b"\x20"])
def test_large_frames_that_come_in_pieces(port, padding):
    """Each as large as was announced; between two of them the other stream's."""
    with Raw(port) as client:
        most = client.frame().settings[hf.SettingsFrame.MAX_FRAME_SIZE]
        size = most - len(padding) - (padding[0] if padding else 0)
        body = bytes(range(256)) * (3 * size // 256)
        content, flags = message(body), PADDED if padding else 0
        frames = []
        for at in range(0, len(content), size):
            piece = padding + content[at : at + size] + bytes(padding[0] if padding else 0)
            frames.append(f(DATA, flags | (END_STREAM if at + size >= len(content) else 0), 1, piece))
        client.send(f(HEADERS, END_HEADERS, 1, block()))
        for number, each in enumerate(frames):
            other = 3 + 2 * number
            for at in range(0, len(each), 100_000):
                client.send(each[at : at + 100_000])
                time.sleep(0.01)
            client.send(call(other))
            answered = client.answer(other) if number < len(frames) - 1 else None
            assert answered in (None, ("0", b"hello", "200"))
    with Raw(port, greet=False) as client:
        values = setting(4, 2**31 - 1)
        client.send(PREFACE, f(SETTINGS, 0, 0, values), f(WINDOW, 0, 0, u32(2**30)))
        client.send(f(HEADERS, END_HEADERS, 1, block()), *frames)
        assert client.answer(1) == ("0", body, "200")


def test_bytes_that_come_one_by_one(port):
    with Raw(port, greet=False) as client:
        client.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in PREFACE + f(SETTINGS, 0, 0) + call(1):
            client.send(bytes([byte]))
        assert client.answer(1) == ("0", b"hello", "200")


def test_header_fields_that_mean_something_else_next_time(port):
    """Blocks are remembered; the same bytes refer to other entries once the dynamic table has others."""
    encoder = hpack.Encoder()
    with Raw(port) as client:
        number = 1
        for name in ("Echo", "Nothing", "Echo", "Nothing", "Big", "Echo"):
            for _ in range(3):  # the second and third time all of it is indexed
                client.send(f(HEADERS, END_HEADERS, number, block(fields=path(name), encoder=encoder)))
                client.send(f(DATA, END_STREAM, number, message(b"3")))
                wanted = {"Echo": ("0", b"3"), "Big": ("0", bytes(3)), "Nothing": ("12", b"")}[name]
                assert client.answer(number)[:2] == wanted
                number += 2


def test_a_block_that_was_remembered_is_forgotten_when_its_entry_is_replaced(port):
    """One entry in a table that has room for one: the block 0xbe means the path that was added last."""
    others = [field for field in FIELDS if field[0] != ":path"]
    rest = b"".join(b"\x00" + bytes([len(n)]) + n.encode() + bytes([len(v)]) + v.encode() for n, v in others[3:])
    first = b"\x83\x86"  # :method POST, :scheme http
    with Raw(port) as client:
        number = 1
        for name in ("/t.T/Echo", "/t.T/None", "/t.T/Echo", "/t.T/None"):
            size = b"\x3f" + bytes([len(":path") + len(name) + 32 - 31]) if number == 1 else b""
            added = b"\x44" + bytes([len(name)]) + name.encode()
            for path_ in (added, b"\xbe", b"\xbe"):
                client.send(f(HEADERS, END_HEADERS, number, (size if path_ is added else b"") + first + path_ + rest))
                client.send(f(DATA, END_STREAM, number, BODY))
                assert client.answer(number)[0] == ("0" if name.endswith("Echo") else "12")
                number += 2


def test_a_client_without_a_dynamic_table(port):
    """RFC 7541, 4.2: it is told that the table has no entries, once, before the first field."""
    with Raw(port, greet=False) as client:
        client.send(PREFACE, f(SETTINGS, 0, 0, setting(1, 0)), call(1), call(3))
        first, second = (client.next(hf.HeadersFrame) for _ in range(2))
        assert first.data[0] == 0x20
        assert second.data[0] != 0x20


def test_flow_control_of_the_answer(port):
    """6.9: not a byte more than the windows allow, whichever of the two is smaller."""
    with Raw(port, greet=False) as client:
        client.send(PREFACE, f(SETTINGS, 0, 0, setting(4, 10)), call(1, b"100000", path("Big")))
        got = b""

        def more(size):
            nonlocal got
            while len(got) < size:
                got += client.next(hf.DataFrame).data
            client.send(f(PING, 0, 0, bytes(8)))
            found = client.next(hf.DataFrame, hf.PingFrame)
            assert isinstance(found, hf.PingFrame), "more than the window"
            assert len(got) == size

        more(10)
        client.send(f(WINDOW, 0, 1, u32(90)))
        more(100)
        client.send(f(SETTINGS, 0, 0, setting(4, 0)))  # 6.9.2: the window is 90 + 0 - 100 = -10 now
        client.send(f(WINDOW, 0, 1, u32(15)))
        more(105)
        client.send(f(SETTINGS, 0, 0, setting(4, 1_000_000)))
        more(65_535)  # what the connection allows
        client.send(f(WINDOW, 0, 0, u32(1_000_000)))
        rest = client.answer(1)
        assert (rest[0], len(got) + len(rest[1]) + 5) == ("0", 100_005)


def test_frames_are_not_larger_than_the_client_takes(port):
    with Raw(port, greet=False) as client:
        values = setting(4, 2**31 - 1) + setting(5, 20_000)
        client.send(PREFACE, f(SETTINGS, 0, 0, values), f(WINDOW, 0, 0, u32(2**30)), call(1, b"100000", path("Big")))
        sizes = [len(client.next(hf.DataFrame).data) for _ in range(6)]
        assert sizes == [20_000] * 5 + [5]


def test_more_content_than_a_stream_was_granted(port):
    """6.9.1. Nothing is granted while nobody reads."""
    with Raw(port) as client:
        window = client.frame().settings[hf.SettingsFrame.INITIAL_WINDOW_SIZE]
        client.send(f(HEADERS, END_HEADERS, 1, block(fields=path("Deaf"))))
        client.send(*[f(DATA, 0, 1, message(bytes(1019))) for _ in range(window // 1024)])  # all of it
        client.send(f(PING, 0, 0, bytes(8)))
        assert isinstance(client.next(hf.PingFrame, hf.RstStreamFrame), hf.PingFrame)
        client.send(f(DATA, 0, 1, b"x"))
        assert client.answer(1) == ("reset", FLOW)
        client.send(call(3))
        assert client.answer(3)[0] == "0"


def test_content_that_nobody_wants_is_granted_to_the_connection(port):
    """Or streams that ended early would use up its window."""
    with Raw(port) as client:
        client.send(f(HEADERS, END_HEADERS, 1, block(fields=path("Nothing"))))
        client.send(*[f(DATA, 0, 1, bytes(16_384)) for _ in range(3000)])  # 48 MB on a stream that is over
        client.send(f(PING, 0, 0, bytes(8)))
        granted = 65_535
        while not isinstance(found := client.next(hf.PingFrame, hf.WindowUpdateFrame), hf.PingFrame):
            granted += found.window_increment if found.stream_id == 0 else 0
        assert granted >= 3000 * 16_384


def test_more_content_than_the_connection_was_granted(monkeypatch):
    """6.9.1. What is read in one go may use the window up; so few bytes come in one."""
    monkeypatch.setattr(receiver_module, "CONNECTION_WINDOW", 10)
    with running() as (_, port, _), Raw(port) as client:
        client.send(f(HEADERS, END_HEADERS, 1, block()), f(DATA, 0, 1, bytes(11)))
        assert client.hung_up() == FLOW


def test_a_window_by_settings_and_pings_of_content_holds_nobody_up(port):
    """Each changes every stream's window, and a byte of content between them shows that something is wanted."""
    with Raw(port) as client, Raw(port) as other:
        numbers = range(1, 4001, 2)
        client.send(*[f(HEADERS, END_HEADERS, number, block()) for number in numbers])
        client.send(f(PING, 0, 0, bytes(8)))
        client.next(hf.PingFrame)
        pairs = [f(SETTINGS, 0, 0, setting(4, 70_000 + i % 2)) + f(DATA, 0, 1, b"\x00") for i in range(900)]
        started_s = time.monotonic()
        client.send(*pairs)
        other.send(call(1))
        assert other.answer(1)[0] == "0"
        client.send(f(RST, 0, 1, u32(CANCEL)), call(4001))
        assert client.answer(4001)[0] == "0"
        assert time.monotonic() - started_s < 10  # 900 times 2,000 streams were a minute on a slow machine


def test_a_larger_window_by_settings_lets_all_streams_go_on(port):
    """200 answers wait for it; several turns of the event loop."""
    with Raw(port, greet=False) as client:
        client.send(PREFACE, f(SETTINGS, 0, 0, setting(4, 0)))
        numbers = range(1, 401, 2)
        client.send(*[call(number, b"100", path("Big")) for number in numbers], f(PING, 0, 0, bytes(8)))
        while not isinstance(found := client.next(hf.PingFrame, hf.DataFrame), hf.PingFrame):
            pytest.fail(f"{found} without a window")
        client.send(f(SETTINGS, 0, 0, setting(4, 1000)))
        ended = set()
        while len(ended) < len(numbers):
            found = client.next(hf.HeadersFrame)
            if "END_STREAM" in found.flags:
                ended.add(found.stream_id)
        assert ended == set(numbers)


def test_whoever_takes_no_answers_in_begins_no_more_streams(port, monkeypatch):
    monkeypatch.setattr(receiver_module, "MAX_UNSENT_BYTES", 1_000_000)
    with Raw(port, greet=False) as client:
        client.send(PREFACE, f(SETTINGS, 0, 0, setting(4, 0)), call(1, b"900000", path("Big")))
        client.next(hf.HeadersFrame)
        client.send(call(3, b"200000", path("Big")))
        client.next(hf.HeadersFrame)
        client.send(call(5))
        assert client.answer(5) == ("reset", REFUSED)
        client.send(f(RST, 0, 1, u32(CANCEL)), f(WINDOW, 0, 3, u32(10)), call(7), f(SETTINGS, 0, 0, setting(4, 100)))
        assert client.answer(7)[0] == "0"


def test_tens_of_thousands_of_frames_in_one_read_hold_nobody_up(port):
    """They are all taken in, in turns."""
    content = message(bytes(60_000))
    with Raw(port) as client, Raw(port) as other:
        client.send(f(HEADERS, END_HEADERS, 1, block()))
        client.send(b"".join(f(DATA, 0, 1, bytes([byte])) for byte in content), f(DATA, END_STREAM, 1))
        other.send(call(1))
        assert other.answer(1)[0] == "0"
        assert client.answer(1)[:2] == ("0", bytes(60_000))


@pytest.mark.parametrize("compressed", [gzip.compress(bytes(40_000_001)), b"no gzip"])
def test_what_cannot_be_inflated_ends_its_call_when_it_is_read(port, compressed):
    """And no other; that it is not inflated before is seen from a handler that does not read."""
    SEEN.clear()
    content = b"\x01" + u32(len(compressed)) + compressed
    gzipped = ("grpc-encoding", "gzip")
    with Raw(port) as client:
        client.send(f(HEADERS, END_HEADERS, 1, block(gzipped, fields=path("Deaf"))), f(DATA, END_STREAM, 1, content))
        client.send(call(3))
        assert client.answer(3)[0] == "0"
        for number, name in ((5, "Echo"), (7, "Reader")):
            client.send(f(HEADERS, END_HEADERS, number, block(gzipped, fields=path(name))))
            client.send(f(DATA, END_STREAM, number, content))
            assert client.answer(number)[0] == ("8" if len(compressed) > 10 else "13")
        assert "read" not in SEEN
        client.send(f(HEADERS, END_HEADERS, 9, block(gzipped, fields=path("Reader"))))
        good = gzip.compress(b"hello")
        client.send(f(DATA, END_STREAM, 9, b"\x01" + u32(len(good)) + good))
        assert client.answer(9)[:2] == ("0", b"hello")


def test_a_large_request_is_granted_what_it_needs(port):
    """With h2 as the client, which keeps to the windows that it is given."""
    client = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
    client.initiate_connection()
    wanted, got, sent = message(bytes(range(256)) * 15_000), b"", 0
    with socket.create_connection(("127.0.0.1", port), timeout=20) as wire:
        stream = client.get_next_available_stream_id()
        client.send_headers(stream, FIELDS)
        over = False
        while not over:
            while sent < len(wanted) and (room := client.local_flow_control_window(stream)):
                size = min(room, 16_384, len(wanted) - sent)
                client.send_data(stream, wanted[sent : sent + size], end_stream=sent + size == len(wanted))
                sent += size
            wire.sendall(client.data_to_send())
            for event in client.receive_data(wire.recv(65536)):
                assert not isinstance(event, h2.events.ConnectionTerminated | h2.events.StreamReset)
                if isinstance(event, h2.events.DataReceived):
                    got += event.data
                    client.acknowledge_received_data(event.flow_controlled_length, stream)
                over |= isinstance(event, h2.events.StreamEnded)
        assert got == wanted


def test_answers_are_sent_at_once(served):
    """Not when the one before is acknowledged, for which a client may take its time. And quiet clients are asked."""
    server, port, loop = served
    with Raw(port) as client:
        client.send(call(1))
        client.answer(1)

        def options():
            (endpoint,) = (each.socket for each in server._connections if each.peer.endswith(f":{own}"))
            wanted = ((socket.IPPROTO_TCP, socket.TCP_NODELAY), (socket.SOL_SOCKET, socket.SO_KEEPALIVE))
            return [endpoint.getsockopt(*each) for each in wanted]

        own = client.socket.getsockname()[1]
        assert on(loop, options) == [1, 1]


def test_a_reset_stops_the_handler(port):
    SEEN.clear()
    with Raw(port) as client:
        client.send(call(1, fields=path("Wait")))
        until(lambda: SEEN == ["begun"])
        client.send(f(RST, 0, 1, u32(CANCEL)))
        until(lambda: SEEN == ["begun", "over"])
        client.send(f(DATA, 0, 1, b"late"), f(WINDOW, 0, 1, u32(5)), f(RST, 0, 1, u32(CANCEL)), call(3))
        assert client.answer(3)[0] == "0"


def test_resets_do_not_make_room_for_more_work(port, monkeypatch):
    """CVE-2023-44487, CVE-2025-8671: a stream counts until its handler has ended, however the stream was."""
    monkeypatch.setattr(receiver_module, "MAX_STREAMS", 3)
    SEEN.clear()
    LET_GO.clear()
    with Raw(port) as client:
        client.send(*[call(number, fields=path("Stubborn")) for number in (1, 3, 5)])
        until(lambda: SEEN.count("begun") == 3)
        client.send(f(RST, 0, 1, u32(CANCEL)), f(WINDOW, 0, 3, u32(0)))  # once by the client, once by its fault
        assert client.answer(3) == ("reset", PROTOCOL)
        until(lambda: SEEN.count("cancelled") == 2)
        client.send(call(7))
        assert client.answer(7) == ("reset", REFUSED)
        LET_GO.set()
        until(lambda: SEEN.count("over") == 3)
        client.send(call(9))
        assert client.answer(9)[0] == "0"


def test_calls_that_end_before_their_handler_begins_leave_nothing_behind(server, port, monkeypatch):
    """Begun and over within one turn of the server's event loop."""
    monkeypatch.setattr(receiver_module, "MAX_STREAMS", 4)
    SEEN.clear()
    with Raw(port) as client:
        for number in range(1, 41, 2):
            client.send(call(number, fields=path("Wait")) + f(RST, 0, number, u32(CANCEL)))
        client.send(f(PING, 0, 0, bytes(8)))
        client.next(hf.PingFrame)
        until(lambda: not server._calls)
        for number in range(41, 81, 2):
            client.send(call(number, fields=[*path("Wait"), ("grpc-timeout", "1n")]))
            answer = client.answer(number)
            assert (number, answer[0]) == (number, "4"), answer
        client.send(call(81))
        assert client.answer(81)[0] == "0"
        client.send(*[call(number, fields=path("Wait")) for number in (83, 85)])
    until(lambda: not server._calls)  # nor do those whose caller has gone
    assert SEEN.count("begun") == SEEN.count("over")


@pytest.mark.parametrize("late", [f(RST, 0, 3, u32(CANCEL)), f(WINDOW, 0, 3, u32(5)), f(DATA, END_STREAM, 3, BODY)])
def test_a_call_that_comes_after_goaway_harms_no_other(late):
    """6.8: it was on its way. Its client, which reads GOAWAY by and by, makes it elsewhere."""
    LET_GO.clear()
    with running() as (server, port, loop), Raw(port) as client:
        client.send(call(1, fields=path("Stubborn")))
        until(lambda: server._calls)
        stopping = asyncio.run_coroutine_threadsafe(server.stop(20), loop)
        assert client.next(hf.GoAwayFrame).last_stream_id == 1
        client.send(f(HEADERS, END_HEADERS, 3, block()), late)
        LET_GO.set()
        assert client.answer(1)[0] == "0"
        stopping.result(20)


def test_a_client_that_has_not_spoken_yet_hears_no_goaway():
    """3.4: the server's settings come first, whatever it has to say."""
    with running() as (server, port, loop), Raw(port, greet=False) as client:
        until(lambda: server._connections)
        stopping = asyncio.run_coroutine_threadsafe(server.stop(20), loop)
        assert client.frame() is None
        client.socket.close()
        stopping.result(20)


def test_what_is_said_last_is_heard(port):
    """However much the client still has to say: a socket closed with bytes unread may lose what it was to send."""
    with Raw(port) as client:
        client.send(f(DATA, 0, 1, b"x"), *[f(DATA, 0, 1, bytes(16_384)) for _ in range(60)])
        assert client.hung_up() == PROTOCOL


@pytest.mark.parametrize(
    ("taken_in", "size", "pings"),
    [
        pytest.param(2**16, 2_000_000, 1, id="in the server's system"),
        pytest.param(2**18, 100_000, 18, id="in the client's system"),
    ],
)
def test_the_last_answer_of_a_server_that_stops_reaches_a_client_that_is_slow_to_read(taken_in, size, pings):
    """Wherever it lies, and for longer than the server lingers otherwise, while the client talks."""
    with running() as (server, port, loop), Raw(port, greet=False, receive_bytes=taken_in) as client:
        window = f(SETTINGS, 0, 0, setting(4, 2**31 - 1)) + f(WINDOW, 0, 0, u32(2**30))
        client.send(PREFACE, window, call(1, str(size).encode(), path("Big")))
        client.next(hf.HeadersFrame)
        stopping = asyncio.run_coroutine_threadsafe(server.stop(20), loop)
        got = 0
        while (found := client.next(hf.DataFrame)) is not None:
            got += len(found.data)
            for _ in range(pings):  # 123 or 126 in all
                client.send(f(PING, 0, 0, bytes(8)))  # fails where the server has hung up
                time.sleep(0.02)
        assert got == size + 5
        client.socket.close()
        stopping.result(20)


def stop_soon(server, loop):
    """As an application does that has nothing more to answer: the first grace period was long, the last one is not."""
    asyncio.run_coroutine_threadsafe(server.stop(20), loop)
    return asyncio.run_coroutine_threadsafe(server.stop(0.1), loop)


def test_a_client_that_goes_on_taking_in_its_answer_has_the_whole_first_grace_period():
    with running() as (server, port, loop), Raw(port, greet=False) as client:
        client.send(PREFACE, f(SETTINGS, 0, 0, setting(4, 10)), call(1, b"100", path("Big")))
        got = len(client.next(hf.DataFrame).data)
        stopping = stop_soon(server, loop)
        while got < 105:
            time.sleep(0.2)  # 2 s in all, of which a server that is in a hurry waits for 0.6
            client.send(f(WINDOW, 0, 1, u32(10)))
            got += len(client.next(hf.DataFrame).data)
        assert client.next(hf.HeadersFrame) is not None
        stopping.result(20)


@pytest.mark.parametrize(("stalled_s", "grace_s"), [(0.3, 20), (20, 1.0)], ids=["stalled", "out of time"])
def test_a_client_that_takes_nothing_in_is_not_waited_for_and_named(monkeypatch, caplog, stalled_s, grace_s):
    monkeypatch.setattr(server_module, "_STALLED_S", stalled_s)
    with running() as (server, port, loop), Raw(port, greet=False) as client:
        client.send(PREFACE, f(SETTINGS, 0, 0, setting(4, 10)), call(1, b"100", path("Big")))
        client.next(hf.DataFrame)
        began_s = time.monotonic()
        asyncio.run_coroutine_threadsafe(server.stop(grace_s), loop)
        asyncio.run_coroutine_threadsafe(server.stop(0.1), loop).result(20)
        assert time.monotonic() - began_s < 10  # of 20
    assert "had not taken in 95 bytes of its answers when the server stopped" in caplog.text


def until_hung_up_on(client, stopping):
    """Seconds for which a client can go on talking to a server that stops."""
    began_s = time.monotonic()
    while not stopping.done():
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # in the end it is hung up on
            client.send(f(PING, 0, 0, bytes(8)))
        time.sleep(0.01)
    return time.monotonic() - began_s


def test_a_client_that_never_stops_talking_holds_up_the_end_for_so_long_and_no_longer(monkeypatch):
    monkeypatch.setattr(connection_module, "_LINGER_S", 0.5)
    monkeypatch.setattr(connection_module, "_MOST_LINGER_S", 2.0)
    with running() as (server, port, loop), Raw(port) as client:
        client.send(call(1))
        assert client.answer(1)[0] == "0"
        stopping = asyncio.run_coroutine_threadsafe(server.stop(20), loop)
        assert 1.0 <= until_hung_up_on(client, stopping) < 10  # it talked, so it was not hung up on after 0.5 s


@pytest.mark.parametrize("unsent", [False, True], ids=["idle", "with an answer that waits for its window"])
def test_nobody_is_patient_with_a_client_that_breaks_the_rules_and_goes_on_talking(monkeypatch, unsent):
    monkeypatch.setattr(connection_module, "_LINGER_S", 0.2)
    with running() as (server, port, loop), Raw(port) as client:
        if unsent:
            client.send(call(1, b"100000", path("Big")))
            client.next(hf.DataFrame)
        client.send(f(HEADERS, END_HEADERS, 2, block()))  # an even number is not a client's
        assert client.next(hf.GoAwayFrame).error_code
        stopping = asyncio.run_coroutine_threadsafe(server.stop(20), loop)
        assert until_hung_up_on(client, stopping) < 10  # of the 20 and 30 that others may have


def test_streams_that_are_reset_wait_for_no_window(served):
    server, port, loop = served
    with Raw(port, greet=False) as client:
        client.send(PREFACE, f(SETTINGS, 0, 0, setting(4, 2**30)), call(1, b"65530", path("Big")))
        assert client.answer(1)[0] == "0"  # and the connection's window is empty
        for number in range(3, 103, 2):
            client.send(call(number, b"10", path("Big")))
            assert client.next(hf.HeadersFrame).stream_id == number
            client.send(f(RST, 0, number, u32(CANCEL)))
        client.send(f(PING, 0, 0, bytes(8)))
        client.next(hf.PingFrame)
        assert not on(
            loop, lambda: [each for each in server._connections if each.sender._waiting or each.sender.unsent]
        )
        client.send(f(WINDOW, 0, 0, u32(1000)), call(103))
        assert client.answer(103)[0] == "0"


def test_a_large_answer_to_a_client_that_is_slow_to_read(port):
    """It is not taken for one that never reads, however large the frames that it takes."""
    with Raw(port, greet=False) as client:
        values = setting(4, 2**31 - 1) + setting(5, 2**24 - 1)
        client.send(PREFACE, f(SETTINGS, 0, 0, values), f(WINDOW, 0, 0, u32(2**30)), call(1, b"30000000", path("Big")))
        time.sleep(0.5)
        status, body, _ = client.answer(1)
        assert (status, len(body)) == ("0", 30_000_000)


def test_an_answer_that_nobody_takes_in_is_dropped_at_the_deadline(served):
    server, port, loop = served
    with Raw(port, greet=False) as client:
        client.send(PREFACE, f(SETTINGS, 0, 0, setting(4, 0)))
        client.send(call(1, b"1000", [*path("Big"), ("grpc-timeout", "1S")]))
        assert client.answer(1) == ("reset", CANCEL)
        assert not on(loop, lambda: [one for one in server._connections if one._receiver.streams or one.sender.unsent])


def test_metadata_that_cannot_be_sent_and_a_status_by_its_number(port):
    with Raw(port) as client:
        client.send(call(1, fields=path("BadTail")), call(3, fields=path("AbortByNumber")))
        assert client.answer(1)[0] == "13"
        assert client.answer(3)[0] == "5"
        client.send(call(5))
        assert client.answer(5)[0] == "0"


def test_thousands_of_calls_and_resets_leave_nothing_behind(port, monkeypatch):
    """The count of streams at work comes back to none, whichever way they end."""
    monkeypatch.setattr(receiver_module, "MAX_STREAMS", 8)
    with Raw(port) as client:
        number = 1
        for _ in range(100):
            client.send(call(number), f(HEADERS, END_HEADERS, number + 2, block()), f(RST, 0, number + 2, u32(CANCEL)))
            client.send(call(number + 4, fields=path("Nothing")), call(number + 6, b"x", path("Big")))
            client.send(f(HEADERS, END_HEADERS, number + 8, block()), f(DATA, END_STREAM, number + 8, b""))
            assert client.answer(number + 8)[0] == "13"
            number += 10
        client.send(call(number))
        assert client.answer(number)[0] == "0"


def test_answers_at_once_leave_nothing_behind(served, monkeypatch):
    server, port, loop = served
    monkeypatch.setattr(receiver_module, "MAX_STREAMS", 4)
    with Raw(port) as client:
        for number in range(1, 81, 4):  # with the message on its way, and without one
            late = ("grpc-timeout", "1H")
            client.send(f(HEADERS, END_HEADERS, number, block(late, fields=path("AtOnce"))))
            assert client.answer(number) == ("8", b"", "200")
            client.send(f(DATA, END_STREAM, number, message(bytes(1000))))
            client.send(f(HEADERS, END_HEADERS | END_STREAM, number + 2, block(fields=path("AtOnce"))))
            assert client.answer(number + 2) == ("8", b"", "200")
        assert on(loop, lambda: len(server._calls)) == 0
        client.send(call(81))
        assert client.answer(81)[0] == "0"


def at_once(stream):
    return f(HEADERS, END_HEADERS | END_STREAM, stream, block(fields=path("AtOnce")))


@pytest.fixture
def gathering(monkeypatch):
    """How long connections gather, once they were asked to twice."""
    if not gather.can_gather():
        pytest.skip("this system's sockets do not gather")
    monkeypatch.setattr(gather, "OFTEN_S", 60.0)
    return lambda seconds: monkeypatch.setattr(AtOnce, "gather_s", seconds)


def ask_twice(client):
    """Two calls one after the other, each of which asks its connection to gather."""
    for number in (1, 3):
        client.send(at_once(number))
        assert client.answer(number) == ("8", b"", "200")


def test_a_connection_that_gathers_answers_together_and_others_at_once(port, gathering):
    gathering(2.0)
    with Raw(port) as client, Raw(port) as other:
        since_s = time.monotonic()
        ask_twice(client)
        client.send(call(5), at_once(7))
        other.send(at_once(1), call(3))
        assert other.answer(3)[:2] == ("0", b"hello")
        other_s = time.monotonic() - since_s
        assert client.answer(7)[0] == "8"
        assert time.monotonic() - since_s >= 1.9
        assert other_s < 1.9


def test_large_requests_are_taken_in_while_others_are_gathered(port, gathering):
    """Nobody is held up in sending."""
    gathering(60.0)
    with Raw(port) as client:
        ask_twice(client)
        client.send(call(5), f(HEADERS, END_HEADERS, 7, block()))
        for _ in range(3):
            client.send(f(DATA, 0, 7, bytes(gather.GATHER_BYTES // 2)))
        assert client.answer(5)[:2] == ("0", b"hello")


def test_a_connection_does_not_gather_for_a_call_now_and_then(port, gathering, monkeypatch):
    gathering(60.0)
    monkeypatch.setattr(gather, "OFTEN_S", 0.05)
    with Raw(port) as client:
        for number in (1, 3, 5):
            client.send(at_once(number))
            assert client.answer(number) == ("8", b"", "200")
            time.sleep(0.1)
        client.send(call(7))
        assert client.answer(7)[:2] == ("0", b"hello")


@pytest.mark.parametrize("first", ["waits", "gathers"])
def test_a_connection_does_not_gather_while_windows_are_waited_for(port, gathering, first):
    gathering(60.0)
    with Raw(port, greet=False) as client:
        client.send(PREFACE, f(SETTINGS, 0, 0, setting(4, 10)))
        large = call(1, b"100", path("Big"))
        if first == "waits":
            client.send(large)
            got = len(client.next(hf.DataFrame).data)
            client.send(at_once(3), at_once(5))
        else:  # in one read, so that it has begun to gather when the answer is sent
            client.send(large, at_once(3), at_once(5))
            got = len(client.next(hf.DataFrame).data)
        while got < 105:
            client.send(f(WINDOW, 0, 1, u32(10)))
            got += len(client.next(hf.DataFrame).data)


def test_an_answer_at_once_that_fails(port, caplog):
    with Raw(port) as client:
        client.send(call(1, fields=path("AtOnceFails")), call(3))
        assert client.answer(1)[0] == "2"
        assert client.answer(3)[0] == "0"
    assert "the handler of a call failed" in caplog.text


IDLE = {
    "PING": f(PING, 0, 0, bytes(8)),
    "SETTINGS": f(SETTINGS, 0, 0),
    "PRIORITY": f(PRIORITY, 0, 1, bytes(5)),
    "unknown": f(0x42, 0, 0),
    "empty DATA": f(DATA, 0, 1),
    "empty CONTINUATION": f(CONTINUATION, 0, 1),
}


@pytest.mark.parametrize("name", IDLE)
def test_frames_that_ask_for_nothing_are_not_taken_for_ever(port, name):
    """CVE-2019-9512, 9515, 9518, CVE-2024-27316."""
    before = f(HEADERS, 0 if name == "empty CONTINUATION" else END_HEADERS, 1, block())
    with Raw(port) as client:
        client.send(before, IDLE[name] * 900)
        if name != "empty CONTINUATION":
            client.send(call(3))  # whoever asks for something as well goes on
            assert client.answer(3)[0] == "0"
        client.send(IDLE[name] * 1100)
        assert client.hung_up() == CALM


def test_a_client_that_asks_and_does_not_read_is_hung_up_on(port, monkeypatch):
    """CVE-2019-9512 and the like: what it would be answered is not kept without bound."""
    monkeypatch.setattr("vision_service.http2.sender._MOST_UNREAD", 200_000)
    monkeypatch.setattr(receiver_module, "_MOST_IDLE_FRAMES", 10**9)
    with Raw(port) as client:
        pings = f(PING, 0, 0, bytes(8)) * 1000
        with pytest.raises(ConnectionError):
            client.send(pings * 5_000)  # 85 MB, whose answers nobody reads
    with Raw(port) as client:
        client.send(call(1))
        assert client.answer(1)[0] == "0"


def test_whoever_does_not_speak_http2_is_told(port):
    with Raw(port, greet=False) as client:
        client.send(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n")
        text = b""
        while more := client.socket.recv(65536):
            text += more
        assert text.startswith(b"HTTP/1.1 400 ")  # and nothing before it
        assert b"gRPC" in text
    with Raw(port, greet=False) as client:
        client.send(b"\x16\x03\x01\x02\x00\x01\x00")  # a TLS client's first bytes
        assert client.socket.recv(65536) == b""


def test_whoever_is_turned_away_may_hang_up_first(served, monkeypatch):
    _, port, loop = served
    monkeypatch.setattr(connection_module, "_LINGER_S", 0.05)
    errors = []
    on(loop, lambda: loop.set_exception_handler(lambda _, context: errors.append(context)))
    try:
        with Raw(port, greet=False) as client:
            client.send(b"GET / HTTP/1.1\r\n\r\n")
            assert client.socket.recv(65536)
        time.sleep(0.2)
        with Raw(port) as client:
            client.send(call(1))
            assert client.answer(1)[0] == "0"
    finally:
        on(loop, lambda: loop.set_exception_handler(None))
    assert errors == []


def test_whoever_says_nothing_is_hung_up_on(port, monkeypatch):
    monkeypatch.setattr(connection_module, "_PREFACE_S", 0.2)
    with Raw(port, greet=False) as client:
        client.send(PREFACE[:10])
        while client.frame() is not None:
            pass
        assert client.closed
