"""Jobs on a real Ray cluster of two nodes, one of which is killed in the middle."""

from __future__ import annotations

import json
import subprocess
import sys

import cv2
import pytest

from tests.helpers import red_image, tiny_manifest
from tests.ray_cluster import TwoNodes
from vision_service.config.settings import ServerSettings
from vision_service.engine.build import resolve_specs
from vision_service.jobs.predictor import Predictor, in_order
from vision_service.jobs.sources import list_files

DRIVER = """
import sys
from pathlib import Path
from vision_service.cluster import connected
from vision_service.config.settings import ServerSettings
from vision_service.jobs.ray_engine import ActorOptions, RayPredictor
from vision_service.jobs.ray_job import run_on_ray

if __name__ == "__main__":
    address, manifest, folder, output = sys.argv[1:]
    settings = ServerSettings.read(models=("tiny", "slow"), manifests=(Path(manifest),), device="cpu")
    with connected(address) as ray:
        predictor = RayPredictor(ray, settings, options=ActorOptions(actors=2))
        show = lambda summary, total: print(summary.seen, total, flush=True)
        print(run_on_ray(predictor, [folder], output, part_images=16, show=show), flush=True)
"""


@pytest.fixture(scope="module")
def nodes():
    cluster = TwoNodes()
    yield cluster
    cluster.close()


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


def test_a_node_is_killed_and_the_job_is_complete_and_equal_to_the_byte(nodes, photos, manifest, tmp_path):
    output = tmp_path / "results"
    command = [sys.executable, "-c", DRIVER, nodes.address, str(manifest), str(photos), str(output)]
    with (
        (tmp_path / "log").open("w") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=nodes.environment) as driver,
    ):
        first = driver.stdout.readline()
        if first:
            nodes.kill(nodes.worker)
        *_, last = driver.stdout
        assert driver.wait() == 0, (tmp_path / "log").read_text()
    print((tmp_path / "log").read_text())
    assert first.split() == ["16", "160"]
    assert "seen=160, failed=2" in last
    results, failures = locally(photos, manifest)
    assert (output / "results.jsonl").read_text() == results
    assert (output / "failures.jsonl").read_text() == failures
    assert len(list((output / "parts").iterdir())) == 10
