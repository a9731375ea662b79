"""The errors that this project raises on purpose, and the gRPC status that each one owns.

    VisionError                     INTERNAL
    ├── InvalidInput                INVALID_ARGUMENT    a field of the request is wrong
    │   └── InvalidImage            INVALID_ARGUMENT    not an image, truncated, too large
    ├── ModelNotFound               NOT_FOUND           no such model or version; lists what exists
    ├── ModelUnavailable            UNAVAILABLE         loading, draining or failed
    ├── ResourceExhausted           RESOURCE_EXHAUSTED
    │   ├── QueueFull               RESOURCE_EXHAUSTED  says when to come back
    │   └── DeviceOutOfMemory       RESOURCE_EXHAUSTED  does not fit on the device even alone
    ├── DeadlineExceeded            DEADLINE_EXCEEDED   passed before the device was reached
    ├── InferenceFailed             INTERNAL            the network raised, or returned nonsense, for this image
    └── SetupError                  FAILED_PRECONDITION what runs is not what should: fix files or settings
        ├── ConfigError             FAILED_PRECONDITION a setting or a spec is wrong
        └── WeightsError            FAILED_PRECONDITION missing, altered, or of another architecture

The message is for the person who called: what was wrong, where, and what to do next. The client raises the same
classes that the server raised.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar


class VisionError(Exception):
    """Base of all errors raised on purpose.

    Attributes:
        status: name of the gRPC status code that a caller over the network gets.
        request_id: what the server's log calls the call; set by the client, else empty.
        address: the server's; set by the client, else empty.
    """

    status: ClassVar[str] = "INTERNAL"
    request_id: str = ""
    address: str = ""

    def __reduce__(self) -> tuple[Any, ...]:
        """An error may come from another process: its message is taken as it is, not made again."""
        return _remade, (type(self), self.args, self.__dict__)


class InvalidInput(VisionError):
    """A field of the request is wrong.

    Attributes:
        field: name of the field as in the API, such as ``score_threshold``.
    """

    status = "INVALID_ARGUMENT"

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}" if field else problem)
        self.field = field


class InvalidImage(InvalidInput):
    """The image cannot be used: not an image, truncated, too many pixels, or its size and data disagree."""

    def __init__(self, problem: str, field: str = "image") -> None:
        super().__init__(field, problem)


class ModelNotFound(VisionError):
    """No model of that name, or no such version of it."""

    status = "NOT_FOUND"


class ModelUnavailable(VisionError):
    """The model exists but does not answer now: it is loading, draining, or failed to load."""

    status = "UNAVAILABLE"


class ResourceExhausted(VisionError):
    """There is no room for this call now."""

    status = "RESOURCE_EXHAUSTED"


class QueueFull(ResourceExhausted):
    """The bounded queue is full.

    Attributes:
        retry_after_s: when there will probably be room, in seconds from now.
        backlog_s: how long the model will be busy with what is there already, in seconds; 0 where that is not known.
    """

    def __init__(self, message: str, retry_after_s: float, backlog_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.backlog_s = backlog_s


class DeviceOutOfMemory(ResourceExhausted):
    """The device has no memory for this image, even in a batch of its own."""


class DeadlineExceeded(VisionError):
    """The caller's deadline passed before the answer was there."""

    status = "DEADLINE_EXCEEDED"


class InferenceFailed(VisionError):
    """The network raised an error, or returned something that is no prediction, for this image."""


class SetupError(VisionError):
    """Files or settings must be put right before this can run."""

    status = "FAILED_PRECONDITION"


class ConfigError(SetupError):
    """A setting or a spec is wrong."""


class WeightsError(SetupError):
    """A weight file is missing, was altered, or belongs to another architecture."""


def _remade(cls: type[VisionError], args: tuple[Any, ...], attributes: dict[str, Any]) -> VisionError:
    error = cls.__new__(cls, *args)
    error.args = args
    error.__dict__.update(attributes)
    return error


def error_classes() -> Iterator[type[VisionError]]:
    """Every class of the tree, the base first."""
    stack: list[type[VisionError]] = [VisionError]
    while stack:
        cls = stack.pop()
        yield cls
        stack.extend(cls.__subclasses__())


def choices(wanted: str, available: Iterable[str]) -> str:
    """A clause for messages about an unknown name: near matches first, else (some of) what exists.

    Args:
        wanted: the name that was not found.
        available: the names that would have been.

    Returns:
        Such as ``did you mean 'cup'?`` or ``there are: 'a', 'b'``.
    """
    names = sorted(available)
    near = difflib.get_close_matches(wanted[:100], names, n=3, cutoff=0.6)  # its cost grows with the square
    if near:
        return f"did you mean {' or '.join(repr(name) for name in near)}?"
    if not names:
        return "there are none"
    shown = ", ".join(repr(name) for name in names[:20])
    return f"there are: {shown}" + (f" and {len(names) - 20} more" if len(names) > 20 else "")
