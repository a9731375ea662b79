"""`vision-service evaluate`, in process and through a server, against pycocotools and numpy called by hand."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from tests import datasets_made as made
from tests.coco_by_hand import coco_stats, guesses_of, voc_to_coco
from tests.helpers import ROOT, relay, run_server, tiny_manifest
from vision_service.cli import app
from vision_service.client import VisionClient
from vision_service.config.settings import ServerSettings
from vision_service.evaluation.report import Report


def evaluate(*arguments):
    return CliRunner().invoke(app, ["evaluate", *(str(argument) for argument in arguments)])


def done(*arguments, code=0):
    result = evaluate(*arguments)
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def address():
    models = ("nanodet_g", "mobilenet_v2", "selfie_segmentation")
    with run_server(ServerSettings.read(host="127.0.0.1", port=0, device="cpu", models=models)) as running:
        yield f"127.0.0.1:{running.port}"


def both_ways(model, dataset, address, folder, *more):
    """The report of a run in process and of one through a server, and what the first printed."""
    printed = done(model, dataset, *more, "--report", folder / "here.json")
    done(model, dataset, *more, "--report", folder / "there.json", "--address", address, "--concurrency", 1)
    return Report.read(folder / "here.json"), Report.read(folder / "there.json"), printed.output


def same_report(here, there):
    """Equal to the last digit, but for where it ran: both answered in batches of one."""
    assert dataclasses.replace(there, ran=here.ran) == here
    assert there.ran["address"]


@pytest.mark.parametrize(("make", "split"), [(made.make_voc, "all"), (made.make_yolo, "val")])
def test_a_detector_both_ways(make, split, address, tmp_path):
    root = make(tmp_path / "data")
    here, there, printed = both_ways("nanodet_g", root, address, tmp_path, "--split", split)
    same_report(here, there)
    assert "mAP@[.5:.95]" in printed
    assert here.metrics["map50"] > 0.5
    assert here.dataset["images"] == len(here.images) == 3


def test_a_detector_agrees_with_pycocotools_on_raw_annotations(address, tmp_path):
    root = made.make_coco(tmp_path / "data")
    here, there, _ = both_ways("nanodet_g", root, address, tmp_path)
    same_report(here, there)
    truths = json.loads((root / "annotations/instances_val2017.json").read_text())
    with VisionClient(address) as client:
        found = [
            client.detect(
                root / "val2017" / image["file_name"], model="nanodet_g", score_threshold=0.01, max_detections=100
            ).prediction
            for image in truths["images"]
        ]
    stats, by_class = coco_stats(truths, guesses_of(found, truths))
    for report in (here, there):
        for name, value in stats.items():
            if name in report.metrics:
                assert report.metrics[name] == pytest.approx(value, abs=1e-6), name
        assert {row["class_name"]: row["ap"] for row in report.per_class} == pytest.approx(by_class, abs=1e-6)


VOC_OF_COCO = {
    "airplane": "aeroplane",
    "motorcycle": "motorbike",
    "couch": "sofa",
    "potted plant": "pottedplant",
    "dining table": "diningtable",
    "tv": "tvmonitor",
}


@pytest.mark.parametrize(("what", "concurrency"), [("voc30", 1), ("bccd", 1), ("voc30", 8)])
def test_shared_annotations_agree_with_pycocotools(shared, address, tmp_path, what, concurrency):
    """Served answers, scored here and by hand. COCO has no cells, so for BCCD round things are mapped to them."""
    root, renamed, more = shared / "data" / what, VOC_OF_COCO, []
    if what == "voc30":
        files = sorted((root / "annotations").glob("*.xml"))[:8]
    else:
        stems = (root / "ImageSets/Main/test.txt").read_text().split()[:8]
        files = [root / "Annotations" / f"{stem}.xml" for stem in stems]
        (tmp_path / "cells.toml").write_text('"sports ball" = "RBC"\ndonut = "RBC"\nfrisbee = "WBC"\n')
        renamed = {"sports ball": "RBC", "donut": "RBC", "frisbee": "WBC"}
        more = ["--split", "test", "--map", tmp_path / "cells.toml"]
    common = ["--limit", 8, "--report", tmp_path / "r.json", *more]
    done("nanodet_g", root, *common, "--address", address, "--concurrency", concurrency, "--save-coco", tmp_path)
    report = Report.read(tmp_path / "r.json")
    truths = voc_to_coco(files)
    folder = root / ("images" if what == "voc30" else "JPEGImages")
    with VisionClient(address) as client:
        found = [
            client.detect(folder / f"{file.stem}.jpg", model="nanodet_g", score_threshold=0.01, max_detections=100)
            for file in files
        ]
    by_hand, by_class = coco_stats(truths, guesses_of([one.prediction for one in found], truths, renamed))
    saved, _ = coco_stats(
        *(json.loads((tmp_path / f"{name}.json").read_text()) for name in ("annotations", "predictions"))
    )
    assert report.metrics["map"] == pytest.approx(saved["map"], abs=1e-9)
    if concurrency == 1:  # batches of one, as the calls by hand
        for name, value in by_hand.items():
            if name in report.metrics:
                assert report.metrics[name] == pytest.approx(value, abs=1e-6), name
        ours = {row["class_name"]: row["ap"] for row in report.per_class if row["objects"]}
        assert ours == pytest.approx({name: value for name, value in by_class.items() if value is not None}, abs=1e-6)
        done("nanodet_g", root, *common)
        assert Report.read(tmp_path / "r.json").metrics == report.metrics
    else:  # larger batches round otherwise
        assert report.metrics["map"] == pytest.approx(by_hand["map"], abs=1e-3)


def test_a_segmenter_both_ways(address, tmp_path):
    root = made.make_masks(tmp_path / "data")
    here, there, printed = both_ways("selfie_segmentation", root, address, tmp_path)
    same_report(here, there)
    assert "person = foreground (only)" in printed
    with VisionClient(address) as client:
        answers = {
            name: client.segment(root / f"images/{name}.jpg", model="selfie_segmentation").prediction
            for name in made.BOXES
        }
    both = either = 0
    for name, answer in answers.items():
        truth = np.zeros(made.SIZES[name], bool)
        for what, (x1, y1, x2, y2) in made.BOXES[name]:
            truth[y1:y2, x1:x2] |= what == "person"
        both, either = both + (truth & answer.mask(1)).sum(), either + (truth | answer.mask(1)).sum()
    assert here.per_class[1]["iou"] == pytest.approx(both / either, abs=1e-6)


def test_a_classifier_both_ways(address, tmp_path):
    root = made.make_file_names(tmp_path / "data")
    here, there, printed = both_ways("mobilenet_v2", root, address, tmp_path)
    same_report(here, there)
    assert len(here.classes["mapped"]) == 3
    assert "997 classes of the model that the dataset lacks compete, and are wrong" in printed
    with VisionClient(address) as client:
        answers = {
            name: client.classify(root / f"{wnid}_{name}.jpg", model="mobilenet_v2", top_k=1000).prediction.class_names
            for name, wnid in made.WORDNET.items()
        }
    spoken = {"astronaut": "space shuttle", "chelsea": "Egyptian cat", "coffee": "espresso"}
    ranks = {name: answers[name].index(spoken[name]) + 1 for name in answers}
    assert {image["image"].split("_")[1][:-4]: image["rank"] for image in here.images} == ranks


def test_stacks(tmp_path):
    rng = np.random.default_rng(0)
    for name, values in (("images.tif", 256), ("masks.tif", 2)):
        first, *others = (Image.fromarray(page) for page in rng.integers(0, values, (3, 40, 50), np.uint8))
        first.save(tmp_path / name, save_all=True, append_images=others)
    done("selfie_segmentation", tmp_path, "--report", tmp_path / "r.json", "--html", tmp_path / "r.html")
    report = Report.read(tmp_path / "r.json")
    assert [image["image"] for image in report.images] == [f"images.tif[{index}]" for index in range(3)]
    assert (tmp_path / "r.html").read_text().count("data:image/jpeg") == 9


def test_pages_and_comparisons(tmp_path):
    root = made.make_class_folders(tmp_path / "data")
    common = ["mobilenet_v2", root]
    done(*common, "--report", tmp_path / "a.json", "--html", tmp_path / "a.html", "--pictures", 1)
    done(*common, "--report", tmp_path / "b.json", "--unmapped", "ignore")
    assert (tmp_path / "a.html").read_text().count("data:image/jpeg") == 1
    result = done(
        "--compare", tmp_path / "a.json", tmp_path / "b.json", "--html", tmp_path / "c.html",
        "--report", tmp_path / "c.json", "--resamples", 100, "--seed", 4,
    )  # fmt: skip
    assert "95 % interval" in result.output
    found = json.loads((tmp_path / "c.json").read_text())
    assert (found["resamples"], found["seed"], found["images"]) == (100, 4, 3)
    assert "top-1" in (tmp_path / "c.html").read_text()


def test_unreadable_images_are_listed_and_do_not_count(tmp_path):
    root = made.make_voc(tmp_path / "data")
    (root / "JPEGImages/chelsea.jpg").write_bytes(made.photo("chelsea").read_bytes()[:3000])
    (root / "JPEGImages/coffee.jpg").unlink()
    result = done("nanodet_g", root, "--report", tmp_path / "r.json", code=1)
    report = Report.read(tmp_path / "r.json")
    assert "2 images failed, and no figure counts them" in result.output
    assert [failure["image"] for failure in report.failures] == ["JPEGImages/chelsea.jpg", "JPEGImages/coffee.jpg"]
    assert "No such file" in report.failures[1]["message"]
    assert (report.dataset["images"], len(report.images)) == (3, 1)
    assert {row["class_name"]: row["objects"] for row in report.per_class}["cat"] == 0
    stopped = done("nanodet_g", root, "--max-failures", 0, code=1)
    assert "stopped: 1 images failed, more than --max-failures 0" in stopped.output


def test_sizes_that_differ_from_the_annotation_are_noted(tmp_path):
    root = made.make_voc(tmp_path / "data")
    (root / "JPEGImages/coffee.jpg").write_bytes(made.photo("chelsea").read_bytes())
    result = done("nanodet_g", root, "--split", "val")
    assert "1 images are not of the size that their annotation says" in result.output


@pytest.mark.parametrize(
    ("arguments", "clause"),
    [
        ([], "say which MODEL on which DATASET"),
        (["nanodet_g", "{voc}", "--version", "2"], "version: has no effect here"),
        (["nanodet_g", "{voc}", "--address", "x:1", "--device", "cpu"], "device: has no effect here"),
        (["nanodet_g", "{voc}", "--stream"], "stream: has no effect here: it is for --address"),
        (
            ["mobilenet_v2", "{voc}", "--format", "csv", "--max-detections", "5"],
            "no effect on classify, only on detect",
        ),
        (["mobilenet_v2", "{voc}", "--save-coco", "x"], "save_coco: has no effect on classify"),
        (["nanodet_g", "{voc}", "--score-threshold", "2"], "score_threshold: must be a number from 0 to 1"),
        (["nanodet_g", "{voc}", "--format", "csv"], "no format 'csv' for a detect model"),
        (
            ["nanodet_g", "{voc}", "--compare", "a", "b"],
            "dataset: has no effect here: --compare takes two reports and no",
        ),
        (["--compare", "a", "b", "--split", "val"], "split: has no effect here"),
        (["--compare", "a", "b", "--pictures", "3"], "pictures: has no effect here: it is for --html"),
        (["nanodet_g", "{voc}", "--seed", "3"], "seed: has no effect here: it is for --compare"),
        (["--compare", "nowhere.json", "b"], "nowhere.json cannot be read"),
        (["esrgan_slim_x2", "{voc}"], "a translate model cannot be evaluated"),
        (["nanodet", "{voc}"], "nanodet_g"),
    ],
)
def test_wrong_use(tmp_path, arguments, clause):
    root = made.make_voc(tmp_path / "data") if arguments else tmp_path
    result = done(*(argument.format(voc=root) for argument in arguments), code=2)
    assert clause in result.output


def test_options_reach_the_model(tmp_path):
    root = made.make_voc(tmp_path / "data")
    counts = []
    some = ["--score-threshold", 0.3]
    for more in ([], some, ["--max-detections", 3], [*some, "--iou-threshold", 0.95], ["--limit", 1]):
        done("nanodet_g", root, "--report", tmp_path / "r.json", "--unmapped", "count", *more)
        counts.append([len(image["found"]) for image in Report.read(tmp_path / "r.json").images])
    plain, threshold, most, overlap, limit = counts
    assert sum(threshold) < sum(overlap) < sum(plain)
    assert most == [3, 3, 3]
    assert limit == plain[:1]


def test_models_of_manifests_and_larger_batches(tmp_path):
    manifest = tiny_manifest(tmp_path, tiny="")
    root = made.make_class_folders(tmp_path / "data")
    (tmp_path / "map.csv").write_text("model,dataset\nred 1,espresso\n")
    done("tiny", root, "--manifest", manifest, "--map", tmp_path / "map.csv", "--report", tmp_path / "r.json",
         "--batch-size", 4, "--device", "cpu")  # fmt: skip
    report = Report.read(tmp_path / "r.json")
    assert report.metrics["top1"] == 0.0
    assert report.classes["only_in_dataset"] == ["Egyptian_cat", "space_shuttle"]


def test_images_travel_on_a_stream_or_in_calls(address, tmp_path):
    root = made.make_voc(tmp_path / "data")
    reports = []
    with relay(address) as (beside, called):
        for more, expected, other in (([], "Detect", "Predict"), (["--stream"], "Predict", "Detect")):
            called.clear()
            file = tmp_path / "r.json"
            done("nanodet_g", root, "--address", beside, "--concurrency", 1, "--report", file, *more)
            reports.append(Report.read(file))
            assert expected in called
            assert other not in called
    same_report(*reports)


def test_a_server_that_is_not_there_stops_the_run(tmp_path):
    root = made.make_voc(tmp_path / "data")
    result = done("nanodet_g", root, "--address", "127.0.0.1:1", "--timeout", 1, code=1)
    assert "127.0.0.1:1" in result.output


def test_without_the_extra(tmp_path):
    """In a process that cannot find torchmetrics, as after a plain installation."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as u\nf = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'torchmetrics' else f(name, *a)\n"
    )
    run = subprocess.run(
        [sys.executable, "-m", "vision_service", "evaluate", "nanodet_g", "x"],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 2
    assert "evaluating needs torchmetrics: pip install 'vision-service[evaluate]'" in run.stderr
