"""The Ultralytics rows as far as they go without the library: what is offered, refused, and never imported."""

import importlib.util
import re
import subprocess
import sys

import pytest
import torch

from tests.helpers import ROOT, tiny_spec
from vision_service import zoo
from vision_service.backends import ultralytics as backend
from vision_service.backends.table import create_backend
from vision_service.errors import ConfigError, WeightsError
from vision_service.weights.check import sha256_of
from vision_service.zoo import ultralytics as family


class Bomb:
    """Pickles to a call that makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.fixture
def armed(tmp_path):
    """A checkpoint that makes a file when it is loaded, and that file's path."""
    fuse, checkpoint = tmp_path / "it ran", tmp_path / "best.pt"
    torch.save({"model": Bomb(fuse)}, checkpoint)
    return checkpoint, fuse


@pytest.fixture
def installed(monkeypatch):
    """The backend takes the library for installed; nothing in these tests gets as far as importing it."""
    monkeypatch.setattr(backend, "find_spec", lambda name: object())


def detector(checkpoint=None, **fields):
    weights = {"file": str(checkpoint), "licence": "none", "source": "a test"} | fields.pop("weights", {})
    spec = tiny_spec(
        task="detect",
        backend="ultralytics_detector",
        classes=("apple", "bear", "cup"),
        preprocess={"resize": {"mode": "letterbox", "size_hw": (64, 64)}},
        weights=weights if checkpoint else None,
        **fields,
    )
    return create_backend(spec)


@pytest.mark.parametrize("cls", ["ultralytics_detector", "ultralytics_classifier"])
def test_a_missing_library_is_named_with_its_licence(monkeypatch, cls):
    monkeypatch.setattr(backend, "find_spec", lambda name: None)
    task = "detect" if cls.endswith("detector") else "classify"
    with pytest.raises(ConfigError, match=r"pip install 'vision-service\[yolo\]'.*AGPL-3\.0.*docs/ultralytics\.md"):
        create_backend(tiny_spec(backend=cls, task=task))


def test_the_pickle_of_these_tests_is_armed(armed):
    checkpoint, fuse = armed
    torch.load(checkpoint, weights_only=False)["model"].close()
    assert fuse.exists()


@pytest.mark.parametrize("known", ["", "prefix"])
def test_a_pickle_does_not_run_unless_it_is_trusted(armed, installed, known):
    checkpoint, fuse = armed
    sha256 = sha256_of(checkpoint)[:10] if known == "prefix" else known
    network = torch.nn.Module()
    network.model = torch.nn.Identity()
    with pytest.raises(WeightsError, match=r"is a pickle, which can run any code.*--trust"):
        detector(checkpoint, weights={"sha256": sha256}, options={"arch": "yolov8n"}).load_weights(network)
    assert not fuse.exists()


def test_a_pickle_that_was_altered_does_not_run_even_if_trusted(armed, installed):
    checkpoint, fuse = armed
    with pytest.raises(WeightsError, match="was altered or is another"):
        detector(checkpoint, weights={"sha256": "1" * 64}, trusted=True).load_weights(torch.nn.Module())
    assert not fuse.exists()


def test_looking_at_a_pickle_does_not_run_it(armed):
    checkpoint, fuse = armed
    assert backend._is_pickled_module(checkpoint.read_bytes())
    assert not fuse.exists()


def test_plain_tensors_are_no_pickle_to_be_trusted(tmp_path, installed):
    file = tmp_path / "plain.pt"
    torch.save({"weight": torch.ones(2)}, file)
    assert not backend._is_pickled_module(file.read_bytes())
    network = torch.nn.Module()
    network.model = torch.nn.Linear(2, 2)
    with pytest.raises(WeightsError, match="1 missing: bias"):
        detector(file, options={"arch": "yolov8n"}).load_weights(network)


@pytest.mark.parametrize("length", [0, 1, 200, "text"])
def test_a_damaged_file_is_said_to_be_one(armed, installed, length):
    checkpoint, fuse = armed
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(b"no weights" if length == "text" else whole[:length])
    network = torch.nn.Module()
    network.model = torch.nn.Identity()
    with pytest.raises(WeightsError, match="is not a weight file that can be read safely"):
        detector(checkpoint, options={"arch": "yolov8n"}).load_weights(network)
    assert not fuse.exists()


