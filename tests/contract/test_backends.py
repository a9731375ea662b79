"""What every backend promises. A new one joins with two lines: a class and its spec."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import ClassVar

import numpy as np
import pytest
import torch

from tests.helpers import ROOT, tiny_spec
from tests.onnx_files import tiny_onnx
from vision_service.backends.table import BACKENDS, create_backend
from vision_service.errors import ConfigError, InferenceFailed
from vision_service.imaging.preprocess import content_hw, preprocess, stack
from vision_service.types import PREDICTION_OF_TASK, VOID, Params, Task

CLASSES = ("apple", "bear", "cup")
WITH_BACKGROUND = ("__background__", "bear", "cup")


def images() -> list[np.ndarray]:
    """Photos of unequal sizes; uint8 [H, W, 3]."""
    rng = np.random.RandomState(0)
    return [rng.randint(0, 256, (height, width, 3), np.uint8) for height, width in ((40, 64), (64, 40), (33, 47))]


def same(a, b) -> bool:
    """Whether two predictions are equal, field by field."""
    return type(a) is type(b) and all(
        np.array_equal(getattr(a, field.name), getattr(b, field.name)) for field in dataclasses.fields(a)
    )


@cache
def built(cls):
    """The backend of a test class and its network, random but always the same."""
    backend = create_backend(tiny_spec(**cls.fields))
    torch.manual_seed(0)
    network = backend.build().eval()
    cls.stir(network)
    return backend, network


@cache
def answered(cls):
    """What the network of a test class returns for all images at once; nobody changes it."""
    return cls().run(cls().prepared()[0])


class BackendContract:
    """Subclass it and set `fields`: those of a spec that is tiny and needs no weights."""

    fields: ClassVar[dict]
    most: ClassVar[int] = 100_000
    """Detections an image that a test asks for at most."""

    @staticmethod
    def stir(network) -> None:
        """For networks that, as they are initialised, return almost the same whatever they see."""

    @property
    def backend(self):
        return built(type(self))[0]

    @property
    def network(self):
        return built(type(self))[1]

    @property
    def task(self) -> Task:
        return self.backend.task

    def prepared(self):
        """Inputs of one shape, uint8 [N, h, w, 3], and how to go back."""
        spec = self.backend.spec.preprocess
        pairs = [preprocess(image, spec) for image in images()]
        if len({pixels.shape for pixels, _ in pairs}) > 1 and not self.backend.mixes_sizes:
            pairs = [preprocess(images()[0][:, ::step].repeat(step, axis=1), spec) for step in (1, 2, 4)]
        return torch.from_numpy(stack([pixels for pixels, _ in pairs])), [meta for _, meta in pairs]

    @property
    def outputs(self):
        return answered(type(self))

    def run(self, pixels, sizes_hw=None):
        with torch.inference_mode():
            return self.network(pixels, self.sizes_hw if sizes_hw is None else sizes_hw)

    @property
    def sizes_hw(self):
        return torch.tensor([content_hw(meta) for meta in self.prepared()[1]])

    def params(self, **chosen) -> Params:
        default = Params(**chosen)
        return dataclasses.replace(default, max_detections=min(default.max_detections, self.most))

    def predict(self, *params):
        _, metas = self.prepared()
        return self.read(self.outputs, metas, params)

    def read(self, outputs, metas, params):
        with torch.inference_mode():  # as the engine does
            return self.backend.postprocess(outputs, metas, params)

    def assert_close(self, ours, theirs):
        """Outputs alike to 1e-5; boxes, which are in pixels, to 1e-5 of the input's longer side, wherever they lie."""
        side = max(self.prepared()[0].shape[1:3])
        for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            in_pixels = self.task is Task.DETECT and index == 0 and a.shape[-1] == 4
            bound = {"atol": 1e-5 * side, "rtol": 0.0} if in_pixels else {"atol": 1e-5, "rtol": 1e-5}
            torch.testing.assert_close(a, b, **bound)

    def test_dense_outputs_have_the_batch_first(self):
        pixels, _ = self.prepared()
        assert pixels.dtype in (torch.uint8, torch.float32)
        outputs = self.outputs
        assert isinstance(outputs, tuple)
        assert all(isinstance(output, torch.Tensor) and len(output) == len(pixels) for output in outputs)

    def test_one_prediction_an_image_in_order(self):
        _, metas = self.prepared()
        outputs = self.outputs
        forward = self.read(outputs, metas, [self.params()] * 3)
        backward = self.read(tuple(o.flip(0) for o in outputs), metas[::-1], [self.params()] * 3)
        assert [type(prediction) for prediction in forward] == [PREDICTION_OF_TASK[self.task]] * 3
        assert all(same(a, b) for a, b in zip(forward, backward[::-1], strict=True))
        assert not same(forward[0], forward[1]), "the images are unequal, so this would not notice a wrong order"

    def test_a_batch_is_its_images_one_by_one(self):
        self.check_one_by_one(self.outputs)

    def check_one_by_one(self, batch):
        pixels, metas = self.prepared()
        together = self.read(batch, metas, [self.params()] * 3)
        for index in range(3):
            single = self.run(pixels[index : index + 1], self.sizes_hw[index : index + 1])
            self.assert_close([output[0] for output in single], [output[index] for output in batch])
            rows = tuple(output[index : index + 1] for output in batch)
            assert same(self.read(rows, metas[index : index + 1], [self.params()])[0], together[index])

    def test_the_same_twice(self):
        again = self.run(self.prepared()[0])
        assert all(torch.equal(a, b) for a, b in zip(self.outputs, again, strict=True))

    def test_each_image_has_its_own_params(self):
        chosen = [
            self.params(score_threshold=0.0, top_k=2, max_detections=4),
            self.params(score_threshold=1.0),
            self.params(),
        ]
        mixed = self.predict(*chosen)
        for index, params in enumerate(chosen):
            assert same(mixed[index], self.predict(*[params] * 3)[index])

    def test_nothing_found_is_an_answer(self):
        for prediction in self.predict(*[self.params(score_threshold=1.0)] * 3):
            match self.task:
                case Task.CLASSIFY | Task.DETECT:
                    assert len(prediction) == 0
                case Task.SEGMENT:
                    nothing = VOID if prediction.background_id is None else prediction.background_id
                    assert (prediction.class_map == nothing).all()
                case Task.TRANSLATE:
                    assert prediction.image.size  # thresholds mean nothing to it

    def test_class_filter(self):
        if self.task is Task.TRANSLATE:
            pytest.skip("has no classes")
        open_params = self.params(score_threshold=0.0, top_k=9, iou_threshold=1.0, max_detections=100_000)
        everything = {i for p in self.predict(*[open_params] * 3) for i in self.ids(p)}
        kept = 1
        assert kept in everything, "the network never finds the class, so the filter would not be tested"
        filtered = self.predict(*[dataclasses.replace(open_params, class_ids=frozenset({kept}))] * 3)
        assert {i for p in filtered for i in self.ids(p)} == {kept}

    def ids(self, prediction) -> set[int]:
        if self.task is Task.SEGMENT:
            return set(np.unique(prediction.class_map).tolist()) - {VOID, prediction.background_id}
        return set(prediction.class_ids.tolist())

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    def test_nonsense_raises_and_says_where(self, value):
        _, metas = self.prepared()
        for index in range(len(self.outputs)):
            outputs = [output.clone() for output in self.outputs]
            outputs[index][(1, *[-1] * (outputs[index].ndim - 1))] = value
            with pytest.raises(InferenceFailed, match="image 1 of a batch of 3"):
                self.read(tuple(outputs), metas, [self.params()] * 3)

    def test_half_precision_outputs_are_read(self):
        _, metas = self.prepared()
        halves = tuple(output.half() for output in self.outputs)
        assert len(self.read(halves, metas, [self.params()] * 3)) == 3

    def test_runtimes_can_take_the_network(self):
        pixels, _ = self.prepared()
        with torch.inference_mode():
            exported = torch.export.export(self.network, (pixels, self.sizes_hw), strict=False)
            self.assert_close(self.outputs, exported.module()(pixels, self.sizes_hw))

    def test_unknown_option_names_what_exists(self):
        with pytest.raises(ConfigError, match="option 'widht' is unknown to backend"):
            create_backend(tiny_spec(**self.fields | {"options": {"widht": 3}}))

    def test_wrong_task(self):
        other = Task.DETECT if self.task is not Task.DETECT else Task.CLASSIFY
        with pytest.raises(ConfigError, match=f"is for {self.task}, but the model's task is {other}"):
            create_backend(tiny_spec(**self.fields | {"task": other, "classes": CLASSES, "background_id": None}))


