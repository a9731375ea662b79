"""`vision-service client` over a folder, stopped in the middle: the job goes on to what an uninterrupted one has."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import cv2
import pytest
from typer.testing import CliRunner

from tests.helpers import red_image, run_server, tiny_manifest
from tests.job_processes import kill_at_30_60_and_90_percent, lines_in, start, wait_for_lines
from vision_service.cli import app
from vision_service.config.settings import ServerSettings

IMAGES = 200
# Batches of several, and slow enough that a job can be met in the middle.
SLOW = 'runtime = "torch"\nbatching.max_batch_size = 4\noptions.sleep_s = 0.04'


def words(folder: Path, address: str, output: Path, *more: object) -> tuple[object, ...]:
    return ("client", "classify", folder, "--address", address, "--output", output, *more)


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def served(manifest: Path):
    return run_server(ServerSettings.read(host="127.0.0.1", port=0, manifests=(manifest,), models=("tiny",)))


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for red in range(IMAGES):
        cv2.imwrite(str(folder / f"{red:03d}.png"), red_image(red)[..., ::-1])
    return folder


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    with served(tiny_manifest(tmp_path_factory.mktemp("models"), tiny=SLOW)) as server:
        yield f"127.0.0.1:{server.port}"


@pytest.fixture(scope="module")
def uninterrupted(photos, address, tmp_path_factory) -> bytes:
    output = tmp_path_factory.mktemp("whole")
    assert run(*words(photos, address, output)).exit_code == 0
    content = (output / "results.jsonl").read_bytes()
    assert [json.loads(line)["classes"][0]["class_id"] for line in content.splitlines()] == list(range(IMAGES))
    return content


def test_killed_at_30_60_and_90_percent(photos, address, uninterrupted, tmp_path):
    kill_at_30_60_and_90_percent(tmp_path, IMAGES, *words(photos, address, tmp_path))
    last = run(*words(photos, address, tmp_path, "--save", "csv"))
    assert last.exit_code == 0, last.output
    assert "going on after" in last.stderr
    assert len(last.stdout.splitlines()) < IMAGES // 2  # what was done was not asked for again
    assert (tmp_path / "results.jsonl").read_bytes() == uninterrupted
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 1 + IMAGES


def test_interrupted(photos, address, uninterrupted, tmp_path):
    process = start(*words(photos, address, tmp_path))
    wait_for_lines(process, tmp_path, 1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on from here" in said.decode()
    assert 0 < lines_in(tmp_path) < IMAGES
    assert run(*words(photos, address, tmp_path)).exit_code == 0
    assert (tmp_path / "results.jsonl").read_bytes() == uninterrupted


def test_the_server_is_killed_and_another_one_takes_over(photos, serve, uninterrupted, tmp_path):
    """What failed because it was away is done again; only --max-failures keeps the rest from failing likewise."""
    output = tmp_path / "out"
    server, port, _ = serve(SLOW)
    process = start(*words(photos, f"127.0.0.1:{port}", output, "--max-failures", 3))
    wait_for_lines(process, output, 1)
    server.kill()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "more failed than --max-failures allows; the same command goes on" in said.decode()
    failures = [json.loads(line) for line in (output / "failures.jsonl").read_text().splitlines()]
    assert {row["status"] for row in failures} == {"UNAVAILABLE"}
    assert lines_in(output) + len(failures) < IMAGES
    done = lines_in(output)
    _, port, _ = serve(SLOW)
    last = run(*words(photos, f"127.0.0.1:{port}", output))
    assert last.exit_code == 0, last.output
    assert len(last.stdout.splitlines()) == IMAGES - done
    assert not (output / "failures.jsonl").exists()
    assert sorted((output / "results.jsonl").read_bytes().splitlines()) == sorted(uninterrupted.splitlines())


def test_another_version_of_the_model_does_all_again(photos, tmp_path):
    for version, again in (("1", False), ("1", False), ("2", True)):
        folder = tmp_path / version
        folder.mkdir(exist_ok=True)
        with served(tiny_manifest(folder, tiny=f'runtime = "torch"\nversion = "{version}"')) as server:
            done = run(*words(photos / "00*.png", f"127.0.0.1:{server.port}", tmp_path / "out"))
        assert done.exit_code == 0, done.output
        assert ("all images are done again" in done.stderr) == again
        rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
        assert [row["version"] for row in rows] == [version] * 10


def test_a_job_is_patient_with_a_server_that_is_full(photos, tmp_path):
    """Far more calls under way than the server takes: they are refused many times, and none is lost."""
    few = "batching = {max_batch_size = 1, max_queued_jobs = 2}\noptions.sleep_s = 0.02"
    with served(tiny_manifest(tmp_path, tiny=few)) as server:
        done = run(*words(photos, f"127.0.0.1:{server.port}", tmp_path / "out", "--in-flight", 48))
    assert done.exit_code == 0, done.output
    records = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [record["classes"][0]["class_id"] for record in records] == list(range(IMAGES))
