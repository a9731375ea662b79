"""The backend: which files it takes, what it refuses, and what is served from real weights."""

from __future__ import annotations

import hashlib
import importlib
import re

import numpy as np
import pytest
import torch

from tests.helpers import ROOT, tiny_spec
from vision_service.backends.table import create_backend
from vision_service.errors import ConfigError, WeightsError
from vision_service.networks.darknet import Darknet
from vision_service.types import ImageMeta, Params
from vision_service.weights.manifest import read_manifest
from vision_service.zoo import darknet as zoo

DATA = ROOT / "tests" / "data"
CLASSES = ("apple", "bear", "cup")
STRETCH = {"resize": {"mode": "stretch", "size_hw": (64, 64)}}


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def files(tmp_path):
    """A cfg and its weights."""
    weights = tmp_path / "tiny.weights"
    weights.write_bytes(np.load(DATA / "reference_darknet_tiny.npz")["weights"].tobytes())
    cfg = tmp_path / "tiny.cfg"
    cfg.write_bytes((DATA / "darknet_tiny.cfg").read_bytes())
    return weights, cfg


def make(files, *, preprocess=STRETCH, options=None, companions=None, classes=CLASSES, weights_sha256=None):
    weights, cfg = files
    companions = [{"file": str(cfg), "sha256": sha256(cfg)}] if companions is None else companions
    return create_backend(
        tiny_spec(
            name="fruit",
            task="detect",
            backend="darknet",
            classes=classes,
            preprocess=preprocess,
            options=options or {},
            weights={
                "file": str(weights),
                "sha256": sha256(weights) if weights_sha256 is None else weights_sha256,
                "licence": "none",
                "source": "a test",
                "companions": companions,
            },
        )
    )


def outputs(backend):
    image = torch.from_numpy(np.load(DATA / "reference_darknet_tiny.npz")["image"])
    with torch.inference_mode():
        return backend.build().eval()(image, torch.tensor([image.shape[1:3]]))


def test_companion_and_option_name_the_same_network(files):
    by_companion = outputs(make(files))
    vectors = np.load(DATA / "reference_darknet_tiny.npz")
    np.testing.assert_allclose(by_companion[1].numpy(), vectors["scores"], atol=1e-5)
    for path in ("tiny.cfg", str(files[1])):  # relative to the weights' folder, and absolute
        by_option = outputs(make(files, options={"cfg": path}, companions=[]))
        assert all(torch.equal(a, b) for a, b in zip(by_companion, by_option, strict=True))


def test_what_is_served_has_its_batch_norms_fused(files):
    assert not any("norm" in name for name in make(files).build().state_dict())


def test_size_of_the_input(files):
    small = {"resize": {"mode": "letterbox", "size_hw": (32, 96)}}
    network = make(files, preprocess=small, options={"size_hw": [32, 96]}).build_network()
    assert network.size_hw == (32, 96)
    with pytest.raises(ConfigError, match=r"tiny\.cfg: takes 64 x 64 .*size_hw is \[32, 96\]\. Make them equal"):
        make(files, preprocess=small).build_network()
    with pytest.raises(ConfigError, match="takes 32 x 96 pixels"):
        make(files, options={"size_hw": [32, 96]}).build_network()


@pytest.mark.parametrize("option", [[32], [32, 0], [32.0, 32], [True, 32], [32, 32, 3]])
def test_size_must_be_two_numbers(files, option):
    with pytest.raises(ConfigError, match="'fruit': option 'size_hw' must be two whole numbers, height and width"):
        make(files, options={"size_hw": option})


def test_inputs_of_no_fixed_size_are_refused(files):
    with pytest.raises(ConfigError, match="must be stretch or letterbox, got native"):
        make(files, preprocess={"resize": {"mode": "native"}})


def test_the_cfg_is_needed_once(files):
    with pytest.raises(ConfigError, match=r"needs the \.cfg .* \(there are 0\), or the option 'cfg'"):
        make(files, companions=[])
    with pytest.raises(ConfigError, match="there are 2"):
        make(files, companions=[{"file": str(files[1])}, {"file": "other.cfg"}])


def test_files_that_are_not_there_or_not_the_right_ones(files):
    weights, cfg = files
    with pytest.raises(WeightsError, match=r"cfg .*missing\.cfg: cannot be read"):
        make(files, options={"cfg": "missing.cfg"}).build()
    with pytest.raises(WeightsError, match=r"'fruit': cfg .*tiny\.cfg: its sha256 is"):
        make(files, companions=[{"file": str(cfg), "sha256": "0" * 64}]).build()
    with pytest.raises(WeightsError, match=r"'fruit': weights .*tiny\.weights: its sha256 is"):
        make(files, weights_sha256="0" * 64).build()
    weights.write_bytes(weights.read_bytes()[:-400])
    with pytest.raises(WeightsError, match=r"do not fit the cfg .*: 100 are missing, from layer 30 \[convolutional\]"):
        make(files).build()


