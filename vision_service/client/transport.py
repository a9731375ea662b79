"""A channel with retries, waiting and not waiting. The two classes differ in their ``await``s only.

An attempt is a call, or a request on a stream where the settings say so.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from vision_service.api.v1 import vision_pb2_grpc
from vision_service.client.failures import AttemptFailed, failure_of, request_id_in, to_error
from vision_service.client.hold_back import HoldBack
from vision_service.client.replies import read_reply
from vision_service.client.retry import Attempts, RetryPolicy
from vision_service.client.streaming import AsyncPredictStream, Metadata, PredictStream
from vision_service.client.unanswered import StreamFailed
from vision_service.errors import InvalidInput, ModelUnavailable
from vision_service.types import Task

T = TypeVar("T")

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
"""Largest request or reply. gRPC's own limit of 4 MiB is less than one raw photo."""

_TASKS = {task.capitalize(): task.value for task in Task}
"""The task of each method that predicts."""

_NOT_NOW = ("UNAVAILABLE", "DEADLINE_EXCEEDED")


@dataclass(frozen=True, slots=True)
class Settings:
    """How a server is called.

    Attributes:
        address: ``host:port``.
        timeout_s: for a whole call, all attempts and pauses included, seconds.
        policy: when to try again.
        max_message_bytes: largest request or reply.
        credentials: ``grpc.ChannelCredentials`` for TLS; ``None`` speaks plain text.
        metadata: sent with every call.
        stream: whether predictions are requests on a stream.
        hold_back: whether a refused prediction holds back all of its method and model until the server wants to be
            asked again.
    """

    address: str
    timeout_s: float
    policy: RetryPolicy
    max_message_bytes: int = MAX_MESSAGE_BYTES
    credentials: Any = None
    metadata: Metadata = ()
    stream: bool = False
    hold_back: bool = False

    def open(self, library: Any) -> Any:
        """A channel.

        Args:
            library: ``grpc`` or ``grpc.aio``.
        """
        options = [
            ("grpc.max_send_message_length", self.max_message_bytes),
            ("grpc.max_receive_message_length", self.max_message_bytes),
            # gRPC would wait up to two minutes between attempts to connect: a server that comes up is seen sooner.
            ("grpc.initial_reconnect_backoff_ms", 200),
            ("grpc.max_reconnect_backoff_ms", 2000),
        ]
        if self.credentials is None:
            return library.insecure_channel(self.address, options)
        return library.secure_channel(self.address, self.credentials, options)

    def attempts(self, timeout_s: float | None) -> Attempts:
        """The attempts of one call; ``None`` takes these settings' own timeout."""
        return Attempts(self.policy, self.timeout_s if timeout_s is None else timeout_s)

    def asking(self, held: HoldBack, method: str, request: Any) -> AbstractContextManager[None]:
        """Around an attempt: whether it is made, and what its failure means to others like it."""
        if not self.hold_back or method not in _TASKS:
            return nullcontext()
        return held.asking((method, request.model.name, request.model.version))


