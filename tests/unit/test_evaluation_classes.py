from __future__ import annotations

import json

import pytest

from tests.helpers import ROOT
from vision_service.errors import ConfigError
from vision_service.evaluation.classes import SPELLINGS, map_classes, read_map
from vision_service.evaluation.voc import VOC_CLASSES

COCO = tuple((ROOT / "weights/classes/coco80.txt").read_text().splitlines())
IMAGENET = tuple((ROOT / "weights/classes/imagenet1k.txt").read_text().splitlines())


def test_every_class_of_voc_is_found_in_coco_and_the_other_way():
    mapping = map_classes(COCO, VOC_CLASSES)
    assert mapping.only_in_dataset() == []
    pairs = {row["model"]: row["dataset"] for row in mapping.to_json()["mapped"]}
    assert {a: b for a, b in pairs.items() if a != b} == {
        "airplane": "aeroplane",
        "couch": "sofa",
        "dining table": "diningtable",
        "motorcycle": "motorbike",
        "potted plant": "pottedplant",
        "tv": "tvmonitor",
    }
    assert len(mapping.only_in_model()) == 60
    assert map_classes(VOC_CLASSES, COCO).only_in_model() == []


@pytest.mark.parametrize(("variant", "coco"), SPELLINGS.items())
def test_every_spelling_means_a_class_of_coco(variant, coco):
    assert coco in COCO
    assert map_classes(COCO, [variant]).to_json()["mapped"][0]["model"] == coco


def test_case_and_underscores_do_not_matter_but_exact_names_win():
    assert map_classes(["Traffic_Light"], ["traffic light"]).by == ("spelling",)
    mapping = map_classes(["tv", "tvmonitor"], ["tvmonitor"])  # the model tells them apart
    assert mapping.to_dataset.tolist() == [-1, 0]


def test_names_that_read_the_same_are_not_guessed():
    with pytest.raises(ConfigError, match="read the same"):
        map_classes(["couch"], ["sofa", "Sofa"])


def test_wordnet_ids_are_imagenets_classes():
    mapping = map_classes(IMAGENET, ["n01494475", "n02012849", "n03126707"])
    assert [row["model_id"] for row in mapping.to_json()["mapped"]] == [4, 134, 517]  # 517 is the other crane
    with pytest.raises(ConfigError, match="no class of the model"):
        map_classes(COCO, ["n01494475"])
    with pytest.raises(ConfigError, match="no class of the model"):  # a thousand others, or another order
        map_classes(IMAGENET[::-1], ["n01494475"])
    assert map_classes(["n01494475", "n2"], ["n01494475"]).by == ("name", "")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("m.toml", 'sports_ball = "x"\n"sports ball" = "RBC"\n'),
        ("m.json", json.dumps({"sports ball": "RBC"})),
        ("m.csv", "model,dataset\nsports ball,RBC\n"),
        ("m.csv", "model,dataset\n32,RBC\n"),
    ],
)
def test_maps(tmp_path, name, text):
    (tmp_path / name).write_text(text.replace('sports_ball = "x"\n', ""))
    mapping = map_classes(COCO, ["RBC", "WBC"], tmp_path / name)
    assert mapping.to_json()["mapped"] == [{"model": "sports ball", "model_id": 32, "dataset": "RBC", "by": "file"}]
    assert mapping.only_in_dataset() == ["WBC"]


def test_a_map_comes_before_names_and_can_take_a_class_out(tmp_path):
    (tmp_path / "m.toml").write_text('cat = "dog"\ndog = ""\n')
    mapping = map_classes(["cat", "dog"], ["cat", "dog"], tmp_path / "m.toml")
    assert mapping.to_dataset.tolist() == [1, -1]


@pytest.mark.parametrize(
    ("name", "text", "clause"),
    [
        ("m.toml", 'kat = "dog"', "the model has no class 'kat'; did you mean 'cat'"),
        ("m.toml", 'cat = "dogg"', "the dataset has no class 'dogg'; did you mean 'dog'"),
        ("m.toml", "cat", "cannot be parsed"),
        ("m.json", "[1]", "need one table"),
        ("m.csv", "model\ncat\n", "row 1: need two columns"),
        ("m.txt", "cat dog", r"is .toml, .json or .csv, got '.txt'"),
    ],
)
def test_wrong_maps(tmp_path, name, text, clause):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=clause):
        map_classes(["cat"], ["dog"], tmp_path / name)


def test_missing_map(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_map(tmp_path / "none.toml")


def test_nothing_in_common():
    with pytest.raises(ConfigError, match=r"the model has cat; the dataset has RBC, WBC.*--map"):
        map_classes(["cat"], ["RBC", "WBC"])
    with pytest.raises(ConfigError, match="--map"):  # a background alone is nothing in common
        map_classes(["background", "cat", "dog"], ["background", "foreground"], is_binary=True)
