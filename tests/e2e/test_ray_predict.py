"""Jobs on a real Ray cluster of two nodes, one of which is killed in the middle."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import cv2
import pytest

from tests.helpers import ROOT, red_image, tiny_manifest
from tests.ray_cluster import two_nodes
from vision_service.config.settings import ServerSettings
from vision_service.engine.build import resolve_specs
from vision_service.jobs.predictor import Predictor, in_order
from vision_service.jobs.sources import list_files


@pytest.fixture(scope="module")
def nodes():
    with two_nodes() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for number in range(160):
        image = red_image(number % 200, 16 + number % 5, 24 + number % 7)
        (folder / f"{number:03d}.png").write_bytes(cv2.imencode(".png", image[..., ::-1])[1].tobytes())
    (folder / "055.png").write_bytes(b"not an image")
    return folder


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return tiny_manifest(tmp_path_factory.mktemp("models"), tiny="options.fail_red = 13", slow="options.sleep_s = 0.05")


def locally(photos, manifest):
    """What one process makes of the photos: lines of results, lines of failures."""
    settings = ServerSettings.read(models=("tiny", "slow"), manifests=(manifest,), device="cpu")
    results, failures = "", ""
    with Predictor(resolve_specs(settings), settings=settings, workers=2) as predictor:
        for outcome in in_order(predictor.predict, list_files([str(photos)]), predictor.in_flight):
            results += "".join(json.dumps(row) + "\n" for row in outcome.records())
            failures += "".join(json.dumps(row) + "\n" for row in outcome.failure_records())
    return results, failures


def started(nodes, manifest, photos, output, log):
    command = [sys.executable, "-m", "vision_service", "predict", str(photos), "--manifest", str(manifest)]
    command += ["--model", "tiny", "--model", "slow", "--device", "cpu", "--output", str(output)]
    command += ["--engine", "ray", "--ray-address", nodes.address]
    return subprocess.Popen(command, stdout=log, stderr=log, env=nodes.environment)


def wait_for_parts(output, count, process):
    while len(list(output.glob("parts/*.parquet"))) < count:
        assert process.poll() is None, "it ended before its time"
        time.sleep(0.05)


def check(output, photos, manifest):
    results, failures = locally(photos, manifest)
    assert (output / "results.jsonl").read_text() == results
    assert (output / "failures.jsonl").read_text() == failures


@pytest.mark.timeout(400)  # half a dozen processes import torch, which takes long where other work is done
def test_a_node_dies_and_all_is_there_and_equal_to_the_byte(nodes, photos, manifest, tmp_path):
    output = tmp_path / "results"
    with (tmp_path / "log").open("w+") as log:
        process = started(nodes, manifest, photos, output, log)
        wait_for_parts(output, 2, process)
        nodes.kill(nodes.worker)
        assert process.wait() == 1, (tmp_path / "log").read_text()  # two images fail, as they should
    said = (tmp_path / "log").read_text()
    assert "160 images were done now and 0 before" in said
    assert "055.png: image: text that starts with" in said
    check(output, photos, manifest)
    assert len(list(output.glob("parts/*"))) == 10


@pytest.mark.timeout(400)
def test_the_command_in_the_page_about_scale_runs_on_a_ray_of_its_own(tmp_path):
    (block,) = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "scale.md").read_text(), re.DOTALL)
    (tmp_path / "samples").mkdir()
    for photo in (ROOT / "samples").glob("*.jpg"):
        (tmp_path / "samples" / photo.name).symlink_to(photo)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    environment |= {"HOME": str(tmp_path)}
    done = subprocess.run(
        shlex.split(block), cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / ".ray").exists()
    rows = [json.loads(line) for line in (tmp_path / "on-ray" / "results.jsonl").read_text().splitlines()]
    assert [row["file"] for row in rows] == ["samples/astronaut.jpg", "samples/chelsea.jpg", "samples/coffee.jpg"]
    assert rows[0]["detections"][0]["class_name"] == "person"
