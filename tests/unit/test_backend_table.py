from __future__ import annotations

import subprocess
import sys

import pytest

from tests.helpers import tiny_spec
from vision_service.backends import table
from vision_service.backends.table import BACKENDS, backend_names, create_backend
from vision_service.errors import ConfigError


@pytest.mark.parametrize("name", BACKENDS)
def test_every_entry_leads_to_a_class(name):
    module, _, cls = BACKENDS[name].partition(":")
    assert hasattr(__import__(module, fromlist=[cls]), cls)


def test_a_plugin_is_found_by_its_entry_point():
    assert "tiny" in backend_names()
    assert type(create_backend(tiny_spec())).__module__ == "tiny_backend"


@pytest.mark.parametrize(
    ("name", "clause"),
    [
        ("nanodett", r"backend 'nanodett' does not exist; did you mean 'nanodet'\?"),
        ("zzz", "there are: .*'esrgan_slim'.*'tiny'"),
        ("", "backend '' does not exist"),
    ],
)
def test_a_miss_names_what_exists(name, clause):
    with pytest.raises(ConfigError, match=clause):
        create_backend(tiny_spec(backend=name))


@pytest.mark.parametrize(
    ("value", "clause"),
    [
        ("no_such_module:X", "cannot be imported: No module named 'no_such_module'"),
        ("vision_service.types:Nothing", "cannot be imported: .*no attribute 'Nothing'"),
        ("vision_service.types:Params", "is not a subclass of vision_service.backends.base.Backend"),
    ],
)
def test_a_broken_plugin_says_how(monkeypatch, value, clause):
    monkeypatch.setitem(table.BACKENDS, "broken", value)
    with pytest.raises(ConfigError, match=clause):
        create_backend(tiny_spec(backend="broken"))


def test_backends_are_imported_on_use():
    code = "import sys, vision_service.backends.table; sys.exit('torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("fields", "clause"),
    [
        ({"backend": "torchvision_classifier", "options": {"arch": "mobilnet_v2"}}, "did you mean 'mobilenet_v2'"),
        ({"backend": "torchvision_classifier", "options": {"arch": 3}}, "option 'arch' must be str, got 3"),
        ({"backend": "torchvision_classifier", "options": {"arhc": "x"}}, r"did you mean 'arch'\?"),
        ({"backend": "nanodet", "task": "detect", "options": {"width": True}}, "must be int, got True"),
        ({"backend": "selfie_segmentation", "task": "segment", "classes": ("a", "b", "c")}, "needs one class beside"),
    ],
)
def test_options_are_checked_before_anything_is_built(fields, clause):
    with pytest.raises(ConfigError, match=clause):
        create_backend(tiny_spec(**fields))


@pytest.mark.parametrize("arch", ["googlenet", "resnet18", "vit_b_16"])
def test_other_torchvision_classifiers(arch):
    fields = {"backend": "torchvision_classifier", "classes": ("a", "b", "c"), "options": {"arch": arch}}
    resize = {"mode": "stretch", "size_hw": (32, 32)}
    network = create_backend(tiny_spec(**fields, preprocess={"resize": resize})).build_network()
    assert [m.out_features for m in network.modules() if hasattr(m, "out_features")][-1] == 3


def test_a_size_that_a_network_cannot_take_is_named():
    fields = {"backend": "torchvision_classifier", "classes": ("a", "b"), "options": {"arch": "vit_b_16"}}
    with pytest.raises(ConfigError, match=r"vit_b_16 cannot be built with .*33.*check preprocess\.resize"):
        create_backend(
            tiny_spec(**fields, preprocess={"resize": {"mode": "stretch", "size_hw": (33, 33)}})
        ).build_network()


def test_nanodet_options_change_the_network():
    fields = {"backend": "nanodet", "task": "detect", "classes": ("a", "b")}
    options = {"width": 4, "neck_channels": 6, "reg_max": 3}
    network = create_backend(tiny_spec(**fields, options=options)).build_network()
    assert network.backbone.stem.conv.out_channels == 4
    assert network.heads[0].predict.weight.shape == (2 + 4 * 4, 6, 1, 1)


def test_esrgan_options_change_the_network():
    fields = {"backend": "esrgan_slim", "task": "translate", "classes": ()}
    options = {"features": 8, "growth": 2, "blocks": 3}
    network = create_backend(tiny_spec(**fields, options=options)).build_network()
    assert network.shallow.out_channels == 8
    assert [block.grow.out_channels for block in network.blocks] == [2, 2, 2]
