"""The Ultralytics backends against the library itself, where it is installed (AGPL-3.0, extra ``yolo``)."""

import json
import os
import sys
import tempfile

import cv2
import numpy as np
import pytest
import torch

from tests.helpers import ROOT, tiny_spec

os.environ.update(YOLO_OFFLINE="true", YOLO_AUTOINSTALL="false", YOLO_VERBOSE="false")
os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.gettempdir())
pytest.importorskip("ultralytics", reason="the package ultralytics (extra `yolo`) is not installed")
sys.path.insert(0, str(ROOT / "scripts"))

import convert_ultralytics
import ultralytics_random
from ultralytics import YOLO
from ultralytics.utils import ROOT as LIBRARY
from ultralytics.utils.ops import scale_masks

from vision_service.backends import _yolo_architecture
from vision_service.backends import ultralytics as backend
from vision_service.backends.table import create_backend
from vision_service.errors import ConfigError, WeightsError
from vision_service.imaging.masks import decode_rle
from vision_service.imaging.preprocess import preprocess
from vision_service.runtimes import CannotCompile, Execution, Workload, create_runtime
from vision_service.weights.check import sha256_of
from vision_service.weights.manifest import read_manifest
from vision_service.zoo import ultralytics as family

pytestmark = pytest.mark.yolo

CLASSES = tuple(f"thing {i}" for i in range(5))
PHOTO = ROOT / "samples" / "chelsea.jpg"
SIZE = 128


def spec_of(checkpoint, **fields):
    base = {
        "task": "detect",
        "backend": "ultralytics_detector",
        "classes": CLASSES,
        "preprocess": {
            "resize": {"mode": "letterbox", "size_hw": (SIZE, SIZE), "pad_multiple": 32},
            "interpolation": "bilinear",
        },
        "params": {"score_threshold": 0.1, "iou_threshold": 0.7, "max_detections": 300},
        "weights": {"file": str(checkpoint), "licence": "none", "source": "random", "sha256": sha256_of(checkpoint)},
    }
    return tiny_spec(**base | fields)


@pytest.fixture(scope="module")
def checkpoint_of(tmp_path_factory):
    """A checkpoint of an architecture, with random weights."""
    made = {}

    def make(arch):
        if arch not in made:
            made[arch] = tmp_path_factory.mktemp(arch) / "network.pt"
            model = ultralytics_random.random_model(arch, cv2.imread(str(PHOTO)), classes=5, size=SIZE)
            ultralytics_random.save(model, made[arch])
        return made[arch]

    return make


def predict(spec, image_bgr):
    served = create_backend(spec).build().eval()
    pixels, meta = preprocess(np.ascontiguousarray(image_bgr[..., ::-1]), spec.preprocess)
    with torch.inference_mode():
        outputs = served(torch.from_numpy(pixels)[None], torch.tensor([pixels.shape[:2]]))
        return create_backend(spec).postprocess(outputs, [meta], [spec.params])[0]


@pytest.mark.parametrize("shape", [(90, 120), (120, 90), (64, 64)], ids=str)
@pytest.mark.parametrize(
    ("arch", "end_to_end"),
    [("yolov8n", False), ("yolov8n-seg", False), ("yolov10n", False), ("yolo26n", False), ("yolo26n-seg", True)],
)
def test_objects_are_those_of_predict(checkpoint_of, arch, end_to_end, shape):
    image = cv2.resize(cv2.imread(str(PHOTO)), shape[::-1])
    checkpoint = checkpoint_of(arch)
    call = {"imgsz": SIZE, "verbose": False, "device": "cpu", "conf": 0.1, "nms": False if end_to_end else None}
    theirs = YOLO(str(checkpoint)).predict(image, **call)[0]
    ours = predict(spec_of(checkpoint, options={"end_to_end": end_to_end}), image)
    boxes = theirs.boxes.xyxy.numpy()
    seen = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    assert len(ours) == seen.sum() > 0
    there = np.column_stack((boxes, 100 * theirs.boxes.conf.numpy(), 1000 * theirs.boxes.cls.numpy()))[seen]
    here = np.column_stack((ours.boxes_xyxy, 100 * ours.scores, 1000 * ours.class_ids))
    distance = np.abs(here[:, None] - there[None]).max(axis=2)
    partners = distance.argmin(axis=1)
    assert sorted(partners) == list(range(len(ours)))
    assert distance.min(axis=1).max() < 0.2  # pixels, and hundredths of a score
    for index, partner in enumerate(partners):
        if arch.endswith("-seg"):
            mask = scale_masks(theirs.masks.data[seen][None, partner : partner + 1].float(), shape)[0, 0] > 0.5
            assert (decode_rle(ours.mask_rles[index], shape) == mask.numpy()).mean() >= 0.995
    assert (ours.mask_rles is not None) == arch.endswith("-seg")


