"""`client` agrees with `predict` on the same photos, to what docs/batch.md says."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path

import cv2
import pytest
from typer.testing import CliRunner

from tests.conftest import SHARED
from tests.helpers import ROOT, run_server
from vision_service.cli import app
from vision_service.config.settings import ServerSettings

sys.path.insert(0, str(ROOT / "scripts"))
compare = importlib.import_module("compare_results").compare

SCORE, EDGE_PX = (
    float(re.search(pattern, (ROOT / "docs/batch.md").read_text())[1])
    for pattern in (r"scores within (0\.0*1)", r"edges within (0\.\d+) pixels")
)
MODELS = {"classify": "mobilenet_v2", "detect": "nanodet_g"}


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """The samples, whole, mirrored and in parts; and twenty photos more where those are at hand."""
    folder = tmp_path_factory.mktemp("photos")
    for path in sorted((ROOT / "samples").glob("*.jpg")):
        image = cv2.imread(str(path))
        height, width = (side // 4 for side in image.shape[:2])
        parts = image, image[:, ::-1], image[height:, width:], image[:-height, :-width]
        for index, part in enumerate(parts):
            cv2.imwrite(str(folder / f"{path.stem}{index}.png"), part)
    for path in sorted((SHARED / "data/imagenet100").glob("*"))[:20]:
        (folder / f"{path.stem}.jpg").symlink_to(path)
    return folder


@pytest.fixture(scope="module", params=["torch", "openvino"])
def runtime(request) -> str:
    if request.param != "torch":
        pytest.importorskip(request.param)
    return request.param


@pytest.fixture(scope="module")
def address(runtime):
    wanted = {"host": "127.0.0.1", "port": 0, "device": "cpu", "runtime": runtime}
    with run_server(ServerSettings.read(models=tuple(MODELS.values()), **wanted)) as server:
        for model in MODELS.values():  # batches of one, which a restless machine may choose, would show nothing
            server.pipeline.catalog.find(model).fix_batch(4)
        yield f"127.0.0.1:{server.port}"


@pytest.mark.parametrize(
    ("task", "more"), [("classify", ()), ("detect", ()), ("detect", ("--score-threshold", "0.05"))]
)
def test_same_answers_to_the_stated_tolerance(photos, runtime, address, tmp_path, task, more):
    here, there = tmp_path / "here", tmp_path / "there"
    model = ["--model", MODELS[task], *more]
    words = ["predict", photos, *model, "--device", "cpu", "--runtime", runtime, "--output", here]
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    words = ["client", task, photos, *model, "--address", address, "--timings", "--output", there]
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in (there / "results.jsonl").read_text().splitlines()]
    assert max(row["timings_ms"]["batch_size"] for row in rows) > 1  # else this shows nothing
    (apart,) = compare(here / "results.jsonl", there / "results.jsonl").values()
    assert (apart.images, apart.alone) == (len(list(photos.iterdir())), [])
    assert apart.matched >= apart.images
    assert apart.score <= SCORE
    assert apart.edge_px <= EDGE_PX


class TestComparison:
    def record(self, file: str, *found: tuple[int, float, float]) -> dict:
        rows = [
            {"class_id": i, "class_name": str(i), "score": score, "box": [left, 0, 9, 9]} for i, score, left in found
        ]
        return {"file": file, "model": "m", "height": 10, "width": 10, "detections": rows}

    def write(self, path: Path, *records: dict) -> Path:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path

    @pytest.mark.parametrize(
        ("one", "other", "score", "edge_px", "alone"),
        [
            ((), (), 0, 0, []),
            (((1, 0.5, 2.0), (1, 0.4, 7.0)), ((1, 0.5, 7.0), (1, 0.4, 2.5)), 0.1, 0.5, []),
            (((1, 0.5, 2.0),), ((2, 0.6, 2.0),), 0, 0, [("a", "1", 0.5), ("a", "2", 0.6)]),
            (((1, 0.5, 2.0),), ((1, 0.5, 2.0), (1, 0.3, 3.0)), 0, 0, [("a", "1", 0.3)]),
        ],
    )
    def test_matched_by_class_and_place(self, tmp_path, one, other, score, edge_px, alone):
        left = self.write(tmp_path / "one", self.record("a", *one))
        right = self.write(tmp_path / "other", self.record("a", *other))
        apart = compare(left, right)["m"]
        assert (apart.score, apart.edge_px) == pytest.approx((score, edge_px))
        assert (apart.alone, apart.equal) == (alone, one == other)

    def test_other_images_are_said(self, tmp_path):
        left, right = (self.write(tmp_path / name, self.record(name)) for name in "ab")
        with pytest.raises(ValueError, match="not about the same images"):
            compare(left, right)
