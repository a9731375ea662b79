"""Messages in the content of a request or response.

Length-Prefixed-Message in https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable

import grpc

_PREFIX = struct.Struct(">BL")  # whether it is compressed, and how long it is

_FEW = 4096
"""Pieces of fewer bytes are put together at once: an object for each byte would take forty."""

_WBITS = {"gzip": 31, "deflate": 15}
"""How zlib is told of the compressions that gRPC knows."""

ACCEPTED = "identity,deflate,gzip"
"""What a client may compress with."""


class StatusError(Exception):
    """A call is to end with a status.

    Args:
        code: the status.
        message: what was wrong.
    """

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code


def framed(message: bytes) -> bytes:
    """A serialised message as it is sent, not compressed."""
    return _PREFIX.pack(0, len(message)) + message


class MessageReader:
    """Takes messages out of a request's content.

    Args:
        encoding: what the request says that its messages are compressed with.
        max_bytes: largest message, before and after it is decompressed.
        arrived: called with each message as it came, and whether it is compressed: see `inflated`.

    Raises:
        StatusError: nobody here knows that compression.
    """

    __slots__ = ("_arrived", "_compressed", "_encoding", "_left", "_max_bytes", "_parts", "_prefix")

    def __init__(self, encoding: str, max_bytes: int, arrived: Callable[[bytes, bool], None]) -> None:
        if encoding != "identity" and encoding not in _WBITS:
            message = f"grpc-encoding: {encoding[:40]!r} is not known here; use one of {ACCEPTED}"
            raise StatusError(grpc.StatusCode.UNIMPLEMENTED, message)
        self._encoding = encoding
        self._max_bytes = max_bytes
        self._arrived = arrived
        self._prefix = b""
        self._compressed = False
        self._left = -1  # of the message that is coming; -1 before its prefix is there
        self._parts: list[bytes | bytearray] = []

    @property
    def between(self) -> bool:
        """Whether no message is there in part."""
        return self._left < 0 and not self._prefix

    def take(self, data: memoryview) -> None:
        """Take in a piece of the content, however it is cut.

        Raises:
            StatusError: a message is too large, or cannot be decompressed.
        """
        while data:
            if self._left < 0:
                data = self._take_prefix(data)
                continue
            part, data = data[: self._left], data[self._left :]
            self._left -= len(part)
            if len(part) >= _FEW:
                self._parts.append(bytes(part))
            elif self._parts and isinstance(self._parts[-1], bytearray):
                self._parts[-1] += part
            elif part:
                self._parts.append(bytearray(part))
            if self._left == 0:
                message, self._left, self._parts = b"".join(self._parts), -1, []
                self._arrived(message, self._compressed)

    def _take_prefix(self, data: memoryview) -> memoryview:
        """Read a message's prefix as far as it is there; gives what comes after it."""
        missing = _PREFIX.size - len(self._prefix)
        self._prefix += bytes(data[:missing])
        if len(self._prefix) < _PREFIX.size:
            return data[missing:]
        compressed, length = _PREFIX.unpack(self._prefix)
        self._prefix = b""
        if length > self._max_bytes:
            self._refuse(length)
        if compressed > 1 or (compressed and self._encoding == "identity"):
            message = f"a message has the flag {compressed}, but the request names no grpc-encoding for it"
            raise StatusError(grpc.StatusCode.INTERNAL, message)
        self._compressed, self._left = bool(compressed), length
        if length == 0:
            self._left = -1
            self._arrived(b"", False)
        return data[missing:]

    def inflated(self, message: bytes) -> bytes:
        """A compressed message as it was before. To be called when it is wanted: it may be much larger.

        Raises:
            StatusError: it is too large, or not compressed that way.
        """
        inflater = zlib.decompressobj(_WBITS[self._encoding])
        try:
            inflated = inflater.decompress(message, self._max_bytes + 1)
        except zlib.error as error:
            reason = f"a message cannot be decompressed as {self._encoding}: {error}"
            raise StatusError(grpc.StatusCode.INTERNAL, reason) from None
        if len(inflated) > self._max_bytes:
            self._refuse(len(inflated))
        if not inflater.eof:
            raise StatusError(grpc.StatusCode.INTERNAL, f"a message is cut off within its {self._encoding}")
        return inflated

    def _refuse(self, length: int) -> None:
        message = f"Received message larger than max ({length} vs. {self._max_bytes}); see max_message_bytes"
        raise StatusError(grpc.StatusCode.RESOURCE_EXHAUSTED, message)
