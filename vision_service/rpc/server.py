"""The server: listens, finds handlers for calls, and stops."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Container, Iterable
from contextlib import suppress
from typing import Any

import grpc

from vision_service.http2.connection import Connection
from vision_service.http2.fields import Request
from vision_service.http2.reader import READ_BYTES
from vision_service.http2.stream import Exchange, Stream
from vision_service.rpc.call import Call, CallDetails

logger = logging.getLogger(__name__)

_BACKLOG = 512
"""Connections that may wait to be taken."""

_LAST_WORDS_S = 0.5
"""How long clients may take to hear that their calls were not waited for, and to hang up when they have all answers."""

_STALLED_S = 5.0
"""A client that takes in nothing of its answers for so long is not waited for when the server stops."""

_LOOK_S = 0.1
"""How often that is looked at."""

_IDLE_S, _PROBE_S, _PROBES = 60, 20, 3
"""After so many quiet seconds TCP asks whether a client is still there, so often and so many times."""


class RpcServer:
    """A gRPC server without TLS. Used on the event loop that is running when it is made.

    It has the methods of `grpc.aio.Server` that an application needs, and takes the same generic handlers. Those have
    to be coroutine functions, or asynchronous generators where responses are streamed. A handler may also have a method
    ``answer_at_once``, which is given the call when its header fields are there and sets a status other than OK, its
    message and trailing metadata; it does not wait, and nothing else of the handler is called.

    Args:
        max_message_bytes: largest message in either direction.
    """

    def __init__(self, max_message_bytes: int) -> None:
        self._max_bytes = max_message_bytes
        self._buffer = memoryview(bytearray(READ_BYTES))
        self._handlers: list[grpc.GenericRpcHandler] = []
        self._sockets: list[socket.socket] = []
        self._listening: list[asyncio.Server] = []
        self._connections: set[Connection] = set()
        self._calls: set[Call] = set()
        self._changed = asyncio.Event()  # a connection is gone, or the end of the grace period has moved
        self._stopped: asyncio.Future[None] | None = None
        self._stop_at_s = float("inf")
        self._answers_by_s = 0.0  # what is answered by the end has until then to be taken in

    def add_generic_rpc_handlers(self, handlers: Iterable[grpc.GenericRpcHandler]) -> None:
        """Take handlers; of several that know a method the first has it."""
        self._handlers.extend(handlers)

    def add_insecure_port(self, address: str) -> int:
        """Listen, once it is started.

        Args:
            address: ``host:port``; port 0 picks a free one. ``[::]`` means every address, of IPv4 as well.

        Returns:
            The port.

        Raises:
            RuntimeError: it cannot be listened on.
        """
        host, _, port = address.rpartition(":")
        host = host.removeprefix("[").removesuffix("]") or "::"
        problem = None
        try:
            bound = int(port)
            found = socket.getaddrinfo(host, bound, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        except (OSError, ValueError) as error:
            raise RuntimeError(f"{address}: {error}") from None
        listeners = []
        for family, _, _, _, where in dict.fromkeys(found):
            both = family == socket.AF_INET6 and host == "::" and socket.has_dualstack_ipv6()
            try:
                listener = socket.create_server((where[0], bound), family=family, backlog=_BACKLOG, dualstack_ipv6=both)
            except OSError as error:  # a name may stand for an address of IPv6 on a machine without
                problem = error
                continue
            listeners.append(listener)
            bound = listener.getsockname()[1]  # the same of every address that a name stands for
        if not listeners or (problem is not None and problem.errno == errno.EADDRINUSE):
            for listener in listeners:
                listener.close()
            raise RuntimeError(f"{address}: {problem}")
        self._sockets += listeners
        return bound

    async def start(self) -> None:
        """Take calls."""
        loop = asyncio.get_running_loop()
        for listener in self._sockets:
            server = await loop.create_server(self._connection, sock=listener, backlog=_BACKLOG)
            self._listening.append(server)

    async def stop(self, grace: float | None) -> None:
        """Take no further calls, and wait for those under way.

        Args:
            grace: for so long, seconds; then they are cancelled. ``None``: at once. When it is called again, the
                earlier end counts for calls, and for clients that still take in their answers the first one.
        """
        loop = asyncio.get_running_loop()
        end_s = loop.time() + (grace or 0.0)
        self._stop_at_s = min(self._stop_at_s, end_s)
        self._changed.set()
        if self._stopped is None:
            self._answers_by_s = end_s
            self._stopped = asyncio.ensure_future(self._stop())
        await asyncio.shield(self._stopped)

    async def _stop(self) -> None:
        for server in self._listening:
            server.close()
        for listener in self._sockets:
            listener.close()
        in_use = {connection for connection in self._connections if connection.in_use}
        for connection in list(self._connections):
            connection.drain()
        await self._connections_gone()
        for call in list(self._calls):
            call.stop()
        await self._answers_taken_in(in_use)
        for connection in list(self._connections):
            left = connection.undelivered()
            if left and connection in in_use:
                logger.warning(
                    "%s had not taken in %d bytes of its answers when the server stopped", connection.peer, left
                )
            connection.abort()

    async def _connections_gone(self) -> None:
        """Wait until every client has its answers, at most until the grace period ends."""
        loop = asyncio.get_running_loop()
        while self._connections and (left_s := self._stop_at_s - loop.time()) > 0:
            await self._change(left_s)

    async def _answers_taken_in(self, in_use: Container[Connection]) -> None:
        """Wait for clients that go on taking in what they were answered, at most until the first grace period ends.

        Args:
            in_use: connections with answers; on others nothing is waited for that was only told.
        """
        loop = asyncio.get_running_loop()
        now_s = loop.time()
        until_s = max(self._answers_by_s, now_s + _LAST_WORDS_S)
        seen: dict[Connection, tuple[int, float]] = {}  # how much there was to take in, and since when that is so
        while now_s < until_s:
            for connection in self._connections:
                left = connection.undelivered()
                if connection not in seen or left < seen[connection][0]:
                    seen[connection] = left, now_s
            if not any(
                now_s - since_s < (_STALLED_S if left and each in in_use else _LAST_WORDS_S)
                for each, (left, since_s) in seen.items()
                if each in self._connections
            ):
                return
            await self._change(_LOOK_S)
            now_s = loop.time()

    async def _change(self, most_s: float) -> None:
        """Wait until a connection is gone or the end has moved."""
        self._changed.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(most_s):
                await self._changed.wait()

    def _connection(self) -> Connection:
        return Connection(self._buffer, self._begin, self._opened, self._closed)

    def _opened(self, connection: Connection) -> None:
        self._connections.add(connection)
        with suppress(OSError):  # it may be gone already
            _set_up(connection.socket)
        if self._stopped is not None:
            connection.drain()

    def _closed(self, connection: Connection) -> None:
        self._connections.discard(connection)
        self._changed.set()

    def _begin(self, stream: Stream, request: Request) -> Exchange:
        call = Call(stream, stream.peer, self._max_bytes, self._call_over)
        self._calls.add(call)
        call.start(request, self._find)
        return call

    def _call_over(self, call: Call) -> None:
        self._calls.discard(call)

    def _find(self, details: CallDetails) -> grpc.RpcMethodHandler | None:
        for handlers in self._handlers:
            handler = handlers.service(details)
            if handler is not None:
                return handler
        return None


def _set_up(endpoint: Any) -> None:
    """Have TCP send at once, and find out about clients that vanish without a word, whose calls go on for nobody."""
    # asyncio does this itself where it made the listening socket; on another one an answer may wait 40 ms for the
    # acknowledgement of the one before.
    endpoint.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    endpoint.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_KEEPIDLE"):
        endpoint.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _IDLE_S)
        endpoint.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _PROBE_S)
        endpoint.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _PROBES)
