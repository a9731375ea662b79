"""What is installed, not what lies in the source tree: the wheel, and the generated code on old and new protobuf."""

import os
import subprocess
import sys
import zipfile

import pytest

from tests.helpers import ROOT, tiny_manifest


def pip_install(target, *requirements):
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), *requirements]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    if done.returncode:
        pytest.skip(f"needs a package index: {done.stderr.strip().splitlines()[-1]}")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    return next(folder.glob("*.whl"))


def test_the_wheel_installed_elsewhere_finds_its_weights(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    pip_install(tmp_path / "site", str(wheel))
    assert "vision_service/_embedded/manifest.toml" in names
    assert "vision_service/evaluation/page.html" in names
    assert any(name.endswith("licenses/weights/NOTICE") for name in names)
    assert not any(name.startswith(("tests/", "samples/")) for name in names)
    code = (
        "import vision_service, numpy as np\n"
        "from vision_service.engine.build import local_pipeline\n"
        "print(vision_service.__file__)\n"
        "with local_pipeline(['selfie_segmentation'], device='cpu') as pipeline:\n"
        "    print(pipeline.predict(np.zeros((40, 60, 3), np.uint8), task='segment').prediction.class_map.shape)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "site") in done.stdout
    assert "(40, 60)" in done.stdout


TALK = """
import warnings
# A generation behind is allowed, and protobuf says so each time.
warnings.filterwarnings("ignore", message="Protobuf gencode version", module="google.protobuf.runtime_version")
import pathlib, sys
sys.path.insert(0, sys.argv[2])
import google.protobuf
from tests.helpers import PLUGINS, red_image, run_server
sys.path.insert(0, str(PLUGINS))
from vision_service.client import VisionClient
from vision_service.config.settings import ServerSettings
settings = ServerSettings.read(host="127.0.0.1", port=0, models=("tiny",), manifests=(pathlib.Path(sys.argv[1]),))
with run_server(settings) as running, VisionClient(f"127.0.0.1:{running.port}") as client:
    print(google.protobuf.__version__, *client.classify(red_image(77)).prediction.class_names)
"""


# With the health and reflection packages that pip picks for that protobuf.
@pytest.mark.parametrize(("protobuf", "helpers"), [("6.30.0", "1.72.2"), ("7.36.2", "1.85.1")])
def test_server_and_client_run_on_the_oldest_and_the_newest_protobuf(protobuf, helpers, tmp_path):
    wanted = (f"protobuf=={protobuf}", f"grpcio-health-checking=={helpers}", f"grpcio-reflection=={helpers}")
    pip_install(tmp_path / "site", *wanted)
    manifest = tiny_manifest(tmp_path, tiny="")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", TALK, str(manifest), str(ROOT)],
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split(maxsplit=1) == [protobuf, "red 77\n"]
