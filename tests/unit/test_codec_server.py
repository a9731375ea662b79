from __future__ import annotations

import dataclasses
import math
import time

import cv2
import numpy as np
import pytest

from vision_service.api.v1 import vision_pb2 as pb
from vision_service.errors import InvalidImage, InvalidInput
from vision_service.imaging.masks import decode_png, decode_rle, encode_rle
from vision_service.imaging.source import RawPixels
from vision_service.model_info import ModelInfo, ModelSelector, ModelState
from vision_service.server import codec, replies
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

IMAGE = pb.Image(encoded=b"jpeg")


def raw(**fields):
    base = {"height": 2, "width": 3, "channels": 3, "data": bytes(18)}
    return pb.Image(raw=pb.RawImage(**(base | fields)))


def result(prediction, hw=(4, 6)):
    return Result(prediction, hw, "net", "2", Timings(1, 2, 3, 4, 5, 6))


READ = {
    pb.ClassifyRequest: codec.read_classify,
    pb.DetectRequest: codec.read_detect,
    pb.SegmentRequest: codec.read_segment,
    pb.TranslateRequest: codec.read_translate,
}


class TestRequests:
    @pytest.mark.parametrize(
        ("request_type", "task"),
        [
            (pb.ClassifyRequest, Task.CLASSIFY),
            (pb.DetectRequest, Task.DETECT),
            (pb.SegmentRequest, Task.SEGMENT),
            (pb.TranslateRequest, Task.TRANSLATE),
        ],
    )
    def test_an_image_alone_chooses_nothing(self, request_type, task):
        call = READ[request_type](request_type(image=IMAGE))
        assert call == codec.Call(
            codec.ReplyForm(task, "coco_rle", "png", 90), ModelSelector("", ""), b"jpeg", ParamOverrides()
        )

    def test_everything_that_can_be_chosen(self):
        selector = pb.ModelSelector(name="net", version="3")
        classes = pb.ClassFilter(class_names=["cat"], class_ids=[7])
        call = codec.read_detect(
            pb.DetectRequest(
                model=selector,
                image=IMAGE,
                score_threshold=0.5,
                iou_threshold=0.25,
                max_detections=9,
                classes=classes,
            )
        )
        assert call.model == ModelSelector("net", "3")
        assert call.overrides == ParamOverrides(None, 0.5, 0.25, 9, ("cat", 7))
        assert codec.read_classify(pb.ClassifyRequest(image=IMAGE, top_k=3)).overrides == ParamOverrides(top_k=3)

    def test_zero_is_not_the_same_as_unset(self):
        assert codec.read_detect(pb.DetectRequest(image=IMAGE)).overrides.score_threshold is None
        call = codec.read_detect(pb.DetectRequest(image=IMAGE, score_threshold=0.0, iou_threshold=0.0))
        assert (call.overrides.score_threshold, call.overrides.iou_threshold) == (0.0, 0.0)

    @pytest.mark.parametrize(
        ("request_", "field", "says"),
        [
            (pb.ClassifyRequest(), "image", "is not set"),
            (pb.ClassifyRequest(image=pb.Image()), "image", "is not set"),
            (pb.DetectRequest(image=pb.Image(encoded=b"")), "image.encoded", "is empty"),
            (pb.SegmentRequest(image=raw(height=0)), "image.raw.height", "1 or more, got 0"),
            (pb.SegmentRequest(image=raw(width=0)), "image.raw.width", "1 or more, got 0"),
            (pb.SegmentRequest(image=raw(channels=2)), "image.raw.channels", "1, 3 or 4, got 2"),
            (pb.SegmentRequest(image=raw(data=bytes(17))), "image.raw.data", "2 x 3 x 3 = 18 bytes, got 17"),
            (pb.SegmentRequest(image=raw(color_order=9)), "image.raw.color_order", "unknown value 9"),
            (pb.ClassifyRequest(image=IMAGE, top_k=0), "top_k", "1 or more, got 0"),
            (pb.ClassifyRequest(image=IMAGE, score_threshold=math.nan), "score_threshold", "0 to 1, got nan"),
            (pb.DetectRequest(image=IMAGE, score_threshold=1.5), "score_threshold", "0 to 1, got 1.5"),
            (pb.DetectRequest(image=IMAGE, iou_threshold=-0.5), "iou_threshold", "0 to 1, got -0.5"),
            (pb.DetectRequest(image=IMAGE, max_detections=0), "max_detections", "1 or more, got 0"),
            (pb.SegmentRequest(image=IMAGE, score_threshold=math.inf), "score_threshold", "0 to 1, got inf"),
            (pb.SegmentRequest(image=IMAGE, mask_encoding=4), "mask_encoding", "unknown value 4"),
            (pb.TranslateRequest(image=IMAGE, image_encoding=5), "image_encoding", "unknown value 5"),
            (pb.TranslateRequest(image=IMAGE, quality=80), "quality", "no effect on PNG"),
            (pb.TranslateRequest(image=IMAGE, image_encoding=4, quality=80), "quality", "no effect on RAW"),
            (pb.TranslateRequest(image=IMAGE, image_encoding=2, quality=0), "quality", "1 to 100, got 0"),
            (pb.TranslateRequest(image=IMAGE, image_encoding=3, quality=101), "quality", "1 to 100, got 101"),
        ],
    )
    def test_what_is_wrong_is_named(self, request_, field, says):
        with pytest.raises(InvalidInput) as caught:
            READ[type(request_)](request_)
        assert caught.value.field == field
        assert says in str(caught.value)
        assert isinstance(caught.value, InvalidImage) == (field.split(".")[0] == "image")

    def test_raw_pixels(self):
        call = codec.read_segment(pb.SegmentRequest(image=raw(color_order=pb.COLOR_ORDER_BGR)))
        assert call.image == RawPixels(bytes(18), 2, 3, 3, "bgr")
        assert codec.read_segment(pb.SegmentRequest(image=raw())).image == RawPixels(bytes(18), 2, 3, 3, "rgb")

    def test_encodings(self):
        for value, word in [(0, "coco_rle"), (1, "coco_rle"), (2, "polygon"), (3, "png")]:
            assert codec.read_segment(pb.SegmentRequest(image=IMAGE, mask_encoding=value)).form.mask_encoding == word
        for value, word in [(0, "png"), (1, "png"), (2, "jpeg"), (3, "webp"), (4, "raw")]:
            assert (
                codec.read_translate(pb.TranslateRequest(image=IMAGE, image_encoding=value)).form.image_encoding == word
            )
        request = pb.TranslateRequest(image=IMAGE, image_encoding=pb.IMAGE_ENCODING_JPEG, quality=1)
        assert codec.read_translate(request).form.quality == 1

    def test_model_requests(self):
        assert codec.read_list_models(pb.ListModelsRequest()) is None
        assert codec.read_list_models(pb.ListModelsRequest(task=pb.TASK_DETECT)) is Task.DETECT
        assert codec.read_get_model(pb.GetModelRequest(name="a", version="b")) == ModelSelector("a", "b")
        with pytest.raises(InvalidInput, match="task: unknown value 17"):
            codec.read_list_models(pb.ListModelsRequest(task=17))
        with pytest.raises(InvalidInput, match="name: is empty"):
            codec.read_get_model(pb.GetModelRequest())


