"""The commands and programs in the README and the docs do what they say."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.helpers import ROOT, run_server
from vision_service.cli import app
from vision_service.config.settings import ServerSettings

PAGES = ["README.md", "docs/client.md", "docs/docker.md"]
SCRIPTS = Path(sys.executable).parent


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def port():
    with run_server(ServerSettings.read(host="127.0.0.1", port=0, device="cpu")) as running:
        yield running.port


def run(command, folder, **kwargs):
    environment = os.environ | {"PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=100, **kwargs
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(ROOT / "samples", tmp_path / "samples")
    return tmp_path


@pytest.mark.parametrize(("page", "number"), [(page, i) for page in PAGES for i in range(len(blocks(page, "python")))])
def test_programs_run(page, number, port, folder):
    program = blocks(page, "python")[number].replace("localhost:50051", f"localhost:{port}")
    printed = run([sys.executable, "-W", "error", "-c", program], folder)
    if (page, number) == ("README.md", 0):
        assert re.search(r"person 0\.7\d at \[", printed)
        assert "('espresso'," in printed


def commands():
    lines = "\n".join(block for page in PAGES for block in blocks(page, "bash")).splitlines()
    return [
        line
        for line in lines
        if line.startswith(("vision-service client", "vision-service models", "vision-service health"))
    ]


def test_there_are_commands_to_run():
    assert len(commands()) >= 2


@pytest.mark.parametrize("line", commands())
def test_client_commands_run(line, port, folder):
    assert run(shlex.split(line.replace("localhost:50051", f"localhost:{port}")), folder)


def test_predict_command_writes_pictures_and_results(folder):
    (line,) = [line for block in blocks("README.md", "bash") for line in block.splitlines() if " predict " in line]
    run(shlex.split(line), folder)
    assert len((folder / "results" / "results.jsonl").read_text().splitlines()) == 3
    assert len(list((folder / "results").rglob("*.png")) + list((folder / "results").rglob("*.jpg"))) == 3


@pytest.mark.timeout(240)
def test_the_page_about_batches_runs(port, folder, monkeypatch):
    """In this process, in the order of the page."""
    monkeypatch.chdir(folder)
    for line in "\n".join(blocks("docs/batch.md", "bash")).splitlines():
        if line.startswith("vision-service "):
            words = shlex.split(line.replace("localhost:50051", f"localhost:{port}"))
            result = CliRunner().invoke(app, words[1:])
            assert result.exit_code == 0, f"{line}\n{result.output}"
        else:
            subprocess.run(line, shell=True, check=True, cwd=folder)
    assert len((folder / "two-models" / "results.jsonl").read_text().splitlines()) == 6
    assert (folder / "tables" / "results.parquet").exists()


@pytest.mark.timeout(240)
def test_the_page_about_evaluation_runs(port, folder, monkeypatch):
    """In this process: six commands that each import torch would take half a minute."""
    monkeypatch.chdir(folder)
    for line in "\n".join(blocks("docs/evaluate.md", "bash")).splitlines():
        if line.startswith("vision-service "):
            words = shlex.split(line.replace("localhost:50051", f"localhost:{port}"))[1:]
            result = CliRunner().invoke(app, words)
            assert result.exit_code == 0, f"{line}\n{result.output}"
        else:
            run(["bash", "-e", "-c", line], folder)
    made = {path.name for path in folder.iterdir()}
    assert made >= {
        "before.json",
        "before.html",
        "shots.html",
        "shots-coco",
        "after.json",
        "changes.html",
        "changes.json",
    }


def test_the_map_in_the_page_about_evaluation_is_one(tmp_path):
    from vision_service.evaluation.classes import SPELLINGS, read_map

    (tmp_path / "map.toml").write_text(blocks("docs/evaluate.md", "toml")[0])
    assert read_map(tmp_path / "map.toml") == {"sports ball": "RBC", "donut": "RBC", "frisbee": "WBC"}
    page = (ROOT / "docs/evaluate.md").read_text()
    assert all(spelling in page for spelling in SPELLINGS)


def test_the_settings_page_lists_every_setting():
    page = (ROOT / "docs" / "serving.md").read_text()
    table = page.split("## Settings")[1].split("```toml")[0]
    listed = {
        name.split(".")[0]
        for row in table.splitlines()
        if row.startswith("| `")
        for name in re.findall(r"`([a-z_.NAME]+)`", row.split("|")[1])
    }
    assert listed == set(ServerSettings.model_fields)


def test_the_example_settings_file_is_valid(tmp_path):
    from vision_service.engine.build import resolve_specs

    (tmp_path / "service.toml").write_text(blocks("docs/serving.md", "toml")[0])
    settings = ServerSettings.read(tmp_path / "service.toml")
    assert {spec.name: spec.batching.max_delay_ms for spec in resolve_specs(settings)} == {
        "nanodet_g": 2.0,
        "mobilenet_v2": None,
    }
