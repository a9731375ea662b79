"""What a connection brings is taken in together for a while: on a real socket, which says when it may be read."""

import asyncio
import platform
import socket
import sys

import pytest

from vision_service.http2 import gather
from vision_service.http2.gather import GATHER_BYTES, Gatherer

pytestmark = pytest.mark.skipif(not gather.can_gather(), reason="this system's sockets do not gather")

LONG_S = 60.0


class Heard(asyncio.Protocol):
    """What came, in the portions in which it came."""

    def __init__(self):
        self.portions = []
        self.over = asyncio.Event()

    def data_received(self, data):
        self.portions.append(data)

    def eof_received(self):
        self.over.set()


@pytest.fixture
def on_a_connection(monkeypatch):
    """Runs steps that take a gatherer of a connection, what it heard, and the socket of the other end."""
    monkeypatch.setattr(gather, "OFTEN_S", LONG_S)

    async def main(steps):
        loop = asyncio.get_running_loop()
        with socket.create_server(("127.0.0.1", 0)) as listening:
            theirs = socket.create_connection(listening.getsockname())
            ours, _ = listening.accept()
        ours.setblocking(False)
        transport, heard = await loop.create_connection(Heard, sock=ours)
        try:
            async with asyncio.timeout(20):
                await steps(Gatherer(transport.get_extra_info("socket"), loop), heard, theirs)
        finally:
            theirs.close()
            transport.close()

    return lambda steps: asyncio.run(main(steps))


def start(gatherer, seconds=LONG_S):
    gatherer.gather(seconds)
    gatherer.gather(seconds)


async def hears(heard, size):
    """As much has been heard; it is waited for."""
    while sum(map(len, heard.portions)) < size:
        await asyncio.sleep(0.01)


def test_what_comes_in_one_while_is_heard_together(on_a_connection):
    async def steps(gatherer, heard, theirs):
        start(gatherer)
        for _ in range(5):
            theirs.send(b"piece")
            await asyncio.sleep(0.02)
        assert heard.portions == []
        gatherer.stop()
        await hears(heard, 25)
        assert heard.portions == [5 * b"piece"], "and nobody sent more to have it heard"
        theirs.send(b"after it")
        await hears(heard, 33)

    on_a_connection(steps)


def test_a_while_is_over_by_itself(on_a_connection):
    async def steps(gatherer, heard, theirs):
        start(gatherer, 0.05)
        gatherer.gather(LONG_S)  # it is not made longer
        theirs.send(b"piece")
        await hears(heard, 5)
        await asyncio.sleep(0.1)
        start(gatherer)
        theirs.send(b"another")
        await asyncio.sleep(0.1)
        assert len(heard.portions) == 1, "there may be a next one"

    on_a_connection(steps)


def test_a_portion_is_heard_at_once(on_a_connection):
    async def steps(gatherer, heard, theirs):
        start(gatherer)
        await asyncio.get_running_loop().run_in_executor(None, theirs.sendall, bytes(GATHER_BYTES))
        await hears(heard, 1)

    on_a_connection(steps)


def test_the_end_is_heard_at_once(on_a_connection):
    async def steps(gatherer, heard, theirs):
        start(gatherer)
        theirs.send(b"the last")
        await asyncio.sleep(0.05)
        assert heard.portions == []
        theirs.shutdown(socket.SHUT_WR)
        await heard.over.wait()
        assert heard.portions == [b"the last"]

    on_a_connection(steps)


@pytest.mark.parametrize("asked", [1, 2])
def test_whoever_asks_once_or_long_after_gathers_nothing(on_a_connection, asked, monkeypatch):
    monkeypatch.setattr(gather, "OFTEN_S", 0.0)

    async def steps(gatherer, heard, theirs):
        for _ in range(asked):
            gatherer.gather(LONG_S)
        theirs.send(b"piece")
        await hears(heard, 5)

    on_a_connection(steps)


@pytest.mark.parametrize(
    ("system", "release", "can"),
    [
        ("linux", "4.18.0-553.el8_10.x86_64", True),
        ("linux", "6.1", True),
        ("linux", "4.17.19", False),
        ("linux", "strange", False),
        ("darwin", "24.0.0", False),
    ],
)
def test_systems_that_would_not_say_that_there_is_something_gather_nothing(monkeypatch, system, release, can):
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "release", lambda: release)
    assert gather.can_gather.__wrapped__() == can


def test_a_socket_that_was_closed_meanwhile_gathers_nothing(monkeypatch):
    monkeypatch.setattr(gather, "OFTEN_S", LONG_S)

    async def main():
        errors = []
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: errors.append(context))
        ours, theirs = socket.socketpair()
        gatherer = Gatherer(ours, loop)
        gatherer.gather(LONG_S)
        gatherer.gather(0.0)
        ours.close()
        theirs.close()
        await asyncio.sleep(0.05)
        gatherer.gather(0.0)
        await asyncio.sleep(0.05)
        assert errors == []

    asyncio.run(main())
