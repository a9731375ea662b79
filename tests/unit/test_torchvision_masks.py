"""Masks of objects, from a detector's answer to the client, the picture and the JSON."""

from __future__ import annotations

import numpy as np
import pytest
from pycocotools import mask as coco

from vision_service.api.v1 import vision_pb2 as pb
from vision_service.client import codec
from vision_service.client import replies as reading
from vision_service.errors import InvalidInput, VisionError
from vision_service.imaging.draw import annotate
from vision_service.imaging.masks import decode_rle, encode_rle
from vision_service.records import to_record
from vision_service.server import codec as server_codec
from vision_service.server import replies as writing
from vision_service.types import Detections, Result
from vision_service.wire import MASK_ENCODING_VALUES

HW = (200, 300)


def masks():
    """Two that overlap and one without a pixel: bool [3, 200, 300]."""
    found = np.zeros((3, *HW), np.bool_)
    found[0, 25:125, 50:200] = True
    found[1, 75:175, 100:250] = True
    found[1, 100:120, 150:170] = False
    return found


def detections(rles=None):
    boxes = np.array([[50, 25, 200, 125], [100, 75, 250, 175], [0, 0, 1, 1]], np.float32)
    scores = np.array([0.9, 0.8, 0.3], np.float32)
    return Detections(boxes, np.array([0, 1, 2]), ("a", "b", "c"), scores, rles)


def result(prediction):
    return Result(prediction, HW, "net", "1")


def with_masks():
    return detections(tuple(encode_rle(mask) for mask in masks()))


def reply(encoding):
    message = writing.write_detections(result(with_masks()), encoding)
    return pb.DetectResponse.FromString(message.SerializeToString())


@pytest.mark.parametrize("encoding", MASK_ENCODING_VALUES)
def test_there_and_back(encoding):
    response = reply(encoding)
    written = {"coco_rle": "coco_rle", "polygon": "polygons", "png": "png"}[encoding]
    assert {row.mask.WhichOneof("encoding") for row in response.detections} == {written}
    read = reading.read_detections(response).prediction
    back = np.stack([decode_rle(rle, HW) for rle in read.mask_rles])
    if encoding == "polygon":
        assert (back != masks()).mean() < 0.01
    else:
        np.testing.assert_array_equal(back, masks())


def test_without_masks_there_are_none():
    response = writing.write_detections(result(detections()), "png")
    assert not any(row.HasField("mask") for row in response.detections)
    assert reading.read_detections(response).prediction.mask_rles is None


def test_the_request_says_how():
    for encoding in MASK_ENCODING_VALUES:
        call = server_codec.read_detect(codec.detect_request(b"x", mask_encoding=encoding))
        assert call.form.mask_encoding == encoding
    assert server_codec.read_detect(codec.detect_request(b"x")).form.mask_encoding == "coco_rle"
    with pytest.raises(InvalidInput, match="mask_encoding: unknown value 'rle'"):
        codec.detect_request(b"x", mask_encoding="rle")
    with pytest.raises(InvalidInput, match="mask_encoding: unknown value 9"):
        server_codec.read_detect(pb.DetectRequest(image=pb.Image(encoded=b"x"), mask_encoding=9))


@pytest.mark.parametrize(
    "damage",
    [
        lambda row: row.ClearField("mask"),
        lambda row: row.mask.coco_rle.MergeFrom(pb.CocoRle(counts=b"~~~")),
        lambda row: row.mask.coco_rle.MergeFrom(pb.CocoRle(height=199)),
    ],
)
def test_a_damaged_mask_is_refused(damage):
    response = reply("coco_rle")
    damage(response.detections[1])
    with pytest.raises(VisionError, match=r"DetectResponse .* cannot be read"):
        reading.read_reply(reading.read_detections, response, "id")


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools' own
def test_json_has_what_pycocotools_reads():
    rows = to_record(result(with_masks()))["detections"]
    for row, mask in zip(rows, masks(), strict=True):
        np.testing.assert_array_equal(coco.decode(row["mask"]), mask)
    assert all("mask" not in row for row in to_record(result(detections()))["detections"])


def test_masks_are_drawn_inside_the_boxes():
    grey = np.full((*HW, 3), 127, np.uint8)
    plain, drawn = annotate(grey, detections()), annotate(grey, with_masks())
    changed = (plain != drawn).any(axis=2)
    assert changed[[60, 150], [150, 200]].all(), "where one mask is"
    assert (drawn[110, 180] != drawn[60, 150]).any(), "where two overlap"
    np.testing.assert_array_equal(drawn[110, 160], drawn[60, 150])  # the hole of the second
    assert not changed[~masks().any(axis=0)].any(), "nothing changes where no mask is"
    with pytest.raises(ValueError, match="run lengths"):
        annotate(grey[:-1], with_masks())
