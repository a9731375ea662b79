"""Calls that are refused by their headers, with as little work as can be.

Under overload refusals are most of the calls, and what they cost is missing where images are answered.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from vision_service.errors import QueueFull
from vision_service.server.access import AccessLog
from vision_service.server.metadata import MAX_MESSAGE, request_id_of, trailing_of


def refusing(error: QueueFull, method: str, access: AccessLog) -> Callable[[Any, Any], Awaitable[bytes]]:
    """What answers one call.

    Args:
        error: why it is refused.
        method: its name, for the log.
        access: the log.
    """

    async def refuse(request: Any, context: grpc.aio.ServicerContext) -> bytes:
        request_id = request_id_of(context.invocation_metadata())
        # Not by `abort`, whose exception has to be made, raised and caught.
        context.set_code(grpc.StatusCode[error.status])
        context.set_details(str(error)[:MAX_MESSAGE])
        context.set_trailing_metadata(trailing_of(error, request_id))
        access.refused(method, error.status, request_id, context.peer())
        return b""  # with a status that is not OK nothing is sent

    return refuse
