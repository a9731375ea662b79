import warnings

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from torchvision import models
from torchvision.ops import batched_nms

from tests.helpers import tiny_spec
from tests.onnx_files import graph, tiny_onnx, weights
from vision_service.backends import _onnx_session
from vision_service.backends.table import create_backend
from vision_service.errors import ConfigError, InferenceFailed, WeightsError
from vision_service.imaging.preprocess import preprocess
from vision_service.networks.segnet import SegNet
from vision_service.types import VOID, ImageMeta, Params

CLASSES = ("ant", "bee", "cat")
STRETCH = {"resize": {"mode": "stretch", "size_hw": (64, 64)}}
BACKENDS = {"classify": "onnx_classifier", "detect": "onnx_detector", "segment": "onnx_segmenter"}
SAME = ImageMeta((64, 64), (64, 64), (1.0, 1.0), (0.0, 0.0))


def backend(task, path=None, classes=CLASSES, preprocess=STRETCH, background_id=None, weights_more=(), **options):
    made = weights(path) | dict(weights_more) if path else tiny_onnx(task)
    fields = {"backend": BACKENDS.get(task, "onnx_translator"), "task": task, "weights": made, "options": options}
    fields |= {"classes": () if task == "translate" else classes, "background_id": background_id}
    return create_backend(tiny_spec(**fields, preprocess=preprocess))


def detector(**options):
    return backend("detect", **({"head": "boxes_scores"} | options))


def pixels(count=2, height=64, width=64):
    return torch.from_numpy(np.random.RandomState(0).randint(0, 256, (count, height, width, 3), np.uint8))


def forward(made, x):
    with torch.inference_mode():
        return made.build().eval()(x, torch.tensor([list(x.shape[1:3])] * len(x)))


def exported(network, path, *, batch=None, shape=(3, 64, 64)):
    """torch's own exporter, the one that needs no further package."""
    axes = None if batch else {"x": {0: "N"}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network, (torch.zeros(batch or 2, *shape),), str(path), dynamo=False, input_names=["x"],
            output_names=["y"], dynamic_axes=axes, opset_version=17,
        )  # fmt: skip
    return path


def seeded(network):
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 1.5)
    return network.eval()


@pytest.mark.parametrize("batch", [None, 1, 2])
def test_torchvisions_network_exported_gives_its_logits(batch, tmp_path):
    torch.manual_seed(0)
    network = seeded(models.squeezenet1_1(num_classes=3))
    path = exported(network, tmp_path / "net.onnx", batch=batch)
    x = pixels(5)
    (ours,) = forward(backend("classify", path), x)
    with torch.inference_mode():
        theirs = network(x.permute(0, 3, 1, 2).float() / 255)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_our_segmenter_exported_gives_its_class_maps(tmp_path):
    class WithoutIndices(nn.Module):  # ONNX has no unpooling that the exporter writes: up to the classifier is enough
        def __init__(self):
            super().__init__()
            net = SegNet(3, width=2)
            self.layers = nn.Sequential(net.encoder[0], net.classifier)

        def forward(self, x):
            return self.layers(x)

    torch.manual_seed(0)
    network = seeded(WithoutIndices())
    made = backend("segment", exported(network, tmp_path / "net.onnx"))
    x = pixels(2)
    outputs = forward(made, x)
    with torch.inference_mode():
        theirs = network(x.permute(0, 3, 1, 2).float() / 255)
    torch.testing.assert_close(outputs[0], theirs, atol=1e-4, rtol=1e-4)
    maps = made.postprocess(outputs, [SAME] * 2, [Params()] * 2)
    for found, wanted in zip(maps, theirs.argmax(1).numpy(), strict=True):
        assert (found.class_map == wanted).mean() >= 0.995
        assert len(np.unique(found.class_map)) > 1


