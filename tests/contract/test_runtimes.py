"""What every runtime promises. A new one joins with a class: its name, its precision and how near it comes."""

from __future__ import annotations

import io
import logging
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import ClassVar

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision import models
from torchvision.transforms.functional import pil_to_tensor

from tests.helpers import ROOT, cpu_has_bf16
from vision_service.backends.base import ServedNetwork
from vision_service.backends.table import create_backend
from vision_service.config import PreprocessSpec
from vision_service.config.settings import EMBEDDED_MODELS
from vision_service.engine.build import replace_fields
from vision_service.errors import ConfigError, DeviceOutOfMemory
from vision_service.imaging.decode import decode_image
from vision_service.imaging.preprocess import preprocess
from vision_service.runtimes import RUNTIMES, Calibration, Execution, Forwards, Workload, _int8, create_runtime
from vision_service.weights.manifest import find_model
from vision_service.zoo import torchvision as zoo

sys.path.insert(0, str(ROOT / "scripts"))
from fidelity_torchvision import awaken, matched

CPU = torch.device("cpu")
LARGEST = 6
LIMIT = PreprocessSpec.model_validate(
    {"resize": {"mode": "limit", "shortest_side": 24, "longest_side": 48, "pad_multiple": 8}, "color_order": "bgr"}
)


class Sized(nn.Module):
    """Two outputs, one of which depends on where the pictures end; what it reports of a place is in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU6(), nn.Conv2d(16, 8, 3, padding=1)
        )
        self.score = nn.Linear(8, 5)

    def forward(self, x, sizes_hw):
        features = self.body(x)
        places = features.float().flatten(2).mean(1, keepdim=True).sigmoid() * sizes_hw[:, :1, None]
        return self.score(features.mean((2, 3))), places  # [N, 5], [N, 1, cells]


class Pooled(nn.Module):
    """Layers, and the mean of what they give."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x):
        return self.layers(x).mean((2, 3))


def sized() -> ServedNetwork:
    torch.manual_seed(0)
    return ServedNetwork(Sized(), LIMIT, with_sizes=True).eval().requires_grad_(False)


