import json

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
from safetensors.torch import save_file

from tests.helpers import tiny_spec
from vision_service.backends.smp import ARCHITECTURES
from vision_service.backends.table import create_backend
from vision_service.errors import ConfigError, WeightsError
from vision_service.imaging.preprocess import preprocess
from vision_service.types import Params

CLASSES = ("sky", "road", "tree")
SMALL = {"resize": {"mode": "native", "pad_multiple": 32}, "mean": (120.0, 110.0, 100.0), "std": (60.0, 50.0, 55.0)}


def spec(classes=CLASSES, preprocess=SMALL, weights=None, **more):
    if weights:
        weights = {"licence": "none", "source": "a test"} | weights
    return tiny_spec(backend="smp", task="segment", classes=classes, preprocess=preprocess, weights=weights, **more)


def library(arch, encoder, seed=0, **more):
    """The library's own network, random, its norms' statistics as well."""
    torch.manual_seed(seed)
    network = smp.create_model(arch, encoder, encoder_weights=None, **({"classes": 3} | more))
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 1.5)
    return network.eval()


def normalised(pixels):
    """The library's documented input: RGB, mean and std, channels first."""
    mean, std = np.array(SMALL["mean"]), np.array(SMALL["std"])
    return torch.from_numpy(((pixels - mean) / std).transpose(2, 0, 1)[None]).float()


def forward(backend, pixels):
    sizes = torch.tensor([pixels.shape[:2]])
    with torch.inference_mode():
        return backend.build().eval()(torch.from_numpy(pixels[None].copy()), sizes)


