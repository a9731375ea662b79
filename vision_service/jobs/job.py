"""One run of a job: what is listed and not done yet goes through a predictor, and is written, committed and counted."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import FrameType, TracebackType
from typing import Any, Protocol, Self

from vision_service.errors import ConfigError, InvalidImage
from vision_service.jobs.items import Item, Outcome
from vision_service.jobs.journal import Journal
from vision_service.jobs.predictor import in_order
from vision_service.jobs.sources import list_files
from vision_service.jobs.video import Step, count_frames, frames_of
from vision_service.records import Record

CHUNK_IMAGES = 64
CHUNK_S = 2.0
"""A chunk is committed when it has so many images, or is so old: no more is lost when the process is killed."""

MOST_REASONS = 20
"""So many failures are named at the end of a run; the file has all."""

_FIRST_JUDGED = 50
"""A share of failures means nothing before so many images."""


class Answers(Protocol):
    """What gives an image its answers: models in this process, or a server."""

    in_flight: int

    def predict(self, item: Item, *, keep_image: bool = False) -> Outcome:
        """One image; what goes wrong is in the outcome."""


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How many images may fail before the job stops: more than a number, or than a share of those seen.

    Attributes:
        most: so many.
        share: 0..1, judged from the 50th image on.
    """

    most: int | None = None
    share: float | None = None

    @classmethod
    def parse(cls, text: str | None) -> Tolerance:
        """``20`` or ``5%``; ``None`` tolerates all.

        Raises:
            ConfigError: neither a number nor a percentage.
        """
        if text is None:
            return cls()
        try:
            if text.endswith("%") and 0 <= float(text[:-1]) <= 100:
                return cls(share=float(text[:-1]) / 100)
            if not text.endswith("%") and int(text) >= 0:
                return cls(most=int(text))
        except ValueError:
            pass
        raise ConfigError(f"--max-failures is a number of images or a percentage such as 5%, got {text!r}")

    def is_passed(self, failed: int, seen: int) -> bool:
        """Whether it is time to stop."""
        if self.most is not None and failed > self.most:
            return True
        return self.share is not None and seen >= _FIRST_JUDGED and failed > self.share * seen


@dataclass(frozen=True, slots=True)
class Done:
    """An outcome, written down.

    Attributes:
        outcome: without its image.
        results: its records as JSON lines, each with its end.
        failures: likewise.
    """

    outcome: Outcome
    results: str
    failures: str


@dataclass(slots=True)
class Summary:
    """What a run did.

    Attributes:
        seen: images of this run.
        failed: of those, without all their answers.
        reasons: the first failures, as records.
        signal: that ended it early, or 0.
        too_many_failures: ended it early.
    """

    seen: int = 0
    failed: int = 0
    reasons: list[Record] = field(default_factory=list)
    signal: int = 0
    too_many_failures: bool = False


class StopSignals:
    """The first Ctrl-C or SIGTERM lets what is under way finish; a second Ctrl-C does not. Use it in a ``with``."""

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = number


@dataclass(frozen=True, slots=True)
class Job:
    """What to do.

    Attributes:
        sources: see `sources.list_files`.
        step: which frames of videos.
        tolerance: for failures.
        timings: put times into records.
        write: makes the files about an image, on a worker; gets the outcome with its image, and its stem.
        keep_image: whether ``write`` needs the image.
    """

    sources: Sequence[str]
    step: Step = field(default_factory=Step)
    tolerance: Tolerance = field(default_factory=Tolerance)
    timings: bool = False
    write: Callable[[Outcome, Any], None] | None = None
    keep_image: bool = False

    def run(self, answers: Answers, journal: Journal | None, show: Callable[[Done], None]) -> Summary:
        """Do what is not done yet.

        Args:
            answers: asked for each image.
            journal: where results go; ``None``: nowhere.
            show: called with what became of each image, in order.
        """
        summary = Summary()
        chunk = _Chunk(journal)
        with StopSignals() as stop:
            for done in in_order(
                lambda pair: self._answer(answers, *pair), self._pending(journal, summary, stop), answers.in_flight
            ):
                show(done)
                chunk.add(done)
                summary.seen += 1
                if done.outcome.failures:
                    summary.failed += 1
                    summary.reasons += done.outcome.failure_records() if len(summary.reasons) < MOST_REASONS else []
                if self.tolerance.is_passed(summary.failed, summary.seen):
                    summary.too_many_failures = True
            chunk.commit()
            summary.signal = stop.received
        return summary

    def count(self) -> int:
        """How many images the sources have, as far as that can be told without reading videos through."""
        return sum(count_frames(item, self.step) if item.is_video else 1 for item in list_files(self.sources))

    def _pending(self, journal: Journal | None, summary: Summary, stop: StopSignals) -> Iterator[tuple[Item, Any]]:
        wanted = (lambda _: True) if journal is None else journal.is_wanted
        for item in self._items(wanted):
            if stop.received or summary.too_many_failures:
                return
            yield item, None if journal is None else journal.stem_of(item)

    def _items(self, wanted: Callable[[Item], bool]) -> Iterator[Item]:
        for file in list_files(self.sources):
            if not file.is_video:
                if wanted(file):
                    yield file
                continue
            empty = True
            try:
                for frame in frames_of(file, self.step, wanted):
                    empty = False
                    yield frame
            except InvalidImage:
                if empty and wanted(file):
                    yield file  # it will fail, with its reason

    def _answer(self, answers: Answers, item: Item, stem: Any) -> Done:
        outcome = answers.predict(item, keep_image=self.keep_image)
        if self.write is not None and stem is not None and outcome.results:
            self.write(outcome, stem)
        return Done(
            replace(outcome, image=None, item=replace(item, pixels=None)),
            "".join(map(line_of, outcome.records(timings=self.timings))),
            "".join(map(line_of, outcome.failure_records())),
        )


class _Chunk:
    """What was done since the last commit."""

    def __init__(self, journal: Journal | None) -> None:
        self._journal = journal
        self._empty()

    def add(self, done: Done) -> None:
        """Take one; commit when it is time."""
        if self._journal is None:
            return
        # Only what the journal notes: class maps and pictures of a chunk would be a lot of memory.
        self._outcomes.append(replace(done.outcome, results=()))
        self._results.append(done.results)
        self._failures.append(done.failures)
        if len(self._outcomes) >= CHUNK_IMAGES or time.monotonic() - self._since_s >= CHUNK_S:
            self.commit()

    def commit(self) -> None:
        """Make what there is last."""
        if self._journal is not None and self._outcomes:
            self._journal.commit(self._outcomes, "".join(self._results), "".join(self._failures))
        self._empty()

    def _empty(self) -> None:
        self._outcomes: list[Outcome] = []
        self._results: list[str] = []
        self._failures: list[str] = []
        self._since_s = time.monotonic()


def line_of(record: Record) -> str:
    """A record as it stands in a file of JSON lines."""
    return json.dumps(record) + "\n"