def test_a_cfg_that_does_not_fit_the_model(files):
    _, cfg = files
    text = cfg.read_text()
    with pytest.raises(ConfigError, match="is for 3 classes, but the model names 2"):
        make(files, classes=("a", "b")).build()
    cfg.write_text(text.replace("channels=3", "channels=1"))
    with pytest.raises(ConfigError, match="takes 1 channels, but images here have 3"):
        make(files).build()
    cfg.write_text(text.replace("[sam]", "[lstm]"))
    with pytest.raises(ConfigError, match=r"'fruit': cfg .*tiny\.cfg: layer 29 \[lstm\], line \d+: this kind of layer"):
        make(files).build()


def test_detections_are_in_pixels_of_the_original(files):
    """A box of a network of 64 x 64, for a photo of 128 x 256."""
    boxes = torch.tensor([[[8.0, 16.0, 24.0, 32.0], [8.0, 16.0, 24.0, 33.0]]])
    scores = torch.tensor([[[0.1, 0.9, 0.3], [0.0, 0.8, 0.1]]])
    meta = ImageMeta((128, 256), (64, 64), (0.25, 0.5), (0.0, 0.0))
    (found,) = make(files).postprocess((boxes, scores), [meta], [Params(score_threshold=0.25)])
    assert found.class_names == ("bear", "cup")  # the second box is suppressed as a bear
    np.testing.assert_allclose(found.boxes_xyxy, [[32, 32, 96, 64]] * 2)
    np.testing.assert_allclose(found.scores, [0.9, 0.3])


def test_the_manifest_in_the_docs_serves_a_users_own_files(files, tmp_path):
    (block,) = re.findall(r"```toml\n(.*?)```", (ROOT / "docs" / "darknet.md").read_text(), re.DOTALL)
    for file, suffix in zip(files, ("weights", "cfg"), strict=True):
        file.rename(tmp_path / f"fruit.{suffix}")
    (tmp_path / "models.toml").write_text(block.replace("[416, 416]", "[64, 64]"))
    (spec,) = read_manifest(tmp_path / "models.toml")
    _, scores = outputs(create_backend(spec))
    np.testing.assert_allclose(scores.numpy(), np.load(DATA / "reference_darknet_tiny.npz")["scores"], atol=1e-5)


def test_the_zoo_names_its_sources():
    assert {"yolov3", "yolov3-tiny", "yolov4", "yolov4-tiny"} <= set(zoo.names())
    assert zoo.spec("yolov5") is None
    assert zoo.spec("yolov4", "2") is None
    for name in zoo.names():
        spec = zoo.spec(name)
        assert spec is not None
        assert len(spec.classes) == 80
        assert (spec.classes[0], spec.classes[-1]) == ("person", "toothbrush")
        assert spec.weights.url.startswith(("https://pjreddie.com/", "https://github.com/AlexeyAB/darknet/releases/"))
        assert spec.weights.url.endswith(f"/{name}.weights")
        assert spec.weights.companions[0].url.endswith(f"/{name}.cfg")
        create_backend(spec)  # the options are understood


@pytest.mark.parametrize("name", ["yolov3-tiny", "yolov4-tiny", "yolov4"])
def test_the_zoo_and_the_published_cfgs_agree(name, shared):
    """The cfg's own hash, and the weight file's length, which follows from the cfg."""
    spec, path = zoo.spec(name), shared / f"testweights/darknet-cfg/{name}.cfg"
    assert spec.weights.companions[0].sha256 == sha256(path)
    with torch.device("meta"):
        network = Darknet(path.read_text(), tuple(spec.options["size_hw"]))
    values = sum(p.numel() for p in network.parameters())
    values += sum(2 * layer.norm.num_features for layer in network.convolutions() if layer.norm is not None)
    assert spec.weights.size_bytes == 20 + 4 * values


def test_served_real_weights_find_what_people_drew(shared, monkeypatch):
    """mAP on voc30. OpenCV drops scores below 0.2 and reaches 0.735 there; what is below is worth 0.026 more."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    fidelity = importlib.import_module("fidelity_darknet")
    truth, found = fidelity.voc30_truth(shared), fidelity.voc30_detections(shared)
    all_scores, cut = (
        fidelity.score_detections(fidelity.above(found, threshold), truth, max_detections=300)
        for threshold in (0.01, 0.2)
    )
    assert all_scores.map50 >= 0.75
    assert cut.map50 == pytest.approx(0.735, abs=0.003)
    assert cut.ap50_by_class["person"] == pytest.approx(0.729, abs=0.005)