def detections(count):
    boxes = np.arange(4 * count, dtype=np.float32).reshape(-1, 4)
    scores = np.linspace(1, 0.5, count, dtype=np.float32)
    return Detections(boxes, np.arange(count), tuple(f"class {i}" for i in range(count)), scores)


class TestReplies:
    def test_info(self):
        info = replies.write_detections(result(detections(0), hw=(480, 640))).info
        assert (info.model_name, info.model_version, info.image_height, info.image_width) == ("net", "2", 480, 640)
        times = info.timings
        found = (times.decode_ms, times.preprocess_ms, times.queue_ms, times.forward_ms, times.postprocess_ms)
        assert (*found, times.batch_size) == (1, 2, 3, 4, 5, 6)

    @pytest.mark.parametrize("count", [0, 1, 100])
    def test_detections(self, count):
        found = detections(count)
        response = replies.write_detections(result(found))
        assert [row.class_id for row in response.detections] == found.class_ids.tolist()
        assert tuple(row.class_name for row in response.detections) == found.class_names
        assert [row.score for row in response.detections] == found.scores.tolist()
        boxes = [[row.box.x1, row.box.y1, row.box.x2, row.box.y2] for row in response.detections]
        assert boxes == found.boxes_xyxy.tolist()

    def test_a_hundred_detections_take_less_than_a_millisecond(self):
        made = result(detections(100))
        times = []
        for _ in range(20):
            start = time.perf_counter()
            replies.write_detections(made)
            times.append(time.perf_counter() - start)
        assert min(times) < 1e-3

    @pytest.mark.parametrize("count", [0, 2])
    def test_classification(self, count):
        scores = np.linspace(0.9, 0.1, count, dtype=np.float32)
        found = Classification(np.arange(count), tuple("ab"[:count]), scores)
        response = replies.write_classification(result(found))
        rows = [(row.class_id, row.class_name, row.score) for row in response.classes]
        assert rows == list(zip(range(count), "ab", scores.tolist(), strict=False))

    def test_segments_are_listed_by_area_without_background_and_void(self):
        class_map = np.array(
            [
                [0, 0, 0, 0, 0, VOID],
                [0, 3, 0, 2, 2, VOID],
                [0, 0, 0, 2, 2, VOID],
                [0, 0, 1, 1, 0, VOID],
            ],
            np.uint8,
        )
        names = ("background", "one", "two", "three", "four")
        found = SegmentationMap(class_map, names, background_id=0)
        segments = replies.write_segments(result(found)).segments
        assert [(s.class_id, s.class_name, s.area) for s in segments] == [(2, "two", 4), (1, "one", 2), (3, "three", 1)]
        boxes = [(s.box.x1, s.box.y1, s.box.x2, s.box.y2) for s in segments]
        assert boxes == [(3, 1, 5, 3), (2, 3, 4, 4), (1, 1, 2, 2)]
        for segment in segments:
            rle = segment.mask.coco_rle
            assert (rle.height, rle.width) == (4, 6)
            assert np.array_equal(decode_rle(rle.counts, (4, 6)), class_map == segment.class_id)

    def test_without_a_background_class_the_first_class_is_listed(self):
        found = SegmentationMap(np.zeros((4, 6), np.uint8), ("sky",), None)
        assert [s.area for s in replies.write_segments(result(found)).segments] == [24]

    def test_nothing_but_background_or_void_has_no_segments(self):
        for fill, background_id in [(0, 0), (VOID, None)]:
            found = SegmentationMap(np.full((4, 6), fill, np.uint8), ("background",), background_id)
            assert not replies.write_segments(result(found)).segments

    def test_png_masks(self):
        found = SegmentationMap(np.eye(4, 6, dtype=np.uint8), ("background", "line"), 0)
        (segment,) = replies.write_segments(result(found), "png").segments
        assert np.array_equal(decode_png(segment.mask.png), np.eye(4, 6, dtype=bool))

    def test_polygon_masks_enclose_the_pixels(self):
        class_map = np.zeros((20, 30), np.uint8)
        class_map[5:15, 8:20] = 1
        found = SegmentationMap(class_map, ("background", "box"), 0)
        (segment,) = replies.write_segments(result(found, hw=(20, 30)), "polygon").segments
        (polygon,) = segment.mask.polygons.polygons
        points = np.array(polygon.xy).reshape(-1, 2)
        assert np.abs(points.min(0) - (8, 5)).max() <= 1
        assert np.abs(points.max(0) - (20, 15)).max() <= 1

    @pytest.mark.parametrize(
        ("encoding", "magic"), [("png", b"\x89PNG"), ("jpeg", b"\xff\xd8"), ("webp", b"RIFF"), ("raw", None)]
    )
    def test_images(self, encoding, magic):
        image = np.zeros((8, 10, 3), np.uint8)
        image[..., 0] = 200  # red
        response = replies.write_image(result(TranslatedImage(image)), encoding)
        assert (response.height, response.width) == (8, 10)
        assert response.info.image_height == 4
        if magic is None:
            sent = response.image.raw
            assert (sent.height, sent.width, sent.channels, sent.color_order) == (8, 10, 3, pb.COLOR_ORDER_RGB)
            assert sent.data == image.tobytes()
        else:
            assert response.image.encoded.startswith(magic)
            decoded = cv2.imdecode(np.frombuffer(response.image.encoded, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
            assert np.abs(decoded.astype(int) - image).max() <= (0 if encoding == "png" else 8)

    def test_quality_has_an_effect(self):
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
        for encoding in ("jpeg", "webp"):
            small, large = (
                len(replies.write_image(result(TranslatedImage(noise)), encoding, quality).image.encoded)
                for quality in (10, 95)
            )
            assert small < large / 2

    def test_write_reply_follows_the_call(self):
        found = result(SegmentationMap(np.eye(4, 6, dtype=np.uint8), ("background", "line"), 0))
        call = codec.read_segment(pb.SegmentRequest(image=IMAGE, mask_encoding=pb.MASK_ENCODING_PNG))
        (segment,) = replies.write_reply(found, call.form).segments
        assert segment.mask.WhichOneof("encoding") == "png"
        image = result(TranslatedImage(np.zeros((4, 6, 3), np.uint8)))
        call = codec.read_translate(pb.TranslateRequest(image=IMAGE, image_encoding=pb.IMAGE_ENCODING_RAW))
        assert replies.write_reply(image, call.form).image.WhichOneof("source") == "raw"
        call = codec.read_detect(pb.DetectRequest(image=IMAGE))
        assert isinstance(replies.write_reply(result(detections(1)), call.form), pb.DetectResponse)
        call = codec.read_classify(pb.ClassifyRequest(image=IMAGE))
        empty = Classification(np.empty(0, np.int64), (), np.empty(0, np.float32))
        assert isinstance(replies.write_reply(result(empty), call.form), pb.ClassifyResponse)

    def test_what_is_written_from_pixels_takes_long(self):
        boxes = detections(1)
        quick = (Classification(np.empty(0, np.int64), (), np.empty(0, np.float32)), boxes)
        slow = (
            dataclasses.replace(boxes, mask_rles=(encode_rle(np.eye(4, 6, dtype=bool)),)),
            SegmentationMap(np.eye(4, 6, dtype=np.uint8), ("background", "line"), 0),
            TranslatedImage(np.zeros((4, 6, 3), np.uint8)),
        )
        assert [replies.takes_long(result(found)) for found in (*quick, *slow)] == [False, False, True, True, True]

    def test_listings_keep_their_order_and_leave_class_names_out(self):
        infos = [
            ModelInfo("b", "10", Task.DETECT, ModelState.READY, class_names=("cat",)),
            ModelInfo("a", "9", Task.DETECT, ModelState.FAILED, state_reason="no file"),
        ]
        models = replies.write_list_models(infos).models
        assert [(model.name, model.version, list(model.class_names)) for model in models] == [
            ("b", "10", []),
            ("a", "9", []),
        ]
        assert models[1].state == pb.MODEL_STATE_FAILED
        assert models[1].state_reason == "no file"
        assert list(replies.write_get_model(infos[0]).model.class_names) == ["cat"]
        assert not replies.write_list_models([]).models
