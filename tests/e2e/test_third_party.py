"""A backend of somebody else's: a package of its own, installed by pip, found by its entry point, served over gRPC."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest

from vision_service.client import VisionClient

PYPROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "brightness-backend"
version = "0.3.0"
dependencies = ["vision-service"]

[project.entry-points."vision_service.backends"]
brightness = "brightness_backend:BrightnessBackend"

[tool.hatch.build.targets.wheel]
packages = ["brightness_backend"]
"""

MODULE = '''
"""Is a picture dark or bright? Written against what the documentation of backends says, and nothing else."""

import numpy as np
import torch
from torch import nn

from vision_service.backends.base import Backend
from vision_service.types import Classification, Task


class Brightness(nn.Module):
    def forward(self, x):
        mean = x.mean((1, 2, 3))
        return torch.stack([1 - mean, mean], dim=1)


class BrightnessBackend(Backend):
    task = Task.CLASSIFY

    def build_network(self):
        return Brightness()

    def postprocess(self, outputs, metas, params):
        (scores,) = outputs
        found = []
        for row in scores.float().cpu().numpy():
            ids = np.argsort(-row)
            found.append(Classification(ids, tuple(self.spec.classes[i] for i in ids), row[ids]))
        return found
'''

MANIFEST = """
[[model]]
name = "lights"
task = "classify"
backend = "brightness"
classes = ["dark", "bright"]
device = "cpu"
preprocess.resize = {mode = "stretch", size_hw = [16, 16]}
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder of installed packages with the third party's in it."""
    folder = tmp_path_factory.mktemp("third-party")
    source = folder / "source"
    (source / "brightness_backend").mkdir(parents=True)
    (source / "pyproject.toml").write_text(PYPROJECT)
    (source / "brightness_backend" / "__init__.py").write_text(MODULE)
    # Without isolation and dependencies, so that no package index is asked: hatchling is here.
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    command += ["--disable-pip-version-check", "--target", str(folder / "site"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    return folder / "site"


def run(folder, site, *arguments):
    """The command line in a process whose Python has the site's packages."""
    (folder / "manifest.toml").write_text(MANIFEST)
    command = [sys.executable, "-m", "vision_service", *arguments]
    path = os.pathsep.join(filter(None, [str(site) if site else "", os.environ.get("PYTHONPATH", "")]))
    environment = os.environ | {"PYTHONPATH": path}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def serve(folder, site):
    manifest = str(folder / "manifest.toml")
    return run(folder, site, "serve", "--host", "127.0.0.1", "--port", "0", "--manifest", manifest, "--model", "lights")


def test_it_is_installed_found_and_served(site, tmp_path):
    process = serve(tmp_path, site)
    printed = []
    try:
        for line in process.stdout:
            printed.append(line)
            if found := re.match(r"ready on 127\.0\.0\.1:(\d+)", line):
                break
        else:
            pytest.fail("".join(printed))
        with VisionClient(f"127.0.0.1:{found[1]}") as client:
            for value, wanted in ((20, "dark"), (230, "bright")):
                result = client.classify(np.full((30, 40, 3), value, np.uint8))
                assert result.model_name == "lights"
                assert result.prediction.class_names[0] == wanted
                assert result.prediction.scores[0] == pytest.approx(max(value, 255 - value) / 255, abs=1e-3)
    finally:
        process.terminate()
        process.wait(30)
        process.stdout.close()


def test_without_the_package_the_miss_says_what_exists(tmp_path):
    process = serve(tmp_path, None)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "backend 'brightness' does not exist" in " ".join(printed.split())