def photo(height=64, width=96):
    return np.random.RandomState(0).randint(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize(
    ("arch", "encoder"), [("unet", "resnet18"), ("fpn", "mobilenet_v2"), ("deeplabv3plus", "tu-mobilenetv3_small_050")]
)
def test_the_same_weights_give_the_librarys_logits_and_class_maps(arch, encoder, tmp_path):
    network = library(arch, encoder)
    with torch.no_grad():  # so that no class has it everywhere
        network.segmentation_head[0].bias -= network(normalised(photo())).mean((0, 2, 3))
    save_file(network.state_dict(), tmp_path / "w.safetensors")
    options = {"arch": arch, "encoder": encoder}
    backend = create_backend(spec(options=options, weights={"file": str(tmp_path / "w.safetensors")}))
    pixels = photo()
    with torch.inference_mode():
        theirs = network(normalised(pixels))
    outputs = forward(backend, pixels)
    torch.testing.assert_close(outputs[0], theirs, atol=1e-4, rtol=1e-4)
    _, meta = preprocess(pixels, backend.spec.preprocess)
    (found,) = backend.postprocess(outputs, [meta], [Params()])
    assert (found.class_map == theirs.argmax(1)[0].numpy()).mean() >= 0.995
    assert len(np.unique(found.class_map)) > 1


def test_a_folder_of_save_pretrained_says_what_it_is(tmp_path):
    network = library("linknet", "resnet18", encoder_depth=4, activation="sigmoid", classes=1)
    network.save_pretrained(tmp_path)
    weights = {"file": str(tmp_path / "model.safetensors")}
    backend = create_backend(spec(classes=("nothing", "crack"), background_id=0, weights=weights))
    pixels = photo()
    (ours,) = forward(backend, pixels)
    with torch.inference_mode():
        theirs = smp.from_pretrained(tmp_path).eval()(normalised(pixels))
    torch.testing.assert_close(ours.sigmoid(), theirs, atol=1e-5, rtol=1e-4)
    _, meta = preprocess(pixels, backend.spec.preprocess)
    (found,) = backend.postprocess((ours,), [meta], [Params(score_threshold=0.5)])
    assert (found.class_map == (theirs[0, 0] >= 0.5).numpy()).mean() >= 0.995


def test_several_classes_a_pixel_are_refused(tmp_path):
    with pytest.raises(
        ConfigError, match=r"'mode' is 'multilabel', so a pixel may have several classes.*binary network"
    ):
        create_backend(spec(options={"mode": "multilabel"}))
    network = library("unet", "resnet18", activation="sigmoid")
    network.save_pretrained(tmp_path)
    weights = {"file": str(tmp_path / "model.safetensors")}
    with pytest.raises(ConfigError, match=r"config\.json says activation 'sigmoid' for 3 classes.*mode = 'multiclass'"):
        create_backend(spec(weights=weights)).build()
    pixels = photo()
    (ours,) = forward(create_backend(spec(weights=weights, options={"mode": "multiclass"})), pixels)
    with torch.inference_mode():
        torch.testing.assert_close(ours.sigmoid(), network(normalised(pixels)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("mode", "classes", "problem"),
    [
        ("binary", CLASSES, "is 'binary', but the network has 3 channels"),
        ("multiclass", ("crack",), "is 'multiclass', but the network has 1 channels"),
        ("multi", CLASSES, "is 'multi'; need 'binary' or 'multiclass'"),
    ],
)
def test_the_mode_fits_the_channels(mode, classes, problem):
    with pytest.raises(ConfigError, match=problem):
        create_backend(spec(classes=classes, options={"mode": mode, "encoder": "resnet18"})).build()


def test_config_may_come_as_a_companion_with_its_hash(tmp_path):
    network = library("unet", "resnet18", decoder_channels=[16, 8, 8, 8, 4])
    network.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "mine.safetensors")
    (tmp_path / "config.json").rename(tmp_path / "mine-config.json")
    weights = {"file": str(tmp_path / "mine.safetensors"), "companions": [{"file": str(tmp_path / "mine-config.json")}]}
    (ours,) = forward(create_backend(spec(weights=weights)), photo())
    with torch.inference_mode():
        torch.testing.assert_close(ours, network(normalised(photo())), atol=1e-4, rtol=1e-4)
    weights["companions"][0]["sha256"] = "0" * 64
    with pytest.raises(WeightsError, match=r"mine-config\.json: its sha256 is"):
        create_backend(spec(weights=weights)).build()


def test_a_classification_head_is_loaded_and_left_out(tmp_path):
    network = library("unet", "resnet18", aux_params={"classes": 5})
    network.save_pretrained(tmp_path)
    outputs = forward(create_backend(spec(weights={"file": str(tmp_path / "model.safetensors")})), photo())
    assert len(outputs) == 1
    with torch.inference_mode():
        torch.testing.assert_close(outputs[0], network(normalised(photo()))[0], atol=1e-4, rtol=1e-4)


def test_options_against_the_config(tmp_path):
    library("unet", "resnet18").save_pretrained(tmp_path)
    weights = {"file": str(tmp_path / "model.safetensors")}
    for option, value in (("arch", "fpn"), ("encoder", "resnet34")):
        with pytest.raises(ConfigError, match=f"option '{option}' is '{value}', but the weights' config.json says"):
            create_backend(spec(weights=weights, options={option: value})).build_network()
    assert create_backend(spec(weights=weights, options={"arch": "Unet"})).build_network()


@pytest.mark.parametrize(
    ("config", "error", "clause"),
    [
        ("{", WeightsError, "config.json: is not valid JSON"),
        ("[]", WeightsError, "need a JSON object"),
        (json.dumps({"_model_class": "Unnet"}), ConfigError, "no architecture 'unnet'; did you mean 'unet'"),
        (json.dumps({"in_channels": 1}), ConfigError, "in_channels 1, images have 3"),
        (json.dumps({"classes": 7}), ConfigError, "7 channels do not fit 3 classes"),
        (
            json.dumps({"decoder_chanels": 7}),
            ConfigError,
            "no parameter 'decoder_chanels'; did you mean 'decoder_channels'",
        ),
    ],
)
def test_a_wrong_config_says_what_is_wrong(config, error, clause, tmp_path):
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(error, match=clause):
        create_backend(spec(weights={"file": str(tmp_path / "model.safetensors")})).build()


def test_weights_of_another_architecture_name_the_first_keys(tmp_path):
    save_file(library("fpn", "resnet18").state_dict(), tmp_path / "w.safetensors")
    backend = create_backend(spec(weights={"file": str(tmp_path / "w.safetensors")}, options={"encoder": "resnet18"}))
    with pytest.raises(WeightsError, match=r"missing: decoder\.blocks\.0.*unknown to the network: decoder\.p2"):
        backend.build()


def test_every_architecture_of_the_library_is_known():
    assert set(ARCHITECTURES) == set(smp.MODEL_ARCHITECTURES_MAPPING)


@pytest.mark.parametrize(
    ("more", "clause"),
    [
        ({"options": {"arch": "unetplusplu"}}, "no architecture 'unetplusplu'; did you mean 'unetplusplus'"),
        ({"options": {"encoder": "resnet19"}}, "no encoder 'resnet19'; did you mean 'resnet1"),
        ({"options": {"encoder": "tu-resnett18"}}, "timm has no encoder 'resnett18'; did you mean 'tu-resnet18'"),
        ({"options": {"channels": 2}}, "2 channels do not fit 3 classes"),
        ({"options": {"channels": 1}}, "needs one class beside the background, got 3"),
    ],
)
def test_options_are_checked_before_anything_is_built(more, clause):
    with pytest.raises(ConfigError, match=clause):
        create_backend(spec(**more))


@pytest.mark.parametrize(
    ("arch", "resize", "clause"),
    [
        (
            "fpn",
            {"mode": "stretch", "size_hw": (224, 230)},
            r"multiples of 32, .*size_hw is \[224, 230\]: use \[224, 224\]",
        ),
        ("fpn", {"mode": "native"}, "pad_multiple is 1: set it to 32"),
        ("pspnet", {"mode": "native", "pad_multiple": 4}, r"multiples of 8, but .*\.pad_multiple is 4: set it to 8"),
    ],
)
def test_sizes_that_do_not_fit_the_stride_are_refused_when_it_is_built(arch, resize, clause):
    with pytest.raises(ConfigError, match=clause):
        create_backend(
            spec(options={"arch": arch, "encoder": "resnet18"}, preprocess={"resize": resize})
        ).build_network()


def test_channels_and_parameters_change_the_network():
    options = {"encoder": "resnet18", "channels": 1, "parameters": {"encoder_depth": 3, "decoder_channels": [8, 4, 2]}}
    network = create_backend(spec(classes=("crack",), options=options)).build_network()
    assert network.segmentation_head[0].out_channels == 1
    assert len(network.decoder.blocks) == 3
    with pytest.raises(ConfigError, match="unet has no parameter 'depth'"):
        create_backend(spec(options={"parameters": {"depth": 3}})).build_network()
    with pytest.raises(ConfigError, match="unet with encoder resnet18 cannot be built"):
        create_backend(spec(options={"encoder": "resnet18", "parameters": {"encoder_depth": 3}})).build_network()
