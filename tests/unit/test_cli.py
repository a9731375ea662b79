from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from typer.testing import CliRunner

from tests.helpers import ROOT, red_image, tiny_manifest
from vision_service.cli import app
from vision_service.cli.failures import exit_code, readable, show_tracebacks
from vision_service.cli.options import read_overrides
from vision_service.cli.output import to_line
from vision_service.errors import (
    ConfigError,
    DeadlineExceeded,
    InvalidImage,
    InvalidInput,
    ModelNotFound,
    QueueFull,
    WeightsError,
)
from vision_service.imaging.masks import decode_rle
from vision_service.records import error_to_record, to_record
from vision_service.types import (
    VOID,
    Classification,
    Detections,
    ParamOverrides,
    Result,
    SegmentationMap,
    Task,
    Timings,
    TranslatedImage,
)


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def save(path: Path, red: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), red_image(red)[..., ::-1])
    return path


def lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def manifest(tmp_path):
    return tiny_manifest(tmp_path, tiny="", other='version = "2"')


@pytest.fixture
def photos(tmp_path):
    """Two good images and one bad, one of them in a folder below."""
    folder = tmp_path / "photos"
    save(folder / "a.png", 10)
    save(folder / "deep" / "b.png", 20)
    (folder / "c.jpg").write_bytes(b"not an image")
    (folder / "notes.txt").write_text("no image, and not meant to be one")
    return folder


class TestHelp:
    def test_lists_the_commands(self):
        result = run("--help")
        assert result.exit_code == 0
        for command in ("serve", "predict", "client", "models"):
            assert f" {command} " in result.stdout

    @pytest.mark.parametrize("command", [["serve"], ["predict"], ["client"], ["models", "list"], ["models", "show"]])
    def test_every_command_has_some(self, command):
        assert run(*command, "--help").exit_code == 0

    def test_version(self):
        from vision_service import __version__

        assert run("--version").stdout == f"vision-service {__version__}\n"

    def test_starts_without_what_is_slow_to_import(self):
        code = (
            "import sys; from vision_service.cli import app; app(['--help'], standalone_mode=False);"
            "print([name for name in ('torch', 'cv2', 'grpc', 'numpy') if name in sys.modules])"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == "[]"

    @pytest.mark.parametrize(
        ("said", "spins"),
        [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "passive"}, "0")],
    )
    def test_torchs_threads_do_not_spin_for_long_unless_told_to(self, said, spins):
        code = "from vision_service.cli import app; app(['models', 'list'], standalone_mode=False); import torch"
        others = {
            name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
        }
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
            env=others | said | {"OMP_DISPLAY_ENV": "verbose"},
        )
        if "GOMP_" not in done.stderr:
            pytest.skip("this torch uses another OpenMP than GNU's")
        assert f"GOMP_SPINCOUNT = '{spins}'" in done.stderr


