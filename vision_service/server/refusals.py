"""Calls that are refused by their headers, with as little work as can be.

Under overload refusals are most of the calls, and what they cost is missing where images are answered.
"""

from __future__ import annotations

from typing import Any

import grpc

from vision_service.errors import QueueFull
from vision_service.server.access import AccessLog
from vision_service.server.metadata import MAX_MESSAGE, request_id_of, trailing_of

GATHER_S = 0.01
"""What a connection brings whose calls are refused may wait so long to be taken in together, seconds: a fifth of the
time in which a refusal is to be there."""

_BACKLOG_S = 10 * GATHER_S
"""A model that is not known to be busy for so long might run dry meanwhile, so nothing waits."""

_EXHAUSTED = grpc.StatusCode[QueueFull.status]


def gather(context: Any, error: QueueFull) -> None:
    """Have the calls that follow a refused one taken in together, where the transport can.

    Args:
        context: of the call or stream.
        error: why it was refused.
    """
    of_connection = getattr(context, "gather", None)
    if of_connection is not None and error.backlog_s >= _BACKLOG_S:
        of_connection(GATHER_S)


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
        gather(context, self._error)

    async def stream_unary(self, requests: Any, context: grpc.aio.ServicerContext) -> bytes:
        """As `answer_at_once`."""
        self.answer_at_once(context)
        return b""  # with a status that is not OK nothing is sent
