"""Plots of a report, as pictures that a page can hold."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

from vision_service.evaluation.report import Report
from vision_service.evaluation.tables import title_of
from vision_service.types import Task

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from vision_service.evaluation.compare import Comparison

_MOST_CURVES = 10
_MOST_BARS = 40
_MOST_CELLS = 25


def report_plots(report: Report) -> list[tuple[str, str]]:
    """What a report shows best as a picture.

    Returns:
        Captions and pictures, as addresses for ``<img src>``.
    """
    draw: dict[Task, list[Callable[[Report], tuple[str, str] | None]]] = {
        Task.DETECT: [_precision_recall, _f1, _bars_of("ap")],
        Task.SEGMENT: [_bars_of("iou"), _pixel_confusion],
        Task.CLASSIFY: [_reliability, _image_confusion, _bars_of("top1")],
    }
    return [plot for make in draw[Task(report.task)] if (plot := make(report)) is not None]


def comparison_plot(found: Comparison) -> tuple[str, str]:
    """The changes with their intervals."""
    rows = found.differences[::-1]
    figure, axes = _figure(6.4, 1.2 + 0.45 * len(rows))
    at = np.arange(len(rows))
    change = np.array([row.change for row in rows])
    reach = np.array([[row.change - row.low, row.high - row.change] for row in rows]).T
    axes.errorbar(change, at, xerr=np.maximum(reach, 0.0), fmt="o", color="#1f5fa8", capsize=4)
    axes.axvline(0.0, color="#888888", linewidth=1)
    axes.set_yticks(at, [title_of(row.name) for row in rows])
    axes.set_xlabel("second - first")
    return "Changes with their 95 % intervals", _address(figure)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _address(figure: Figure) -> str:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def _precision_recall(report: Report) -> tuple[str, str] | None:
    curves: dict[str, list[float]] = report.curves["precision_at_recall"]
    objects = {row["class_name"]: row["objects"] for row in report.per_class}
    shown = sorted(curves, key=lambda name: -objects[name])[:_MOST_CURVES]
    figure, axes = _figure(6.4, 4.4)
    recall = np.linspace(0, 1, 101)
    for name in shown:
        axes.plot(recall, curves[name], linewidth=1.3, label=name)
    axes.plot(recall, np.mean(list(curves.values()), axis=0), color="black", linewidth=2.2, label="mean of all")
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    axes.legend(fontsize=7, loc="lower left")
    more = "" if len(shown) == len(curves) else f" (the {len(shown)} classes with most objects, and the mean)"
    return f"Precision and recall at overlap 0.5{more}", _address(figure)


def _f1(report: Report) -> tuple[str, str] | None:
    points = np.array(report.curves["f1_at_score"]).reshape(-1, 4)
    if len(points) < 2:
        return None
    figure, axes = _figure(6.4, 4.4)
    for column, name, colour in ((1, "precision", "#1f5fa8"), (2, "recall", "#c8641e"), (3, "F1", "black")):
        axes.plot(points[:, 0], points[:, column], color=colour, label=name)
    axes.axvline(report.metrics["best_f1_score"] or 0.0, color="#888888", linestyle=":", label="best F1")
    axes.set(xlabel="score threshold", xlim=(0, 1), ylim=(0, 1.02))
    axes.legend(fontsize=8)
    return "Precision, recall and F1 over all objects by score threshold, at overlap 0.5", _address(figure)


def _bars_of(name: str) -> Callable[[Report], tuple[str, str] | None]:
    def draw(report: Report) -> tuple[str, str] | None:
        rows = sorted((row for row in report.per_class if row[name] is not None), key=lambda row: -float(row[name]))
        if len(rows) < 2:
            return None
        what = f"{title_of(name)} by class"
        if len(rows) > _MOST_BARS:
            rows, what = rows[-_MOST_BARS:], f"{what}, the worst {_MOST_BARS} of {len(rows)}"
        figure, axes = _figure(6.4, 0.8 + 0.22 * len(rows))
        axes.barh(
            [report.spoken(row["class_name"]) for row in rows][::-1], [row[name] for row in rows][::-1], color="#1f5fa8"
        )
        axes.set(xlim=(0, 1))
        axes.tick_params(axis="y", labelsize=7)
        return what, _address(figure)

    return draw


def _pixel_confusion(report: Report) -> tuple[str, str] | None:
    counts = np.array(report.curves["confusion"], np.float64)[:-1]
    return _matrix(counts, report.class_names, "Share of each class's pixels by what was found")


def _image_confusion(report: Report) -> tuple[str, str] | None:
    count = len(report.class_names)
    counts = np.zeros((count, count + 1))
    for truth, found, images in report.curves["confusion"]:
        counts[truth, found] = images
    return _matrix(counts, [*map(report.spoken, report.class_names)], "Share of each class's images by answer")


def _matrix(counts: Any, names: list[str], what: str) -> tuple[str, str]:
    """Rows of a confusion matrix as shares; of many classes those that are confused most."""
    count = len(names)
    if count > _MOST_CELLS:
        wrong = counts[:, :count] - np.diag(np.diag(counts[:, :count]))
        kept = np.sort(
            np.argsort(-(wrong.sum(axis=0) + counts.sum(axis=1) - np.diag(counts)), kind="stable")[:_MOST_CELLS]
        )
        what = f"{what}: the {_MOST_CELLS} classes that are confused most, of {count}"
        rest = counts[kept].sum(axis=1) - counts[np.ix_(kept, kept)].sum(axis=1)
        counts = np.column_stack([counts[np.ix_(kept, kept)], rest])
        names = [names[k] for k in kept]
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = 2.2 + 0.24 * len(names)
    figure, axes = _figure(side + 1, side)
    picture = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    axes.set_xticks(range(len(names) + 1), [*names, "(other)"], rotation=90, fontsize=7)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set(xlabel="found", ylabel="true")
    if len(names) <= 8:
        for (row, column), share in np.ndenumerate(shares):
            colour = "white" if share > 0.5 else "black"
            axes.text(column, row, f"{share:.2f}", ha="center", va="center", fontsize=7, color=colour)
    figure.colorbar(picture, shrink=0.7)
    return what, _address(figure)


def _reliability(report: Report) -> tuple[str, str] | None:
    rows = np.array(report.curves["reliability"]).reshape(-1, 3)
    figure, axes = _figure(6.4, 4.4)
    axes.plot([0, 1], [0, 1], color="#888888", linewidth=1, label="calibrated")
    axes.plot(rows[:, 0], rows[:, 1], "o-", color="#1f5fa8", label="this model")
    for confidence, right, images in rows:
        axes.annotate(f"{int(images)}", (confidence, right), textcoords="offset points", xytext=(4, -10), fontsize=7)
    axes.set(xlabel="mean score of the answer", ylabel="share that is right", xlim=(0, 1.02), ylim=(0, 1.05))
    axes.legend(fontsize=8, loc="upper left")
    return f"Reliability, ECE {report.metrics['ece']:.4f}; numbers are images in a bin of scores", _address(figure)
