"""Around every call: a request id, one line in the log, and errors as statuses."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import grpc

from vision_service.errors import QueueFull, VisionError
from vision_service.server.access import AccessLog
from vision_service.server.metadata import MAX_MESSAGE, PREDICT, REQUEST_ID, method_of, request_id_of, trailing_of
from vision_service.server.refusals import RefusedCall
from vision_service.types import Task

logger = logging.getLogger("vision_service.access")

TASK_OF_METHOD = {method_of(task): task for task in Task}

Method = Callable[[Any, grpc.aio.ServicerContext], Awaitable[Any]]
"""Of a servicer: request and context in, reply out."""


class Calls(grpc.GenericRpcHandler):
    """Every method of the server. Gives each call an id, logs it, and turns its errors into statuses.

    A `VisionError` becomes its own status with its own message. Anything else becomes INTERNAL with no more than the
    request id; its text goes to the log. Other streams than those of Predict (reflection, health watches) pass as they
    are.

    This is what gRPC calls an interceptor, except that methods are wrapped once and not at each call, and that a call
    can be refused as soon as its headers are there. Servicers are added to it by their generated functions as to a
    server.

    Args:
        check_room: raises `QueueFull` where no call of a task would be let in. Such a call is refused before its
            message is read.
        access: where each call has its line.
    """

    def __init__(self, check_room: Callable[[Task], None], access: AccessLog) -> None:
        self._check_room = check_room
        self._access = access
        self._handlers: list[grpc.GenericRpcHandler] = []
        self._wrapped: dict[str, grpc.RpcMethodHandler] = {}
        self._active = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def add_generic_rpc_handlers(self, handlers: Iterable[grpc.GenericRpcHandler]) -> None:
        """Take a servicer's methods. Called by its generated function."""
        self._handlers.extend(handlers)

    def add_registered_method_handlers(self, service_name: str, method_handlers: Any) -> None:
        """The same methods in another form, which would pass by this one. Called by the generated function."""

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        """What answers a call. Called by gRPC as soon as the call's headers are there."""
        method = handler_call_details.method
        refusal = self._refusal(method)
        if refusal is not None:
            return RefusedCall(refusal, method, self._access)
        known = self._wrapped.get(method)
        if known is not None:
            return known
        for handlers in self._handlers:
            handler = handlers.service(handler_call_details)
            if handler is not None:
                self._wrapped[method] = handler = self._wrap(handler, method)
                return handler
        return None

    @property
    def under_way(self) -> int:
        """Calls and streams of Predict that have no end yet."""
        return self._active

    async def wait_idle(self) -> None:
        """Wait until no call and no stream of Predict is under way."""
        await self._idle.wait()

    def _wrap(self, handler: grpc.RpcMethodHandler, method: str) -> grpc.RpcMethodHandler:
        if method == PREDICT:  # its answers are serialised when they are done
            return grpc.stream_stream_rpc_method_handler(
                self._counted(handler.stream_stream, method), request_deserializer=handler.request_deserializer
            )
        if handler.unary_unary is None:
            return handler
        return grpc.unary_unary_rpc_method_handler(
            self._counted(handler.unary_unary, method),
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    def _refusal(self, method: str) -> QueueFull | None:
        """Why a call of a method would not be let in, if so."""
        task = TASK_OF_METHOD.get(method)
        if task is None:
            return None
        try:
            self._check_room(task)
        except QueueFull as error:
            return error.with_traceback(None)  # whose frames would hold the call, and be held by it
        return None

    def _counted(self, inner: Method, method: str) -> Method:
        """A method as `observed` runs it, under way for `wait_idle` meanwhile."""

        async def call(request: Any, context: grpc.aio.ServicerContext) -> Any:
            self._active += 1
            self._idle.clear()
            try:
                return await observed(inner, request, context, method, self._access)
            finally:
                self._active -= 1
                if self._active == 0:
                    self._idle.set()

        return call


async def _abort(
    context: grpc.aio.ServicerContext, code: grpc.StatusCode, message: str, trailing: tuple[tuple[str, str], ...]
) -> None:
    """End a call with a status; when its caller has gone meanwhile, quietly."""
    try:
        await context.abort(code, message[:MAX_MESSAGE], trailing)
    except (grpc.aio.AbortError, asyncio.CancelledError):
        raise
    except Exception as error:  # gRPC's own, private classes
        logger.debug("the caller had gone before it could be told %s: %s", code.name, error)
        raise asyncio.CancelledError from None


async def observed(
    inner: Method, request: Any, context: grpc.aio.ServicerContext, method: str, access: AccessLog
) -> Any:
    """Run a servicer's method: with a request id, its line in the log, and its errors as statuses.

    Args:
        inner: the method.
        request: its request.
        context: gRPC's, or what stands for it where a proxy has taken the call.
        method: its name, for the log.
        access: the log.

    Raises:
        grpc.aio.AbortError: the call was ended with a status.
    """
    request_id = request_id_of(context.invocation_metadata())
    started_s = time.perf_counter()
    status = "OK"
    context.set_trailing_metadata(((REQUEST_ID, request_id),))
    try:
        return await inner(request, context)
    except VisionError as error:
        status = error.status
        if status == "INTERNAL":
            logger.error("call %s failed", request_id, exc_info=error)
        await _abort(context, grpc.StatusCode[status], str(error), trailing_of(error, request_id))
    except asyncio.CancelledError:
        status = "CANCELLED"  # by the caller, or by its deadline
        raise
    except grpc.aio.AbortError:
        status = str(context.code().name if hasattr(context.code(), "name") else context.code())
        raise
    except Exception:
        status = "INTERNAL"
        logger.exception("call %s failed", request_id)
        message = f"internal error; the server's log has it as {request_id}"
        await _abort(context, grpc.StatusCode.INTERNAL, message, ((REQUEST_ID, request_id),))
    finally:
        access.note(method, status, request_id, context.peer(), started_s)