SMALL = {"resize": {"mode": "stretch", "size_hw": (64, 64)}}
SMALL_LETTERBOX = {"resize": {"mode": "letterbox", "size_hw": (64, 64)}, "color_order": "bgr"}
TINY_DECODER = {"decoder_channels": [8, 8, 8, 8, 8]}
SMALL_LIMIT = {"resize": {"mode": "limit", "shortest_side": 64, "longest_side": 96, "pad_multiple": 32}}
# As torchvision's detectors have it: float32 in.
SMALL_EXACT = SMALL_LIMIT | {"interpolation": "bilinear_float"}
SMALL_NATIVE = {"resize": {"mode": "native", "pad_multiple": 4}}


def fields(backend, task, classes=CLASSES, preprocess=SMALL, **more):
    return {"backend": backend, "task": task, "classes": classes, "preprocess": preprocess} | more


def settle_mask_rcnn(network) -> None:
    """Features, which are among the outputs, of a size around one; and both classes among the few best boxes."""
    detector = network.network.detector
    for block in detector.backbone.fpn.layer_blocks:
        block[0].weight.data *= 0.1
    for parameter in detector.roi_heads.box_predictor.cls_score.parameters():
        parameter.data[1] = parameter.data[2]


class TestTorchvisionClassifier(BackendContract):
    fields = fields("torchvision_classifier", "classify", options={"arch": "squeezenet1_1"})


