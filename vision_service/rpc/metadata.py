"""What travels in header fields: metadata, deadlines and statuses.

Requests and Responses in https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable
from urllib.parse import quote_from_bytes

import grpc

from vision_service.http2.fields import write_fields

Metadata = tuple[tuple[str, str | bytes], ...]

CONTENT_TYPE = "application/grpc"

_RESERVED = {"te", "content-type", "grpc-timeout", "grpc-encoding", "grpc-accept-encoding", "grpc-message-type"}

_TIMEOUT = re.compile(r"(\d{1,8})([HMSmun])")
_UNITS_S = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}

_PLAIN = "".join(chr(code) for code in range(0x20, 0x7F) if chr(code) != "%")
"""What `grpc-message` has as it is; the other bytes of its UTF-8 are percent-encoded."""


def timeout_s(value: str) -> float:
    """Seconds in a ``grpc-timeout``.

    Raises:
        ValueError: it is none.
    """
    found = _TIMEOUT.fullmatch(value)
    if found is None:
        raise ValueError(
            f"grpc-timeout: {value[:20]!r} is no number of at most 8 digits with a unit of H, M, S, m, u, n"
        )
    return int(found[1]) * _UNITS_S[found[2]]


def read_metadata(fields: Iterable[tuple[str, bytes]]) -> Metadata:
    """The caller's metadata, without what is gRPC's own. Values of names that end in ``-bin`` are bytes.

    Raises:
        ValueError: a value is neither ASCII nor base64 where it has to be.
    """
    metadata: list[tuple[str, str | bytes]] = []
    for name, value in fields:
        if name in _RESERVED:
            continue
        if not name.endswith("-bin"):
            try:
                metadata.append((name, value.decode("ascii")))
            except UnicodeDecodeError:
                raise ValueError(
                    f"{name}: the value is not ASCII; binary values need a name that ends in -bin"
                ) from None
            continue
        for part in map(bytes.strip, value.split(b",")):  # several values may have been joined on the way
            try:
                metadata.append((name, base64.b64decode(part + b"=" * (-len(part) % 4), validate=True)))
            except binascii.Error:
                raise ValueError(f"{name}: the value is not base64") from None
    return tuple(metadata)


def write_metadata(metadata: Iterable[tuple[str, str | bytes]]) -> bytes:
    """Metadata as header fields."""
    fields = []
    for name, value in metadata:
        if name.endswith("-bin"):
            raw = value.encode() if isinstance(value, str) else value
            fields.append((name.encode(), base64.b64encode(raw).rstrip(b"=")))
        else:
            fields.append((name.encode(), value.encode("ascii") if isinstance(value, str) else value))
    return write_fields(fields)


_OK = write_fields([(b"grpc-status", b"0")])


def write_status(code: grpc.StatusCode, message: str) -> bytes:
    """A status as header fields."""
    if code is grpc.StatusCode.OK and not message:
        return _OK
    encoded = quote_from_bytes(message.encode("utf-8", "replace"), safe=_PLAIN).encode("ascii")
    if encoded.startswith(b" "):  # no field may begin or end with one (RFC 9113, 8.2.1)
        encoded = b"%20" + encoded[1:]
    if encoded.endswith(b" "):
        encoded = encoded[:-1] + b"%20"
    return write_fields([(b"grpc-status", b"%d" % code.value[0]), (b"grpc-message", encoded)])
