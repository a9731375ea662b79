"""How far a job is: a bar on a terminal, a line now and then in a pipe."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Task as Bar
from rich.text import Text

from vision_service.errors import VisionError

EVERY_S = 10.0
"""Between two lines."""


class JobProgress:
    """Counts images on stderr, with the rate and the time left; use it in a ``with``.

    Args:
        count: how many images there will be; asked on a thread of its own, since listing may take long.
    """

    def __init__(self, count: Callable[[], int] | None) -> None:
        console = Console(stderr=True)
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            _Rate(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            # The bar may move aside for lines on the same terminal, but must not swallow what goes into a pipe.
            redirect_stdout=sys.stdout.isatty(),
        )
        self._bar = self._bars.add_task("images", total=None)
        self._count = count
        self._total: int | None = None
        self._done = 0
        self._began_s = self._said_s = time.monotonic()

    def set_total(self, total: int) -> None:
        """How many there will be, when that turns out later."""
        self._total = total
        self._bars.update(self._bar, total=total)

    def advance(self, images: int = 1) -> None:
        """One more image is done, or several."""
        self._done += images
        self._bars.advance(self._bar, images)
        now_s = time.monotonic()
        if self._bars.disable and now_s - self._said_s >= EVERY_S:
            self._said_s = now_s
            typer.echo(progress_line(self._done, self._total, now_s - self._began_s), err=True)

    def __enter__(self) -> Self:
        self._bars.start()
        if self._count is not None:
            threading.Thread(target=self._find_total, name="count", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def _find_total(self) -> None:
        try:
            if self._count is not None:
                self.set_total(self._count())
        except VisionError:  # the job runs into it as well, and says so
            return


def progress_line(done: int, total: int | None, elapsed_s: float) -> str:
    """Such as ``350 of 1000 images, 63.2/s, 10 s left``."""
    rate = done / elapsed_s if elapsed_s > 0 else 0.0
    of = "" if total is None else f" of {total}"
    left = f", {max(0, total - done) / rate:.0f} s left" if total is not None and rate else ""
    return f"{done}{of} images, {rate:.1f}/s{left}"


class _Rate(ProgressColumn):
    def render(self, task: Bar) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f}/s")