class TestPredict:
    def test_a_bad_file_does_not_stop_the_others(self, manifest, photos, tmp_path):
        output = tmp_path / "out"
        result = run(
            *("predict", photos, "--model", "tiny", "--manifest", manifest),
            *("--output", output, "--save", "pictures", "--json"),
        )
        assert result.exit_code == 1
        assert "1 failed:" in result.stderr
        assert str(photos / "c.jpg") in result.stderr

        shown = lines(result.stdout)
        assert [Path(row["file"]).name for row in shown] == ["a.png", "c.jpg", "b.png"]
        assert shown[0]["classes"] == [{"class_id": 10, "class_name": "red 10", "score": round(10 / 255, 6)}]
        assert shown[2]["classes"][0]["class_id"] == 20
        assert (shown[0]["model"], shown[0]["version"], shown[0]["height"], shown[0]["width"]) == ("tiny", "1", 16, 24)

        written = lines((output / "results.jsonl").read_text())
        assert written == [shown[0], shown[2]]
        (failure,) = lines((output / "failures.jsonl").read_text())
        assert failure == shown[1]
        assert (failure["error"], failure["status"]) == ("InvalidImage", "INVALID_ARGUMENT")
        assert {path.relative_to(output) for path in output.rglob("*.jpg")} == {
            Path("a.tiny.jpg"),
            Path("deep/b.tiny.jpg"),
        }
        assert cv2.imread(str(output / "a.tiny.jpg")).shape == (16, 24, 3)

    def test_good_files_leave_no_failures(self, manifest, tmp_path):
        photo = save(tmp_path / "a.png", 7)
        output = tmp_path / "out"
        output.mkdir()
        (output / "failures.jsonl").write_text("of an earlier run")
        result = run("predict", photo, "--model", "tiny", "--manifest", manifest, "--output", output)
        assert result.exit_code == 0
        assert result.stdout == f"{photo}: red 7 0.03\n"
        assert not (output / "failures.jsonl").exists()

    def test_several_models(self, manifest, tmp_path):
        photo = save(tmp_path / "a.png", 7)
        output = tmp_path / "out"
        models = ("--model", "tiny", "--model", "other@2")
        arguments = (*models, "--manifest", manifest, "--output", output, "--save", "jsonl,pictures", "--json")
        result = run("predict", photo, *arguments)
        assert [(row["model"], row["version"]) for row in lines(result.stdout)] == [("tiny", "1"), ("other", "2")]
        assert {path.name for path in output.glob("*.jpg")} == {"a.tiny.jpg", "a.other.jpg"}

    def test_without_output_nothing_is_written(self, manifest, tmp_path):
        photo = save(tmp_path / "photos" / "a.png", 7)
        before = set(tmp_path.rglob("*"))
        assert run("predict", photo, "--model", "tiny", "--manifest", manifest).exit_code == 0
        assert set(tmp_path.rglob("*")) == before

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            ([], "say what to do: --task"),
            (["--model", "tinny"], "no model 'tinny' is known; did you mean 'tiny'?"),
            (["--model", "tiny", "--task", "detect"], "tiny is a model for classify, not for detect"),
            (["--model", "tiny", "--iou-threshold", "0.5"], "iou_threshold: has no effect on classify, only on detect"),
            (["--model", "tiny", "--score-threshold", "2"], "score_threshold: must be a number from 0 to 1, got 2.0"),
            (["--model", "tiny", "--class", "blue"], "classes: the model has no class 'blue'"),
            (["--model", "tiny", "--class", "256"], "classes: the model has class ids 0 to 255, got 256"),
            (["--model", "tiny", "--device", "tpu"], "device"),
            (["--model", "tiny", "--every", "2"], "--every and --every-s have no effect: no source is a video"),
            (["--model", "tiny", "--save", "csv"], "--save has no effect without --output"),
            (["--model", "tiny", "--restart"], "--restart has no effect without --output"),
            (["--model", "tiny", "--retry-failures"], "--retry-failures has no effect without --output"),
            (["--model", "tiny", "--output", "o", "--save", "cvs"], "there is no such output; did you mean 'csv'?"),
            (["--model", "tiny", "--output", "o", "--save", "yolo"], "yolo has no effect on classify, only on detect"),
            (["--model", "tiny", "--output", "o", "--save", "video"], "no effect: no source is a video"),
            (["--model", "tiny", "--output", "o", "--coco-ids", "x"], "--coco-ids has no effect without --save coco"),
            (["--model", "tiny", "--max-failures", "x"], "--max-failures is a number of images or a percentage"),
        ],
    )
    def test_wrong_use_is_one_line_and_exit_code_2(self, manifest, photos, arguments, says):
        result = run("predict", photos, "--manifest", manifest, *arguments)
        assert result.exit_code == 2
        assert result.stderr.startswith("error: ")
        assert says in result.stderr
        assert len(result.stderr.splitlines()) == 1
        assert result.stdout == ""

    def test_a_folder_without_images(self, manifest, tmp_path):
        (tmp_path / "empty").mkdir()
        result = run("predict", tmp_path / "empty", "--model", "tiny", "--manifest", manifest)
        assert result.exit_code == 2
        assert "no images in" in result.stderr

    def test_a_path_that_does_not_exist(self, tmp_path):
        result = run("predict", tmp_path / "missing.jpg", "--task", "classify")
        assert (result.exit_code, result.stderr) == (2, f"error: {tmp_path / 'missing.jpg'} does not exist\n")

    def test_debug_lets_the_error_through(self, photos):
        try:
            result = run("--debug", "predict", photos)
        finally:
            show_tracebacks(False)
        assert isinstance(result.exception, ConfigError)

    def test_a_task_has_a_model_that_ships(self, photos):
        areas = []
        for threshold in (0, 0.99):
            result = run("predict", photos / "a.png", "--task", "segment", "--score-threshold", threshold, "--json")
            assert result.exit_code == 0, result.output
            (row,) = lines(result.stdout)
            assert row["model"] == "selfie_segmentation"
            areas.append(sum(segment["area"] for segment in row["segments"]))
        assert areas[0] > areas[1]


