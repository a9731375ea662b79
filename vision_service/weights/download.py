"""One file from its source to its place: resumed, retried, checked, and only then given its name.

Bytes gather in ``NAME.part`` beside the final path, and ``NAME.part.json`` says which state of which source they came
from. A file appears under its own name by an atomic rename, when its size and sha256 are right. A lock per file lets
one process fetch while others wait and then find the file there.
"""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Self

from filelock import FileLock, Timeout

from vision_service.config import FileSpec
from vision_service.config.settings import ServerSettings
from vision_service.errors import WeightsError
from vision_service.weights import verified
from vision_service.weights.check import sha256_of
from vision_service.weights.sources import Interrupted, Source, is_local, mirrored, open_source

logger = logging.getLogger(__name__)

_LONGEST_WAIT_S = 60.0


class Stopped(Exception):
    """The download was told to stop; what came so far is kept for the next time."""


@dataclass(frozen=True, slots=True)
class FetchOptions:
    """How files are fetched.

    Attributes:
        weights_dir: the cache.
        mirror: see `sources.mirrored`.
        offline: only ``file:`` addresses may be used.
        parallel: most files at a time.
        tries: attempts without a new byte before a download gives up.
        timeout_s: for a connection, and for each next piece.
        backoff_s: wait after the first failure; doubles with each further one.
    """

    weights_dir: Path
    mirror: str = ""
    offline: bool = False
    parallel: int = 4
    tries: int = 6
    timeout_s: float = 30.0
    backoff_s: float = 0.5

    @classmethod
    def from_settings(cls, settings: ServerSettings) -> Self:
        """As the process was told."""
        return cls(settings.weights_dir, settings.weights_mirror, settings.offline)


class Watcher:
    """Told what happens to a download; called from the threads that do it. This one writes the log."""

    def started(self, file: FileSpec, url: str, done_bytes: int, total_bytes: int | None) -> None:
        """A connection stands; so many bytes are here already."""
        logger.info("fetching %s from %s, %d of %s bytes are here", file.file, url, done_bytes, total_bytes or "?")

    def moved(self, file: FileSpec, done_bytes: int) -> None:
        """So many bytes are here now."""

    def waiting(self, file: FileSpec, reason: str) -> None:
        """Nothing moves for a while."""
        logger.info("%s: %s", file.file, reason)

    def finished(self, file: FileSpec, sha256: str) -> None:
        """The file is in its place."""
        checked = "its sha256 is right" if file.sha256 else f"unverified, its sha256 is {sha256}"
        logger.info("fetched %s, %s", file.file, checked)


def address(file: FileSpec, options: FetchOptions) -> str:
    """Where a file will be fetched from; empty when nobody knows."""
    return mirrored(file.url, options.mirror, Path(file.file).name) if file.url else ""


def reachable(file: FileSpec, options: FetchOptions) -> bool:
    """Whether a file may be fetched at all: it has an address, and offline mode allows that."""
    url = address(file, options)
    return bool(url) and (not options.offline or is_local(url))


def fetch(
    file: FileSpec, options: FetchOptions, watcher: Watcher, stop: threading.Event, *, replace: bool = False
) -> None:
    """Bring a file to its place, unless it is there.

    Args:
        file: an absolute path and where it comes from.
        options: how.
        watcher: told what happens.
        stop: set to end the download at the next piece.
        replace: fetch even if a file is there.

    Raises:
        WeightsError: it cannot be had, is not what the spec says, or cannot be written; names the next step. Nothing
            stands under the final name then that was not there before.
        Stopped: ``stop`` was set.
    """
    target = Path(file.file)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(file, watcher, stop):
            if target.exists() and not replace:
                return
            _Download(file, address(file, options), options, watcher, stop).run()
    except OSError as error:
        raise WeightsError(
            f"{target} cannot be written: {error.strerror or error}. Make room, or name another folder by the setting "
            "weights_dir (VISION_SERVICE_WEIGHTS_DIR)"
        ) from None


@contextmanager
def _locked(file: FileSpec, watcher: Watcher, stop: threading.Event) -> Iterator[None]:
    target = Path(file.file)
    lock = FileLock(target.with_name(f".{target.name}.lock"))
    told = False
    while True:
        try:
            lock.acquire(timeout=0.5)
            break
        except Timeout:
            if stop.is_set():
                raise Stopped from None
            if not told:
                watcher.waiting(file, "another process is fetching it")
                told = True
    try:
        yield
    finally:
        lock.release()


