"""Header fields: of requests, read by the package `hpack` and checked; of responses, written without compression."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hpack import Decoder, HPACKError, OversizedHeaderListError

from vision_service.http2.frames import ConnectionFault, ErrorCode

MAX_FIELDS_BYTES = 16_384
"""Largest header list, as RFC 9113, 6.5.2 counts it: 32 bytes for each field beside its name and value. gRPC's own
servers take as much."""

MAX_BLOCK_BYTES = 4 * MAX_FIELDS_BYTES
"""So much is decoded all the same, for the sake of the requests that follow; a client that sends more is hung up on."""

_REMEMBERED, _REMEMBERED_BYTES = 64, 1024
"""So many header blocks of at most so many bytes are not decoded again while a client sends them over and over."""

_MOST_UPDATES = 2
"""No header block needs more changes of the table's size at its beginning (RFC 7541, 4.2)."""

_PSEUDO = (b":method", b":scheme", b":path", b":authority")
_OF_A_CONNECTION = {b"connection", b"proxy-connection", b"keep-alive", b"transfer-encoding", b"upgrade"}
_NAME = re.compile(rb"[!#$%&'*+\-.^_`|~0-9a-z]+")
_FORBIDDEN_IN_VALUE = re.compile(rb"[\x00\r\n]")


class Malformed(ValueError):
    """The fields are no request (RFC 9113, 8.1.1): the stream is to be reset, the connection goes on.

    Args:
        message: what is wrong.
        code: with which it is reset.
    """

    def __init__(self, message: str, code: ErrorCode = ErrorCode.PROTOCOL_ERROR) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class Request:
    """The header fields of a request.

    Attributes:
        method: such as ``POST``.
        path: with its query.
        fields: the others, but for what concerns HTTP/2 alone; in order.
    """

    method: str
    path: str
    fields: tuple[tuple[str, bytes], ...]


class FieldReader:
    """Decodes the header blocks of one connection, all of them, in order."""

    def __init__(self) -> None:
        self._decoder = Decoder(max_header_list_size=MAX_BLOCK_BYTES)
        self._known: dict[bytes, Request] = {}

    def read(self, block: bytes) -> Request:
        """The request that a header block begins.

        Raises:
            ConnectionFault: the block cannot be decoded; nor can those that follow.
            Malformed: it is no request, or too large a one.
        """
        known = self._known.get(block)
        if known is not None:  # it changes no state, or it would not be here
            return known
        size, length, newest = self._table()
        fields = self._decode(block)
        size_now, length_now, newest_now = self._table()
        unchanged = size == size_now and length == length_now and newest is newest_now
        if not unchanged or len(self._known) >= _REMEMBERED:
            self._known.clear()  # the same bytes may mean something else from now on
        request = _request(fields)
        if unchanged and len(block) <= _REMEMBERED_BYTES:
            self._known[block] = request
        return request

    def skip(self, block: bytes) -> None:
        """Decode a block that nobody wants, for the sake of those that follow. Raises ConnectionFault as `read`."""
        self._known.clear()
        self._decode(block)

    def _table(self) -> tuple[int, int, object]:
        """The size and length of the dynamic table, and its newest entry, an object of its own (RFC 7541, 2.3.2)."""
        table = self._decoder.header_table
        entries = table.dynamic_entries
        return table.maxsize, len(entries), entries[0] if entries else None

    def _decode(self, block: bytes) -> Sequence[tuple[bytes, bytes]]:
        if _updates(block) > _MOST_UPDATES:
            raise ConnectionFault(
                ErrorCode.COMPRESSION_ERROR, "a header block that changes the table's size over and over"
            )
        try:
            return [(bytes(name), bytes(value)) for name, value in self._decoder.decode(block, raw=True)]
        except OversizedHeaderListError:
            message = f"more than {MAX_BLOCK_BYTES} bytes of header fields"
            raise ConnectionFault(ErrorCode.ENHANCE_YOUR_CALM, message) from None
        except (HPACKError, IndexError, ValueError) as error:  # the last two: a block that is cut off
            raise ConnectionFault(ErrorCode.COMPRESSION_ERROR, f"the header block cannot be decoded: {error}") from None


def _updates(block: bytes) -> int:
    """How many changes of the table's size a block begins with (RFC 7541, 6.3), counted up to one too many."""
    at = found = 0
    while at < len(block) and block[at] & 0xE0 == 0x20 and found <= _MOST_UPDATES:
        found += 1
        more = block[at] & 0x1F == 0x1F
        at += 1
        while more and at < len(block):
            more = block[at] & 0x80 != 0
            at += 1
    return found


def _request(fields: Sequence[tuple[bytes, bytes]]) -> Request:
    """Fields as a request, checked as RFC 9113, 8.2 and 8.3 say; but space around values is dropped, as gRPC does."""
    size = sum(len(name) + len(value) + 32 for name, value in fields)
    if size > MAX_FIELDS_BYTES:
        raise Malformed(f"{size} bytes of header fields; at most {MAX_FIELDS_BYTES}", ErrorCode.ENHANCE_YOUR_CALM)
    pseudo: dict[bytes, bytes] = {}
    others: list[tuple[str, bytes]] = []
    for name, value in fields:
        if _FORBIDDEN_IN_VALUE.search(value):
            raise Malformed(f"the value of {name!r} has bytes that are not allowed")
        if name.startswith(b":"):
            if others or name in pseudo or name not in _PSEUDO:
                raise Malformed(f"{name!r} is unknown, there twice or after other fields")
            pseudo[name] = value
            continue
        if not _NAME.fullmatch(name):
            raise Malformed(f"{name!r} is no name of a field in lower case")
        if name in _OF_A_CONNECTION or (name == b"te" and value != b"trailers"):
            raise Malformed(f"{name!r} is of HTTP/1")
        others.append((name.decode("ascii"), value.strip(b" \t")))
    missing = [name for name in _PSEUDO[:3] if not pseudo.get(name)]
    if missing:
        raise Malformed(f"{missing[0]!r} is missing")
    try:
        method, path = pseudo[b":method"].decode("ascii"), pseudo[b":path"].decode("ascii")
    except UnicodeDecodeError:
        raise Malformed("the method or the path is not ASCII") from None
    return Request(method, path, tuple(others))


def write_fields(fields: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Header fields as they are, never indexed and without Huffman's code (RFC 7541, 6.2.2): no state, little work."""
    parts: list[bytes] = []
    for name, value in fields:
        name_length, length = len(name), len(value)
        parts += (
            b"\x00",
            _SHORT[name_length] if name_length < _IN_A_BYTE else _length(name_length),
            name,
            _SHORT[length] if length < _IN_A_BYTE else _length(length),
            value,
        )
    return b"".join(parts)


_IN_A_BYTE = 127
_SHORT = [bytes((length,)) for length in range(_IN_A_BYTE)]


def _length(length: int) -> bytes:
    """A length in front of a string (RFC 7541, 5.1, with a prefix of 7 bits) that does not fit into a byte."""
    rest, written = length - 127, bytearray((127,))
    while rest >= 128:
        written.append(rest & 127 | 128)
        rest >>= 7
    written.append(rest)
    return bytes(written)


STATUS_200 = b"\x88"
"""``:status: 200``, from the static table (RFC 7541, appendix A)."""


def write_status(status: int) -> bytes:
    """A response's ``:status``: the name from the static table, the value as it is."""
    return STATUS_200 if status == 200 else b"\x08\x03%d" % status
