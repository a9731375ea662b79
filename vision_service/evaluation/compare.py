"""What changed from one report to another, with intervals from a paired bootstrap over images."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vision_service.errors import ConfigError
from vision_service.evaluation.places import listing
from vision_service.evaluation.report import Report, write_text
from vision_service.evaluation.scores import Record, Resampled
from vision_service.types import Task

FORMAT = "vision-service comparison 1"
INTERVAL = (2.5, 97.5)
"""Percentiles that bound the interval: 95 %."""


@dataclass(frozen=True, slots=True)
class Difference:
    """A figure in both reports.

    Attributes:
        name: of the figure.
        first: in the first report, over the images that both have.
        second: in the second.
        low: lower end of the 95 % interval of ``second - first``.
        high: upper end.
        share_above: of the resamples, in which ``second`` is larger.
    """

    name: str
    first: float
    second: float
    low: float
    high: float
    share_above: float

    @property
    def change(self) -> float:
        """``second - first``."""
        return self.second - self.first


@dataclass(frozen=True, slots=True)
class ImageChange:
    """An image that is answered better or worse.

    Attributes:
        image: its name.
        first: what the first report has: errors (detect), 1 - mIoU (segment), the rank of the right class (classify).
        second: the same of the second; lower is better.
        what: it in words.
    """

    image: str
    first: float
    second: float
    what: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """From one report to another.

    Attributes:
        task: of both.
        models: names of the two.
        images: how many both have.
        differences: a row a figure.
        classes: ``class_name``, the figure's ``name``, ``first`` and ``second``; the largest change first.
        changes: images, the largest change first.
        notes: what a reader should know.
        resamples: of the bootstrap.
        seed: of it.
    """

    task: str
    models: tuple[str, str]
    images: int
    differences: list[Difference]
    classes: list[dict[str, Any]]
    changes: list[ImageChange]
    notes: list[str]
    resamples: int
    seed: int

    def write(self, path: Path) -> None:
        """As JSON.

        Raises:
            ConfigError: it cannot be written.
        """
        data = asdict(self)
        for row in data["differences"]:
            row |= {name: None for name, value in row.items() if value != value}  # JSON has no NaN
        write_text(path, json.dumps({"report": FORMAT, **data}, indent=1) + "\n")


def compare_reports(first: Report, second: Report, *, resamples: int = 1000, seed: int = 0) -> Comparison:
    """Compare two reports on the images that both have.

    Both reports are evaluated on the same random draws of images, with replacement, as many as there are; the interval
    is the 2.5th to the 97.5th percentile of the differences (B. Efron and R. Tibshirani, An Introduction to the
    Bootstrap, 1993, chapter 13; paired as by P. Koehn, EMNLP 2004). The figures are computed anew for every draw.

    Args:
        first: of the model that was.
        second: of the model that is.
        resamples: how many draws.
        seed: of the draws; the same seed draws the same.

    Raises:
        ConfigError: they are not of one task and dataset, or have no image in common.
    """
    _check(first, second)
    names = [record["image"] for record in first.images]
    others = {record["image"]: record for record in second.images}
    pairs = [(record, others[record["image"]]) for record in first.images if record["image"] in others]
    if not pairs:
        raise ConfigError(f"the reports have no image in common: {listing(names, 3)}; {listing(others, 3)}")
    wrong = [one["image"] for one, other in pairs if _truth(one) != _truth(other)]
    if wrong:
        raise ConfigError(
            f"{len(wrong)} images are annotated otherwise in the second report, so figures cannot be compared: "
            f"{listing(wrong, 5)}"
        )
    differences = _bootstrap([one for one, _ in pairs], [other for _, other in pairs], first, resamples, seed)
    return Comparison(
        first.task,
        (_label(first), _label(second)),
        len(pairs),
        differences,
        _classes(first, second),
        _changes(pairs, first, second),
        _notes(first, second, pairs),
        resamples,
        seed,
    )


def resampled(task: Task, images: list[Record], class_count: int) -> Resampled:
    """The records of a report, ready to be weighed."""
    if task is Task.DETECT:
        from vision_service.evaluation.ranking import RankedDetections

        return RankedDetections(images, class_count)
    if task is Task.SEGMENT:
        from vision_service.evaluation.segment import SegmentedImages

        return SegmentedImages(images, class_count)
    from vision_service.evaluation.classify import ClassifiedImages

    return ClassifiedImages(images, class_count)


def _check(first: Report, second: Report) -> None:
    for what, one, other in (
        ("tasks", first.task, second.task),
        ("classes", first.class_names, second.class_names),
    ):
        if one != other:
            raise ConfigError(f"the reports are of different {what}, so there is nothing to compare: {one}; {other}")


def _truth(record: Record) -> Any:
    """What people say of an image, as far as a report keeps it."""
    if "confusion" in record:
        pixels: dict[int, int] = {}
        for truth, _, count in record["confusion"]:
            pixels[truth] = pixels.get(truth, 0) + count
        return pixels
    return [row[:6] for row in record["truth"]] if isinstance(record["truth"], list) else record["truth"]


def _bootstrap(
    first: list[Record], second: list[Record], report: Report, resamples: int, seed: int
) -> list[Difference]:
    count = len(first)
    sides = [resampled(Task(report.task), images, len(report.class_names)) for images in (first, second)]
    whole = [side.metrics(np.ones(count)) for side in sides]
    rng = np.random.default_rng(seed)
    # With classes left out, one may have too few for a top-5.
    draws: dict[str, list[float]] = {name: [] for name in whole[0] if name in whole[1]}
    for _ in range(resamples):
        weights = rng.multinomial(count, np.full(count, 1 / count)).astype(np.float64)
        drawn = [side.metrics(weights) for side in sides]
        for name, values in draws.items():
            values.append(drawn[1][name] - drawn[0][name])
    return [_difference(name, whole[0][name], whole[1][name], np.array(values)) for name, values in draws.items()]


def _difference(name: str, first: float, second: float, draws: NDArray[np.float64]) -> Difference:
    draws = draws[~np.isnan(draws)]  # none of the images drawn has an object
    low, high = np.percentile(draws, INTERVAL) if len(draws) else (float("nan"), float("nan"))
    # A tie is half for either side.
    above = float(((draws > 0) + 0.5 * (draws == 0)).mean()) if len(draws) else float("nan")
    return Difference(name, first, second, float(low), float(high), above)


_CLASS_FIGURE = {Task.DETECT: "ap", Task.SEGMENT: "iou", Task.CLASSIFY: "top1"}


def _classes(first: Report, second: Report) -> list[dict[str, Any]]:
    name = _CLASS_FIGURE[Task(first.task)]
    rows = [
        {"class_name": first.spoken(one["class_name"]), "name": name, "first": one[name], "second": other[name]}
        for one, other in zip(first.per_class, second.per_class, strict=True)
        if one[name] != other[name]
    ]
    return sorted(rows, key=lambda row: -abs((row["second"] or 0.0) - (row["first"] or 0.0)))


def _changes(pairs: list[tuple[Record, Record]], first: Report, second: Report) -> list[ImageChange]:
    describe: Callable[[Record, Report], tuple[float, str]] = _DESCRIBE[Task(first.task)]
    found = []
    for one, other in pairs:
        (before, was), (after, now) = describe(one, first), describe(other, second)
        if before != after or was != now:
            found.append(ImageChange(one["image"], before, after, f"{was} -> {now}"))
    return sorted(found, key=lambda change: -abs(change.second - change.first))


def _boxes(record: Record, _: Report) -> tuple[float, str]:
    return record["wrong"] + record[
        "missed"
    ], f"{record['right']} right, {record['wrong']} wrong, {record['missed']} missed"


def _pixels(record: Record, _: Report) -> tuple[float, str]:
    miou = record["miou"]
    return (1.0, "nothing to measure") if miou is None else (round(1.0 - miou, 6), f"mIoU {miou:.4f}")


def _ranked(record: Record, report: Report) -> tuple[float, str]:
    top, score = record["top"][0]
    return record["rank"], f"{report.class_name(top)} {score:.2f}, the right one is number {record['rank']}"


_DESCRIBE = {Task.DETECT: _boxes, Task.SEGMENT: _pixels, Task.CLASSIFY: _ranked}


def _notes(first: Report, second: Report, pairs: list[tuple[Record, Record]]) -> list[str]:
    notes = []
    for what, report in (("first", first), ("second", second)):
        alone = len(report.images) - len(pairs)
        if alone:
            notes.append(f"{alone} images are in the {what} report alone and do not count")
    changed = sorted(
        name for name in {*first.settings, *second.settings} if first.settings.get(name) != second.settings.get(name)
    )
    if changed:
        notes.append(f"the reports were made with different settings: {listing(changed)}")
    if first.task == Task.DETECT:
        one, other = (report.metrics["best_f1_score"] or 0.0 for report in (first, second))
        notes.append(
            f"images are judged at overlap 0.5 and at each report's score of best F1: {one:.3f} and {other:.3f}"
        )
    return notes


def _label(report: Report) -> str:
    return f"{report.model['name']} {report.model['version']}"
