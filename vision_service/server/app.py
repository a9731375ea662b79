"""The gRPC server: starts, loads models, says when it is ready, and drains."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import SERVICE_NAME as HEALTH_SERVICE
from grpc_health.v1.health import aio as aio_health
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from vision_service.api.v1 import vision_pb2 as pb
from vision_service.api.v1 import vision_pb2_grpc as pb_grpc
from vision_service.config.settings import ServerSettings
from vision_service.engine.build import build_pipeline, resolve_specs
from vision_service.engine.garbage import settle_garbage
from vision_service.engine.slices import short_slices
from vision_service.errors import ConfigError, VisionError
from vision_service.rpc.server import RpcServer
from vision_service.server.access import AccessLog
from vision_service.server.calls import Calls
from vision_service.server.servicers import ModelServicer, StreamingServicer
from vision_service.server.streams import PredictStreams
from vision_service.types import Task

logger = logging.getLogger(__name__)

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING

STREAM_GRACE_S = 0.2
"""How long replies that were just written, and the news that health is NOT_SERVING, may take to get out."""

SERVICES = tuple(service.full_name for service in pb.DESCRIPTOR.services_by_name.values())


class VisionServer:
    """A server with its models.

    Health, by the standard protocol: the service name ``""`` and each service's full name are SERVING when every model
    is ready; ``classify``, ``detect``, ``segment`` and ``translate`` when that task's default model is.

    Args:
        settings: of the process.

    Raises:
        ConfigError: a model is unknown or a setting does not fit.
    """

    def __init__(self, settings: ServerSettings) -> None:
        if not settings.models:
            raise ConfigError("models: name at least one model to serve")
        self.settings = settings
        self._specs = resolve_specs(settings)
        self.pipeline = build_pipeline(settings, self._specs)
        self._health = aio_health.HealthServicer()
        self._access = AccessLog()
        self.calls = Calls(self.pipeline.check_room, self._access)
        self._streams = PredictStreams(self.pipeline, self._access)
        self._server: Any = None
        self.port = 0

    async def start(self) -> int:
        """Listen, then load every model.

        Returns:
            The port that is listened on.

        Raises:
            ConfigError: the port is taken.
            VisionError: a model could not be loaded and the settings require all of them.
        """
        for service in ("", *SERVICES, *Task):  # the health servicer starts out as SERVING
            await self._health.set(str(service), NOT_SERVING)
        self._server = self._listener()
        pb_grpc.add_VisionServiceServicer_to_server(StreamingServicer(self.pipeline, self._streams), self.calls)
        pb_grpc.add_ModelServiceServicer_to_server(ModelServicer(self.pipeline), self.calls)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.calls)
        self._server.add_generic_rpc_handlers((self.calls,))
        described = reflection.aio.ReflectionServicer((*SERVICES, HEALTH_SERVICE, reflection.SERVICE_NAME))
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(described, self.calls)
        address = f"{self.settings.host}:{self.settings.port}"
        try:
            self.port = self._server.add_insecure_port(address)
        except RuntimeError:
            raise ConfigError(f"cannot listen on {address}; is the port taken? Port 0 picks a free one") from None
        await self._server.start()
        await self._load_models()
        return self.port

    def _listener(self) -> Any:
        """What takes calls, as the settings want it."""
        most = self.settings.max_message_bytes
        if self.settings.transport == "asyncio":
            return RpcServer(most)
        return grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", most),
                ("grpc.max_send_message_length", most),
                ("grpc.so_reuseport", 0),  # a second server on the port is an error, not a lottery
            ]
        )

    async def _load_models(self) -> None:
        loop = asyncio.get_running_loop()
        failed = []
        for spec in self._specs:  # one after the other: each uses every core
            try:
                await loop.run_in_executor(None, self.pipeline.catalog.load, spec)
            except VisionError as error:
                if self.settings.require_all_models:
                    raise
                failed.append(spec.name)
                logger.error("model %s failed to load: %s", spec.name, error)
            await self._health.set(str(spec.task), SERVING if self.pipeline.catalog.ready(spec.task) else NOT_SERVING)
        if not failed:
            for service in ("", *SERVICES):
                await self._health.set(service, SERVING)

    async def stop(self) -> bool:
        """Say NOT_SERVING, refuse new calls, answer those under way, free the models.

        Returns:
            Whether every call under way was answered within the drain timeout.
        """
        if self._server is None:
            return True
        with suppress(TimeoutError):  # somebody who watches and takes nothing in keeps the news from all
            await asyncio.wait_for(self._health.enter_graceful_shutdown(), STREAM_GRACE_S)
        self._streams.stop()
        loop = asyncio.get_running_loop()
        until_s, under_way = loop.time() + self.settings.drain_timeout_s, self.calls.under_way
        stopping = asyncio.ensure_future(self._server.stop(self.settings.drain_timeout_s))  # refuses new calls at once
        idle = asyncio.ensure_future(self.calls.wait_idle())
        await asyncio.wait((stopping, idle), return_when=asyncio.FIRST_COMPLETED)
        # By the clock: that none is under way now may be because time was over and gRPC has cancelled them.
        in_time = not under_way or loop.time() < until_s
        idle.cancel()
        # Streams (health watches, reflection) have no end of their own and nothing to answer.
        await self._server.stop(STREAM_GRACE_S if in_time else None)
        await stopping
        left_s = max(1.0, until_s - loop.time())
        drained = await loop.run_in_executor(None, self.pipeline.close, left_s)
        self._access.write_rest()  # calls that were cancelled have come to their end by now
        return drained and in_time


async def serve(settings: ServerSettings, on_ready: Callable[[VisionServer], None]) -> int:
    """Serve until SIGTERM or SIGINT, then drain.

    Args:
        settings: of the process.
        on_ready: called once every model is ready.

    Returns:
        The exit code: 0 when every call under way was answered, else 1.
    """
    if settings.compute_nice:
        short_slices()  # before gRPC and the models start their threads; those that compute have usual ones
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    server = VisionServer(settings)
    starting = asyncio.ensure_future(server.start())
    stopping = asyncio.ensure_future(stop.wait())
    await asyncio.wait((starting, stopping), return_when=asyncio.FIRST_COMPLETED)
    try:
        if starting.done():
            starting.result()
            settle_garbage()
            on_ready(server)
            await stopping
            logger.info("draining: no new calls, up to %.0f s for those under way", settings.drain_timeout_s)
    finally:
        drained = await server.stop()
        starting.cancel()
        stopping.cancel()
    logger.info("stopped" if drained else "stopped with calls unanswered")
    return 0 if drained else 1
