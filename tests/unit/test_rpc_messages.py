"""Messages and metadata as gRPC frames them, in whatever pieces they come."""

import gzip
import itertools
import random
import struct
import tracemalloc
import zlib

import grpc
import pytest

from vision_service.rpc.messages import MessageReader, StatusError, framed
from vision_service.rpc.metadata import read_metadata, timeout_s, write_status


def read(content, cuts=(), encoding="identity", most=1_000_000):
    """The messages in a content that comes in pieces."""
    got = []
    reader = MessageReader(
        encoding, most, lambda message, compressed: got.append(reader.inflated(message) if compressed else message)
    )
    for start, end in itertools.pairwise([0, *cuts, len(content)]):
        reader.take(memoryview(content)[start:end])
    return got, reader.between


def prefixed(message, flag=0):
    return struct.pack(">BL", flag, len(message)) + message


MESSAGES = [b"", b"a", bytes(5000), b"", b"bc" * 40_000, b"d"]
CONTENT = b"".join(map(prefixed, MESSAGES))


def test_a_message_is_framed_as_the_protocol_says():
    assert framed(b"abc") == b"\x00\x00\x00\x00\x03abc"


@pytest.mark.parametrize("seed", range(20))
def test_messages_come_out_whole_however_the_content_is_cut(seed):
    random_ = random.Random(seed)
    cuts = sorted(random_.sample(range(1, len(CONTENT)), random_.choice([0, 1, 5, 300, 3000])))
    assert read(CONTENT, cuts) == (MESSAGES, True)


def test_thousands_of_empty_messages():
    assert read(bytes(5 * 10_000)) == ([b""] * 10_000, True)


def test_byte_by_byte():
    assert read(CONTENT[:20], range(1, 20)) == ([b"", b"a"], False)
    short = b"".join(map(prefixed, [b"abc", b"", b"defgh"]))
    assert read(short, range(1, len(short))) == ([b"abc", b"", b"defgh"], True)


@pytest.mark.parametrize("left", range(1, 8))
def test_what_is_cut_off_is_no_message(left):
    got, between = read(prefixed(b"abc")[:-left])
    assert (got, between) == ([], False)


@pytest.mark.parametrize(("encoding", "compress"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
def test_compressed_messages_beside_others(encoding, compress):
    content = prefixed(compress(b"a" * 9000), 1) + prefixed(b"plain") + prefixed(compress(b""), 1)
    assert read(content, range(1, len(content), 7), encoding) == ([b"a" * 9000, b"plain", b""], True)


@pytest.mark.parametrize(
    ("content", "encoding", "code", "text"),
    [
        (prefixed(bytes(1001)), "identity", "RESOURCE_EXHAUSTED", r"1001 vs\. 1000"),
        (struct.pack(">BL", 0, 2**32 - 1), "identity", "RESOURCE_EXHAUSTED", "4294967295"),
        (prefixed(gzip.compress(bytes(1001)), 1), "gzip", "RESOURCE_EXHAUSTED", r"1001 vs\. 1000"),
        (prefixed(b"no gzip", 1), "gzip", "INTERNAL", "cannot be decompressed as gzip"),
        (prefixed(gzip.compress(b"abc")[:-3], 1), "gzip", "INTERNAL", "cut off"),
        (prefixed(b"abc", 1), "identity", "INTERNAL", "grpc-encoding"),
        (prefixed(b"abc", 2), "gzip", "INTERNAL", "flag 2"),
        (b"", "snappy", "UNIMPLEMENTED", "snappy.*gzip"),
    ],
)
def test_what_cannot_be_read_ends_with_a_status(content, encoding, code, text):
    with pytest.raises(StatusError, match=text) as error:
        read(content, (), encoding, most=1000)
    assert error.value.code is grpc.StatusCode[code]


def test_a_bomb_is_not_inflated():
    """A gigabyte of zeros, of which a little more than the largest message is ever made."""
    pump = zlib.compressobj(9)
    bomb = b"".join(pump.compress(bytes(1 << 20)) for _ in range(1024)) + pump.flush()
    most = len(bomb)
    tracemalloc.start()
    with pytest.raises(StatusError, match=rf"larger than max \({most + 1} vs"):
        read(prefixed(bomb, 1), (), "deflate", most)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * most


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1H", 3600),
        ("2M", 120),
        ("3S", 3),
        ("4m", 0.004),
        ("5u", 5e-6),
        ("6n", 6e-9),
        ("99999999S", 99999999),
        ("0n", 0),
    ],
)
def test_timeouts(text, seconds):
    assert timeout_s(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "1", "S", "1s", "-1S", "1.5S", "123456789S", "1SS", " 1S"])
def test_what_is_no_timeout(text):
    with pytest.raises(ValueError, match="grpc-timeout"):
        timeout_s(text)


def test_the_callers_metadata():
    fields = [
        ("te", b"trailers"),
        ("grpc-timeout", b"1S"),
        ("user-agent", b"someone"),
        ("one-bin", b"AP8"),  # without padding, as gRPC writes it
        ("two-bin", b"AP8=,AQ"),  # with, and two values joined by a proxy
    ]
    assert read_metadata(fields) == (
        ("user-agent", "someone"),
        ("one-bin", b"\x00\xff"),
        ("two-bin", b"\x00\xff"),
        ("two-bin", b"\x01"),
    )


@pytest.mark.parametrize("field", [("a-bin", b"?"), ("a", b"\xff")])
def test_metadata_that_is_none(field):
    with pytest.raises(ValueError, match=field[0]):
        read_metadata([field])


def test_the_message_of_a_status_is_percent_encoded():
    for message, written in ((" ", b"%20"), (" a ", b"%20a%20"), ("  ", b"%20%20")):
        assert write_status(grpc.StatusCode.INTERNAL, message).endswith(bytes([len(written)]) + written)
    assert b"50%25 gr%C3%B6%C3%9Fer%0A~ !" in write_status(grpc.StatusCode.INTERNAL, "50% größer\n~ !")