# Torchvision's own description of its suppression to torch.export is a step behind torch.
exports_suppression = pytest.mark.filterwarnings("ignore:`create_unbacked_symint` is deprecated:FutureWarning")


@exports_suppression
class TestTorchvisionDetector(BackendContract):
    options: ClassVar = {"arch": "fasterrcnn_mobilenet_v3_large_320_fpn"}
    fields = fields("torchvision_detector", "detect", WITH_BACKGROUND, SMALL_EXACT, options=options)


class TestRetinaNet(BackendContract):
    fields = fields(
        "torchvision_detector", "detect", WITH_BACKGROUND, SMALL_LIMIT, options={"arch": "retinanet_resnet50_fpn"}
    )


class TestFcos(BackendContract):
    fields = fields(
        "torchvision_detector", "detect", WITH_BACKGROUND, SMALL_LIMIT, options={"arch": "fcos_resnet50_fpn"}
    )


@exports_suppression
class TestMaskRcnn(BackendContract):
    most = 6  # each costs a pass of the mask head
    stir = staticmethod(settle_mask_rcnn)
    fields = fields(
        "torchvision_detector", "detect", WITH_BACKGROUND, SMALL_LIMIT, options={"arch": "maskrcnn_resnet50_fpn"}
    )

    @pytest.mark.filterwarnings("ignore:TF32 acceleration")  # which torch says when oneDNN is switched at all
    def test_a_batch_is_its_images_one_by_one(self):
        """With convolutions that do images one by one: oneDNN's round otherwise by the size of the batch, and then on
        some processors neighbours among this random network's proposals change places."""
        with torch.backends.mkldnn.flags(enabled=False):
            self.check_one_by_one(self.run(self.prepared()[0]))


