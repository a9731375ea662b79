"""One image between its caller and the batcher."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from vision_service.engine.host import ModelHost
from vision_service.engine.loaded import Answer
from vision_service.engine.queue import Ride
from vision_service.errors import InferenceFailed, VisionError
from vision_service.imaging.source import ImageInput
from vision_service.types import Params, Prediction, Result, Timings

logger = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class Held:
    """An image, as it was sent, for as long as it is needed.

    Not the call's own: what drops it hangs on the call's future, and future and call would hold each other.
    """

    image: ImageInput

    def drop(self) -> None:
        """The bytes are not needed any more, and may be many."""
        self.image = b""


@dataclass(eq=False, slots=True)
class Call:
    """One image on its way.

    Nothing that its futures hold leads back to them, so that all of it is freed when the last one has gone, and not
    when Python next looks for cycles: by then there may be hundreds of them.

    Attributes:
        held: the image; dropped as soon as it is decoded.
        host: whose model it goes to.
        params: what the call chose.
        deadline_s: on `time.monotonic`'s clock, or ``None``.
        finish: last work on the result, or ``None``.
        finish_needed: whether a result needs that.
        result: what the caller waits for.
        decode_ms: file bytes to pixels.
        preprocess_ms: pixels to the network's input.
        original_hw: of the image.
    """

    held: Held
    host: ModelHost
    params: Params
    deadline_s: float | None
    finish: Callable[[Result[Any]], Any] | None = None
    finish_needed: Callable[[Result[Any]], bool] = lambda _: True
    result: Future[Any] = field(default_factory=Future)
    decode_ms: float = 0.0
    preprocess_ms: float = 0.0
    original_hw: tuple[int, int] = (0, 0)

    def succeed(self, value: Any) -> None:
        """Answer, unless the caller has gone."""
        if self.result.set_running_or_notify_cancel():
            self.result.set_result(value)

    def fail(self, error: BaseException) -> None:
        """Answer with an error, unless the caller has gone."""
        if self.result.set_running_or_notify_cancel():
            self.result.set_exception(error)

    def fail_at(self, error: Exception, what: str) -> None:
        """Answer with an error that its caller may see: of what nobody foresaw, the text goes to the log.

        It leads to no frames: they hold the call, and the call its error.

        Args:
            error: as it was caught.
            what: failed.
        """
        if isinstance(error, VisionError):
            shown = error
        else:
            logger.error("%s", what, exc_info=error)
            shown = InferenceFailed(f"{what} ({type(error).__name__}); the log says more")
            shown.__cause__ = error
        known: BaseException | None = shown
        while known is not None:
            known.__traceback__ = None
            before = known.__cause__ or known.__context__
            known.__context__ = before
            known = before
        self.fail(shown)

    def outcome(self, travelled: Ride[Answer]) -> Result[Prediction]:
        """The result of a batch's answer and of what was measured before it."""
        answer = travelled.value
        timings = Timings(
            decode_ms=self.decode_ms,
            preprocess_ms=self.preprocess_ms,
            queue_ms=1000 * travelled.queue_s,
            forward_ms=answer.forward_ms,
            postprocess_ms=answer.postprocess_ms,
            batch_size=travelled.batch_size,
        )
        spec = self.host.spec
        return Result(answer.prediction, self.original_hw, spec.name, spec.version, timings)


def cancel_with(riding: weakref.ref[Future[Any]], result: Future[Any]) -> None:
    """Cancel a call's place in a batch when its caller has gone."""
    if result.cancelled() and (future := riding()) is not None:
        future.cancel()
