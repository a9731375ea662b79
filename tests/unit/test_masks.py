"""Masks to bytes and outlines and back, checked against pycocotools and Pillow."""

import io

import cv2
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from vision_service.imaging import masks
from vision_service.imaging.encode import encode_image


def blobs(hw, seed, share=0.5):
    noise = cv2.GaussianBlur(np.random.default_rng(seed).random(hw), (0, 0), max(hw) / 20)
    return noise > np.quantile(noise, 1 - share)


def ring():
    mask = np.zeros((30, 40), np.uint8)
    cv2.circle(mask, (20, 15), 12, 1, -1)
    cv2.circle(mask, (20, 15), 6, 0, -1)
    mask[15, 20] = 1
    return mask.astype(bool)


MASKS = {
    "empty": np.zeros((7, 9), bool),
    "full": np.ones((7, 9), bool),
    "one pixel": np.ones((1, 1), bool),
    "a row": np.random.default_rng(0).random((1, 50)) < 0.5,
    "a column": np.random.default_rng(1).random((50, 1)) < 0.5,
    "noise": np.random.default_rng(2).random((40, 60)) < 0.5,
    "ring": ring(),
    "blobs": blobs((375, 500), 3),
    "few": blobs((375, 500), 4, 0.02),
}
each_mask = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # within pycocotools' decode
@each_mask
def test_rle_agrees_with_pycocotools_both_ways(mask):
    counts = masks.encode_rle(mask)
    np.testing.assert_array_equal(coco.decode({"size": list(mask.shape), "counts": counts}), mask)
    decoded = masks.decode_rle(counts, mask.shape)
    assert decoded.dtype == bool
    np.testing.assert_array_equal(decoded, mask)


def test_rle_of_no_pixels():
    assert masks.decode_rle(b"", (0, 5)).shape == (0, 5)
    assert masks.decode_rle(masks.encode_rle(np.zeros((0, 5), bool)), (0, 5)).shape == (0, 5)


@pytest.mark.parametrize(
    ("counts", "hw"),
    [
        (b"", (3, 3)),
        (b"9", (3, 4)),
        (b"9", (2, 4)),
        (b"9", (-3, -3)),
        (b"\x00", (3, 3)),
        (b"\xff\xff", (3, 3)),
        (b"o", (3, 3)),  # says that more follows
        (b"o" * 9 + b"0", (3, 3)),
        (b"oooooo0", (3, 3)),
        (b"O0:", (3, 3)),  # -1 first
        (b"9", (100_000, 100_000)),
    ],
)
def test_bad_rle_raises_value_error(counts, hw):
    with pytest.raises(ValueError, match=r"run lengths|need a size"):
        masks.decode_rle(counts, hw)


def test_characters_that_rle_never_uses_are_named():
    for counts in (b"\x00", b"9\x7f", b"o"):
        with pytest.raises(ValueError, match="a character out of place"):
            masks.decode_rle(counts, (3, 3))


def test_random_bytes_as_rle_do_no_harm():
    rng = np.random.default_rng(5)
    good = masks.encode_rle(MASKS["blobs"])
    for _ in range(300):
        counts = bytearray(good)
        for position in rng.integers(len(counts), size=3):
            counts[position] = rng.integers(40, 120)
        try:
            assert masks.decode_rle(bytes(counts), (375, 500)).shape == (375, 500)
        except ValueError as error:
            assert "run lengths" in str(error)  # noqa: PT017 - some changes leave the sum as it was


@each_mask
def test_polygons_round_trip(mask):
    polygons = masks.to_polygons(mask)
    assert all(points.dtype == np.float32 and points.shape[1] == 2 for points in polygons)
    np.testing.assert_array_equal(masks.from_polygons(polygons, mask.shape), mask)


def test_polygons_are_x_then_y_and_holes_are_outlines():
    assert masks.to_polygons(MASKS["empty"]) == []
    mask = np.zeros((20, 30), bool)
    mask[2:9, 5:26] = True
    (outline,) = masks.to_polygons(mask)
    assert outline.min(axis=0).tolist() == [5, 2]
    assert outline.max(axis=0).tolist() == [25, 8]
    assert len(masks.to_polygons(ring())) == 3  # the ring, its hole, the dot within


@pytest.mark.parametrize(
    "polygon",
    [np.zeros((0, 2)), np.zeros((3, 3)), np.zeros(4), np.full((3, 2), np.nan), np.full((3, 2), 1e30)],
)
def test_bad_polygons_raise_value_error(polygon):
    with pytest.raises(ValueError, match="need"):
        masks.from_polygons([polygon], (5, 5))


def test_polygons_outside_are_cut():
    square = np.array([[-10, -10], [3, -10], [3, 3], [-10, 3]], np.float32)
    assert masks.from_polygons([square], (8, 8)).sum() == 16
    assert masks.from_polygons([], (8, 8)).sum() == 0


@each_mask
def test_png_round_trip(mask):
    data = masks.encode_png(mask)
    picture = Image.open(io.BytesIO(data))
    assert picture.mode == "L"
    np.testing.assert_array_equal(np.asarray(picture), mask * 255)
    np.testing.assert_array_equal(masks.decode_png(data), mask)


def test_bad_png_raises_value_error():
    good = masks.encode_png(MASKS["blobs"])
    jpeg = encode_image(np.zeros((5, 5, 3), np.uint8), "jpeg")
    huge = good[:16] + b"\0\0\xff\xff\0\0\xff\xff" + good[24:]
    broken = good[:60] + bytes(40) + good[100:]
    for data in (b"", b"abc", good[:-1], jpeg, huge, broken):
        with pytest.raises(ValueError, match=r"PNG|no bytes|text"):
            masks.decode_png(data)


@pytest.mark.parametrize("write", [masks.encode_rle, masks.to_polygons, masks.encode_png])
def test_only_bool_matrices_are_masks(write):
    with pytest.raises(ValueError, match="bool"):
        write(np.zeros((3, 3), np.uint8))
    with pytest.raises(ValueError, match="bool"):
        write(np.zeros((3, 3, 1), bool))


def test_a_png_of_no_pixels_is_refused():
    with pytest.raises(ValueError, match="at least one pixel"):
        masks.encode_png(np.zeros((0, 3), bool))
    assert masks.to_polygons(np.zeros((0, 3), bool)) == []
