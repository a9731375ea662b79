"""One run of a job on Ray: what is listed and not done yet is predicted and written on the nodes, then put together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from vision_service.errors import ConfigError
from vision_service.jobs.items import Item
from vision_service.jobs.job import MOST_REASONS
from vision_service.jobs.ray_engine import RayPredictor
from vision_service.jobs.ray_parts import Parts, Written
from vision_service.jobs.sources import list_files, no_images
from vision_service.records import Record


@dataclass(slots=True)
class RaySummary:
    """What a run did.

    Attributes:
        listed: images that the sources have.
        before: of those, done by earlier runs.
        seen: of those, done by this run.
        failed: of the images of this run, those without all their answers.
        failed_in_all: of all images, when the job is through.
        reasons: the first failures, as records.
        too_many_failures: ended it early.
    """

    listed: int = 0
    before: int = 0
    seen: int = 0
    failed: int = 0
    failed_in_all: int = 0
    reasons: list[Record] = field(default_factory=list)
    too_many_failures: bool = False

    def add(self, part: Written) -> None:
        """Count a part."""
        self.seen += part.images
        self.failed += part.failed
        self.reasons += part.reasons[: MOST_REASONS - len(self.reasons)]


def run_on_ray(
    predictor: RayPredictor,
    sources: Sequence[str],
    output: str,
    *,
    restart: bool = False,
    retry_failures: bool = False,
    too_many: Callable[[int, int], bool] = lambda failed, seen: False,
    starts: Callable[[int], Any] = lambda images: None,
    done: Callable[[int], Any] = lambda images: None,
) -> RaySummary:
    """Do what is not done yet.

    Args:
        predictor: on a cluster.
        sources: see `sources.list_files`; nodes must find files where they are found here.
        output: folder of the results: a path that all nodes share, or a URL that fsspec knows.
        restart: do again what is done.
        retry_failures: try failures again whose file has not changed, too.
        too_many: whether so many failed images, of so many seen, end the job.
        starts: told how many images this run has.
        done: told after each part how many it has.

    Returns:
        What was done. ``results.jsonl`` and ``failures.jsonl`` are there unless there were too many failures.

    Raises:
        ConfigError: there are no images, a source is a video, or the output cannot be used.
        VisionError: the models cannot be loaded on the nodes.
    """
    items = list(list_files(sources))
    _check(items, sources)
    parts = Parts(output, predictor.fingerprint())
    if restart:
        parts.clear()
    pending = list(parts.pending(items, retry_failures=retry_failures))
    starts(len(pending))
    summary = RaySummary(listed=len(items), before=len(items) - len(pending))
    for part in predictor.write(pending, parts):
        summary.add(part)
        done(part.images)
        if too_many(summary.failed, summary.seen):
            summary.too_many_failures = True
            return summary
    summary.failed_in_all = parts.finish(items)
    return summary


def _check(items: Sequence[Item], sources: Sequence[str]) -> None:
    if not items:
        raise no_images(sources)
    video = next((item for item in items if item.is_video), None)
    if video is not None:
        raise ConfigError(f"{video.file} is a video, which only the local engine reads: leave --engine ray out")