def test_classes_are_those_of_predict(checkpoint_of):
    image = cv2.imread(str(PHOTO))
    checkpoint = checkpoint_of("yolo11n-cls")
    theirs = YOLO(str(checkpoint)).predict(image, imgsz=224, verbose=False, device="cpu")[0].probs
    resize = {"mode": "shortest_side_crop", "shortest_side": 224, "crop_hw": (224, 224)}
    spec = spec_of(checkpoint, task="classify", backend="ultralytics_classifier", preprocess={"resize": resize})
    ours = predict(spec.model_copy(update={"params": family.spec("yolo11n-cls").params}), image)
    assert ours.class_ids[0] == theirs.top1
    np.testing.assert_allclose(ours.scores, theirs.data.numpy()[ours.class_ids], atol=0.01)
    assert ours.scores.sum() == pytest.approx(1.0, abs=1e-4)  # softmax once


def test_same_tensor_same_output(checkpoint_of):
    checkpoint = checkpoint_of("yolov8n-seg")
    network = create_backend(spec_of(checkpoint)).build().eval().network
    theirs = YOLO(str(checkpoint)).model.fuse(verbose=False).eval()
    images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        (dense, protos), *_ = theirs(images)
        boxes, scores, coefficients, our_protos = network(images)
    x, y, w, h = dense[:, :4].unbind(1)
    torch.testing.assert_close(boxes, torch.stack((x - w / 2, y - h / 2, x + w / 2, y + h / 2), -1))
    torch.testing.assert_close(scores, dense[:, 4:9].transpose(1, 2))
    torch.testing.assert_close(coefficients, dense[:, 9:].transpose(1, 2))
    torch.testing.assert_close(our_protos, protos)


def in_runtime(name, network, images):
    work = Workload(images[:1], len(images), any_size=True)
    return create_runtime(name, torch.device("cpu"), Execution(1)).compile(network, work, "fp32")


@pytest.mark.parametrize("runtime", ["openvino", "onnxruntime"])
@pytest.mark.parametrize("arch", ["yolov8n", "yolov8n-seg"])
def test_other_runtimes_answer_as_torch_does(checkpoint_of, arch, runtime):
    spec = spec_of(checkpoint_of(arch))
    network = create_backend(spec).build().eval().requires_grad_(False)
    pixels, meta = preprocess(np.ascontiguousarray(cv2.imread(str(PHOTO))[..., ::-1]), spec.preprocess)
    images = torch.from_numpy(np.stack([pixels, pixels[:, ::-1]]))
    sizes_hw = torch.tensor([pixels.shape[:2]] * 2)
    with torch.inference_mode():
        expected = network(images, sizes_hw)
        found = in_runtime(runtime, network, images)(images, sizes_hw)
        assert len(found) == len(expected)
        for ours, theirs in zip(found, expected, strict=True):
            assert ((ours - theirs).abs() <= 1e-3 * theirs.abs().max()).all()
        one, other = (create_backend(spec).postprocess(o, [meta] * 2, [spec.params] * 2)[0] for o in (found, expected))
    assert len(one) == len(other) > 0
    assert (one.class_ids == other.class_ids).all()
    assert np.abs(one.boxes_xyxy - other.boxes_xyxy).max() < 0.1  # pixels
    assert np.abs(one.scores - other.scores).max() < 1e-3


