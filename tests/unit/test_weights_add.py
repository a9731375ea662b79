"""`models add`: a file of the user's own, from the command line to an answer."""

from __future__ import annotations

import tomllib

import cv2
import pytest
import torch
from safetensors.torch import load_file, save_file
from torchvision import models
from typer.testing import CliRunner

from tests.helpers import ROOT, red_image
from vision_service.cli import app
from vision_service.engine.build import local_pipeline
from vision_service.types import Task
from vision_service.weights.check import sha256_of
from vision_service.weights.manifest import embedded_manifest, find_model, list_models, read_manifest


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VISION_SERVICE_WEIGHTS_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def state_dict(tmp_path):
    """The weights that ship, as a user would save them."""
    state = load_file(embedded_manifest().parent / "mobilenet_v2.safetensors")
    path = tmp_path / "my net.pth"
    torch.save({key: value.float() for key, value in state.items()}, path)
    return path


MINE = ("--name", "mine", "--task", "classify", "--backend", "torchvision_classifier")


def test_registers_a_state_dict_that_then_classifies(state_dict, cache, samples):
    result = run(
        "models", "add", state_dict, *MINE, "--option", "arch=mobilenet_v2", "--preprocess-from", "mobilenet_v2"
    )
    assert result.exit_code == 0, result.output
    assert f"added mine@1 to {cache / 'models.toml'}" in result.stdout

    spec = find_model("mine")
    theirs = find_model("mobilenet_v2")
    assert spec.weights.file == str(state_dict)
    assert (spec.weights.sha256, spec.weights.size_bytes) == (sha256_of(state_dict), state_dict.stat().st_size)
    assert (spec.preprocess, spec.classes, spec.params) == (theirs.preprocess, theirs.classes, theirs.params)
    assert next(one.family for one in list_models() if one.key == "mine") == "user"

    image = next((ROOT / "samples").glob("*.jpg")).read_bytes()
    with local_pipeline(["mine", "mobilenet_v2"], device="cpu") as pipeline:
        mine = pipeline.predict(image, task=Task.CLASSIFY, model="mine").prediction
        shipped = pipeline.predict(image, task=Task.CLASSIFY, model="mobilenet_v2").prediction
    assert mine.class_names == shipped.class_names
    assert mine.scores == pytest.approx(shipped.scores, abs=1e-5)


@pytest.fixture
def small(tmp_path):
    """A squeezenet for two classes, its class names, and its architecture's outputs."""
    torch.manual_seed(0)
    network = models.squeezenet1_1(num_classes=2).eval()
    save_file(network.state_dict(), tmp_path / "small.safetensors")
    (tmp_path / "pets.txt").write_text("cat\nguinea pig\n")
    return tmp_path / "small.safetensors"


SMALL = (*MINE, "--option", "arch=squeezenet1_1", "--preprocess-from", "mobilenet_v2")


def test_classes_version_and_licence_of_its_own(small, cache):
    pets = small.with_name("pets.txt")
    more = ("--classes", pets, "--version", "7", "--licence", "MIT")
    assert run("models", "add", small, *SMALL, *more).exit_code == 0
    pets.unlink()  # the registry has a copy
    spec = find_model("mine@7")
    assert spec.classes == ("cat", "guinea pig")
    assert spec.weights.licence == "MIT"
    assert (cache / "classes" / "mine@7.txt").read_text() == "cat\nguinea pig\n"


