"""`serve` fetches the weights that are missing, says so, and answers."""

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


def arguments(manifest, *more):
    return ("--device", "cpu", "--model", "fetched", "--manifest", str(manifest), *more)


def ended(manifest, *more):
    """A start that comes to nothing."""
    command = [sys.executable, "-m", "vision_service", "serve", "--port", "0", *arguments(manifest, *more)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def serve(manifest, serve_process, tmp_path):
    def start(*more):
        _, port, _ = serve_process(*arguments(manifest, *more))
        return port, (tmp_path / "log").read_text()

    return start


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
    done = ended(manifest, *more)
    assert done.returncode == 2
    assert clause in done.stderr
    assert "Traceback" not in done.stderr
    assert server.requests == []


def test_a_wrong_file_ends_the_start_and_is_thrown_away(manifest, server, tmp_path):
    server.add("/nanodet_g.safetensors", b"<html>please log in</html>")
    done = ended(manifest)
    assert done.returncode == 2
    assert "model 'fetched': what came from" in done.stderr
    assert "it was thrown away. Fetch again" in done.stderr
    assert not list(tmp_path.glob("nanodet_g*"))
