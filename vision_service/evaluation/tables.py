"""A report's figures as tables, for terminals and pages alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vision_service.evaluation.compare import Comparison
from vision_service.evaluation.report import Report
from vision_service.types import Task

TITLES: dict[str, str] = {
    "map": "mAP@[.5:.95]",
    "map50": "AP50",
    "map75": "AP75",
    "map_small": "mAP, small objects",
    "map_medium": "mAP, medium objects",
    "map_large": "mAP, large objects",
    "map_known_classes": "mAP over the classes that the model has",
    "map50_known_classes": "AP50 over the classes that the model has",
    "recall_1": "mean recall, 1 detection an image",
    "recall_10": "mean recall, 10 detections an image",
    "recall_max": "mean recall, all detections",
    "best_f1": "best F1 at overlap 0.5",
    "best_f1_score": "score threshold of the best F1",
    "miou": "mIoU",
    "mdice": "mean Dice",
    "pixel_accuracy": "pixels right",
    "top1": "top-1",
    "top5": "top-5",
    "ece": "calibration error (ECE, 15 bins)",
    "class_name": "class",
    "ap": "mAP",
    "ap50": "AP50",
    "ap75": "AP75",
    "ap_small": "small",
    "ap_medium": "medium",
    "ap_large": "large",
    "iou": "IoU",
    "dice": "Dice",
}
"""What figures are called where people read them; the others are called as in the file."""


@dataclass(frozen=True, slots=True)
class Table:
    """Text in rows.

    Attributes:
        title: above it.
        header: a name a column.
        rows: as many texts each; columns after the first are figures.
    """

    title: str
    header: list[str]
    rows: list[list[str]]


def title_of(name: str) -> str:
    """What a figure is called."""
    return TITLES.get(name, name.replace("_", " "))


def figure(value: Any) -> str:
    """A figure with four digits; a dash for what could not be measured."""
    if value is None or (isinstance(value, float) and value != value):
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def overall(report: Report) -> Table:
    """The overall figures."""
    answered, asked = len(report.images), report.dataset["images"]
    split = f", split {report.dataset['split']}" if report.dataset["split"] else ""
    rows = [[title_of(name), figure(value)] for name, value in report.metrics.items()]
    model = f"{report.model['name']} {report.model['version']}"
    title = f"{model} on {report.dataset['path']}{split}: {answered} of {asked} images"
    return Table(title, ["figure", "value"], rows)


def by_class(report: Report, most: int | None = None) -> Table:
    """A row a class; worst first when there are more than ``most``, which are then all that is shown."""
    columns = list(report.per_class[0]) if report.per_class else ["class_name"]
    rows, title = report.per_class, "by class"
    if most is not None and len(rows) > most:
        rows = sorted(rows, key=lambda row: (row[columns[1]] is None, row[columns[1]] or 0.0))[:most]
        title = f"by class: the worst {most} of {len(report.per_class)}"
    cells = [[report.spoken(row["class_name"]), *(figure(row[name]) for name in columns[1:])] for row in rows]
    return Table(title, [title_of(name) for name in columns], cells)


def class_notes(report: Report) -> list[str]:
    """What does not match between model and dataset, and what became of it."""
    lines = []
    otherwise = [row for row in report.classes["mapped"] if row["by"] not in ("name", "WordNet")]
    if otherwise:
        pairs = ", ".join(f"{row['model']} = {row['dataset']} ({row['by']})" for row in otherwise[:20])
        lines.append(f"classes with two names: {pairs}{_more(len(otherwise), 20)}")
    missing = report.classes["only_in_dataset"]
    if missing:
        lines.append(
            f"{len(missing)} classes of the dataset that the model lacks count as never found: "
            f"{', '.join(missing[:20])}{_more(len(missing), 20)}"
        )
    extra = report.classes["only_in_model"]
    if extra:
        what = _UNMAPPED[Task(report.task), report.settings["unmapped"]]
        lines.append(
            f"{len(extra)} classes of the model that the dataset lacks {what}: "
            f"{', '.join(extra[:8])}{_more(len(extra), 8)}"
        )
    return lines


_UNMAPPED = {
    (Task.DETECT, "ignore"): "are ignored",
    (Task.DETECT, "count"): "count as false alarms (average precision does not have them)",
    (Task.SEGMENT, "ignore"): "are taken for background",
    (Task.SEGMENT, "count"): "count as wrong",
    (Task.CLASSIFY, "ignore"): "are left out of every answer",
    (Task.CLASSIFY, "count"): "compete, and are wrong",
}


def _more(count: int, shown: int) -> str:
    return f" and {count - shown} more" if count > shown else ""


def differences(found: Comparison, first: str, second: str) -> Table:
    """The overall figures of two reports."""
    rows = [
        [
            title_of(row.name),
            figure(row.first),
            figure(row.second),
            f"{row.change:+.4f}",
            f"{row.low:+.4f} to {row.high:+.4f}",
            f"{row.share_above:.1%}",
        ]
        for row in found.differences
    ]
    title = f"{first} ({found.models[0]}) to {second} ({found.models[1]}), {found.images} images"
    header = ["figure", "first", "second", "change", "95 % interval of the change", "resamples in which it rises"]
    return Table(title, header, rows)


def changed_classes(found: Comparison, most: int) -> Table:
    """The classes that changed."""
    rows = [
        [row["class_name"], figure(row["first"]), figure(row["second"]), _change(row["first"], row["second"])]
        for row in found.classes[:most]
    ]
    name = title_of(found.classes[0]["name"]) if found.classes else ""
    return Table(
        f"{name} of {_of(len(rows), len(found.classes), 'classes')}", ["class", "first", "second", "change"], rows
    )


def changed_images(found: Comparison, most: int) -> Table:
    """The images that changed."""
    rows = [[change.image, change.what, f"{change.second - change.first:+.4g}"] for change in found.changes[:most]]
    return Table(
        f"{_of(len(rows), len(found.changes), 'images')} whose answer changed",
        ["image", "what", _MEASURE[found.task]],
        rows,
    )


_MEASURE = {"detect": "errors", "segment": "1 - mIoU", "classify": "rank"}


def _change(first: float | None, second: float | None) -> str:
    return "-" if first is None or second is None else f"{second - first:+.4f}"


def _of(shown: int, count: int, what: str) -> str:
    return f"{count} {what}" if shown == count else f"the first {shown} of {count} {what}"
