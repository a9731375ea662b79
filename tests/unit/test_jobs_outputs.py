"""Each output, read by somebody else's reader."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
from pathlib import Path, PurePosixPath

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from typer.testing import CliRunner

from tests.helpers import ROOT, red_image, tiny_manifest
from vision_service.cli import app
from vision_service.errors import ConfigError
from vision_service.imaging.decode import DecodeLimits
from vision_service.imaging.masks import encode_rle
from vision_service.jobs.items import Item, Outcome
from vision_service.jobs.outputs.coco import Ids, write_coco, write_rle
from vision_service.jobs.outputs.kinds import KINDS, Model, choose_kinds
from vision_service.jobs.outputs.per_image import ImageFiles
from vision_service.jobs.outputs.sheet import SHOWN, write_sheet
from vision_service.records import to_prediction
from vision_service.types import Detections, Result, SegmentationMap, Task, TranslatedImage

DETECTOR = Model("net", "1", Task.DETECT, ("cat", "dog"))
SEGMENTER = Model("seg", "1", Task.SEGMENT, ("background", "cat", "dog"))
TRANSLATOR = Model("gan", "1", Task.TRANSLATE, ())


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def found_two(masks: bool = False) -> Result:
    boxes = np.array([[1.25, 2, 11, 12], [4, 4, 8, 6]], np.float32)
    rles = None
    if masks:
        mask = np.zeros((20, 30), bool)
        mask[2:12, 1:11] = True
        rles = (encode_rle(mask), encode_rle(~mask))
    scores = np.array([0.9, 0.5], np.float32)
    prediction = Detections(boxes, np.array([1, 0]), ("dog", "cat"), scores, rles)
    return Result(prediction, (20, 30), "net", "1")


def outcome(result: Result, name: str = "deep/a.png") -> Outcome:
    return Outcome(Item(name, PurePosixPath(name)), (result,), (), red_image(200, 20, 30))


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Path:
    """What `predict` writes of the photos that ship: everything that a detector has."""
    folder = tmp_path_factory.mktemp("job")
    kinds = "parquet,parquet-flat,csv,coco,yolo,pictures,crops,html"
    words = ("--task", "detect", "--runtime", "torch", "--workers", 1, "--save", kinds)
    result = run("predict", ROOT / "samples", *words, "--output", folder)
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture(scope="module")
def records(job) -> list[dict]:
    return [json.loads(line) for line in (job / "results.jsonl").read_text().splitlines()]


class TestOfADetector:
    def test_parquet(self, job, records):
        parquet = pytest.importorskip("pyarrow.parquet")
        rows = parquet.read_table(job / "results.parquet").to_pylist()
        assert len(rows) == len(records) == 3
        for row, record in zip(rows, records, strict=True):
            assert {key: row[key] for key in ("file", "model", "height", "width")} == {
                key: record[key] for key in ("file", "model", "height", "width")
            }
            assert [{**one, "mask": None} for one in record["detections"]] == row["detections"]
            assert (row["classes"], row["segments"], row["image"], row["frame"]) == (None,) * 4

    def test_parquet_flat_and_csv(self, job, records):
        parquet = pytest.importorskip("pyarrow.parquet")
        rows = parquet.read_table(job / "results_flat.parquet").to_pylist()
        boxes = [(record["file"], one) for record in records for one in record["detections"]]
        assert len(rows) == len(boxes)
        for row, (file, one) in zip(rows, boxes, strict=True):
            assert (row["file"], row["class_name"], row["score"]) == (file, one["class_name"], one["score"])
            assert [row[edge] for edge in ("x1", "y1", "x2", "y2")] == one["box"]
        with (job / "results.csv").open(newline="") as file:
            texts = list(csv.DictReader(file))
        assert [{key: "" if value is None else str(value) for key, value in row.items()} for row in rows] == texts

    def test_coco(self, job, records, capsys):
        images = COCO(str(job / "coco_images.json"))
        results = images.loadRes(str(job / "coco.json"))
        assert len(results.anns) == sum(len(record["detections"]) for record in records)
        assert [images.imgs[i]["file_name"] for i in (1, 2, 3)] == [record["file"] for record in records]
        first = results.loadAnns(results.getAnnIds(imgIds=[1]))[0]
        one = records[0]["detections"][0]
        assert images.cats[first["category_id"]]["name"] == one["class_name"]
        left, top, width, height = first["bbox"]
        assert [left, top, left + width, top + height] == pytest.approx(one["box"], abs=0.01)

    def test_yolo(self, job, records):
        names = (job / "labels" / "classes.txt").read_text().splitlines()
        for record in records:
            rows = np.loadtxt(job / "labels" / f"{Path(record['file']).stem}.txt", ndmin=2)
            assert [names[int(row[0])] for row in rows] == [one["class_name"] for one in record["detections"]]
            height, width = record["height"], record["width"]
            for (_, x, y, w, h, score), one in zip(rows, record["detections"], strict=True):
                corners = [(x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height]
                assert corners == pytest.approx(one["box"], abs=0.02)
                assert score == pytest.approx(one["score"], abs=1e-6)

    def test_pictures_and_crops(self, job, records):
        for record in records:
            stem = Path(record["file"]).stem
            picture = cv2.imread(str(job / f"{stem}.nanodet_g.jpg"))
            assert picture.shape[:2] == (record["height"], record["width"])
            crops = sorted((job / "crops" / f"{stem}.nanodet_g").iterdir())
            assert len(crops) == len(record["detections"])
            left, top, right, bottom = (round(edge) for edge in record["detections"][0]["box"])
            original = cv2.imread(record["file"])[top:bottom, left:right]
            crop = cv2.imread(str(crops[0]))
            assert crop.shape == original.shape
            assert np.abs(crop.astype(int) - original).mean() < 6

    def test_html_shows_the_worst_and_the_best(self, job, records):
        page = (job / "results.html").read_text()
        worst, best = page.split("The worst")[1].split("The best")
        by_score = sorted(records, key=lambda record: record["detections"][0]["score"])
        names = [Path(record["file"]).name for record in by_score]
        assert re.findall(r"([a-z]+\.jpg)</figcaption>", worst) == names
        assert re.findall(r"([a-z]+\.jpg)</figcaption>", best) == names[::-1]
        content = base64.b64decode(re.search(r"base64,([^\"]+)", page)[1])
        assert cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR) is not None


class TestOfOthers:
    @pytest.mark.filterwarnings("ignore:__array__ implementation")  # of pycocotools
    def test_class_maps_and_run_lengths(self, tmp_path):
        words = ("--task", "segment", "--runtime", "torch", "--workers", 1, "--save", "class-map,rle,csv")
        photo = ROOT / "samples" / "astronaut.jpg"
        assert run("predict", photo, *words, "--output", tmp_path).exit_code == 0
        (record,) = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
        class_map = cv2.imread(str(tmp_path / "class-maps" / "astronaut.selfie_segmentation.png"), cv2.IMREAD_UNCHANGED)
        assert (class_map.shape, class_map.dtype) == ((512, 512), np.uint8)
        (one,) = json.loads((tmp_path / "rle.json").read_text())
        mask = coco_mask.decode({**one["segmentation"], "counts": one["segmentation"]["counts"].encode()})
        assert np.array_equal(mask == 1, class_map == 1)
        assert one["area"] == record["segments"][0]["area"] == mask.sum()
        (row,) = csv.DictReader(io.StringIO((tmp_path / "results.csv").read_text()))
        assert (row["class_name"], int(row["area"]), row["score"]) == ("person", one["area"], "")

    def test_a_model_that_makes_images_has_them_written(self, tmp_path):
        manifest = tmp_path / "manifest.toml"
        manifest.write_text(
            '[[model]]\nname = "same"\ntask = "translate"\nbackend = "tiny_translate"\nruntime = "torch"\n'
            'preprocess.resize = {mode = "native"}\n'
        )
        cv2.imwrite(str(tmp_path / "a.png"), red_image(77)[..., ::-1])
        words = ("--model", "same", "--manifest", manifest, "--output", tmp_path / "out")
        result = run("predict", tmp_path / "a.png", *words)
        assert result.exit_code == 0, result.output
        assert np.array_equal(cv2.imread(str(tmp_path / "out" / "a.same.png"))[..., ::-1], red_image(77))

    def test_a_video(self, tmp_path):
        tiny_manifest(tmp_path, tiny='runtime = "torch"')
        writer = cv2.VideoWriter(str(tmp_path / "clip.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 10, (64, 48))
        for index in range(20):
            writer.write(red_image(10 * index, 48, 64)[..., ::-1])
        writer.release()
        words = ("--model", "tiny", "--manifest", tmp_path / "manifest.toml", "--output", tmp_path / "out")
        result = run("predict", tmp_path / "clip.mp4", *words, "--every-s", 0.5, "--save", "video,pictures,html")
        assert result.exit_code == 0, result.output
        records = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
        assert [(record["frame"], record["time_s"]) for record in records] == [(0, 0.0), (5, 0.5), (10, 1.0), (15, 1.5)]
        assert all(abs(record["classes"][0]["class_id"] - 10 * record["frame"]) < 6 for record in records)
        film = cv2.VideoCapture(str(tmp_path / "out" / "videos" / "clip.tiny.mp4"))
        assert film.get(cv2.CAP_PROP_FRAME_COUNT) == 4
        assert film.get(cv2.CAP_PROP_FPS) == pytest.approx(2.0)
        film.release()
        assert (tmp_path / "out" / "clip" / "000015_1500ms.tiny.jpg").exists()
        assert (tmp_path / "out" / "results.html").read_text().count("data:image/jpeg") == 8

    def test_a_video_that_is_none(self, tmp_path):
        tiny_manifest(tmp_path, tiny='runtime = "torch"')
        (tmp_path / "bad.mp4").write_bytes(b"no video")
        words = ("--model", "tiny", "--manifest", tmp_path / "manifest.toml", "--output", tmp_path / "out")
        result = run("predict", tmp_path / "bad.mp4", *words)
        assert result.exit_code == 1
        assert "bad.mp4 cannot be read as a video" in (tmp_path / "out" / "failures.jsonl").read_text()


class TestPerImage:
    def test_fewer_boxes_leave_no_old_crops(self, tmp_path):
        files = ImageFiles(tmp_path, ("jsonl", "crops"), [DETECTOR])
        stem = PurePosixPath("deep/a")
        files.write(outcome(found_two()), stem)
        assert [path.name for path in sorted((tmp_path / "crops/deep/a.net").iterdir())] == [
            "000_dog.jpg",
            "001_cat.jpg",
        ]
        nothing = Result(Detections.empty(), (20, 30), "net", "1")
        files.write(outcome(nothing), stem)
        assert not (tmp_path / "crops/deep/a.net").exists()

    def test_nothing_found_is_an_empty_label_file(self, tmp_path):
        ImageFiles(tmp_path, ("yolo",), [DETECTOR]).write(
            outcome(Result(Detections.empty(), (20, 30), "net", "1")), PurePosixPath("a")
        )
        assert (tmp_path / "labels/a.txt").read_bytes() == b""

    def test_several_detectors_have_folders_of_their_own(self, tmp_path):
        other = Model("other", "1", Task.DETECT, ("bird",))
        ImageFiles(tmp_path, ("yolo",), [DETECTOR, other]).write(outcome(found_two()), PurePosixPath("a"))
        assert (tmp_path / "labels/net/a.txt").read_text().startswith("1 ")
        assert (tmp_path / "labels/other/classes.txt").read_text() == "bird\n"

    @pytest.mark.parametrize(
        "prediction", [SegmentationMap(np.zeros((20, 30), np.uint8), ("a",)), TranslatedImage(red_image(1))]
    )
    def test_what_is_for_others_is_left_out(self, tmp_path, prediction):
        files = ImageFiles(tmp_path, ("yolo", "crops"), [])
        files.write(outcome(Result(prediction, (20, 30), "x", "1")), PurePosixPath("a"))
        assert not list(tmp_path.rglob("*.jpg"))

    def test_names_from_a_server_stay_in_the_folder(self, tmp_path):
        found = found_two()
        evil = Result(found.prediction, (20, 30), "../../evil", "1")
        ImageFiles(tmp_path / "out", ("pictures",), [DETECTOR]).write(outcome(evil), PurePosixPath("a"))
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.______evil.jpg"]


class TestCoco:
    def test_ids_of_a_dataset(self, tmp_path):
        (tmp_path / "annotations.json").write_text(
            json.dumps({
                "images": [{"id": 139, "file_name": "a.png"}, {"id": 285, "file_name": "val/b.png"}],
                "categories": [{"id": 18, "name": "dog"}],
            })
        )  # fmt: skip
        ids = Ids.read(tmp_path / "annotations.json")
        records = [
            row for name in ("x/a.png", "x/val/b.png", "new.png") for row in outcome(found_two(), name).records()
        ]
        write_coco(records, tmp_path, [DETECTOR], ids)
        rows = json.loads((tmp_path / "coco.json").read_text())
        assert [(row["image_id"], row["category_id"]) for row in rows] == [(139, 18), (285, 18)]
        with pytest.raises(ConfigError, match="no file of COCO annotations"):
            Ids.read(tmp_path / "coco.json")

    def test_several_models_have_files_of_their_own(self, tmp_path):
        other = Model("other", "2", Task.DETECT, ("bird",))
        write_coco(outcome(found_two()).records(), tmp_path, [DETECTOR, other], None)
        assert len(json.loads((tmp_path / "coco.net-1.json").read_text())) == 2
        assert json.loads((tmp_path / "coco.other-2.json").read_text()) == []

    @pytest.mark.filterwarnings("ignore:__array__ implementation")  # of pycocotools
    def test_masks(self, tmp_path, capsys):
        records = outcome(found_two(masks=True)).records()
        write_coco(records, tmp_path, [DETECTOR], None)
        results = COCO(str(tmp_path / "coco_images.json")).loadRes(str(tmp_path / "coco.json"))
        assert results.annToMask(results.anns[1]).sum() == 100
        write_rle(records, tmp_path)
        assert [row["area"] for row in json.loads((tmp_path / "rle.json").read_text())] == [100, 500]

    def test_nothing(self, tmp_path):
        write_coco([], tmp_path, [DETECTOR], None)
        write_rle([], tmp_path)
        assert json.loads((tmp_path / "coco.json").read_text()) == json.loads((tmp_path / "rle.json").read_text()) == []
        assert json.loads((tmp_path / "coco_images.json").read_text())["images"] == []


class TestSheet:
    def test_no_more_than_both_ends_are_kept(self, tmp_path):
        cv2.imwrite(str(tmp_path / "a.png"), red_image(3))
        row = {"task": "classify", "model": "net", "version": "1", "file": str(tmp_path / "a.png")}
        records = ({**row, "classes": [{"class_id": 0, "class_name": "<b>", "score": i / 100}]} for i in range(100))
        model = Model("net", "1", Task.CLASSIFY, ("<b>",))
        write_sheet(records, tmp_path / "page.html", [model], DecodeLimits())
        page = (tmp_path / "page.html").read_text()
        shown = [float(text) for text in re.findall(r"<figcaption>([0-9.]+)", page)]
        assert shown == [i / 100 for i in range(SHOWN)] + [i / 100 for i in range(99, 99 - SHOWN, -1)]
        assert "<p>100 images</p>" in page

    def test_an_image_that_is_gone_is_said(self, tmp_path):
        record = outcome(found_two(), "<gone>.png").records()[0]
        write_sheet([record], tmp_path / "page.html", [DETECTOR], DecodeLimits())
        assert "&lt;gone&gt;.png cannot be read" in (tmp_path / "page.html").read_text()


class TestChoices:
    def test_what_is_written_when_nothing_is_chosen(self):
        assert choose_kinds(None, [DETECTOR], may_have_video=False) == ("jsonl",)
        assert choose_kinds(None, [DETECTOR, TRANSLATOR], may_have_video=False) == ("jsonl", "pictures")

    def test_lists_and_repetitions(self):
        assert choose_kinds(["csv, yolo", "csv"], [DETECTOR], may_have_video=False) == ("jsonl", "csv", "yolo")

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("model", [DETECTOR, SEGMENTER, TRANSLATOR], ids=lambda model: model.name)
    def test_what_has_no_effect_is_refused(self, kind, model):
        if model.task in KINDS[kind].tasks:
            assert kind in choose_kinds([kind], [model], may_have_video=True)
        else:
            with pytest.raises(ConfigError, match=f"--save {kind} has no effect on {model.task}, only on"):
                choose_kinds([kind], [model], may_have_video=True)


def test_a_record_of_an_image_is_no_prediction():
    with pytest.raises(ValueError, match="task 'translate'"):
        to_prediction({"task": "translate"})
