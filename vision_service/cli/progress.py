"""Downloads as a person sees them: bars on a terminal, lines in a pipe."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from vision_service.weights.download import Watcher

if TYPE_CHECKING:
    from vision_service.config import FileSpec


class Downloads(Watcher):
    """Shows downloads on stderr: what is fetched from where, how far it is, at which rate, and what became of it."""

    def __init__(self) -> None:
        self._bars: dict[str, TaskID] = {}
        self._begun: dict[str, tuple[float, int]] = {}
        self._done: dict[str, int] = {}
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not sys.stderr.isatty(),
            transient=True,
        )

    def started(self, file: FileSpec, url: str, done_bytes: int, total_bytes: int | None) -> None:
        """Name the file, its size and its source; a resumed one says where it goes on."""
        size = "unknown size" if total_bytes is None else f"{total_bytes / 1e6:.1f} MB"
        resumed = f", going on from {done_bytes / 1e6:.1f} MB" if done_bytes else ""
        self._say(f"pulling {_name(file)} ({size}) from {url}{resumed}")
        self._begun[file.file] = (time.monotonic(), done_bytes)
        if file.file not in self._bars:
            self._bars[file.file] = self._progress.add_task(_name(file), total=total_bytes)
        self._progress.update(self._bars[file.file], completed=done_bytes, total=total_bytes)

    def moved(self, file: FileSpec, done_bytes: int) -> None:
        """Move its bar."""
        self._done[file.file] = done_bytes
        self._progress.update(self._bars[file.file], completed=done_bytes)

    def waiting(self, file: FileSpec, reason: str) -> None:
        """Say why nothing moves."""
        self._say(f"{_name(file)}: {reason}")

    def finished(self, file: FileSpec, sha256: str) -> None:
        """Say what was compared, and the rate."""
        begun_s, begun_bytes = self._begun[file.file]
        seconds = max(time.monotonic() - begun_s, 1e-3)
        rate = (self._done.get(file.file, begun_bytes) - begun_bytes) / 1e6 / seconds
        checked = "sha256 is right" if file.sha256 else f"no sha256 to compare with, it has {sha256}"
        self._say(f"pulled {_name(file)} in {seconds:.1f} s, {rate:.1f} MB/s: {checked}")

    def _say(self, line: str) -> None:
        if self._progress.disable:
            typer.echo(line, err=True)
        else:
            self._progress.console.print(line, markup=False, highlight=False)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the bars away."""
        self._progress.stop()


def _name(file: FileSpec) -> str:
    return Path(file.file).name