class TestSsdLite(BackendContract):
    fields = fields(
        "torchvision_detector", "detect", WITH_BACKGROUND, SMALL, options={"arch": "ssdlite320_mobilenet_v3_large"}
    )


class TestTorchvisionSegmenter(BackendContract):
    fields = fields("torchvision_segmenter", "segment", background_id=0, options={"arch": "fcn_resnet50"})


class TestDarknet(BackendContract):
    fields = fields("darknet", "detect", options={"cfg": str(ROOT / "tests" / "data" / "darknet_tiny.cfg")})


class TestNanoDet(BackendContract):
    fields = fields("nanodet", "detect", preprocess=SMALL_LETTERBOX, options={"width": 4, "neck_channels": 8})


class TestSelfieSegmentation(BackendContract):
    fields = fields("selfie_segmentation", "segment", classes=("nothing", "person"), background_id=0)


class TestEsrganSlim(BackendContract):
    fields = fields("esrgan_slim", "translate", classes=(), preprocess=SMALL_NATIVE, options={"features": 8})


class TestTimm(BackendContract):
    fields = fields("timm_classifier", "classify", options={"arch": "test_resnet"})


class TestLeNet5(BackendContract):
    fields = fields("lenet5", "classify", preprocess={"resize": {"mode": "stretch", "size_hw": (32, 32)}})


class TestSmp(BackendContract):
    fields = fields("smp", "segment", options={"encoder": "resnet18", "parameters": TINY_DECODER})


class TestSegNet(BackendContract):
    fields = fields("segnet", "segment", options={"width": 2})


class TestPix2Pix(BackendContract):
    fields = fields("pix2pix", "translate", classes=(), options={"width": 2, "levels": 5})


class TestOnnxClassifier(BackendContract):
    fields = fields("onnx_classifier", "classify", weights=tiny_onnx("classify"))


class TestOnnxDetector(BackendContract):
    fields = fields("onnx_detector", "detect", options={"head": "yolov8"}, weights=tiny_onnx("detect"))


class TestOnnxSegmenter(BackendContract):
    fields = fields("onnx_segmenter", "segment", weights=tiny_onnx("segment"))


class TestOnnxTranslator(BackendContract):
    fields = fields("onnx_translator", "translate", classes=(), weights=tiny_onnx("translate"))


def normalise_layers(network) -> None:
    """Scale every layer but the boxes' last (a pixel there is 32 here) to outputs of one spread on noise, in order."""

    def scale(module, inputs, output):
        factor = 0.3 / output.std()
        module.weight.data *= factor
        return output * factor

    layers = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear) and len(m.weight) > 4]
    handles = [layer.register_forward_hook(scale) for layer in layers]
    with torch.no_grad():
        noise = torch.randint(0, 256, (3, 64, 64, 3), dtype=torch.uint8)
        network(noise, torch.tensor([[64, 64]] * 3))
    for handle in handles:
        handle.remove()


@pytest.mark.yolo
class TestUltralyticsDetector(BackendContract):
    fields = fields("ultralytics_detector", "detect", options={"arch": "yolo26n"})
    stir = staticmethod(normalise_layers)


@pytest.mark.yolo
class TestUltralyticsSegment(BackendContract):
    fields = fields("ultralytics_detector", "detect", options={"arch": "yolo26n-seg"})
    stir = staticmethod(normalise_layers)


@pytest.mark.yolo
class TestUltralyticsEndToEnd(BackendContract):
    fields = fields("ultralytics_detector", "detect", options={"arch": "yolo26n", "end_to_end": True})
    stir = staticmethod(normalise_layers)


@pytest.mark.yolo
class TestUltralyticsClassifier(BackendContract):
    fields = fields("ultralytics_classifier", "classify", options={"arch": "yolo11n-cls"})
    stir = staticmethod(normalise_layers)


def test_every_built_in_backend_is_held_to_the_contract():
    held = {cls.fields["backend"] for cls in BackendContract.__subclasses__()}
    assert set(BACKENDS) <= held, "add a subclass of BackendContract for the new backend"