class Transport:
    """Calls methods and waits for the answers."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._channel = settings.open(grpc)
        self._methods = _methods_of(self._channel)
        self._stream = PredictStream(self._channel, settings.metadata, settings.max_message_bytes)
        self._held = HoldBack()
        self._closed = False

    def call(self, method: str, build: Callable[[], Any], read: Callable[[Any, str], T], timeout_s: float | None) -> T:
        """Build a request, send it, again where that helps, and read the reply.

        Args:
            method: its name.
            build: makes the request.
            read: takes the reply and the request id.
            timeout_s: for all of it; ``None``: the settings'.

        Raises:
            VisionError: as the server raised it.
        """
        attempts = self._settings.attempts(timeout_s)
        request = build_request(build)
        while True:
            if self._closed:
                raise ModelUnavailable(f"the client of {self._settings.address} is closed; open another")
            try:
                response, request_id = self._attempt(method, request, attempts)
            except AttemptFailed as failed:
                pause_s = attempts.pause_s(failed.failure)
                if pause_s is None:
                    raise to_error(failed.failure, self._settings.address, attempts.made) from failed.__cause__
                time.sleep(pause_s)
            else:
                return read_reply(read, response, request_id)

    def health(self, service: str, timeout_s: float) -> bool:
        """Ask once whether a service answers calls; False also when nobody answers."""
        request = health_pb2.HealthCheckRequest(service=service)
        try:
            response = self._methods["Check"](request, timeout=timeout_s, metadata=self._settings.metadata)
        except grpc.RpcError as error:
            return _unhealthy(error, self._settings.address)
        return bool(response.status == health_pb2.HealthCheckResponse.SERVING)

    def close(self) -> None:
        """Calls under way fail."""
        self._closed = True
        self._stream.stop()
        self._channel.close()
        self._stream.join()

    def _attempt(self, method: str, request: Any, attempts: Attempts) -> tuple[Any, str]:
        """Ask once; gives the reply and the request id, or raises `AttemptFailed`."""
        timeout_s = attempts.start()
        with self._settings.asking(self._held, method, request):
            return self._ask(method, request, timeout_s, attempts)

    def _ask(self, method: str, request: Any, timeout_s: float, attempts: Attempts) -> tuple[Any, str]:
        if self._settings.stream and self._stream.usable and method in _TASKS:
            try:
                return self._stream.ask(_TASKS[method], request, timeout_s)
            except StreamFailed as failed:
                if self._closed or failed.tells_of_server:
                    raise
            timeout_s = attempts.remaining_s()
        return self._call(method, request, timeout_s)

    def _call(self, method: str, request: Any, timeout_s: float) -> tuple[Any, str]:
        try:
            response, rpc = self._methods[method].with_call(
                request, timeout=timeout_s, metadata=self._settings.metadata
            )
        except grpc.RpcError as error:
            raise AttemptFailed(failure_of(error)) from error
        return response, request_id_in(rpc.initial_metadata(), rpc.trailing_metadata())


class AsyncTransport:
    """As `Transport`, on an event loop. Files are read and masks decoded in threads."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._channel = settings.open(grpc.aio)
        self._methods = _methods_of(self._channel)
        self._stream = AsyncPredictStream(self._channel, settings.metadata, settings.max_message_bytes)
        self._held = HoldBack()
        self._closed = False

    async def call(
        self, method: str, build: Callable[[], Any], read: Callable[[Any, str], T], timeout_s: float | None
    ) -> T:
        """See `Transport.call`."""
        attempts = self._settings.attempts(timeout_s)
        request = await asyncio.to_thread(build_request, build)
        while True:
            if self._closed:
                raise ModelUnavailable(f"the client of {self._settings.address} is closed; open another")
            try:
                response, request_id = await self._attempt(method, request, attempts)
            except AttemptFailed as failed:
                pause_s = attempts.pause_s(failed.failure)
                if pause_s is None:
                    raise to_error(failed.failure, self._settings.address, attempts.made) from failed.__cause__
                await asyncio.sleep(pause_s)
            else:
                return await asyncio.to_thread(read_reply, read, response, request_id)

    async def health(self, service: str, timeout_s: float) -> bool:
        """See `Transport.health`."""
        request = health_pb2.HealthCheckRequest(service=service)
        try:
            response = await self._methods["Check"](request, timeout=timeout_s, metadata=self._settings.metadata)
        except grpc.RpcError as error:
            return _unhealthy(error, self._settings.address)
        return bool(response.status == health_pb2.HealthCheckResponse.SERVING)

    async def close(self) -> None:
        """Calls under way fail."""
        self._closed = True
        await self._stream.close()
        await self._channel.close()

    async def _attempt(self, method: str, request: Any, attempts: Attempts) -> tuple[Any, str]:
        """See `Transport._attempt`."""
        timeout_s = attempts.start()
        with self._settings.asking(self._held, method, request):
            return await self._ask(method, request, timeout_s, attempts)

    async def _ask(self, method: str, request: Any, timeout_s: float, attempts: Attempts) -> tuple[Any, str]:
        if self._settings.stream and self._stream.usable and method in _TASKS:
            try:
                return await self._stream.ask(_TASKS[method], request, timeout_s)
            except StreamFailed as failed:
                if self._closed or failed.tells_of_server:
                    raise
            timeout_s = attempts.remaining_s()
        return await self._call(method, request, timeout_s)

    async def _call(self, method: str, request: Any, timeout_s: float) -> tuple[Any, str]:
        rpc = self._methods[method](request, timeout=timeout_s, metadata=self._settings.metadata)
        try:
            response = await rpc
        except grpc.RpcError as error:
            raise AttemptFailed(failure_of(error)) from error
        return response, request_id_in(await rpc.initial_metadata(), await rpc.trailing_metadata())


def build_request(build: Callable[[], Any]) -> Any:
    """A request; what does not fit into its fields is the caller's mistake.

    Raises:
        InvalidInput: a value has the wrong type or is too large for its field.
    """
    try:
        return build()
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidInput("", f"a value does not fit into the request: {error}") from error


def _methods_of(channel: Any) -> dict[str, Any]:
    """The callables of a channel, by method name."""
    vision = vision_pb2_grpc.VisionServiceStub(channel)
    models = vision_pb2_grpc.ModelServiceStub(channel)
    return {
        "Classify": vision.Classify,
        "Detect": vision.Detect,
        "Segment": vision.Segment,
        "Translate": vision.Translate,
        "ListModels": models.ListModels,
        "GetModel": models.GetModel,
        "Check": health_pb2_grpc.HealthStub(channel).Check,
    }


def _unhealthy(error: grpc.RpcError, address: str) -> bool:
    """False when the error means "not now"; raises when the question was wrong."""
    failure = failure_of(error)
    if failure.status in _NOT_NOW:
        return False
    raise to_error(failure, address) from error
