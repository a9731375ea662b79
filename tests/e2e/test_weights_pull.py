"""`serve` fetches the weights that are missing, says so, and answers."""

import os
import re
import subprocess
import sys

import pytest

from tests.file_server import file_server
from tests.helpers import ROOT
from vision_service.client import VisionClient
from vision_service.weights.manifest import embedded_manifest, find_model

REAL = embedded_manifest().parent / "nanodet_g.safetensors"


@pytest.fixture
def server():
    with file_server() as running:
        running.add("/nanodet_g.safetensors", REAL.read_bytes())
        yield running


@pytest.fixture
def manifest(tmp_path, server):
    """The detector that ships, under another name and with an address."""
    text = embedded_manifest().read_text()
    table = next(part for part in text.split("[[model]]") if 'name = "nanodet_g"' in part)
    table = table.replace('name = "nanodet_g"', 'name = "fetched"')
    table = table.replace('"coco80.txt"', f'"{embedded_manifest().parent / "classes" / "coco80.txt"}"')
    path = tmp_path / "manifest.toml"
    path.write_text(f'[[model]]{table}\nurl = "{server.url}/nanodet_g.safetensors"\n')
    return path


def command(manifest, *more):
    return [
        *(sys.executable, "-m", "vision_service", "serve", "--host", "127.0.0.1", "--port", "0", "--device", "cpu"),
        *("--model", "fetched", "--manifest", str(manifest), *more),
    ]


@pytest.fixture
def serve(manifest, tmp_path):
    processes = []

    def start(*more):
        with (tmp_path / "log").open("w") as log:
            process = subprocess.Popen(
                command(manifest, *more), stdout=subprocess.PIPE, stderr=log, text=True, env=os.environ
            )
        processes.append(process)
        printed = []
        for line in process.stdout:
            printed.append(line)
            if found := re.match(r"ready on 127\.0\.0\.1:(\d+)", line):
                return int(found[1]), (tmp_path / "log").read_text()
        pytest.fail("".join(printed) + (tmp_path / "log").read_text())
        return None

    yield start
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()


def test_serve_pulls_what_is_missing_and_answers(serve, server, tmp_path):
    server.files["/nanodet_g.safetensors"].cuts = [3_000_000]
    port, said = serve()
    assert f"pulling nanodet_g.safetensors (7.6 MB) from {server.url}/nanodet_g.safetensors" in said
    assert "going on from" in said
    assert re.search(r"pulled nanodet_g\.safetensors in .* sha256 is right", said)
    assert (tmp_path / "nanodet_g.safetensors").read_bytes() == REAL.read_bytes()
    assert server.sent("/nanodet_g.safetensors") < REAL.stat().st_size + 65536
    with VisionClient(f"127.0.0.1:{port}") as client:
        image = (ROOT / "samples" / "astronaut.jpg").read_bytes()
        found = client.detect(image, model="fetched")
    assert len(found.prediction) > 0
    assert set(found.prediction.class_names) <= set(find_model("nanodet_g").classes)


@pytest.mark.parametrize(
    ("more", "clause"),
    [
        (("--offline",), "offline, and these files are not here: "),
        (("--trust", "fetchd"), "trusted_models has 'fetchd', which is not served; did you mean 'fetched'?"),
    ],
)
def test_a_start_that_cannot_be(manifest, server, tmp_path, more, clause):
    done = subprocess.run(command(manifest, *more), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert clause in done.stderr
    assert "Traceback" not in done.stderr
    assert server.requests == []


def test_a_wrong_file_ends_the_start_and_is_thrown_away(manifest, server, tmp_path):
    server.add("/nanodet_g.safetensors", b"<html>please log in</html>")
    done = subprocess.run(command(manifest), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "model 'fetched': what came from" in done.stderr
    assert "it was thrown away. Fetch again" in done.stderr
    assert not list(tmp_path.glob("nanodet_g*"))
