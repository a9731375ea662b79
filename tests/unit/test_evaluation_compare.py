from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
import pytest

from tests.datasets_made import make_voc
from vision_service.errors import ConfigError
from vision_service.evaluation.classes import map_classes
from vision_service.evaluation.compare import compare_reports
from vision_service.evaluation.detect import DetectionScorer, DetectOptions
from vision_service.evaluation.page import comparison_page, report_page
from vision_service.evaluation.report import Report
from vision_service.evaluation.tables import changed_images, differences
from vision_service.evaluation.voc import voc_boxes
from vision_service.types import Detections, Result, Task


def report_of(dataset, found, name="m"):
    """A report of a detector that finds ``found``: rows of box, class and score, by image stem."""
    scorer = DetectionScorer(dataset, map_classes(dataset.class_names, dataset.class_names), DetectOptions())
    ids = {name: index for index, name in enumerate(dataset.class_names)}
    for sample in dataset.samples:
        rows = sorted(found[sample.image.stem], key=lambda row: -row[2])
        prediction = Detections(
            np.array([box for box, _, _ in rows], np.float32).reshape(-1, 4),
            np.array([ids[what] for _, what, _ in rows], np.int64),
            tuple(what for _, what, _ in rows),
            np.array([score for _, _, score in rows], np.float32),
        )
        scorer.add(sample, Result(prediction, sample.declared_hw, name, "1"))
    scores = scorer.finish()
    about = {"path": str(dataset.root), "format": "voc", "split": "", "images": len(dataset.samples)}
    return Report(
        Task.DETECT,
        {"name": name, "version": "1"},
        {**about, "class_names": list(dataset.class_names)},
        dataclasses.asdict(DetectOptions()),
        map_classes(dataset.class_names, dataset.class_names).to_json(),
        scores.metrics,
        scores.per_class,
        scores.curves,
        [],
        [],
        scores.images,
        {"device": "cpu"},
    )


PERFECT = {
    "astronaut": [([20, 10, 400, 511], "person", 0.9), ([300, 1, 420, 100], "chair", 0.8)],
    "chelsea": [([60, 20, 440, 299], "cat", 0.7)],
    "coffee": [([150, 60, 440, 290], "cup", 0.6), ([1, 1, 600, 400], "diningtable", 0.5)],
}
WORSE = PERFECT | {"chelsea": [], "coffee": [([150, 60, 440, 290], "cup", 0.6), ([1, 1, 50, 50], "cat", 0.65)]}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return voc_boxes(make_voc(tmp_path_factory.mktemp("data") / "voc"), "")


@pytest.fixture(scope="module")
def reports(dataset):
    return report_of(dataset, WORSE, "worse"), report_of(dataset, PERFECT, "perfect")


def test_what_changed(reports):
    found = compare_reports(*reports, resamples=300)
    by_name = {row.name: row for row in found.differences}
    assert by_name["map50"].first == pytest.approx(0.6)
    assert by_name["map50"].second == pytest.approx(1.0)
    assert 0 <= by_name["map50"].low <= 0.4 <= by_name["map50"].high <= 1
    assert [row["class_name"] for row in found.classes] == ["cat", "diningtable"]
    assert [change.image for change in found.changes] == ["JPEGImages/coffee.jpg", "JPEGImages/chelsea.jpg"]
    assert found.changes[0].what == "1 right, 1 wrong, 1 missed -> 2 right, 0 wrong, 0 missed"
    assert (found.changes[0].first, found.changes[0].second) == (2, 0)
    assert "+0.4000" in differences(found, "a", "b").rows[1]
    assert changed_images(found, 1).title == "the first 1 of 2 images whose answer changed"


def test_a_report_compared_with_itself(reports):
    found = compare_reports(reports[0], reports[0], resamples=100)
    assert [(row.change, row.low, row.high, row.share_above) for row in found.differences] == [(0, 0, 0, 0.5)] * 3
    assert not found.classes
    assert not found.changes