def test_what_openvino_cannot_convert_is_named(checkpoint_of):
    spec = spec_of(checkpoint_of("yolo26n"), options={"end_to_end": True})
    images = torch.full((2, 96, SIZE, 3), 127, dtype=torch.uint8)
    with pytest.raises(CannotCompile, match=r"OpenVINO cannot convert the network: No conversion rule .* sym_min$"):
        in_runtime("openvino", create_backend(spec).build().eval().requires_grad_(False), images)


def test_end_to_end_reads_the_other_head(checkpoint_of):
    checkpoint = checkpoint_of("yolov10n")
    images = torch.rand(1, 3, 64, 64)
    shapes = []
    for chosen in (False, True):
        network = create_backend(spec_of(checkpoint, options={"end_to_end": chosen})).build_network()
        shapes.append([tuple(output.shape) for output in network(images)])
    assert shapes == [[(1, 84, 4), (1, 84, 5)], [(1, 84, 6)]]
    with pytest.raises(ConfigError, match="option 'end_to_end': the head Detect has no end-to-end half"):
        create_backend(spec_of(checkpoint_of("yolov8n"), options={"end_to_end": True})).build_network()


def test_boxes_of_a_half_precision_network_are_float32(checkpoint_of):
    served = create_backend(spec_of(checkpoint_of("yolov8n"))).build().eval()
    images = torch.from_numpy(np.ascontiguousarray(cv2.resize(cv2.imread(str(PHOTO)), (SIZE, SIZE))[None, ..., ::-1]))
    with torch.inference_mode():
        boxes, scores = served.half()(images, torch.tensor([[SIZE, SIZE]]))
    assert boxes.dtype == scores.dtype == torch.float32
    # Centres lie between cells; in half precision none above 64 would have a fraction finer than 1/16.
    large = boxes[boxes > 64]
    assert len(large) > 20
    assert ((large * 16).frac() != 0).float().mean() > 0.5


def test_trusted_known_or_not_at_all(checkpoint_of):
    checkpoint = checkpoint_of("yolov8n")
    known = spec_of(checkpoint)
    unknown = known.model_copy(update={"weights": known.weights.model_copy(update={"sha256": ""})})
    with pytest.raises(WeightsError, match="is a pickle"):
        create_backend(unknown).build()
    image = cv2.imread(str(PHOTO))[:90, :120]
    expected = predict(known, image)
    trusted = predict(unknown.model_copy(update={"trusted": True}), image)
    np.testing.assert_array_equal(expected.boxes_xyxy, trusted.boxes_xyxy)
    assert len(expected)


