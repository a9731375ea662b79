"""The load generator's connection to a peer: HTTP/1.1, one keep-alive connection for each call in flight.

As cheap as its counterpart for gRPC (`vision_service.bench.http2`): requests are written before the clock starts, and
of a reply no more is read than its status and where it ends.
"""

from __future__ import annotations

import select
import socket

from vision_service.bench.http2 import INTERNAL, OK, UNAVAILABLE, Reply

BOUNDARY = "--------vision-service-bench"


class HttpConnection:
    """Many keep-alive connections to one path; see `vision_service.bench.load.Wire`.

    Args:
        address: ``host:port``.
        path: of the POST, then the kind of body after a ``#``: ``raw`` or ``form`` (a form with a file).
    """

    def __init__(self, address: str, path: str) -> None:
        host, _, port = address.rpartition(":")
        self._address = (host, int(port))
        self._path, _, self._kind = path.partition("#")
        self._poll = select.epoll()
        self._idle: list[socket.socket] = []
        self._busy: dict[int, tuple[socket.socket, int, bytearray]] = {}
        self._begun = 0

    def prepare(self, message: bytes) -> bytes:
        """A whole request."""
        kind = "application/octet-stream"
        if self._kind == "form":
            kind = f"multipart/form-data; boundary={BOUNDARY}"
            head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="a.jpg"\r\n'
            message = f"{head}Content-Type: image/jpeg\r\n\r\n".encode() + message + f"\r\n--{BOUNDARY}--\r\n".encode()
        head = f"POST {self._path} HTTP/1.1\r\nHost: {self._address[0]}:{self._address[1]}\r\n"
        return f"{head}Content-Type: {kind}\r\nContent-Length: {len(message)}\r\n\r\n".encode() + message

    def start(self, prepared: bytes) -> int:
        """Send a request on a free connection, or on a new one."""
        connection = self._idle.pop() if self._idle else self._connect()
        connection.sendall(prepared)
        self._begun += 1
        self._busy[connection.fileno()] = (connection, self._begun, bytearray())
        return self._begun

    def flush(self) -> None:
        """Nothing: `start` has sent it."""

    def replies(self, timeout_s: float) -> list[Reply]:
        """Calls that ended; waits for the first one."""
        done = []
        for number, _ in self._poll.poll(max(0.0, timeout_s)):
            if number not in self._busy:
                continue
            connection, call, buffer = self._busy[number]
            arrived = connection.recv(1 << 16)
            buffer += arrived
            reply = Reply(call, UNAVAILABLE, b"") if not arrived else _parsed(call, buffer)
            if reply is not None:
                del self._busy[number]
                if arrived:
                    self._idle.append(connection)
                else:
                    self._poll.unregister(number)
                    connection.close()
                done.append(reply)
        return done

    def close(self) -> None:
        """Hang up."""
        for connection in [*self._idle, *(one for one, _, _ in self._busy.values())]:
            connection.close()
        self._poll.close()

    def _connect(self) -> socket.socket:
        connection = socket.create_connection(self._address, timeout=60)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._poll.register(connection, select.EPOLLIN)
        return connection


def _parsed(call: int, buffer: bytearray) -> Reply | None:
    """The reply in a buffer; ``None`` when it is not whole."""
    head, found, body = buffer.partition(b"\r\n\r\n")
    if not found:
        return None
    fields = head.lower()
    if b"transfer-encoding: chunked" in fields:
        if not body.endswith(b"0\r\n\r\n"):
            return None
    else:
        length = int(fields.partition(b"content-length:")[2].split(None, 1)[0])
        if len(body) < length:
            return None
    status = int(head.split(None, 2)[1])
    return Reply(call, OK if status == 200 else 8 if status in (429, 503) else INTERNAL, bytes(body))