def test_a_second_one_leaves_the_first_and_its_comments(small, cache):
    pets = small.with_name("pets.txt")
    assert run("models", "add", small, *SMALL, "--classes", pets).exit_code == 0
    registry = cache / "models.toml"
    registry.write_text("# keep me\n" + registry.read_text())
    assert run("models", "add", small, *SMALL, "--classes", pets, "--version", "2").exit_code == 0
    assert registry.read_text().startswith("# keep me\n")
    assert [spec.version for spec in read_manifest(registry)] == ["1", "2"]
    before = registry.read_bytes()
    result = run("models", "add", small, *SMALL, "--classes", pets, "--version", "2")
    assert result.exit_code == 2
    assert f"a model 'mine' version '2' is in {registry} already; give this one another --version" in result.stderr
    assert registry.read_bytes() == before
    result = run("models", "add", small, *SMALL, "--classes", pets, "--name", "nanodet_g")
    assert result.exit_code == 2
    assert "a model 'nanodet_g' version '1' ships with the package already" in result.stderr
    assert registry.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "clause"),
    [
        ((), "do not fit the network"),  # 1000 classes from mobilenet_v2, 2 in the file
        (("--option", "arch=squeezenet1_0"), "do not fit the network"),
        (("--option", "arch"), "--option is key=value, got 'arch'"),
        (("--option", "arhc=1"), "arhc"),
        (("--backend", "torchvision"), "does not exist; did you mean 'torchvision_"),
        (("--name", "../mine"), "name: "),
        (("--preprocess-from", "mobilenet_v9"), "no model 'mobilenet_v9' is known; did you mean"),
    ],
)
def test_what_does_not_load_is_not_registered(small, cache, arguments, clause):
    result = run("models", "add", small, *SMALL, *arguments)
    assert result.exit_code == 2, result.output
    assert clause in result.stderr
    assert not (cache / "models.toml").exists()


def test_preprocessing_comes_from_the_architecture_or_must_be_named(small, tmp_path):
    pets = ("--classes", small.with_name("pets.txt"))
    result = run("models", "add", small, *MINE, *pets, "--option", "arch=no_such_network")
    assert result.exit_code == 2
    assert "how are its images prepared?" in result.stderr
    assert "--preprocess-from NAME" in result.stderr
    mobile = models.mobilenet_v2(num_classes=2)
    save_file(mobile.state_dict(), tmp_path / "mobile.safetensors")
    added = run("models", "add", tmp_path / "mobile.safetensors", *MINE, *pets, "--option", "arch=mobilenet_v2")
    assert added.exit_code == 0, added.output
    assert find_model("mine").preprocess == find_model("mobilenet_v2").preprocess


def test_options_keep_their_types(tmp_path):
    from vision_service.cli.add import _read_options

    pairs = ["width=32", "scale=1.5", "flag=true", "arch=resnet18", "sizes=[1, 2]", "empty=", "eq=a=b"]
    expected = {"width": 32, "scale": 1.5, "flag": True, "arch": "resnet18", "sizes": [1, 2], "empty": "", "eq": "a=b"}
    assert _read_options(pairs) == expected


def test_companions_are_noted_with_their_hash(small, tmp_path):
    (tmp_path / "net.cfg").write_text("[net]")
    pets = ("--classes", small.with_name("pets.txt"))
    assert run("models", "add", small, *SMALL, *pets, "--companion", tmp_path / "net.cfg").exit_code == 0
    (companion,) = find_model("mine").weights.companions
    assert (companion.file, companion.sha256) == (str(tmp_path / "net.cfg"), sha256_of(tmp_path / "net.cfg"))


PICKLED = """
from vision_service.backends.torchvision_classify import TorchvisionClassifier
from vision_service.weights.check import check_trusted
from pathlib import Path

class Pickled(TorchvisionClassifier):
    def load_weights(self, network):
        check_trusted(Path(self.spec.weights.file), self.spec.weights, self.spec.trusted)
        super().load_weights(network)
"""


def test_a_format_that_runs_code_needs_trust_once(small, tmp_path, monkeypatch, cache):
    from vision_service.backends import table

    (tmp_path / "pickled_backend.py").write_text(PICKLED)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(table.BACKENDS, "pickled", "pickled_backend:Pickled")
    arguments = (*SMALL, "--classes", small.with_name("pets.txt"), "--backend", "pickled")
    refused = run("models", "add", small, *arguments)
    assert refused.exit_code == 2
    assert "is a pickle, which can run any code" in refused.stderr
    assert "models add --trust" in refused.stderr
    assert not (cache / "models.toml").exists()
    assert run("models", "add", small, *arguments, "--trust").exit_code == 0
    (entry,) = tomllib.loads((cache / "models.toml").read_text())["model"]
    assert "trusted" not in entry  # the hash in the registry is what lets this very file in
    cv2.imwrite(str(tmp_path / "red.png"), red_image(200))
    with local_pipeline(["mine"], device="cpu") as pipeline:
        outcome = pipeline.predict((tmp_path / "red.png").read_bytes(), task=Task.CLASSIFY, model="mine")
    assert set(outcome.prediction.class_names) == {"cat", "guinea pig"}