class TestModels:
    def test_list(self, manifest):
        result = run("models", "list", "--manifest", manifest)
        assert result.exit_code == 0
        heading, *rows = result.stdout.splitlines()
        columns = ["name", "task", "version", "family", "backend", "licence", "size", "here", "verified", "default"]
        assert heading.split() == columns
        by_name = {row.split()[0]: row.split() for row in rows}
        assert by_name["mobilenet_v2"][1:4] == ["classify", "1", "embedded"]
        assert by_name["mobilenet_v2"][5:9] == ["BSD-3-Clause", "7.2", "MB", "yes"]
        assert by_name["mobilenet_v2"][-1] == "yes"
        assert by_name["selfie_segmentation"][4] == "selfie_segmentation"  # nothing is cut or folded in a pipe
        assert by_name["other"] == ["other", "classify", "2", "user", "tiny", "-", "yes"]

    def test_list_as_json_of_one_task(self, manifest):
        rows = json.loads(run("models", "list", "--task", "classify", "--json", "--manifest", manifest).stdout)
        assert {row["task"] for row in rows} == {"classify"}
        assert [row["name"] for row in rows if row["is_default"]] == ["mobilenet_v2"]
        assert {"tiny", "other"} <= {row["name"] for row in rows}

    def test_show(self, manifest):
        shown = json.loads(run("models", "show", "other", "--json", "--manifest", manifest).stdout)
        assert (shown["name"], shown["version"], len(shown["classes"])) == ("other", "2", 256)
        assert "version: 2\n" in run("models", "show", "other", "--manifest", manifest).stdout

    def test_show_unknown(self):
        result = run("models", "show", "nanodet")
        assert result.exit_code == 2
        assert result.stderr == "error: no model 'nanodet' is known; did you mean 'nanodet_g'?\n"


class TestErrors:
    @pytest.mark.parametrize(
        ("error", "code"),
        [
            (InvalidInput("top_k", "no"), 2),
            (ConfigError("no"), 2),
            (WeightsError("no"), 2),
            (ModelNotFound("no"), 2),
            (InvalidImage("no"), 1),
            (QueueFull("no", 1.0), 1),
            (DeadlineExceeded("no"), 1),
            (RuntimeError("no"), 1),
            (OSError("no"), 1),
        ],
    )
    def test_exit_codes(self, error, code):
        assert exit_code(error) == code

    def test_surprises_are_one_line_too(self, capsys):
        import typer

        @readable
        def surprise():
            raise ZeroDivisionError("by zero")

        with pytest.raises(typer.Exit):
            surprise()
        printed = capsys.readouterr().err
        assert printed == "error: unexpected ZeroDivisionError: by zero; `vision-service --debug ...` shows where\n"


