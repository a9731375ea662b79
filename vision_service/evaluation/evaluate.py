"""From a model and a dataset to a report."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vision_service.errors import ConfigError, InvalidInput
from vision_service.evaluation.classes import ClassMapping, map_classes
from vision_service.evaluation.datasets import open_dataset
from vision_service.evaluation.detect import DetectionScorer, DetectOptions
from vision_service.evaluation.pairs import BINARY_NAMES
from vision_service.evaluation.predictors import ModelFacts, Predictor
from vision_service.evaluation.report import Report
from vision_service.evaluation.run import Run, run
from vision_service.evaluation.samples import Dataset, Sample
from vision_service.evaluation.scores import Scorer, Unmapped
from vision_service.types import Params, Task


@dataclass(frozen=True, slots=True)
class Options:
    """What may be chosen for an evaluation; ``None`` is the task's default.

    Attributes:
        format: of the dataset; empty: by what is there.
        split: of the dataset.
        classes: names of the ids in masks.
        map_file: which class of the model is which of the dataset.
        unmapped: see the tasks' options.
        score_threshold: detect, segment.
        iou_threshold: detect.
        max_detections: detect.
        difficult: detect.
        limit: the first so many images only.
        max_failures: stop once more images failed.
    """

    format: str = ""
    split: str = ""
    classes: Path | None = None
    map_file: Path | None = None
    unmapped: Unmapped | None = None
    score_threshold: float | None = None
    iou_threshold: float | None = None
    max_detections: int | None = None
    difficult: str | None = None
    limit: int | None = None
    max_failures: int | None = None


TAKES: dict[Task, frozenset[str]] = {
    Task.DETECT: frozenset({"unmapped", "score_threshold", "iou_threshold", "max_detections", "difficult"}),
    Task.SEGMENT: frozenset({"unmapped", "score_threshold"}),
    Task.CLASSIFY: frozenset({"unmapped"}),
}
"""Which choices have an effect on which task."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A report, and the dataset and the scorer that it came from, for pictures and files that need them."""

    report: Report
    dataset: Dataset
    scorer: Scorer


def evaluate(
    predictor: Predictor,
    root: Path,
    options: Options,
    *,
    started: Callable[[int], None] = lambda _: None,
    watch: Callable[[Sample], None] = lambda _: None,
) -> Evaluation:
    """Evaluate a model on a dataset.

    Args:
        predictor: the model.
        root: the dataset.
        options: what was chosen.
        started: told how many images there are, once the dataset was read.
        watch: told after every image.

    Raises:
        ConfigError: the dataset, the map of classes or an option does not fit.
        VisionError: see `run.run`.
    """
    facts = predictor.facts
    chosen = _chosen(facts.task, options)
    dataset = open_dataset(root, facts.task, format=options.format, split=options.split, classes=options.classes)
    samples = list(dataset.samples)[: options.limit]
    dataset = replace(dataset, samples=samples)
    is_binary = dataset.format == "masks" and dataset.class_names == BINARY_NAMES
    mapping = map_classes(facts.class_names, dataset.class_names, options.map_file, is_binary=is_binary)
    scorer, settings = _scorer(dataset, mapping, chosen)
    started(len(samples))
    begun_s = time.monotonic()
    outcome = run(predictor, dataset, scorer, max_failures=options.max_failures, watch=watch)
    seconds = time.monotonic() - begun_s
    if options.limit is not None:
        outcome.notes.append(f"only the first {len(samples)} images count")
    ran = {**facts.where, "seconds": round(seconds, 2), "images_per_s": round(len(samples) / seconds, 2)}
    report = _report(facts, dataset, settings, mapping, outcome, ran)
    report.dataset["classes_file"] = str(options.classes or "")
    return Evaluation(report, dataset, scorer)


def _report(
    facts: ModelFacts,
    dataset: Dataset,
    settings: dict[str, Any],
    mapping: ClassMapping,
    outcome: Run,
    ran: dict[str, Any],
) -> Report:
    scores = outcome.scores
    return Report(
        task=str(facts.task),
        model={"name": facts.name, "version": facts.version},
        dataset={
            "path": str(dataset.root),
            "format": dataset.format,
            "split": dataset.split,
            "images": len(dataset.samples),
            "class_names": list(dataset.class_names),
        },
        settings=settings,
        classes=mapping.to_json(),
        metrics=scores.metrics,
        per_class=scores.per_class,
        curves=scores.curves,
        failures=outcome.failures,
        notes=outcome.notes,
        images=scores.images,
        ran=ran,
    )


def _chosen(task: Task, options: Options) -> dict[str, Any]:
    """The choices that are set and belong to the task's scorer.

    Raises:
        InvalidInput: one that has no effect on the task, or is out of its range.
        ConfigError: the task cannot be evaluated.
    """
    if task not in TAKES:
        raise ConfigError(f"a {task} model cannot be evaluated: there is nothing to compare its images with")
    scoring = set().union(*TAKES.values())
    chosen = {name: value for name in sorted(scoring) if (value := getattr(options, name)) is not None}
    for name in chosen.keys() - TAKES[task]:
        takers = " and ".join(t for t, names in TAKES.items() if name in names)
        raise InvalidInput(name, f"has no effect on {task}, only on {takers}")
    Params(**{name: chosen[name] for name in ("score_threshold", "iou_threshold", "max_detections") if name in chosen})
    return chosen


def _scorer(dataset: Dataset, mapping: ClassMapping, chosen: dict[str, Any]) -> tuple[Scorer, dict[str, Any]]:
    if dataset.task is Task.DETECT:
        detect = DetectOptions(**chosen)
        return DetectionScorer(dataset, mapping, detect), asdict(detect)
    if dataset.task is Task.SEGMENT:
        from vision_service.evaluation.segment import SegmentationScorer, SegmentOptions

        segment = SegmentOptions(**chosen)
        return SegmentationScorer(dataset, mapping, segment), asdict(segment)
    from vision_service.evaluation.classify import ClassificationScorer, ClassifyOptions

    classify = ClassifyOptions(**chosen)
    return ClassificationScorer(dataset, mapping, classify), asdict(classify)