def test_seeds_and_resamples_have_an_effect(reports):
    one, same, other = (compare_reports(*reports, resamples=120, seed=seed) for seed in (1, 1, 2))
    assert one == same
    assert one.differences != other.differences
    assert one.resamples == 120


def test_the_interval_is_that_of_the_draws(reports):
    """The same draws, with each figure computed from a dataset in which images are repeated."""
    found = compare_reports(*reports, resamples=100, seed=3)
    rng = np.random.default_rng(3)
    changes = []
    for _ in range(100):
        weights = rng.multinomial(3, np.full(3, 1 / 3))
        figures = []
        for report in reports:
            # each class has objects in one image: its AP at 0.5 is that image's, unless false alarms come first
            at = {row["class_name"]: row["ap50"] for row in report.per_class}
            where = {"person": 0, "chair": 0, "cat": 1, "cup": 2, "diningtable": 2}
            figures.append(np.mean([at[name] for name, image in where.items() if weights[image]]))
        changes.append(figures[1] - figures[0])
    row = next(row for row in found.differences if row.name == "map50")
    assert (row.low, row.high) == pytest.approx(tuple(np.percentile(changes, [2.5, 97.5])), abs=1e-9)


def test_images_of_one_report_alone_are_left_out(reports):
    fewer = dataclasses.replace(reports[1], images=reports[1].images[:2])
    found = compare_reports(reports[0], fewer, resamples=100)
    assert found.images == 2
    assert "1 images are in the first report alone" in found.notes[0]


def test_other_settings_are_said(reports):
    changed = dataclasses.replace(reports[1], settings=reports[1].settings | {"score_threshold": 0.5})
    assert any("score_threshold" in note for note in compare_reports(reports[0], changed, resamples=100).notes)


@pytest.mark.parametrize(
    ("fields", "clause"),
    [
        ({"task": "segment"}, "different tasks"),
        ({"dataset": {"class_names": ["x"]}}, "different classes"),
        ({"images": []}, "no image in common"),
    ],
)
def test_what_cannot_be_compared(reports, fields, clause):
    with pytest.raises(ConfigError, match=clause):
        compare_reports(reports[0], dataclasses.replace(reports[1], **fields))


def test_other_annotations_cannot_be_compared(reports):
    changed = json.loads(json.dumps(reports[1].images))
    changed[1]["truth"][0][1] += 5
    with pytest.raises(ConfigError, match=r"1 images are annotated otherwise .*chelsea.jpg"):
        compare_reports(reports[0], dataclasses.replace(reports[1], images=changed))


def test_reports_are_read_as_they_were_written(reports, tmp_path):
    reports[0].write(tmp_path / "deep/a.json")
    assert Report.read(tmp_path / "deep/a.json") == reports[0]
    lines = (tmp_path / "deep/a.json").read_text().splitlines()
    assert sum('"image":"JPEGImages/' in line for line in lines) == 3  # a line an image


@pytest.mark.parametrize(
    ("text", "clause"), [("{}", "is not a report"), ("{", "is not JSON"), ("[]", "is not a report")]
)
def test_files_that_are_no_reports(tmp_path, text, clause):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ConfigError, match=clause):
        Report.read(tmp_path / "a.json")


def test_pages_need_nothing_else(reports, dataset):
    found = compare_reports(*reports, resamples=100)
    for page, pictures in (
        (report_page(reports[0], dataset, 2), 4),
        (comparison_page(found, *reports, ("a<b", "b"), 2), 6),
    ):
        sources = re.findall(r'(?:src|href)="([^"]*)"', page)
        assert all(source.startswith("data:image/") for source in sources)
        assert sum(source.startswith("data:image/jpeg") for source in sources) == pictures
        assert any(source.startswith("data:image/png") for source in sources)
        assert "url(" not in page
    assert "a&lt;b" in page


def test_pages_without_the_images(reports, tmp_path):
    moved = [dataclasses.replace(one, dataset=one.dataset | {"path": str(tmp_path / "gone")}) for one in reports]
    page = comparison_page(compare_reports(*moved, resamples=100), *moved, ("a", "b"))
    assert "cannot be read from here" in page