class TestOverrides:
    NOTHING = dict.fromkeys(("top_k", "score_threshold", "iou_threshold", "max_detections", "classes"))

    def test_nothing(self):
        assert read_overrides([Task.TRANSLATE], **self.NOTHING) == ParamOverrides()

    def test_everything(self):
        values = {"top_k": None, "score_threshold": 0.0, "iou_threshold": 0.5, "max_detections": 3}
        overrides = read_overrides([Task.DETECT], **values, classes=["cat", "7"])
        assert overrides == ParamOverrides(None, 0.0, 0.5, 3, ("cat", 7))

    def test_an_option_that_has_an_effect_on_one_of_several_tasks(self):
        chosen = {**self.NOTHING, "top_k": 2}
        assert read_overrides([Task.DETECT, Task.CLASSIFY], **chosen).top_k == 2
        with pytest.raises(InvalidInput, match="top_k: has no effect on detect and segment, only on classify"):
            read_overrides([Task.DETECT, Task.SEGMENT], **chosen)


def result(prediction, **fields):
    return Result(prediction, (4, 6), "net", "2", Timings(batch_size=3), **fields)


class TestOutput:
    def test_common_keys(self):
        row = to_record(result(Detections.empty(), request_id="id-7"))
        assert list(row) == [
            "task",
            "model",
            "version",
            "height",
            "width",
            "detections",
            "timings_ms",
            "request_id",
        ]
        bare = to_record(result(Detections.empty(), request_id="id-7"), timings=False)
        assert bare.keys() == row.keys() - {"timings_ms", "request_id"}
        assert (row["task"], row["model"], row["version"], row["height"], row["width"]) == ("detect", "net", "2", 4, 6)
        assert row["timings_ms"]["batch_size"] == 3
        assert row["detections"] == []
        assert "request_id" not in to_record(result(Detections.empty()))

    def test_detections(self):
        boxes = np.array([[0.125, 1, 2, 3]], np.float32)
        found = result(Detections(boxes, np.array([1]), ("cat",), np.array([0.1], np.float32)))
        row = {"class_id": 1, "class_name": "cat", "score": 0.1, "box": [0.12, 1.0, 2.0, 3.0]}
        assert json.loads(json.dumps(to_record(found)))["detections"] == [row]
        assert to_line(found) == "cat 0.10"
        assert to_line(result(Detections.empty())) == "nothing found"

    def test_classes(self):
        found = result(Classification(np.array([1]), ("cat",), np.array([0.5], np.float32)))
        assert to_record(found)["classes"] == [{"class_id": 1, "class_name": "cat", "score": 0.5}]
        none = result(Classification(np.empty(0, np.int64), (), np.empty(0, np.float32)))
        assert to_record(none)["classes"] == []
        assert to_line(none) == "no class"

    def test_segments(self):
        class_map = np.full((4, 6), VOID, np.uint8)
        class_map[1:3, 2:5] = 1
        row = json.loads(json.dumps(to_record(result(SegmentationMap(class_map, ("a", "b"))))))
        (segment,) = row["segments"]
        mask = segment.pop("mask")
        assert segment == {"class_id": 1, "class_name": "b", "area": 6, "box": [2, 1, 5, 3]}
        assert np.array_equal(decode_rle(mask["counts"].encode(), tuple(mask["size"])), class_map == 1)
        assert to_line(result(SegmentationMap(class_map, ("a", "b")))) == "b 25.0%"

    def test_images(self):
        found = result(TranslatedImage(np.zeros((8, 12, 3), np.uint8)))
        assert to_record(found)["image"] == {"height": 8, "width": 12}
        assert to_line(found) == "image of 12x8 pixels"

    def test_errors(self):
        assert error_to_record(QueueFull("full", 1.0)) == {
            "error": "QueueFull",
            "status": "RESOURCE_EXHAUSTED",
            "message": "full",
        }


def test_choices_that_only_ray_can_honour_are_refused_without_it():
    result = run("serve", "--max-replicas", 2)
    assert result.exit_code == 2
    assert "max_replicas: has an effect with --engine ray only" in result.stderr
    wrong = run("serve", "--engine", "ray", "--min-replicas", 0)
    assert wrong.exit_code == 2
    assert "min_replicas" in wrong.stderr