def test_a_converted_checkpoint_answers_alike_without_a_pickle(checkpoint_of, tmp_path):
    checkpoint = checkpoint_of("yolov8n-seg")
    with pytest.raises(WeightsError, match="is a pickle"):
        convert_ultralytics.convert(checkpoint, tmp_path, trusted=False)
    manifest = convert_ultralytics.convert(checkpoint, tmp_path, trusted=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["network.safetensors", "network.toml", "network.yaml"]
    (spec,) = read_manifest(manifest)
    assert (spec.classes, spec.trusted, spec.weights.licence) == (CLASSES, False, "AGPL-3.0")
    image = cv2.imread(str(PHOTO))[:90, :120]
    theirs = spec_of(checkpoint)
    ours = predict(spec.model_copy(update={"preprocess": theirs.preprocess}), image)
    expected = predict(theirs, image)
    assert len(ours) > 3
    np.testing.assert_array_equal(ours.boxes_xyxy, expected.boxes_xyxy)
    assert ours.mask_rles == expected.mask_rles


def test_state_dicts_need_an_architecture(checkpoint_of, tmp_path):
    module = torch.load(checkpoint_of("yolov8n"), weights_only=False)["model"]
    plain = tmp_path / "plain.pt"
    torch.save(module.state_dict(), plain)
    image = cv2.imread(str(PHOTO))[:90, :120]
    ours = predict(spec_of(plain, options={"arch": "yolov8n"}), image)
    np.testing.assert_array_equal(ours.boxes_xyxy, predict(spec_of(checkpoint_of("yolov8n")), image).boxes_xyxy)
    with pytest.raises(ConfigError, match="no architecture is known; name one"):
        create_backend(spec_of(plain)).build()
    with pytest.raises(WeightsError, match="do not fit the network"):
        create_backend(spec_of(plain, options={"arch": "yolo11n"})).build()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"classes": ("one",)}, "the checkpoint has 5 classes, the spec 1"),
        ({"task": "classify", "backend": "ultralytics_classifier"}, "its head is 'Detect'"),
        ({"preprocess": {"resize": {"mode": "stretch", "size_hw": (64, 60)}}}, r"multiples of 32.*\[64, 60\]"),
        (
            {"preprocess": {"resize": {"mode": "letterbox", "size_hw": (64, 64), "pad_multiple": 16}}},
            "multiples of 32.*pad_multiple 16",
        ),
        ({"options": {"arch": "yolo8n"}}, "has no architecture 'yolo8n'; did you mean 'yolov8n'"),
    ],
)
def test_specs_that_do_not_fit_are_refused(checkpoint_of, changes, problem):
    with pytest.raises(ConfigError, match=problem):
        create_backend(spec_of(checkpoint_of("yolov8n"), **changes)).build()


def test_a_hostile_architecture_beside_safe_weights(tmp_path):
    fuse, yaml, weights = tmp_path / "it ran", tmp_path / "evil.yaml", tmp_path / "weights.safetensors"
    weights.touch()
    layers = {"backbone": [[-1, 1, "Conv", [8, 3, 2]]], "head": [[[-1], 1, "Detect", ["nc"]]]}
    yaml.write_text(json.dumps({"nc": 5, "activation": f"open({str(fuse)!r}, 'w')", **layers}))
    spec = spec_of(weights)
    companions = [{"file": str(yaml), "sha256": sha256_of(yaml)}]
    spec = tiny_spec(**spec.model_dump() | {"weights": spec.weights.model_dump() | {"companions": companions}})
    with pytest.raises(ConfigError, match="the activation"):
        create_backend(spec).build()
    assert not fuse.exists()


def test_every_official_model_has_an_architecture():
    for name, arch in family.FILES.items():
        assert _yolo_architecture.packaged(LIBRARY, arch)[0].exists(), name


IMPORT = """
import os, cv2, numpy, torch
cv2.setNumThreads(3)
before = torch.save, cv2.getNumThreads(), numpy.get_printoptions(), repr(torch.tensor([1 / 3]))
from vision_service.backends.ultralytics import _library
environment = set(os.environ)
_library()
from ultralytics.utils import ONLINE, AUTOINSTALL, SETTINGS_FILE
assert (torch.save, cv2.getNumThreads(), numpy.get_printoptions(), repr(torch.tensor([1 / 3]))) == before
assert {name for name in set(os.environ) - environment if not name.startswith("YOLO_")} == set()
assert (ONLINE, AUTOINSTALL) == (False, False)
print(SETTINGS_FILE)
"""


def test_importing_it_changes_nothing_and_writes_nothing_at_home(tmp_path):
    import subprocess

    path = os.pathsep.join([str(ROOT), *sys.path])
    environment = {"PYTHONPATH": path, "PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, env=environment, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "AGPL-3.0" in done.stderr
    assert not any("Ultralytics" in str(path) for path in tmp_path.rglob("*"))
    assert not os.path.exists(done.stdout.strip())  # noqa: PTH110 - the folder went when the process ended
    assert backend._library().__name__ == "ultralytics.nn.tasks"
