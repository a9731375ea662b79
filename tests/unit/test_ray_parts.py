"""What a job on Ray writes and finds again; none of it needs a cluster."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import PurePosixPath

import numpy as np
import pytest
from pyarrow import parquet
from typer.testing import CliRunner

from tests.helpers import ROOT, red_image, tiny_spec
from vision_service.cli import app
from vision_service.errors import ConfigError, InvalidImage, QueueFull, error_classes
from vision_service.imaging.decode import DecodeLimits
from vision_service.jobs.items import Failure, Item, Outcome
from vision_service.jobs.ray_engine import ActorOptions
from vision_service.jobs.ray_parts import Parts
from vision_service.jobs.ray_stages import Decode, pack, unpack
from vision_service.types import Detections, Result


def item(name: str, stamp: str = "1") -> Item:
    return Item(f"photos/{name}", PurePosixPath(name), 10, stamp)


def found(one: Item) -> Outcome:
    boxes = np.array([[1, 2, 3.126, 4]], np.float32)
    prediction = Detections(boxes, np.array([5]), ("cup",), np.array([0.5], np.float32))
    return Outcome(one, (Result(prediction, (20, 30), "m", "1"),))


def failed(one: Item, *, passing: bool = False) -> Outcome:
    return Outcome(one, failures=(Failure(InvalidImage("broken"), "m", passing),))


ITEMS = [item(f"{letter}.jpg") for letter in "abcdef"]


@pytest.fixture(params=["folder", "store"])
def url(request, tmp_path):
    return str(tmp_path / "out") if request.param == "folder" else f"memory://{tmp_path.name}/out"


def written(url: str, identity: str = "1" * 64) -> Parts:
    parts = Parts(url, identity)
    assert list(parts.pending(ITEMS)) == ITEMS
    parts.write([found(ITEMS[0]), failed(ITEMS[1])])
    parts.write([found(ITEMS[2]), found(ITEMS[3])])
    return parts


def names(items) -> str:
    return "".join(one.name.stem for one in items)


class TestParts:
    def test_what_is_written_is_not_pending(self, url):
        parts = written(url)
        assert names(parts.pending(ITEMS)) == "ef"
        assert names(Parts(url, "1" * 64).pending(ITEMS)) == "ef"

    def test_a_part_that_is_written_twice_is_one_part(self, url):
        parts = written(url)
        again = parts.write([found(ITEMS[2]), found(ITEMS[3])])
        assert (again.images, again.failed) == (2, 0)
        parts.write([found(ITEMS[4]), found(ITEMS[5])])
        parts.finish(ITEMS)
        assert len(read(parts, "results.jsonl")) == 5

    def test_a_changed_image_takes_its_part_with_it(self, url):
        parts = written(url)
        changed = [item("a.jpg", stamp="2"), *ITEMS[1:]]
        assert names(parts.pending(changed)) == "abef"
        assert names(parts.pending(changed)) == "abef"

    def test_failures_are_tried_again_on_demand_and_passing_ones_always(self, url):
        parts = written(url)
        assert names(parts.pending(ITEMS)) == "ef"
        assert names(parts.pending(ITEMS, retry_failures=True)) == "abef"
        parts.write([found(ITEMS[4]), failed(ITEMS[5], passing=True)])
        assert names(parts.pending(ITEMS)) == "abef"

    def test_other_models_do_it_all_again(self, url):
        written(url)
        assert names(Parts(url, "2" * 64).pending(ITEMS)) == "abcdef"
        assert names(Parts(url, "1" * 64).pending(ITEMS)) == "abcdef"

    def test_clear(self, url):
        parts = written(url)
        parts.clear()
        assert names(parts.pending(ITEMS)) == "abcdef"

    def test_results_in_the_order_of_the_images_as_a_local_job_writes_them(self, url):
        parts = Parts(url, "1" * 64)
        list(parts.pending(ITEMS))
        parts.write([found(ITEMS[4]), found(ITEMS[5])])
        parts.write([failed(ITEMS[2]), found(ITEMS[3])])
        parts.write([found(ITEMS[0]), found(ITEMS[1])])
        assert parts.finish(ITEMS) == 1
        expected = [json.dumps(row) for one in ITEMS if one is not ITEMS[2] for row in found(one).records()]
        assert read(parts, "results.jsonl") == expected
        assert read(parts, "failures.jsonl") == [json.dumps(row) for row in failed(ITEMS[2]).failure_records()]

    def test_no_failures_leave_no_file(self, url):
        parts = Parts(url, "1" * 64)
        list(parts.pending(ITEMS))
        parts.write([found(one) for one in ITEMS])
        assert parts.finish(ITEMS) == 0
        with pytest.raises(FileNotFoundError):
            read(parts, "failures.jsonl")

    def test_parts_are_tables_with_nested_detections(self, tmp_path):
        written(str(tmp_path))
        rows = parquet.read_table(tmp_path / "parts").sort_by("file").to_pylist()
        assert [row["file"][-5] for row in rows] == ["a", "b", "c", "d"]
        assert rows[0]["detections"] == [
            {"class_id": 5, "class_name": "cup", "score": 0.5, "box": [1.0, 2.0, 3.13, 4.0], "mask": None}
        ]
        assert (rows[1]["error"], rows[1]["message"]) == ("InvalidImage", "image: broken")


def read(parts: Parts, name: str) -> list[str]:
    with parts._store.open(f"{parts._folder}/{name}") as file:
        return file.read().decode().splitlines()


def test_decoding_leaves_pixels_or_a_reason(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # it goes there itself, and this brings the tests back
    import cv2

    (tmp_path / "good.png").write_bytes(cv2.imencode(".png", red_image(7)[..., ::-1])[1].tobytes())
    (tmp_path / "bad.png").write_bytes(b"not an image")
    items = [Item(name, PurePosixPath(name)) for name in ("good.png", "bad.png", "none.png")]
    blocks = list(Decode(DecodeLimits(), None, str(tmp_path))(pack(items)))
    good, bad, none = (one for block in blocks for one in unpack(block))
    assert (good.pixels == red_image(7)).all()
    assert "not an image" in str(bad.failures[0].error)
    assert not bad.failures[0].passing
    assert "No such file" in str(none.failures[0].error)
    assert none.failures[0].passing


def test_a_jpeg_that_the_only_model_decodes_smaller_is_left_to_it(tmp_path, monkeypatch):
    import cv2

    monkeypatch.chdir(tmp_path)
    only = tiny_spec().preprocess
    for name, side in (("large.jpg", 512), ("small.jpg", 16)):
        (tmp_path / name).write_bytes(cv2.imencode(".jpg", red_image(7, side, side))[1].tobytes())
    items = [Item(name, PurePosixPath(name)) for name in ("large.jpg", "small.jpg", "none.jpg")]
    blocks = list(Decode(DecodeLimits(), only, str(tmp_path))(pack(items)))
    large, small, none = (one for block in blocks for one in unpack(block))
    assert large == (items[0], (tmp_path / "large.jpg").read_bytes())
    assert small.pixels.shape == (16, 16, 3)
    assert none.failures[0].passing


def test_a_task_that_decodes_imports_no_torch():
    code = "import sys, vision_service.jobs.ray_stages; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_errors_come_from_another_process_as_they_are():
    def same(error):
        there = pickle.loads(pickle.dumps(error))
        assert (type(there), str(there), there.__dict__) == (type(error), str(error), error.__dict__)

    same(InvalidImage("broken", "image.raw"))
    full = QueueFull("later", 1.5)
    full.request_id = "abc"
    full.add_note("said twice")
    same(full)
    for cls in error_classes():
        if cls.__init__ is Exception.__init__:
            same(cls("why"))


@pytest.mark.parametrize(
    ("options", "resources", "most"),
    [
        (ActorOptions(), {"CPU": 2}, 1),
        (ActorOptions(), {"CPU": 8, "GPU": 2}, 7),
        (ActorOptions(actors=3), {"CPU": 8}, 3),
        (ActorOptions(gpus=0.5), {"CPU": 8, "GPU": 2}, 4),
    ],
)
def test_how_many_actors_a_cluster_has(options, resources, most):
    assert options.most(resources) == most


@pytest.mark.parametrize(("gpus", "resources"), [(0, {}), (0, {"CPU": 1}), (1, {"CPU": 8})])
def test_a_cluster_that_is_too_small_is_refused(gpus, resources):
    with pytest.raises(ConfigError, match="a job needs"):
        ActorOptions(gpus=gpus).most(resources)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engine", "ray"], "add --output"),
        (["--engine", "ray", "--output", "out", "--json"], "--json has no effect with --engine ray"),
        (["--engine", "ray", "--output", "out", "--timings"], "--timings has no effect"),
        (["--engine", "ray", "--output", "out", "--save", "pictures"], "--save pictures cannot be written"),
        (["--engine", "ray", "--output", "memory://x", "--save", "csv"], "--save csv cannot be written"),
        (["--output", "memory://x"], "only --engine ray writes to a URL"),
        (["--output", str(ROOT / "README.md")], "is a file"),
        (["--ray-address", "auto"], "ray_address: has an effect with --engine ray only"),
        (["--worker-gpus", "1"], "worker_gpus: has an effect with --engine ray only"),
    ],
)
def test_what_only_the_other_engine_can_is_refused(arguments, message):
    result = CliRunner().invoke(app, ["predict", str(ROOT / "samples"), "--task", "detect", *arguments])
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_folder_with_a_local_jobs_results_is_refused(tmp_path):
    (tmp_path / ".job.sqlite").touch()
    command = ["predict", str(ROOT / "samples"), "--task", "detect", "--engine", "ray", "--output", str(tmp_path)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2
    assert "choose another folder" in result.stderr