def noise(count: int, height: int = 24, width: int = 32):
    """Images and sizes, the last of which is smaller."""
    images = torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8, generator=torch.manual_seed(count))
    sizes_hw = torch.tensor([[height, width]] * count)
    sizes_hw[-1] = torch.tensor([height // 2, width - 5])
    return images, sizes_hw


@pytest.fixture(scope="module")
def noises(tmp_path_factory):
    """A folder to calibrate with, for networks that are tested with noise; not all in it are images."""
    folder = tmp_path_factory.mktemp("noises")
    for index, image in enumerate(torch.cat((noise(4)[0].flatten(1), noise(4, 40, 24)[0].flatten(1)[:, :2304]))):
        cv2.imwrite(str(folder / f"{index}.png"), image.view(24, 32, 3).numpy())
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def kept_in(tmp_path_factory):
    """A cache of compiled networks."""
    return tmp_path_factory.mktemp("compiled")


class RuntimeContract:
    """Subclass it and set these.

    `tolerance`: largest difference from eager float32, as a share of the largest value. `models`: likewise, for those
    that ship, in all but a thousandth of the values; ``None``: too slow to compile for a test.
    """

    name: ClassVar[str]
    precision: ClassVar[str] = "fp32"
    tolerance: ClassVar[float] = 1e-5
    models: ClassVar[float | None] = None

    @classmethod
    def compiled(cls, network, kept_in, noises, example=None, spec=LIMIT):
        example = torch.full((1, 24, 32, 3), 127, dtype=torch.uint8) if example is None else example
        calibration = Calibration(noises, spec) if cls.precision == "int8" else None
        work = Workload(example, LARGEST, any_size=spec.any_input_size, described="test", calibration=calibration)
        return create_runtime(cls.name, CPU, Execution(1, kept_in)).compile(network, work, cls.precision)

    @pytest.fixture(scope="class")
    @classmethod
    def forward(cls, kept_in, noises):
        return cls.compiled(sized(), kept_in, noises)

    def assert_near(self, found, expected, tolerance=None, outliers=0.0):
        assert [tuple(tensor.shape) for tensor in found] == [tuple(tensor.shape) for tensor in expected]
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.device.type == "cpu"
            differences = (ours.float() - theirs).abs() / theirs.abs().max()
            too_large = differences > (tolerance or self.tolerance)
            assert too_large.float().mean() <= outliers, f"largest {differences.max():.2g}"

    @pytest.mark.parametrize("count", [1, 2, 3, 5, LARGEST])
    def test_every_batch_size_is_the_network_itself(self, forward, count):
        images, sizes_hw = noise(count)
        with torch.inference_mode():
            self.assert_near(forward(images, sizes_hw), sized()(images, sizes_hw))

    def test_other_sizes_and_a_part_of_a_staging_buffer(self, forward):
        images, sizes_hw = noise(4, 40, 24)
        with torch.inference_mode():
            self.assert_near(forward(images[:3], sizes_hw[:3]), sized()(images[:3], sizes_hw[:3]))

    def test_sizes_are_respected(self, forward):
        images, sizes_hw = noise(2)
        whole = forward(images, torch.tensor([[24, 32]] * 2))
        cut = forward(images, sizes_hw)
        for one, other in zip(whole, cut, strict=True):
            assert not torch.equal(one[-1], other[-1])

    def test_pixels_that_nobody_rounded(self, kept_in, noises):
        spec = LIMIT.model_copy(update={"interpolation": "bilinear_float"})
        images, sizes_hw = noise(3)
        images = images.float() + torch.rand(images.shape, generator=torch.manual_seed(0)) - 0.5
        forward = self.compiled(sized(), kept_in, noises, images[:1], spec)
        found = [output.clone() for output in forward(images, sizes_hw)]
        with torch.inference_mode():
            self.assert_near(found, sized()(images, sizes_hw))
        if self.precision != "int8":  # which rounds them itself
            assert not torch.equal(found[0], forward(images.round(), sizes_hw)[0])

    def test_outputs_are_the_callers(self, forward):
        images, sizes_hw = noise(3)
        outputs = forward(images, sizes_hw)
        kept = [output.clone() for output in outputs]
        images.fill_(0)
        sizes_hw.fill_(8)
        forward(images, sizes_hw)
        assert all(torch.equal(one, other) for one, other in zip(outputs, kept, strict=True))

    def test_no_memory_is_named(self, forward):
        images, sizes_hw = noise(1)
        count = 2_000_000_000  # terabytes, of one image that is looked at again and again
        with pytest.raises(DeviceOutOfMemory, match=r"\(2000000000, 24, 32, 3\) does not fit into the free memory"):
            forward(images.expand(count, -1, -1, -1), sizes_hw.expand(count, -1))
        assert len(forward(*noise(2))[0]) == 2

    def test_a_precision_that_it_has_not_got(self):
        with pytest.raises(ConfigError, match=f"runtime {self.name} has no precision fp16 on cpu: .*needs a GPU"):
            create_runtime(self.name, CPU).compile(sized(), Workload(noise(1)[0]), "fp16")

    @pytest.mark.parametrize("model", EMBEDDED_MODELS)
    def test_models_that_ship(self, model, kept_in, noises):
        if self.models is None:
            pytest.skip(f"compiling a real network with {self.name} takes minutes")
        spec = find_model(model, [])
        calibration = Calibration(ROOT / "samples", spec.preprocess)
        (one, sizes_hw), (other, _) = calibration.batches()[:2]
        if spec.preprocess.any_input_size:
            one, other, sizes_hw = one[:, :64, :96], other[:, :64, :96], torch.tensor([[64, 96]])
        images, sizes_hw = torch.cat((one, other, one)), sizes_hw.repeat(3, 1)
        network = create_backend(spec).build().eval().requires_grad_(False)
        with torch.inference_mode():
            expected = tuple(output.clone() for output in network(images, sizes_hw))
        forward = self.compiled(network, kept_in, noises, images[:1], spec.preprocess)
        self.assert_near(forward(images, sizes_hw), expected, self.models, outliers=1e-3)


class TestTorch(RuntimeContract):
    name = "torch"
    models = 1e-5


class TestTorchBf16(RuntimeContract):
    name, precision, tolerance = "torch", "bf16", 0.02
    models = 0.05


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")


@needs_compiler
@pytest.mark.timeout(600)  # inductor tries compilers and writes C++
class TestTorchCompile(RuntimeContract):
    name = "torch_compile"


needs_openvino = pytest.mark.skipif(find_spec("openvino") is None, reason="needs the package openvino")
needs_nncf = pytest.mark.skipif(find_spec("nncf") is None, reason="needs the package nncf")
needs_onnx = pytest.mark.skipif(find_spec("onnxscript") is None, reason="needs the package onnxscript")


@needs_openvino
class TestOpenVino(RuntimeContract):
    name = "openvino"
    models = 1e-5


@pytest.mark.skipif(not cpu_has_bf16(), reason="needs OpenVINO and a processor with bf16")
class TestOpenVinoBf16(RuntimeContract):
    name, precision, tolerance = "openvino", "bf16", 0.02
    models = 0.05

    def test_it_really_is_bf16_and_fp32_is_not(self, forward, kept_in, noises):
        images, sizes_hw = noise(3)
        with torch.inference_mode():
            scores = sized()(images, sizes_hw)[0]
        error = (forward(images, sizes_hw)[0] - scores).abs().max() / scores.abs().max()
        assert error > 1e-4, "the instructions round to 8 bits"


@needs_openvino
@needs_nncf
class TestOpenVinoInt8(RuntimeContract):
    name, precision, tolerance = "openvino", "int8", 0.1

    def test_without_images_it_says_what_to_set(self):
        with pytest.raises(ConfigError, match=r"int8 needs images .* set calibration_folder"):
            create_runtime("openvino", CPU).compile(sized(), Workload(noise(1)[0]), "int8")

    def test_large_sums_are_not_cut_off(self, kept_in, tmp_path):
        """On processors that add products of eight bits in sixteen (AVX2) they would be; elsewhere this is easy."""
        picture = np.full((24, 32, 3), 255, np.uint8)
        picture[:, :16] = 0
        cv2.imwrite(str(tmp_path / "white_and_black.png"), picture)
        layers = nn.Sequential(nn.Conv2d(3, 16, 1, bias=False), nn.ReLU(), nn.Conv2d(16, 8, 1, bias=False))
        for parameters in layers.parameters():  # all as large as their layer's scale can say
            nn.init.constant_(parameters, 0.1)
        network = ServedNetwork(Pooled(layers), LIMIT).eval().requires_grad_(False)
        white = torch.full((1, 24, 32, 3), 255, dtype=torch.uint8), torch.tensor([[24, 32]])
        with torch.inference_mode():
            expected = network(*white)
        self.assert_near(self.compiled(network, kept_in, tmp_path)(*white), expected, tolerance=0.05)

    def test_a_cache_of_several_machines_keeps_weights_of_seven_and_of_eight_bits(self, tmp_path, noises, monkeypatch):
        openvino = pytest.importorskip("openvino")
        largest = {}
        for bits in (7, 8):
            monkeypatch.setattr(_int8, "weight_bits", lambda bits=bits: bits)
            before = set(tmp_path.rglob("*.xml"))
            self.compiled(sized(), tmp_path, noises)
            (written,) = set(tmp_path.rglob("*.xml")) - before
            ops = openvino.Core().read_model(written).get_ordered_ops()
            weights = [op.data for op in ops if op.get_type_name() == "Constant" and op.get_element_type().is_signed()]
            largest[bits] = max(int(np.abs(data.astype(int)).max()) for data in weights if data.dtype == np.int8)
        assert largest[7] <= 64 < largest[8]

    def test_its_convolutions_are_quantized(self, forward, kept_in):
        texts = [file.read_text() for file in kept_in.rglob("*.xml")]
        assert any("FakeQuantize" in text and 'element_type="i8"' in text for text in texts)


@needs_onnx
class TestOnnxRuntime(RuntimeContract):
    name = "onnxruntime"


@pytest.mark.parametrize(
    "name", [pytest.param("openvino", marks=needs_openvino), pytest.param("onnxruntime", marks=needs_onnx)]
)
def test_a_detector_that_sees_unrounded_pixels(name, samples):
    """SSDLite at a smaller size, seeded and scaled so that its scores differ."""
    spec = replace_fields(
        zoo.spec("ssdlite320_mobilenet_v3_large"),
        {"preprocess": {"resize": {"size_hw": (128, 128)}}, "params": {"score_threshold": 0.1}},
    ).model_copy(update={"weights": None})
    photos = [pil_to_tensor(Image.open(io.BytesIO(data)).convert("RGB")) / 255 for data in samples.values()]
    seeded = awaken(models.get_model(spec.name, weights=None, weights_backbone=None), photos)
    backend = create_backend(spec)
    network = backend.build().eval().requires_grad_(False)
    network.network.detector.load_state_dict(seeded.state_dict())
    prepared = [preprocess(decode_image(data), spec.preprocess) for data in samples.values()]
    images = torch.from_numpy(np.stack([pixels for pixels, _ in prepared]))
    sizes_hw = torch.tensor([[128, 128]] * len(images))
    assert images.dtype == torch.float32
    with torch.inference_mode():
        expected = network(images, sizes_hw)
    forward = create_runtime(name, CPU, Execution(1)).compile(network, Workload(images[:1], len(images)), "fp32")
    metas, params = [meta for _, meta in prepared], [spec.params] * len(images)
    theirs, ours = (backend.postprocess(outputs, metas, params) for outputs in (expected, forward(images, sizes_hw)))
    for one, other in zip(ours, theirs, strict=True):
        assert len(other) > 5
        there = {"boxes": other.boxes_xyxy, "labels": other.class_ids, "scores": other.scores}
        found, overlap, gap = matched(one, {key: torch.from_numpy(values) for key, values in there.items()})
        assert found == len(one) == len(other)
        assert overlap > 0.999
        assert gap < 1e-3


@needs_openvino
def test_passes_at_one_time_do_not_touch_each_other():
    network, work = sized(), Workload(noise(1)[0], LARGEST)
    forwards = create_runtime("openvino", CPU, Execution(2, None, 2, 1)).compile(network, work, "fp32")
    assert len(forwards.beside) == 2

    def wrong(forward, count):
        images, sizes_hw = noise(count)
        with torch.inference_mode():
            expected = network(images, sizes_hw)
        outputs = [forward(images, sizes_hw) for _ in range(40)]  # kept: a later call must not change them
        pairs = [pair for output in outputs for pair in zip(output, expected, strict=True)]
        return sum(float((ours - theirs).abs().max() / theirs.abs().max()) > 1e-5 for ours, theirs in pairs)

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(wrong, (forwards, *forwards.beside), (3, 4, 5))) == [0, 0, 0]


@needs_openvino
def test_one_pass_at_a_time_is_one_function():
    forward = create_runtime("openvino", CPU, Execution(2)).compile(sized(), Workload(noise(1)[0], LARGEST), "fp32")
    assert not isinstance(forward, Forwards)


def test_every_runtime_of_a_cpu_is_held_to_the_contract():
    held = {cls.name for cls in RuntimeContract.__subclasses__()}
    assert set(RUNTIMES) - held == {"torch_cuda_graphs", "tensorrt"}, "those two are in tests/gpu"


@pytest.mark.parametrize("name", ["torch_cuda_graphs", "tensorrt"])
def test_what_needs_a_gpu_says_so(name):
    with pytest.raises(ConfigError, match=f"runtime {name} runs on cuda, not on cpu"):
        create_runtime(name, CPU)


def test_a_misspelt_runtime():
    with pytest.raises(ConfigError, match="there is no runtime 'openvin'; did you mean 'openvino'"):
        create_runtime("openvin", CPU)


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [("openvino", "openvino", "openvino"), ("onnxruntime", "onnxscript", "onnxruntime")],
)
def test_what_is_not_installed_says_how_to(name, package, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"{package} is not installed: pip install 'vision-service\[{extra}\]'"):
        create_runtime(name, CPU)


@needs_openvino
def test_nothing_is_reported_to_the_makers_of_openvino():

    code = (
        "import sys; from vision_service.runtimes._openvino_library import load_library; "
        "load_library('openvino', 'openvino'); sys.exit('openvino_telemetry' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@needs_openvino
@needs_nncf
@pytest.mark.parametrize(
    ("files", "clause"),
    [({}, "is empty"), ({"a.txt": "no image"}, "none of its 1 files is an image"), (None, "is not a folder")],
)
def test_a_folder_without_images(files, clause, tmp_path):
    folder = tmp_path / "photos"
    if files is not None:
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text)
    work = Workload(noise(1)[0], calibration=Calibration(folder, LIMIT), any_size=True)
    with pytest.raises(ConfigError, match=clause):
        create_runtime("openvino", CPU).compile(sized(), work, "int8")


def test_a_large_folder_is_thinned_out(tmp_path, samples, caplog):
    small = min(samples.values(), key=len)
    for index in range(650):
        (tmp_path / f"{index:03}.jpg").write_bytes(small if index == 0 else b"")
    calibration = Calibration(tmp_path, LIMIT)
    with caplog.at_level(logging.INFO):
        assert len(calibration.batches()) == 1
    assert "216 files are not images" in caplog.text
