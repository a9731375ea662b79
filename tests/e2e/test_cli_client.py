"""The command line against a real server with tiny models."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import pytest
from typer.testing import CliRunner

from tests.helpers import red_image, relay, run_server, tiny_manifest
from vision_service.cli import app
from vision_service.config.settings import ServerSettings


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    manifest = tiny_manifest(folder, tiny="", other='version = "2"')
    settings = ServerSettings.read(host="127.0.0.1", port=0, manifests=(manifest,), models=("tiny", "other"))
    with run_server(settings) as server:
        yield f"127.0.0.1:{server.port}"


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for red in range(1, 6):
        cv2.imwrite(str(folder / f"{red}.png"), red_image(red)[..., ::-1])
    return folder


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def lines(text):
    return [json.loads(line) for line in text.splitlines()]


def test_results_in_the_order_of_the_files(address, photos, tmp_path):
    output = tmp_path / "out"
    options = ("--output", output, "--save", "pictures", "--timings", "--json", "--in-flight", 2)
    result = run("client", "classify", photos, "--address", address, *options)
    assert result.exit_code == 0, result.output
    rows = lines(result.stdout)
    assert [Path(row["file"]).name for row in rows] == [f"{red}.png" for red in range(1, 6)]
    assert [row["classes"][0]["class_name"] for row in rows] == [f"red {red}" for red in range(1, 6)]
    assert all(row["request_id"] for row in rows)
    assert lines((output / "results.jsonl").read_text()) == rows
    assert len(list(output.glob("*.tiny.jpg"))) == 5


def test_images_travel_on_a_stream_or_in_calls(address, photos):
    (photos / "6.jpg").write_bytes(b"not an image")
    with relay(address) as (beside, called):
        calls = run("client", "classify", photos, "--address", beside, "--json")
        assert called.count("Classify") == 6
        assert "Predict" not in called
        called.clear()
        stream = run("client", "classify", photos, "--address", beside, "--json", "--stream")
        assert called.count("Predict") == 1
        assert "Classify" not in called
    for result in (calls, stream):
        assert result.exit_code == 1
        rows = lines(result.stdout)
        assert [row["classes"][0]["class_name"] for row in rows[:5]] == [f"red {red}" for red in range(1, 6)]
        assert rows[5]["error"] == "InvalidImage"


def test_model_and_version_are_asked_for(address, photos):
    result = run("client", "classify", photos / "1.png", "--address", address, "--model", "other", "--version", "2")
    assert result.stdout == f"{photos / '1.png'}: red 1 0.00\n"
    result = run("client", "classify", photos / "1.png", "--address", address, "--model", "tiny", "--version", "2")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: model 'tiny' has no version '2'")


def test_a_bad_file_does_not_stop_the_others(address, photos):
    (photos / "0.jpg").write_bytes(b"not an image")
    result = run("client", "classify", photos, "--address", address, "--json")
    assert result.exit_code == 1
    failure, *rows = lines(result.stdout)
    assert (failure["error"], failure["status"]) == ("InvalidImage", "INVALID_ARGUMENT")
    assert len(rows) == 5
    assert "1 failed:" in result.stderr


def test_an_option_with_no_effect_is_refused(address, photos):
    result = run("client", "classify", photos, "--address", address, "--max-detections", 3)
    assert result.exit_code == 2
    assert "max_detections: has no effect on classify, only on detect" in result.stderr


def test_a_class_that_the_model_does_not_have_is_said_once(address, photos):
    result = run("client", "classify", photos, "--address", address, "--class", "blue")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: classes: the model has no class 'blue'")
    assert len(result.stderr.splitlines()) == 1


def test_models_of_a_server(address):
    rows = json.loads(run("models", "list", "--address", address, "--json").stdout)
    assert [(row["name"], row["version"], row["state"], row["is_default"]) for row in rows] == [
        ("other", "2", "ready", False),
        ("tiny", "1", "ready", True),
    ]
    assert json.loads(run("models", "list", "--address", address, "--json", "--task", "detect").stdout) == []
    shown = json.loads(run("models", "show", "other@2", "--address", address, "--json").stdout)
    assert (shown["name"], len(shown["class_names"]), shown["preprocess"]["resize"]["mode"]) == (
        "other",
        256,
        "stretch",
    )
    missing = run("models", "show", "othre", "--address", address)
    assert missing.exit_code == 2
    assert "did you mean 'other'?" in missing.stderr


@pytest.mark.parametrize("more", [(), ("--output", "out")])
def test_a_server_that_is_not_there_is_said_once(photos, tmp_path, monkeypatch, more):
    monkeypatch.chdir(tmp_path)
    result = run("client", "classify", photos, "--address", "127.0.0.1:1", "--timeout", 0.5, *more)
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert "UNAVAILABLE from 127.0.0.1:1" in line
    assert line.endswith("`vision-service health --address 127.0.0.1:1` tells whether a server answers there")
    assert not (tmp_path / "out").exists()


def test_models_of_a_server_that_is_not_there():
    listed = run("models", "list", "--address", "127.0.0.1:1")
    assert listed.exit_code == 1
    assert "UNAVAILABLE from 127.0.0.1:1" in listed.stderr


def test_health_tells_by_its_exit_code(address, monkeypatch):
    healthy = run("health", "--address", address)
    assert (healthy.exit_code, healthy.stdout) == (0, "SERVING\n")
    idle = run("health", "--address", address, "--service", "detect")
    assert (idle.exit_code, idle.stdout) == (1, "NOT_SERVING\n")
    monkeypatch.setenv("VISION_SERVICE_PORT", address.rpartition(":")[2])
    assert run("health").exit_code == 0
    assert run("health", "--address", "127.0.0.1:1", "--timeout", "0.2").exit_code == 1
