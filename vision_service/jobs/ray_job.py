"""One run of a job on Ray: what is listed and not done yet is predicted and written on the nodes, then put together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from vision_service.errors import ConfigError
from vision_service.jobs.items import Item
from vision_service.jobs.ray_engine import PART_IMAGES, RayPredictor
from vision_service.jobs.ray_parts import Parts, Written
from vision_service.jobs.sources import list_files
from vision_service.records import Record

MOST_REASONS = 20
"""So many failures are named at the end of a run; the file has all."""


@dataclass(slots=True)
class RaySummary:
    """What a run did.

    Attributes:
        listed: images that the sources have.
        seen: images of this run; the others were done before.
        failed: of those, without all their answers.
        reasons: the first failures, as records.
        too_many_failures: ended it early.
    """

    listed: int = 0
    seen: int = 0
    failed: int = 0
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
    part_images: int = PART_IMAGES,
    too_many: Callable[[int, int], bool] = lambda failed, seen: False,
    show: Callable[[RaySummary, int], Any] = lambda summary, total: None,
) -> RaySummary:
    """Do what is not done yet.

    Args:
        predictor: on a cluster.
        sources: see `sources.list_files`; nodes must find files where they are found here.
        output: folder of the results: a path that all nodes share, or a URL that fsspec knows.
        part_images: images of a part.
        too_many: whether so many failed images, of so many seen, end the job.
        show: told after each part; with the number of images of this run.

    Returns:
        What was done. ``results.jsonl`` and ``failures.jsonl`` are there unless there were too many failures.

    Raises:
        ConfigError: a source is a video, or the output cannot be used.
        VisionError: the models cannot be loaded on the nodes.
    """
    items = list(list_files(sources))
    _refuse_videos(items)
    parts = Parts(output, predictor.fingerprint())
    pending = list(parts.pending(items))
    summary = RaySummary(len(items))
    for part in predictor.write(pending, parts, part_images):
        summary.add(part)
        show(summary, len(pending))
        if too_many(summary.failed, summary.seen):
            summary.too_many_failures = True
            return summary
    parts.finish(items)
    return summary


def _refuse_videos(items: Sequence[Item]) -> None:
    video = next((item for item in items if item.is_video), None)
    if video is not None:
        raise ConfigError(f"{video.file} is a video, which only the local engine reads: leave --engine ray out")
