"""What a connection brings is taken in together for a while: on a real socket, which says when it may be read."""

import asyncio
import socket
import sys

import pytest

from vision_service.http2 import gather
from vision_service.http2.gather import GATHER_BYTES, Gatherer

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux's sockets gather")

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
            with theirs:
                await steps(Gatherer(transport.get_extra_info("socket"), loop), heard, theirs)
        finally:
            transport.close()

    return lambda steps: asyncio.run(main(steps))


def test_what_comes_in_one_while_is_heard_together(on_a_connection):
    async def steps(gatherer, heard, theirs):
        gatherer.gather(LONG_S)
        gatherer.gather(0.3)
        for _ in range(5):
            theirs.send(b"piece")
            await asyncio.sleep(0.01)
        assert heard.portions == []
        while not heard.portions:
            await asyncio.sleep(0.01)
        assert heard.portions == [5 * b"piece"], "and nobody sent more to have it heard"
        theirs.send(b"after it")
        while len(heard.portions) < 2:
            await asyncio.sleep(0.01)
        assert heard.portions[1] == b"after it"

    on_a_connection(steps)


def test_a_portion_is_heard_at_once_and_so_is_the_end(on_a_connection):
    async def steps(gatherer, heard, theirs):
        gatherer.gather(LONG_S)
        gatherer.gather(LONG_S)
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, theirs.sendall, bytes(GATHER_BYTES))
        while not heard.portions:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        rest = GATHER_BYTES - sum(map(len, heard.portions))  # asyncio reads no more in one go here
        portions = len(heard.portions)
        theirs.send(b"the last")
        await asyncio.sleep(0.1)
        assert len(heard.portions) == portions
        theirs.shutdown(socket.SHUT_WR)
        await heard.over.wait()
        assert b"".join(heard.portions[portions:]) == bytes(rest) + b"the last"

    on_a_connection(steps)


@pytest.mark.parametrize("asked", [1, 2])
def test_a_portion_does_not_wait_for_the_first_who_asks(on_a_connection, asked, monkeypatch):
    """Nor for one who asks long after the one before."""
    monkeypatch.setattr(gather, "OFTEN_S", 0.0)

    async def steps(gatherer, heard, theirs):
        for _ in range(asked):
            gatherer.gather(LONG_S)
        theirs.send(b"piece")
        while not heard.portions:
            await asyncio.sleep(0.01)

    on_a_connection(steps)


def test_a_while_is_not_made_longer_by_those_who_ask_meanwhile(on_a_connection):
    async def steps(gatherer, heard, theirs):
        gatherer.gather(0.2)
        gatherer.gather(0.2)
        gatherer.gather(LONG_S)
        theirs.send(b"piece")
        while not heard.portions:
            await asyncio.sleep(0.01)

    on_a_connection(steps)


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