def test_the_family_has_no_names_without_its_library(monkeypatch):
    monkeypatch.setattr(family, "find_spec", lambda name: None)
    assert family.names() == []
    monkeypatch.setattr(family, "find_spec", lambda name: object())
    assert {"yolov8n", "yolo11x-seg", "yolo26n-cls", "rtdetr-l", "yolov5n6u", "yolov3-tinyu"} <= set(family.names())


@pytest.mark.parametrize(
    ("name", "arch", "task", "resize"),
    [
        ("yolov8n", "yolov8n", "detect", {"size_hw": (640, 640), "pad_multiple": 32}),
        ("yolo11s-seg", "yolo11s-seg", "detect", {"size_hw": (640, 640), "pad_multiple": 32}),
        ("yolov5n6u", "yolov5n-p6", "detect", {"size_hw": (1280, 1280), "pad_multiple": 64}),
        ("yolov3-tinyu", "yolov3-tiny", "detect", {"size_hw": (640, 640), "pad_multiple": 32}),
        ("rtdetr-x", "rtdetr-x", "detect", {"size_hw": (640, 640), "mode": "stretch"}),
        ("yolo26m-cls", "yolo26m-cls", "classify", {"shortest_side": 224, "crop_hw": (224, 224)}),
    ],
)
def test_official_models(name, arch, task, resize):
    spec = zoo.find(name)
    assert (spec.name, spec.task, spec.options) == (name, task, {"arch": arch})
    assert spec.weights.url == f"https://github.com/ultralytics/assets/releases/download/v8.4.0/{name}.pt"
    assert (spec.weights.licence, spec.weights.sha256, spec.trusted) == ("AGPL-3.0", "", False)
    assert len(spec.classes) == (1000 if task == "classify" else 80)
    assert resize.items() <= spec.preprocess.resize.model_dump().items()
    if task == "detect":
        params = spec.params
        assert (params.score_threshold, params.iou_threshold, params.max_detections) == (0.25, 0.7, 300)
        assert spec.preprocess.interpolation == "bilinear"


def test_unknown_models_and_versions():
    assert family.spec("yolov8q") is None
    assert family.spec("yolov8n", "2") is None
    assert family.spec("yolov8n", "1") == family.spec("yolov8n")


NEVER = """
import importlib, pkgutil, sys
import numpy as np
import vision_service
from vision_service import zoo
for module in pkgutil.walk_packages(vision_service.__path__, "vision_service."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
zoo.names()
assert zoo.find("yolov8n") is not None
from tests.helpers import run_server
from vision_service.client import VisionClient
from vision_service.config.settings import ServerSettings
with run_server(ServerSettings.read(models=("selfie_segmentation",), port=0, device="cpu")) as server:
    with VisionClient(f"localhost:{server.port}") as client:
        print(type(client.segment(np.zeros((32, 32, 3), np.uint8)).prediction).__name__)
loaded = [name for name in sys.modules if name.split(".")[0] == "ultralytics"]
assert not loaded, loaded
"""


def test_importing_everything_and_serving_does_not_import_it(tmp_path):
    """A package of that name lies ready and would fail: installed or not, nobody touches it."""
    (tmp_path / "ultralytics").mkdir()
    (tmp_path / "ultralytics" / "__init__.py").write_text("raise SystemExit('ultralytics was imported')")
    path = f"{tmp_path}:{ROOT}"
    environment = {"PYTHONPATH": path, "PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", NEVER], capture_output=True, text=True, env=environment, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().endswith("SegmentationMap")


def test_only_one_file_speaks_of_importing_it():
    pattern = re.compile(r"^\s*(import|from) ultralytics\b", re.MULTILINE)
    users = [path.name for path in (ROOT / "vision_service").rglob("*.py") if pattern.search(path.read_text())]
    assert users == ["ultralytics.py"]
    assert importlib.util.find_spec("vision_service.backends.ultralytics").origin.endswith("backends/ultralytics.py")
