"""What one side writes, the other reads: requests and replies, there and back."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from vision_service.api.v1 import vision_pb2 as pb
from vision_service.client import codec
from vision_service.client import replies as reading
from vision_service.errors import InvalidImage, InvalidInput, VisionError
from vision_service.imaging.source import RawPixels
from vision_service.model_info import ModelInfo, ModelState
from vision_service.server import codec as server_codec
from vision_service.server import replies as writing
from vision_service.types import (
    VOID,
    Classification,
    Detections,
    ParamOverrides,
    Result,
    SegmentationMap,
    Task,
    Timings,
    TranslatedImage,
)
from vision_service.wire import model_from_proto, model_to_proto


def over_the_wire(message):
    return type(message).FromString(message.SerializeToString())


def result(prediction, hw=(4, 6)):
    return Result(prediction, hw, "net", "2", Timings(1.5, 2, 3, 4, 5, 6))


def assert_same_but_prediction(read, written):
    for name in ("original_hw", "model_name", "model_version", "timings"):
        assert getattr(read, name) == getattr(written, name)
    assert read.request_id == "id-1"


class TestRequests:
    @pytest.mark.parametrize(
        "choices",
        [
            {},
            {"top_k": 3, "score_threshold": 0.25, "classes": ["cat", 7, np.int64(8)]},
            {"score_threshold": 0.0},
            {"classes": []},
        ],
    )
    def test_classify(self, choices):
        call = server_codec.read_classify(over_the_wire(codec.classify_request(b"x", **choices)))
        classes = tuple(sorted(choices.get("classes") or (), key=lambda item: not isinstance(item, str))) or None
        assert call.overrides == ParamOverrides(choices.get("top_k"), choices.get("score_threshold"), classes=classes)

    def test_detect(self):
        request = codec.detect_request(
            b"x",
            model="net",
            version="3",
            score_threshold=0.5,
            iou_threshold=0.75,
            max_detections=4,
            classes=("cat",),
        )
        call = server_codec.read_detect(over_the_wire(request))
        assert (call.model.name, call.model.version) == ("net", "3")
        assert call.overrides == ParamOverrides(None, 0.5, 0.75, 4, ("cat",))

    @pytest.mark.parametrize("encoding", ["coco_rle", "polygon", "png"])
    def test_segment(self, encoding):
        request = over_the_wire(codec.segment_request(b"x", mask_encoding=encoding))
        assert server_codec.read_segment(request).form.mask_encoding == encoding

    @pytest.mark.parametrize(("encoding", "quality"), [("png", None), ("raw", None), ("jpeg", 1), ("webp", 100)])
    def test_translate(self, encoding, quality):
        call = server_codec.read_translate(
            over_the_wire(codec.translate_request(b"x", image_encoding=encoding, quality=quality))
        )
        assert (call.form.image_encoding, call.form.quality) == (encoding, quality or 90)

    def test_models(self):
        assert server_codec.read_list_models(codec.list_models_request()) is None
        for task in Task:
            assert server_codec.read_list_models(codec.list_models_request(task)) is task
        assert server_codec.read_get_model(codec.get_model_request("a", "b")).version == "b"

    @pytest.mark.parametrize(
        ("build", "field"),
        [
            (lambda: codec.classify_request(b"x", top_k=0), "top_k"),
            (lambda: codec.classify_request(b"x", top_k=-1), "top_k"),
            (lambda: codec.classify_request(b"x", score_threshold=math.nan), "score_threshold"),
            (lambda: codec.classify_request(b"x", classes="cat"), "classes"),
            (lambda: codec.classify_request(b"x", classes=[-1]), "classes"),
            (lambda: codec.segment_request(b"x", mask_encoding="rle"), "mask_encoding"),
            (lambda: codec.translate_request(b"x", image_encoding="gif"), "image_encoding"),
            (lambda: codec.translate_request(b"x", image_encoding="jpeg", quality=-1), "quality"),
            (lambda: codec.classify_request(b"x", color_order="bgr"), "color_order"),
            (lambda: codec.classify_request(b"x", color_order="grb"), "color_order"),
        ],
    )
    def test_slips_are_found_before_sending(self, build, field):
        with pytest.raises(InvalidInput) as caught:
            build()
        assert caught.value.field == field


class TestImages:
    def test_files_travel_as_they_are(self, tmp_path: Path):
        path = tmp_path / "photo.jpg"
        path.write_bytes(b"jpeg")
        for image in (path, str(path), b"jpeg"):
            assert codec.image_message(image) == pb.Image(encoded=b"jpeg")

    @pytest.mark.parametrize("shape", [(2, 3), (2, 3, 1), (2, 3, 3), (2, 3, 4)])
    @pytest.mark.parametrize("order", ["rgb", "bgr"])
    def test_arrays_travel_as_pixels(self, shape, order):
        array = np.arange(math.prod(shape), dtype=np.uint8).reshape(shape)
        call = server_codec.read_detect(over_the_wire(codec.detect_request(array, color_order=order)))
        channels = shape[2] if len(shape) == 3 else 1
        assert call.image == RawPixels(array.tobytes(), 2, 3, channels, order)

    def test_views_are_sent_as_they_look(self):
        array = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
        flipped = array[:, ::-1]
        assert codec.image_message(flipped).raw.data == np.ascontiguousarray(flipped).tobytes()

    def test_raw_pixels_keep_their_order(self):
        raw = RawPixels(bytes(3), 1, 1, 3, "bgr")
        assert server_codec.read_detect(codec.detect_request(raw)).image == raw

    @pytest.mark.parametrize(
        "image",
        [
            b"",
            np.zeros((0, 3, 3), np.uint8),
            np.zeros((2, 3, 3), np.float32),
            np.zeros((2, 3, 2), np.uint8),
            np.zeros(3, np.uint8),
            Path("/does/not/exist.jpg"),
            None,
            7,
        ],
    )
    def test_what_is_no_image_is_refused(self, image):
        with pytest.raises(InvalidImage):
            codec.image_message(image)


class TestReplies:
    @pytest.mark.parametrize("count", [0, 1, 3])
    def test_classification(self, count):
        scores = np.linspace(0.9, 0.1, count, dtype=np.float32)
        written = result(Classification(np.arange(count), tuple("abc"[:count]), scores))
        read = reading.read_classification(over_the_wire(writing.write_classification(written)), "id-1")
        assert_same_but_prediction(read, written)
        assert np.array_equal(read.prediction.class_ids, written.prediction.class_ids)
        assert np.array_equal(read.prediction.scores, scores)
        assert read.prediction.class_names == written.prediction.class_names
        assert (read.prediction.class_ids.dtype, read.prediction.scores.dtype) == (np.int64, np.float32)

    @pytest.mark.parametrize("count", [0, 1, 100])
    def test_detections(self, count):
        rng = np.random.default_rng(count)
        corners = np.sort(rng.random((count, 2, 2), np.float32) * 640, axis=1).reshape(-1, 4)
        scores = np.sort(rng.random(count, np.float32))[::-1].copy()
        written = result(Detections(corners, np.arange(count), tuple(map(str, range(count))), scores))
        read = reading.read_detections(over_the_wire(writing.write_detections(written)), "id-1")
        assert_same_but_prediction(read, written)
        assert np.array_equal(read.prediction.boxes_xyxy, corners)
        assert read.prediction.boxes_xyxy.dtype == np.float32
        assert np.array_equal(read.prediction.scores, scores)
        assert np.array_equal(read.prediction.class_ids, np.arange(count))
        assert read.prediction.class_names == written.prediction.class_names

    @pytest.mark.parametrize("encoding", ["coco_rle", "png", "polygon"])
    @pytest.mark.parametrize("background_id", [None, 0])
    def test_class_maps(self, encoding, background_id):
        class_map = np.zeros((40, 50), np.uint8)
        class_map[5:20, 5:30] = 2
        class_map[25:38, 10:45] = 4
        class_map[28:32, 20:30] = 1  # a hole in 4, filled by another class
        class_map[:, 48:] = VOID if background_id is None else background_id
        written = result(SegmentationMap(class_map, ("a", "b", "c", "d", "e", "f"), background_id), hw=(40, 50))
        read = reading.read_segments(over_the_wire(writing.write_segments(written, encoding)), "id-1")
        assert_same_but_prediction(read, written)
        differing = (read.prediction.class_map != class_map).mean()
        assert differing == 0 if encoding != "polygon" else differing < 0.1
        first = "a" if background_id is None else ""
        assert read.prediction.class_names == (first, "b", "c", "", "e")
        assert read.prediction.background_id == background_id

    @pytest.mark.parametrize("encoding", ["coco_rle", "png", "polygon"])
    def test_class_map_of_nothing(self, encoding):
        written = result(SegmentationMap(np.zeros((4, 6), np.uint8), ("background",), 0))
        read = reading.read_segments(over_the_wire(writing.write_segments(written, encoding)), "id-1")
        assert np.array_equal(read.prediction.class_map, np.zeros((4, 6)))
        assert read.prediction.class_names == ("",)

    @pytest.mark.parametrize("encoding", ["png", "jpeg", "webp", "raw"])
    def test_images(self, encoding):
        image = np.zeros((8, 10, 3), np.uint8)
        image[..., 0], image[..., 2] = 200, 50
        written = result(TranslatedImage(image))
        read = reading.read_image(over_the_wire(writing.write_image(written, encoding)), "id-1")
        assert_same_but_prediction(read, written)
        tolerance = 0 if encoding in ("png", "raw") else 8
        assert np.abs(read.prediction.image.astype(int) - image).max() <= tolerance
        assert read.prediction.image.flags.writeable

    @pytest.mark.parametrize(
        ("read", "response"),
        [
            (reading.read_classification, pb.ClassifyResponse(classes=[pb.ScoredClass(score=2.0)])),
            (reading.read_detections, pb.DetectResponse(detections=[pb.Detection(box=pb.Box(x1=2, x2=1))])),
            (reading.read_segments, pb.SegmentResponse(segments=[pb.Segment(class_id=1)])),
            (reading.read_segments, pb.SegmentResponse(segments=[pb.Segment(class_id=255)])),
            (
                reading.read_segments,
                pb.SegmentResponse(
                    segments=[pb.Segment(mask=pb.Mask(coco_rle=pb.CocoRle(height=1, width=1, counts=b"01")))],
                    info=pb.ResponseInfo(image_height=2, image_width=2),
                ),
            ),
            (reading.read_image, pb.TranslateResponse(image=pb.Image(encoded=b"no"), height=1, width=1)),
            (reading.read_image, pb.TranslateResponse(image=pb.Image(raw=pb.RawImage(data=b"12")), height=1, width=1)),
            (reading.read_image, pb.TranslateResponse()),
            (reading.read_get_model, pb.GetModelResponse()),
        ],
    )
    def test_nonsense_is_one_kind_of_error(self, read, response):
        with pytest.raises(
            VisionError, match=rf"{type(response).__name__} \(request 'id-1'\) cannot be read"
        ) as caught:
            reading.read_reply(read, response, "id-1")
        assert type(caught.value) is VisionError


class TestModels:
    INFO = ModelInfo(
        name="net",
        version="2",
        task=Task.SEGMENT,
        state=ModelState.DRAINING,
        state_reason="why",
        is_default=True,
        backend="unet",
        device="cpu",
        runtime="torch",
        precision="fp32",
        licence="MIT",
        source="there",
        class_names=("a", "b"),
        preprocess_json="{}",
        max_batch_size=8,
        max_queued_jobs=9,
        queued_jobs=1,
        latency_curve=((1, 4.5), (8, 20.25)),
        latency_beside=((1, 7.5), (8, 40.5)),
        max_delay_ms=1.5,
        target_p99_ms=50.0,
        answer_within_ms=40.5,
        max_wait_ms=2000.0,
    )

    def test_there_and_back(self):
        assert model_from_proto(over_the_wire(model_to_proto(self.INFO))) == self.INFO

    @pytest.mark.parametrize("task", Task)
    @pytest.mark.parametrize("state", ModelState)
    def test_every_word(self, task, state):
        info = ModelInfo("net", "1", task, state)
        response = over_the_wire(writing.write_list_models([info]))
        assert reading.read_list_models(response) == [info]

    def test_every_field_of_the_api_is_mapped(self):
        assert {field.name for field in pb.Model.DESCRIPTOR.fields} == set(ModelInfo.__dataclass_fields__)
