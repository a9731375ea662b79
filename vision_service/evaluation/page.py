"""Reports and comparisons as one HTML file that needs nothing else: pictures are inside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jinja2

from vision_service.errors import ConfigError
from vision_service.evaluation import pictures, plots, tables
from vision_service.evaluation.compare import Comparison
from vision_service.evaluation.datasets import open_dataset
from vision_service.evaluation.report import Report
from vision_service.evaluation.samples import Dataset, Sample
from vision_service.types import Task

_MOST_LISTED = 200


def report_page(report: Report, dataset: Dataset, picture_count: int = 12) -> str:
    """A report for people: figures, plots, the worst images.

    Args:
        report: the report.
        dataset: it was made of, for the images.
        picture_count: how many images are shown.
    """
    samples = {sample.name: sample for sample in dataset.samples}
    shown = [
        _Shown(record["image"], "", pictures.draw_record(record, report, samples[record["image"]]))
        for record in pictures.worst(report, picture_count)
    ]
    where = ", ".join(f"{name} {value}" for name, value in report.ran.items() if value != "")
    settings = ", ".join(f"{name} {value}" for name, value in report.settings.items() if value is not None)
    overall, by_class = tables.overall(report), tables.by_class(report)
    return _render(
        title=overall.title,
        lines=[f"Asked with {settings}. Ran on {where}.", *tables.class_notes(report), *report.notes],
        tables=[tables.Table("", overall.header, overall.rows), by_class],
        plots=plots.report_plots(report),
        gallery_title="The worst images",
        legend=_legend(report),
        gallery=shown,
        failures=report.failures,
    )


def comparison_page(
    found: Comparison, first: Report, second: Report, names: tuple[str, str], picture_count: int = 12
) -> str:
    """What changed, for people. Images are shown if the dataset still lies where the first report says.

    Args:
        found: from `compare_reports`.
        first: the first report.
        second: the second.
        names: what they are called.
        picture_count: how many changed images are shown.
    """
    samples = _samples(first)
    records = [{record["image"]: record for record in report.images} for report in (first, second)]
    shown = []
    for change in found.changes[:picture_count] if samples else []:
        drawn = [
            pictures.draw_record(by_name[change.image], report, samples[change.image])
            for by_name, report in zip(records, (first, second), strict=True)
            if change.image in samples
        ]
        both = [
            (f"{name}: {caption}", picture)
            for name, side in zip(("first", "second"), drawn, strict=False)
            for caption, picture in side
            if name == "first" or caption != "what is there"
        ]
        shown.append(_Shown(change.image, change.what, both))
    differences = tables.differences(found, *names)
    lines = [
        f"Intervals are the 2.5th to the 97.5th percentile of the change over {found.resamples} draws of images with "
        f"replacement (seed {found.seed}), the same draws for both reports (paired bootstrap).",
        *found.notes,
    ]
    if not samples:
        lines.append(f"the images are not shown: {first.dataset['path']} cannot be read from here")
    return _render(
        title=differences.title,
        lines=lines,
        tables=[
            tables.Table("", differences.header, differences.rows),
            tables.changed_classes(found, _MOST_LISTED),
            tables.changed_images(found, _MOST_LISTED),
        ],
        plots=[plots.comparison_plot(found)],
        gallery_title="The images that changed most",
        legend=_legend(first),
        gallery=shown,
        failures=[],
    )


class _Shown:
    """An image on a page."""

    def __init__(self, name: str, what: str, drawn: Sequence[tuple[str, str]]) -> None:
        self.name, self.what, self.pictures = name, what, drawn


def _legend(report: Report) -> list[tuple[str, str]]:
    if report.task != Task.DETECT:
        return []
    return list(zip(pictures.COLOURS, pictures.LEGEND, strict=True))


def _samples(report: Report) -> dict[str, Sample]:
    about = report.dataset
    classes = Path(about["classes_file"]) if about.get("classes_file") else None
    try:
        dataset = open_dataset(
            Path(about["path"]), Task(report.task), format=about["format"], split=about["split"], classes=classes
        )
    except (ConfigError, OSError):
        return {}
    return {sample.name: sample for sample in dataset.samples}


def _render(**values: object) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("page.html").render(values)