class _Download:
    """One file's way, while its lock is held."""

    def __init__(
        self, file: FileSpec, url: str, options: FetchOptions, watcher: Watcher, stop: threading.Event
    ) -> None:
        self._file, self._url, self._options, self._watcher, self._stop = file, url, options, watcher, stop
        self._target = Path(file.file)
        self._part = self._target.with_name(self._target.name + ".part")
        self._notes = self._part.with_name(self._part.name + ".json")

    def run(self) -> None:
        resumed = self._part.exists()
        self._receive_with_patience()
        sha256 = sha256_of(self._part)
        if resumed and not sha256.startswith(self._file.sha256):
            self._forget()  # what lay here may have been of another file
            self._receive_with_patience()
            sha256 = sha256_of(self._part)
        self._check(sha256)
        self._part.replace(self._target)
        self._notes.unlink(missing_ok=True)
        verified.note(self._options.weights_dir, self._target, sha256)
        self._watcher.finished(self._file, sha256)

    def _receive_with_patience(self) -> None:
        failures, most = 0, self._here()
        while True:
            try:
                return self._receive()
            except Interrupted as error:
                here = self._here()
                failures = 1 if here > most else failures + 1
                most = max(most, here)
                if failures >= self._options.tries:
                    raise WeightsError(
                        f"cannot fetch {self._url}: {error}, in {failures} tries. {here} bytes are kept in "
                        f"{self._part}; the same command goes on from there"
                    ) from None
                backoff_s = self._options.backoff_s * 2 ** (failures - 1) * random.uniform(0.5, 1.0)  # noqa: S311
                wait_s = min(backoff_s if error.wait_s is None else error.wait_s, _LONGEST_WAIT_S)
                self._watcher.waiting(self._file, f"{error}; trying again in {wait_s:.1f} s")
                if self._stop.wait(wait_s):
                    raise Stopped from None

    def _receive(self) -> None:
        """From what is here to the end."""
        if self._stop.is_set():
            raise Stopped
        here, validator = self._resume_point()
        with open_source(self._url, here, validator, self._options.timeout_s) as source:
            if source.offset not in {0, here}:
                raise WeightsError(f"cannot fetch {self._url}: asked for byte {here} on, got {source.offset} on")
            self._check_room(source)
            with self._part.open("r+b" if source.offset else "wb") as part:
                part.seek(source.offset)
                self._notes.write_text(json.dumps({"url": self._url, "validator": source.validator}))
                self._watcher.started(self._file, self._url, source.offset, source.total_bytes or self._file.size_bytes)
                self._write(part, source)
                part.flush()
                os.fsync(part.fileno())
        if source.total_bytes is not None and self._here() < source.total_bytes:
            raise Interrupted(f"the connection ended after {self._here()} of {source.total_bytes} bytes")

    def _write(self, part: IO[bytes], source: Source) -> None:
        done = source.offset
        most = source.total_bytes or self._file.size_bytes
        for chunk in source.chunks:
            if self._stop.is_set():
                raise Stopped
            done += len(chunk)
            if most is not None and done > most:
                raise WeightsError(f"cannot fetch {self._url}: it is longer than the {most} bytes that it should have")
            part.write(chunk)
            self._watcher.moved(self._file, done)

    def _resume_point(self) -> tuple[int, str]:
        """How many bytes to keep, and of which state of the source they are."""
        try:
            notes = json.loads(self._notes.read_text())
            validator = str(notes["validator"]) if notes["url"] == self._url else ""
        except (OSError, ValueError, TypeError, KeyError):
            validator = ""
        # Without either, bytes of two states could be joined and nobody would notice.
        known = bool(validator or self._file.sha256)
        return (self._here(), validator) if known else (0, "")

    def _check_room(self, source: Source) -> None:
        total, expected = source.total_bytes, self._file.size_bytes
        if total is not None and expected is not None and total != expected:
            raise WeightsError(
                f"cannot fetch {self._url}: it has {total} bytes, {self._target.name} should have {expected}. It is "
                "another file, or a page about an error; open the address in a browser, or set weights_mirror"
            )
        needed = (total or expected or 0) - source.offset
        free = shutil.disk_usage(self._part.parent).free
        if needed > free:
            raise WeightsError(
                f"cannot fetch {self._url}: it needs {needed / 1e6:.1f} MB more and {self._part.parent} has "
                f"{free / 1e6:.1f} MB free. Make room, or name another folder by the setting weights_dir"
            )

    def _check(self, sha256: str) -> None:
        size = self._here()
        problems = []
        if self._file.size_bytes not in {None, size}:
            problems.append(f"has {size} bytes instead of {self._file.size_bytes}")
        if not sha256.startswith(self._file.sha256):
            problems.append(f"has the sha256 {sha256} instead of {self._file.sha256}")
        if problems:
            self._forget()
            raise WeightsError(
                f"what came from {self._url} {' and '.join(problems)}; it was thrown away. Fetch again; if that "
                "does not help, the source or the mirror has another file than the one that is meant: ask who runs it"
            )

    def _forget(self) -> None:
        self._part.unlink(missing_ok=True)
        self._notes.unlink(missing_ok=True)

    def _here(self) -> int:
        return self._part.stat().st_size if self._part.exists() else 0
