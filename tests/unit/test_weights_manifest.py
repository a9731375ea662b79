from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from vision_service.backends.table import create_backend
from vision_service.errors import ConfigError, ModelNotFound
from vision_service.types import Task
from vision_service.weights.manifest import embedded_manifest, find_model, known_models, read_manifest

MODEL = """
[[model]]
name = "{name}"
version = "{version}"
task = "classify"
backend = "torchvision_classifier"
classes = {classes}
preprocess.resize = {{ mode = "stretch", size_hw = [8, 8] }}
{more}
"""


@pytest.fixture
def write(tmp_path):
    def write(*models, file="mine.toml"):
        path = tmp_path / file
        defaults = {"name": "mine", "version": "1", "classes": '["a", "b"]', "more": ""}
        path.write_text("".join(MODEL.format(**defaults | model) for model in models))
        return path

    return write


def test_embedded_models():
    models = known_models()
    tasks = {name: spec.task for name, spec in models.items()}
    assert tasks == {
        "mobilenet_v2": Task.CLASSIFY,
        "nanodet_g": Task.DETECT,
        "selfie_segmentation": Task.SEGMENT,
        "esrgan_slim_x2": Task.TRANSLATE,
    }
    assert [len(models[name].classes) for name in tasks] == [1000, 80, 2, 0]
    assert models["nanodet_g"].classes[0] == "person"
    assert models["mobilenet_v2"].classes[207] == "golden retriever"


@pytest.mark.parametrize("name", ["mobilenet_v2", "nanodet_g", "selfie_segmentation", "esrgan_slim_x2"])
def test_embedded_weights_are_there_and_unaltered(name):
    weights = known_models()[name].weights
    assert Path(weights.file).is_absolute()
    assert hashlib.sha256(Path(weights.file).read_bytes()).hexdigest() == weights.sha256
    assert Path(weights.file).name in (embedded_manifest().parent / "NOTICE").read_text()


@pytest.mark.parametrize("name", ["mobilenet_v2", "nanodet_g", "selfie_segmentation", "esrgan_slim_x2"])
def test_embedded_models_have_a_backend(name):
    assert create_backend(find_model(name)).task is find_model(name).task


def test_shipped_files_stay_small():
    assert sum(file.stat().st_size for file in embedded_manifest().parent.rglob("*") if file.is_file()) < 20e6


def test_mobilenet_v2_is_prepared_as_torchvision_does():
    from torchvision.models import MobileNet_V2_Weights

    theirs, ours = MobileNet_V2_Weights.IMAGENET1K_V1.transforms(), find_model("mobilenet_v2").preprocess
    assert [ours.resize.shortest_side] == theirs.resize_size
    assert list(ours.resize.crop_hw) == theirs.crop_size * 2
    assert [m / 255 for m in ours.mean] == pytest.approx(theirs.mean)
    assert [s / 255 for s in ours.std] == pytest.approx(theirs.std)
    assert theirs.antialias
    assert ours.interpolation == "antialias"


def test_no_models_is_no_mistake(tmp_path):
    (tmp_path / "empty.toml").write_text("")
    assert read_manifest(tmp_path / "empty.toml") == []


def test_a_users_models_join_the_embedded_ones(write, tmp_path):
    (tmp_path / "classes").mkdir()
    (tmp_path / "classes" / "pets.txt").write_text("cat\nguinea pig\n")
    more = f'[model.weights]\nfile = "w/pets.pt"\nsha256 = "{"0" * 64}"\nlicence = "MIT"\nsource = "me"'
    models = known_models([write({"name": "pets", "classes": '"pets.txt"', "more": more})])
    assert models["pets"].classes == ("cat", "guinea pig")
    assert models["pets"].weights.file == str(tmp_path / "w" / "pets.pt")
    assert "nanodet_g" in models


def test_versions(write):
    manifests = [write({"version": "1"}, {"version": "3"}, {"version": "2"})]
    models = known_models(manifests)
    assert {key: spec.version for key, spec in models.items() if spec.name == "mine"} == {
        "mine": "2",
        "mine@1": "1",
        "mine@3": "3",
    }
    assert find_model("mine", manifests).version == "2"
    assert find_model("mine@2", manifests).version == "2"
    assert find_model("mine@3", manifests).version == "3"


@pytest.mark.parametrize(
    ("name", "clause"),
    [
        ("nanodet", r"did you mean 'nanodet_g'\?"),
        ("mobilenet_v2@7", "did you mean 'mobilenet_v2@1'"),
        ("zzz", "there are: 'esrgan_slim_x2', 'mobilenet_v2', 'nanodet_g', 'selfie_segmentation'"),
        ("", "no model '' is known"),
    ],
)
def test_unknown_name(name, clause):
    with pytest.raises(ModelNotFound, match=clause):
        find_model(name)


def test_the_same_version_twice(write):
    with pytest.raises(ConfigError, match=r"model 'mine' version '1' is already in .*mine\.toml; give one of them"):
        known_models([write({}, {})])
    with pytest.raises(ConfigError, match=r"'nanodet_g' version '1' is already in .*manifest\.toml"):
        known_models([write({"name": "nanodet_g"})])


@pytest.mark.parametrize(
    ("more", "clause"),
    [
        ("bakcend = 'x'", r"model 'mine': unknown field 'bakcend'; did you mean 'backend'\?"),
        ("background_id = 9", "background_id 9 is not among the 2 classes"),
        ("precision = 'fp8'", "precision: Input should be 'auto', 'fp32', 'bf16', 'fp16' or 'int8'"),
        ("params = { score_threshold = 2 }", "score_threshold: must be a number from 0 to 1, got 2"),
        ("batching = { max_batch_size = 0 }", "batching.max_batch_size: Input should be greater than or equal to 1"),
    ],
)
def test_a_wrong_model_says_where(write, more, clause):
    with pytest.raises(ConfigError, match=clause):
        read_manifest(write({"more": more}))


def test_missing_field(tmp_path):
    (tmp_path / "m.toml").write_text('[[model]]\nname = "a"\ntask = "classify"\n')
    with pytest.raises(ConfigError, match=r"m\.toml: model 'a': 'backend' is missing; 'preprocess' is missing"):
        read_manifest(tmp_path / "m.toml")


def test_unknown_class_file(write, tmp_path):
    (tmp_path / "classes").mkdir()
    (tmp_path / "classes" / "coco80.txt").write_text("person\n")
    with pytest.raises(ConfigError, match=r"no file of class names 'coco.txt' .*did you mean 'coco80.txt'\?"):
        read_manifest(write({"classes": '"coco.txt"'}))


def test_blank_line_among_classes(write, tmp_path):
    (tmp_path / "c.txt").write_text("cat\n\ndog\n")
    with pytest.raises(ConfigError, match=r"line 2 of .*c\.txt is blank"):
        read_manifest(write({"classes": '"c.txt"'}))


@pytest.mark.parametrize(
    ("content", "clause"),
    [
        ("[[model", "is not valid TOML"),
        ("[model]\nname = 'x'", "with two brackets"),
        ("model = 3", "with two brackets"),
        ("[[modle]]", "unknown key 'modle'"),
        (b"\xff\xfe", "is not valid TOML"),
    ],
)
def test_not_a_manifest(tmp_path, content, clause):
    path = tmp_path / "m.toml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=clause):
        read_manifest(path)


def test_no_such_manifest(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.toml cannot be read: No such file"):
        known_models([tmp_path / "none.toml"])
