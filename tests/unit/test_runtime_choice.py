"""Which runtime a network gets, and how it is told."""

from __future__ import annotations

import logging
import sys
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from tests.helpers import cpu_has_bf16, tiny_spec
from tests.onnx_files import tiny_onnx
from vision_service.config.settings import ServerSettings
from vision_service.engine.build import local_pipeline, resolve_specs
from vision_service.engine.catalog import Catalog
from vision_service.errors import ConfigError
from vision_service.runtimes import Workload, choose_precision, compile_network

CPU = torch.device("cpu")
needs_bf16 = pytest.mark.skipif(not cpu_has_bf16(), reason="needs a processor with bf16")
needs_openvino = pytest.mark.skipif(find_spec("openvino") is None, reason="needs the package openvino")


class Served(nn.Module):
    def __init__(self, looks_at_values: bool = False) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3)
        self.looks_at_values = looks_at_values

    def forward(self, images, sizes_hw):
        x = self.layer(images.permute(0, 3, 1, 2).to(self.layer.weight.dtype))
        if self.looks_at_values and x.mean().item() > 1e9:
            x = -x
        return (x.mean((2, 3)),)


class Ranked(nn.Module):
    """Returns its best twenty cells, or all where there are fewer, as torchvision's detectors do."""

    def forward(self, images, sizes_hw):
        cells = images.float().mean(3)[:, ::16, ::16].flatten(1)
        return (cells.topk(min(20, cells.shape[1]), dim=1).values,)


def chosen(network, runtime="auto", precision="fp32", **more):
    work = Workload(torch.zeros(1, 8, 8, 3, dtype=torch.uint8))
    return compile_network(network, work, runtime=runtime, precision=precision, device=CPU, **more)


@needs_openvino
def test_auto_on_a_cpu_is_openvino():
    level = logging.getLogger().level
    compiled = chosen(Served())
    assert (compiled.runtime, compiled.precision, compiled.reason) == ("openvino", "fp32", "auto on cpu")
    assert logging.getLogger().level == level, "the converter silences the whole process"


@needs_openvino
@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=needs_bf16)])
def test_what_cannot_be_converted_falls_back_with_the_reason(caplog, precision):
    compiled = chosen(Served(looks_at_values=True), precision=precision)
    assert (compiled.runtime, compiled.precision) == ("torch", precision)
    assert "not openvino: the network cannot be exported as a graph" in compiled.reason
    assert "runtime openvino cannot take the network" in caplog.text
    with pytest.raises(ConfigError, match="cannot be exported as a graph"):
        chosen(Served(looks_at_values=True), "openvino")
    with pytest.raises(ConfigError, match=r"no runtime can run this in int8 on cpu: not openvino: .*; not torch: "):
        chosen(Served(looks_at_values=True), precision="int8")


@needs_openvino
@pytest.mark.skipif(cpu_has_bf16(), reason="needs a processor without bf16")
def test_a_processor_without_bf16_is_a_reason_to_fall_back_too():
    compiled = chosen(Served(), precision="bf16")
    assert (compiled.runtime, compiled.precision) == ("torch", "bf16")
    assert "not openvino: runtime openvino: this processor has no bf16 instructions" in compiled.reason


def test_auto_without_openvino_is_torch_and_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    compiled = chosen(Served())
    assert compiled.runtime == "torch"
    assert r"pip install 'vision-service[openvino]'" in compiled.reason


@needs_openvino
def test_a_conversion_that_disagrees_is_refused(monkeypatch):
    from vision_service.runtimes import _exported

    monkeypatch.setattr(_exported, "_TOLERANCE", -1.0)  # nothing is near enough
    compiled = chosen(Served())
    assert compiled.runtime == "torch"
    assert "disagrees with the original in 100% of output 0" in compiled.reason


@pytest.mark.parametrize("example_hw", [(32, 32), (256, 256)])
def test_a_graph_that_is_right_at_one_size_alone_is_not_taken_for_any(example_hw):
    work = Workload(torch.zeros(1, *example_hw, 3, dtype=torch.uint8), any_size=True)
    compiled = compile_network(Ranked(), work, runtime="auto", precision="fp32", device=CPU)
    for height, width in ((32, 32), (64, 96), (256, 128), (320, 256)):
        images = torch.randint(0, 256, (2, height, width, 3), dtype=torch.uint8)
        sizes_hw = torch.tensor([[height, width]] * 2)
        torch.testing.assert_close(compiled.forward(images, sizes_hw), Ranked()(images, sizes_hw))


def test_a_network_in_bf16_keeps_its_batch_norms_in_float32():
    from vision_service.runtimes.torch_eager import to_device

    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    assert [p.dtype for p in to_device(body, CPU, "bf16").parameters()] == [torch.bfloat16] * 2 + [torch.float32] * 2
    first = to_device(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)), CPU, "bf16")
    assert {p.dtype for p in first.parameters()} == {torch.bfloat16}, "it would hand float32 to the next layer"


def test_precision_by_device():
    assert choose_precision("auto", CPU) == "fp32"
    assert choose_precision("auto", torch.device("cuda:0")) == "fp16"
    assert choose_precision("int8", CPU) == "int8"


def test_a_backend_that_brings_its_runtime():
    pytest.importorskip("onnxruntime")
    fields = {"backend": "onnx_classifier", "classes": ("a", "b", "c"), "weights": tiny_onnx("classify")}
    size = {"preprocess": {"resize": {"mode": "stretch", "size_hw": (64, 64)}}}
    catalog = Catalog()
    info = catalog.info(catalog.load(tiny_spec(**fields | size)))
    assert (info.runtime, info.precision) == ("onnxruntime", "fp32")
    assert "runs its file in onnxruntime itself" in info.runtime_reason
    catalog.close()
    for change, clause in (
        ({"runtime": "openvino"}, "use runtime auto or onnxruntime"),
        ({"precision": "bf16"}, "has its own precision"),
    ):
        with pytest.raises(ConfigError, match=clause):
            Catalog().load(tiny_spec(**fields | size | change))


def test_settings_reach_models_that_say_auto(tmp_path):
    settings = ServerSettings.read(
        models=("mobilenet_v2", "nanodet_g"),
        runtime="torch",
        precision="bf16",
        calibration_folder=tmp_path,
        model={"nanodet_g": {"runtime": "openvino", "precision": "int8", "calibration_folder": "/other"}},
    )
    one, other = resolve_specs(settings)
    assert (one.runtime, one.precision, one.calibration_folder) == ("torch", "bf16", tmp_path)
    assert (other.runtime, other.precision, str(other.calibration_folder)) == ("openvino", "int8", "/other")


def test_the_cache_lies_beside_the_weights(tmp_path):
    assert ServerSettings.read(weights_dir=tmp_path / "weights").compile_cache_dir == tmp_path / "compiled"
    assert ServerSettings.read(compile_cache_dir=tmp_path / "x").compile_cache_dir == tmp_path / "x"
    with pytest.raises(ConfigError, match="weights_dir"):
        ServerSettings.read(weights_dir=3)


def test_a_served_model_says_how_it_runs(samples, caplog):
    with (
        caplog.at_level("INFO"),
        local_pipeline(["selfie_segmentation"], runtime="torch", precision="bf16") as pipeline,
    ):
        info = pipeline.catalog.info(pipeline.catalog.hosts()[0])
        assert (info.runtime, info.precision, info.runtime_reason) == ("torch", "bf16", "chosen by name")
        assert (pipeline.predict(samples["astronaut"], task="segment").prediction.class_map == 1).mean() > 0.1
    assert "selfie_segmentation:1: runtime torch, bf16 (chosen by name)" in caplog.text
