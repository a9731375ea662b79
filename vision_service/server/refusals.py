"""Calls that are refused by their headers, with as little work as can be.

Under overload refusals are most of the calls, and what they cost is missing where images are answered.
"""

from __future__ import annotations

from typing import Any

import grpc

from vision_service.errors import QueueFull
from vision_service.server.access import AccessLog
from vision_service.server.metadata import MAX_MESSAGE, request_id_of, trailing_of

_EXHAUSTED = grpc.StatusCode[QueueFull.status]


class RefusedCall(grpc.RpcMethodHandler):
    """The handler of one call, which refuses it.

    For gRPC's own server it is the handler of a stream of requests, which is called before any was read; on the wire
    both are one. Our own asks it by `answer_at_once`, and makes no task.

    Args:
        error: why it is refused.
        method: its name, for the log.
        access: the log.
    """

    request_streaming = True
    response_streaming = False
    request_deserializer = None
    response_serializer = None
    unary_unary = None
    unary_stream = None
    stream_stream = None

    def __init__(self, error: QueueFull, method: str, access: AccessLog) -> None:
        self._error = error
        self._method = method
        self._access = access

    def answer_at_once(self, context: Any) -> None:
        """Say why; the message need not have come.

        Args:
            context: the call's.
        """
        request_id = request_id_of(context.invocation_metadata())
        # Not by `abort`, whose exception has to be made, raised and caught.
        context.set_code(_EXHAUSTED)
        context.set_details(str(self._error)[:MAX_MESSAGE])
        context.set_trailing_metadata(trailing_of(self._error, request_id))
        self._access.refused(self._method, QueueFull.status, request_id, context.peer())

    async def stream_unary(self, requests: Any, context: grpc.aio.ServicerContext) -> bytes:
        """As `answer_at_once`."""
        self.answer_at_once(context)
        return b""  # with a status that is not OK nothing is sent