def test_a_batch_is_its_images_whatever_the_graph_takes(tmp_path):
    answers = []
    for batch in (["N"], [1], [2]):
        nodes = [("Conv", ["x", "w"], ["y"], {}), ("GlobalMaxPool", ["y"], ["z"], {})]
        w = np.random.RandomState(1).randn(3, 3, 3, 3).astype(np.float32)
        path = graph(tmp_path / "g.onnx", nodes, {"x": [*batch, 3, 64, 64]}, {"z": [*batch, 3, 1, 1]}, w=w)
        answers.append(forward(backend("classify", path), pixels(3))[0])
    assert answers[0].shape == (3, 3, 1, 1)
    for other in answers[1:]:
        torch.testing.assert_close(other, answers[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("shape", "layout", "transposed"),
    [
        ([1, 3, 64, 64], "", False),
        ([1, 64, 64, 3], "", True),
        ([1, "a", "b", "c"], "nhwc", True),
        ([1, "a", "b", "c"], "nchw", False),
    ],
)
def test_the_input_arrives_in_the_graphs_layout(shape, layout, transposed, tmp_path):
    nodes = [("ReduceMax", ["x"], ["y"], {"axes": [1, 2] if transposed else [2, 3], "keepdims": 0})]
    path = graph(tmp_path / "g.onnx", nodes, {"x": shape}, {"y": [1, 3]})
    x = torch.zeros(2, 64, 64, 3, dtype=torch.uint8)
    x[0, 5, 6, 0], x[1, 60, 0, 2] = 255, 51
    (found,) = forward(backend("classify", path, layout=layout), x)
    assert found.tolist() == [[1, 0, 0], [0, 0, pytest.approx(0.2)]]


@pytest.mark.parametrize("kind", [onnx.TensorProto.UINT8, onnx.TensorProto.FLOAT16])
def test_the_input_arrives_in_the_graphs_type(kind, tmp_path):
    nodes = [("Cast", ["x"], ["f"], {"to": onnx.TensorProto.FLOAT}), ("ReduceMax", ["f"], ["y"], {"axes": [2, 3]})]
    path = graph(tmp_path / "g.onnx", nodes, {"x": (kind, ["N", 3, 64, 64])}, {"y": ["N", 3, 1, 1]})
    raw = STRETCH | {"std": (1.0, 1.0, 1.0)}
    (found,) = forward(backend("classify", path, preprocess=raw), torch.full((1, 64, 64, 3), 201, dtype=torch.uint8))
    assert found.flatten().tolist() == [201.0] * 3


@pytest.mark.parametrize(
    ("activation", "values", "scores"),
    [
        ("softmax", [0.0, np.log(3.0), 0.0], [0.6, 0.2, 0.2]),
        ("sigmoid", [0.0, np.log(3.0), -np.log(3.0)], [0.75, 0.5, 0.25]),
        ("none", [0.1, 0.7, 0.2], [0.7, 0.2, 0.1]),
    ],
)
def test_classifier_activations(activation, values, scores):
    made = backend("classify", activation=activation)
    (found,) = made.postprocess((torch.tensor([values]),), [SAME], [Params()])
    assert found.class_names[0] == "bee"
    assert found.scores.tolist() == pytest.approx(scores, abs=1e-6)


def test_logits_are_no_probabilities():
    with pytest.raises(InferenceFailed, match=r"values from -1 to 5 where probabilities are expected"):
        backend("classify", activation="none").postprocess((torch.tensor([[5.0, 0, -1.0]]),), [SAME], [Params()])
    with pytest.raises(InferenceFailed, match="2 values for 3 classes"):
        backend("classify").postprocess((torch.zeros(1, 2),), [SAME], [Params()])


# Two bees that overlap by 0.68 (100 and 81 in 108 or so), one ant apart; in pixels of the input.
BOXES = torch.tensor([[10.0, 10, 20, 20], [11, 11, 20, 20], [40, 30, 50, 60]])
SCORES = torch.tensor([[0.0, 0.9, 0.0], [0.0, 0.8, 0.0], [0.7, 0.0, 0.1]])


def as_head(head):
    """The same objects as each head writes them."""
    x1, y1, x2, y2 = BOXES.unbind(1)
    centres = torch.stack([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1], 1)
    best, ids = SCORES.max(1)
    match head:
        case "boxes_scores":
            return (BOXES[None], SCORES[None])
        case "yolov5":
            objectness = torch.full((3, 1), 0.95)
            return (torch.cat([centres, objectness, SCORES / 0.95], 1)[None],)
        case "yolov8":
            return (torch.cat([centres, SCORES], 1).T[None],)
        case "nms":
            return (BOXES[None], best[None], ids[None])
        case _:
            return (torch.cat([BOXES, best[:, None], ids[:, None].float()], 1)[None],)


@pytest.mark.parametrize("head", ["boxes_scores", "yolov5", "yolov8", "nms", "nms_rows"])
def test_every_head_finds_the_same(head):
    params = Params(score_threshold=0.3, iou_threshold=0.5)
    (found,) = detector(head=head).postprocess(as_head(head), [SAME], [params])
    kept = [0, 1, 2] if head.startswith("nms") else [0, 2]  # whose graph decides what is suppressed
    np.testing.assert_allclose(found.boxes_xyxy, BOXES[kept], atol=1e-4)
    assert found.class_names == tuple(("bee", "bee", "ant")[i] for i in kept)
    np.testing.assert_allclose(found.scores, SCORES.amax(1)[kept], atol=1e-6)
    (few,) = detector(head=head).postprocess(
        as_head(head), [SAME], [Params(score_threshold=0.75, class_ids=frozenset({1}), max_detections=1)]
    )
    assert few.class_names == ("bee",)


def test_suppression_is_torchvisions():
    torch.manual_seed(0)
    boxes = torch.rand(1, 200, 4) * 30
    boxes[..., 2:] += boxes[..., :2] + 2
    scores = torch.rand(1, 200, 3)
    params = Params(score_threshold=0.5, iou_threshold=0.4, max_detections=1000)
    (found,) = detector().postprocess((boxes, scores), [SAME], [params])
    row, ids = (scores[0] >= 0.5).nonzero(as_tuple=True)
    keep = batched_nms(boxes[0][row], scores[0][row, ids], ids, 0.4)
    np.testing.assert_allclose(found.boxes_xyxy, boxes[0][row][keep].clamp(max=64), atol=1e-4)
    assert found.class_ids.tolist() == ids[keep].tolist()


@pytest.mark.parametrize(
    ("box_format", "row"),
    [("xyxy", [8, 16, 24, 48]), ("yxyx", [16, 8, 48, 24]), ("xywh", [8, 16, 16, 32]), ("cxcywh", [16, 32, 16, 32])],
)
@pytest.mark.parametrize("unit", [False, True])
def test_box_formats_and_scales(box_format, row, unit):
    boxes = torch.tensor([[row]], dtype=torch.float32)
    wide = ImageMeta((64, 128), (64, 128), (1.0, 1.0), (0.0, 0.0))
    if unit:
        by = [64, 128, 64, 128] if box_format == "yxyx" else [128, 64, 128, 64]
        boxes = boxes / torch.tensor(by)
    made = detector(box_format=box_format, box_scale="unit" if unit else "pixels")
    (found,) = made.postprocess((boxes, torch.tensor([[[0.0, 0.9, 0.0]]])), [wide], [Params(score_threshold=0.5)])
    np.testing.assert_allclose(found.boxes_xyxy, [[8, 16, 24, 48]], atol=1e-4)


def test_detector_scores_may_be_logits():
    logits = torch.tensor([[[0.0, np.log(3.0), -9.0]]])
    made = detector(activation="sigmoid")
    (found,) = made.postprocess((BOXES[None, :1], logits), [SAME], [Params(score_threshold=0.4)])
    assert found.scores.tolist() == pytest.approx([0.75, 0.5])


@pytest.mark.parametrize(
    ("head", "outputs", "clause"),
    [
        ("yolov8", (torch.zeros(1, 8, 20),), "transposed output has 8 columns"),
        ("yolov5", (torch.zeros(1, 20, 7),), "classes need 8"),
        ("boxes_scores", (torch.zeros(1, 5, 4), torch.zeros(1, 5, 80)), "scores has 80 columns"),
        ("nms", (torch.zeros(1, 5, 4), torch.zeros(1, 5), torch.full((1, 5), 3)), "class id 3 of 3 classes"),
        ("boxes_scores", (torch.zeros(1, 5, 4), torch.full((1, 5, 3), 7.0)), "where probabilities are expected"),
    ],
)
def test_outputs_that_do_not_fit_say_so(head, outputs, clause):
    with pytest.raises(InferenceFailed, match=clause):
        detector(head=head).postprocess(outputs, [SAME], [Params()])


def test_rows_that_mean_nothing_are_left_out():
    boxes = torch.cat([BOXES, BOXES[:1] + 5])[None]
    outputs = (boxes, torch.tensor([[0.9, 0.8, 0.7, 0.6]]), torch.tensor([[1, 1, 0, -1]]))
    (found,) = detector(head="nms").postprocess(outputs, [SAME], [Params(score_threshold=0.1)])
    assert len(found) == 3


def test_graphs_that_suppress_return_as_many_boxes_as_there_are(tmp_path):
    # One box for each red pixel, so images of one batch have different numbers; no batch axis, as torchvision exports.
    nodes = [
        ("Slice", ["x", "zero", "one", "one"], ["red"], {}),
        ("Greater", ["red", "half"], ["on"], {}),
        ("NonZero", ["on"], ["index"], {}),
        ("Transpose", ["index"], ["rows"], {"perm": [1, 0]}),
        ("Cast", ["rows"], ["at"], {"to": onnx.TensorProto.FLOAT}),
        ("Gather", ["at", "order"], ["corner"], {"axis": 1}),
        ("Add", ["corner", "size"], ["boxes"], {}),
        ("ReduceMax", ["boxes"], ["top"], {"axes": [1], "keepdims": 0}),
        ("Div", ["top", "hundred"], ["scores"], {}),
        ("Mul", ["top", "nothing"], ["none"], {}),
        ("Cast", ["none"], ["ids"], {"to": onnx.TensorProto.INT64}),
    ]
    outputs = {"boxes": ["K", 4], "scores": ["K"], "ids": (onnx.TensorProto.INT64, ["K"])}
    numbers = {"half": np.float32(0.5), "hundred": np.float32(100), "nothing": np.float32(0)}
    path = graph(
        tmp_path / "g.onnx", nodes, {"x": [1, 3, 64, 64]}, outputs, zero=np.array([0]), one=np.array([1]),
        order=np.array([3, 2, 3, 2]), size=np.array([0, 0, 2, 2], np.float32), **numbers,
    )  # fmt: skip
    x = torch.zeros(3, 64, 64, 3, dtype=torch.uint8)
    x[1, 20, 30, 0] = x[2, 5, 6, 0] = x[2, 40, 50, 0] = 255
    made = backend("detect", path, head="nms")
    found = made.postprocess(forward(made, x), [SAME] * 3, [Params()] * 3)
    assert [len(f) for f in found] == [0, 1, 2]
    assert found[1].boxes_xyxy.tolist() == [[30, 20, 32, 22]]
    assert found[2].boxes_xyxy.tolist() == [[50, 40, 52, 42], [6, 5, 8, 7]]


def planes(*values):
    """[1, C, 64, 64], each channel of one value on the left and another on the right."""
    made = torch.zeros(1, len(values), 64, 64)
    for channel, (left, right) in enumerate(values):
        made[0, channel, :, :32], made[0, channel, :, 32:] = left, right
    return made


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("smaller", [1, 4])
@pytest.mark.parametrize(
    ("output", "made"),
    [
        ("logits", planes((2, -1), (0, 3), (-9, -9))),
        ("probabilities", planes((0.8, 0.0), (0.2, 1.0), (0.0, 0.0))),
        ("class_ids", planes((0, 1))),
    ],
)
def test_segmenter_outputs(output, made, smaller, last):
    made = made[..., ::smaller, ::smaller]
    made = made.permute(0, 2, 3, 1) if last else made
    (found,) = backend("segment", output=output).postprocess((made,), [SAME], [Params()])
    edge = slice(28, 36) if smaller > 1 else slice(0, 0)  # enlarging blurs it
    assert (np.delete(found.class_map, edge, axis=1) == np.delete(np.repeat([0, 1], 32), edge)).all()


def test_segmenter_probabilities_meet_the_threshold():
    made = backend("segment", output="probabilities", classes=("crack",))
    (found,) = made.postprocess((planes((0.59, 0.61)),), [SAME], [Params(score_threshold=0.6)])
    assert (found.class_map == np.repeat([VOID, 0], 32)).all()


def test_class_ids_are_filtered_and_checked():
    made = backend("segment", output="class_ids", background_id=0)
    (found,) = made.postprocess((planes((1, 2))[:, 0],), [SAME], [Params(class_ids=frozenset({2}))])
    assert (found.class_map == np.repeat([0, 2], 32)).all()
    with pytest.raises(InferenceFailed, match="class ids from 1 to 3 for 3 classes"):
        made.postprocess((planes((1, 3)),), [SAME], [Params()])


@pytest.mark.parametrize(
    ("outputs", "clause"),
    [
        (torch.zeros(1, 5, 64, 64), r"returned \[1, 5, 64, 64\]; need .* with 1 or 3 channels"),
        (torch.zeros(1, 1, 64, 64), "needs one class beside the background, got 3"),
    ],
)
def test_segmenter_channels_must_fit(outputs, clause):
    with pytest.raises(InferenceFailed, match=clause):
        backend("segment").postprocess((outputs,), [SAME], [Params()])


@pytest.mark.parametrize(
    ("output_range", "value"), [([0.0, 1.0], 0.2), ([0, 255], 51.0), ([-1.0, 1.0], -0.6), ([1, 0], 0.8)]
)
@pytest.mark.parametrize("last", [False, True])
def test_translator_ranges_and_layouts(output_range, value, last):
    made = backend("translate", output_range=output_range)
    output = torch.full((1, 128, 128, 3) if last else (1, 3, 128, 128), value)
    (found,) = made.postprocess((output,), [SAME], [Params()])
    assert found.image.shape == (128, 128, 3)
    assert (found.image == 51).all()


def test_outputs_are_read_in_the_order_that_the_option_says(tmp_path):
    nodes = [("Identity", ["s"], ["scores"], {}), ("Identity", ["b"], ["boxes"], {}), ("Shape", ["x"], ["other"], {})]
    outputs = {"other": (onnx.TensorProto.INT64, [4]), "scores": [1, 3, 3], "boxes": [1, 3, 4]}
    constants = {"s": SCORES[None].numpy(), "b": BOXES[None].numpy()}
    path = graph(tmp_path / "g.onnx", nodes, {"x": [1, 3, 64, 64]}, outputs, **constants)
    made = backend("detect", path, head="boxes_scores", outputs=["boxes", "scores"])
    found = made.postprocess(forward(made, pixels(2)), [SAME] * 2, [Params(score_threshold=0.5)] * 2)
    assert [f.class_names for f in found] == [("bee", "ant")] * 2
    with pytest.raises(ConfigError, match="need 2 outputs, got 'other', 'scores', 'boxes': name them"):
        backend("detect", path, head="boxes_scores").build()
    with pytest.raises(ConfigError, match="no output 'boxs'; did you mean 'boxes'"):
        backend("detect", path, head="boxes_scores", outputs=["boxs", "scores"]).build()
    with pytest.raises(ConfigError, match=r"output 'other' has 1 axes, \[4\]; need 3"):
        backend("detect", path, head="boxes_scores", outputs=["boxes", "other"]).build()


@pytest.mark.parametrize(
    ("shape", "options", "clause"),
    [
        (["N", 1, 64, 64], {}, "does not say where its 3 channels are"),
        (["N", 3, 64, 64], {"layout": "nhwc"}, "as nhwc it has 64 channels"),
        (["N", 3, 64, 64], {"layout": "chw"}, "must be 'nchw' or 'nhwc', got 'chw'"),
        ([3, 64, 64], {}, "the input has 3 axes"),
        (["N", 3, 64, 80], {}, r"takes inputs of \[64, 80\] .* is stretch to \[64, 64\]"),
    ],
)
def test_inputs_that_do_not_fit_say_so(shape, options, clause, tmp_path):
    path = graph(tmp_path / "g.onnx", [("Identity", ["x"], ["y"], {})], {"x": shape}, {"y": shape})
    with pytest.raises(ConfigError, match=clause):
        backend("classify", path, **options).build()


def test_native_sizes_need_a_graph_that_takes_any(tmp_path):
    native = {"resize": {"mode": "native"}}
    for shape, fits in (([1, 3, 64, 64], False), ([1, 3, "h", "w"], True)):
        path = graph(tmp_path / "g.onnx", [("Identity", ["x"], ["y"], {})], {"x": shape}, {"y": shape})
        made = backend("translate", path, preprocess=native)
        if fits:
            photo = pixels(1, 40, 56)
            (found,) = made.postprocess(
                forward(made, photo), [preprocess(photo[0].numpy(), made.spec.preprocess)[1]], [None]
            )
            assert (found.image == photo[0].numpy()).all()
        else:
            with pytest.raises(ConfigError, match=r"resize is native$"):
                made.build()


def test_files_that_are_no_graph(tmp_path):
    path = tmp_path / "g.onnx"
    path.write_bytes(b"not a graph")
    with pytest.raises(WeightsError, match=r"g\.onnx: ONNX Runtime .* cannot load it"):
        backend("classify", path).build()
    with pytest.raises(WeightsError, match="its sha256 is"):
        backend("classify", path, weights_more={"sha256": "0" * 64}).build()
    with pytest.raises(WeightsError, match="cannot be read"):
        backend("classify", tmp_path / "none.onnx").build()
    with pytest.raises(ConfigError, match=r"weights\.file is missing"):
        create_backend(tiny_spec(backend="onnx_classifier", classes=CLASSES))
    two = {"x": [1, 3, 64, 64], "mask": [1, 3, 64, 64]}
    graph(path, [("Add", ["x", "mask"], ["y"], {})], two, {"y": [1, 3, 64, 64]})
    with pytest.raises(ConfigError, match="need a graph with one input, the image, got 2: 'x', 'mask'"):
        backend("classify", path).build()
    graph(path, [("Identity", ["x"], ["y"], {})], {"x": (11, [1, 3, 64, 64])}, {"y": (11, [1, 3, 64, 64])})
    with pytest.raises(ConfigError, match=r"input 'x' is tensor\(double\), need one of"):
        backend("classify", path).build()


def test_outputs_without_the_inputs_batch(tmp_path):
    path = graph(
        tmp_path / "g.onnx",
        [("ReduceMax", ["x"], ["y"], {"axes": [0]})],
        {"x": ["N", 3, 64, 64]},
        {"y": [1, 3, 64, 64]},
    )
    with pytest.raises(InferenceFailed, match=r"output 'y' is \[1, 3, 64, 64\] for a batch of 2"):
        forward(backend("classify", path), pixels(2))


def test_without_onnxruntime_it_says_what_to_install(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(_onnx_session, "import_module", missing)
    with pytest.raises(ConfigError, match=r"pip install 'vision-service\[onnx\]'"):
        backend("classify").build()


@pytest.mark.parametrize(
    ("task", "options", "clause"),
    [
        ("classify", {"activation": "tanh"}, "option 'activation' is 'tanh'; there are: 'none', 'sigmoid', 'softmax'"),
        ("detect", {}, "option 'head' is ''; there are: 'boxes_scores', 'nms'"),
        ("detect", {"head": "yolov9"}, "did you mean 'yolov"),
        ("detect", {"head": "nms", "box_format": "xxyy"}, "option 'box_format' is 'xxyy'"),
        ("detect", {"head": "nms", "box_scale": "feet"}, "option 'box_scale' is 'feet'"),
        ("detect", {"head": "nms", "activation": "sigmoid"}, "the scores of 'nms' are probabilities"),
        ("segment", {"output": "scores"}, "option 'output' is 'scores'"),
        ("translate", {"output_range": [1, 1]}, r"two numbers that differ, black and white, got \[1, 1\]"),
        ("translate", {"output_range": [1]}, "two numbers that differ"),
    ],
)
def test_options_are_checked_before_anything_is_read(task, options, clause):
    with pytest.raises(ConfigError, match=clause):
        backend(task, **options)
