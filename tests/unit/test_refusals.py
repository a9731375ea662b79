"""Calls that are refused by their headers, on our transport."""

import asyncio
import time

import grpc
import pytest

from vision_service.errors import QueueFull
from vision_service.http2 import gather as gathering
from vision_service.rpc.server import RpcServer
from vision_service.server import refusals
from vision_service.server.access import AccessLog
from vision_service.server.calls import Calls
from vision_service.server.refusals import RefusedCall, gather

METHOD = "/vision.v1.VisionService/Classify"


def full(task):
    raise QueueFull("no room", 0.25, backlog_s=0.5)


def test_a_refusal_holds_none_of_the_frames_that_it_went_through():
    class Details:
        method = METHOD

    refused = Calls(full, AccessLog()).service(Details())
    assert isinstance(refused, RefusedCall)
    assert refused._error.__traceback__ is None


def test_our_transport_makes_no_task_of_a_refusal(monkeypatch):
    def no_task(self, requests, context):
        raise AssertionError("it was called as gRPC's own server calls it")

    monkeypatch.setattr(RefusedCall, "stream_unary", no_task)

    async def main():
        server = RpcServer(1_000_000)
        server.add_generic_rpc_handlers((Calls(full, AccessLog()),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_unary(METHOD)(bytes(500_000), timeout=10)
        await server.stop(0)
        return caught.value

    error = asyncio.run(main())
    assert (error.code(), error.details()) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "no room")
    assert dict(error.trailing_metadata())["grpc-retry-pushback-ms"] == "250"


@pytest.mark.parametrize(("backlog_s", "gathered"), [(0.0, []), (0.05, []), (0.2, [0.01]), (2.0, [0.01])])
def test_calls_after_a_refused_one_are_gathered_unless_the_model_might_run_dry(backlog_s, gathered):
    found = []

    class Context:
        def gather(self, seconds):
            found.append(seconds)

    gather(Context(), QueueFull("no room", 1.0, backlog_s))
    gather(object(), QueueFull("no room", 1.0, backlog_s))  # of gRPC's own server, which cannot
    assert found == gathered


@pytest.mark.skipif(not gathering.can_gather(), reason="this system's sockets do not gather")
def test_calls_after_refused_ones_are_taken_in_together(monkeypatch):
    monkeypatch.setattr(refusals, "GATHER_S", 1.0)
    monkeypatch.setattr(gathering, "OFTEN_S", 60.0)

    async def main():
        server = RpcServer(1_000_000)
        server.add_generic_rpc_handlers((Calls(full, AccessLog()),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        started_s = time.monotonic()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            for _ in range(4):  # the last two wait
                with pytest.raises(grpc.aio.AioRpcError, match="no room"):
                    await channel.unary_unary(METHOD)(bytes(1000), timeout=10)
        await server.stop(0)
        return time.monotonic() - started_s

    assert asyncio.run(main()) > 1.9
