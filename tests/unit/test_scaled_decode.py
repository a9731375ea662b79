"""Large JPEGs are decoded no larger than a model needs them, and nothing else about them changes."""

import io

import cv2
import numpy as np
import pytest
from PIL import Image

from vision_service.config import PreprocessSpec
from vision_service.errors import InvalidImage
from vision_service.imaging import geometry
from vision_service.imaging.decode import DecodeLimits, decode_for, decode_image
from vision_service.imaging.preprocess import boxes_to_original, preprocess

CROP = PreprocessSpec(resize={"mode": "shortest_side_crop", "shortest_side": 32, "crop_hw": (28, 28)})
EXACT = CROP.model_copy(update={"exact_decode": True})
LETTERBOX = PreprocessSpec(resize={"mode": "letterbox", "size_hw": (64, 64)}, interpolation="bilinear")
NATIVE = PreprocessSpec(resize={"mode": "native"})


def picture(height, width):
    """Smooth, and different in each corner."""
    rows, columns = np.mgrid[:height, :width]
    red, green = 255 * columns / width, 255 * rows / height
    return np.stack([red, green, 128 + 100 * np.sin(6 * columns / width)], -1).astype(np.uint8)


def jpeg(image, orientation=1):
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=95, exif=exif)
    return file.getvalue()


@pytest.mark.parametrize(
    ("spec", "height", "width", "factor"),
    [
        (CROP, 100, 150, 1),
        (CROP, 2 * 96, 300, 2),
        (CROP, 2 * 96 - 2, 300, 1),
        (CROP, 4 * 96, 4 * 96, 4),
        (CROP, 800, 1000, 8),
        (CROP, 1000, 800, 8),
        (CROP, 800, 1004, 4),  # the rest of a division by 8 would shift the picture
        (CROP, 801, 1000, 1),
        (CROP, 8000, 100, 1),  # very long: a window of it is taken in its own pixels
        (LETTERBOX, 500, 800, 4),
        (NATIVE, 3000, 3000, 1),
    ],
)
def test_by_how_much_a_picture_may_be_divided(spec, height, width, factor):
    assert geometry.reduction(spec.resize, height, width) == factor


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("hw", [(904, 1200), (1200, 1600), (900, 1204)])
@pytest.mark.parametrize("spec", [CROP, LETTERBOX])
def test_the_network_sees_the_same_and_answers_return_to_the_same_pixels(spec, hw, orientation):
    data = jpeg(picture(*hw), orientation)
    whole = decode_image(data)
    image, original_hw = decode_for(data, spec)
    assert original_hw == whole.shape[:2]
    assert image.shape[0] <= whole.shape[0] / 4
    expected, meta = preprocess(whole, spec)
    scaled, scaled_meta = preprocess(image, spec, original_hw)
    assert scaled_meta == meta
    assert scaled.shape == expected.shape
    assert np.abs(scaled.astype(int) - expected).mean() < 0.5
    boxes = np.array([[0, 0, meta.input_hw[1], meta.input_hw[0]]], np.float32)
    assert (boxes_to_original(boxes, scaled_meta) <= [*original_hw[::-1], *original_hw[::-1]]).all()


def test_exact_decode_turns_it_off():
    data = jpeg(picture(904, 1200))
    assert decode_for(data, CROP)[0].shape == (113, 150, 3)
    image, original_hw = decode_for(data, EXACT)
    assert original_hw == (904, 1200)
    np.testing.assert_array_equal(image, decode_image(data))


@pytest.mark.parametrize("format", [".png", ".bmp", ".webp"])
def test_other_formats_are_decoded_whole(format):
    data = cv2.imencode(format, picture(904, 1200))[1].tobytes()
    assert decode_for(data, CROP)[0].shape == (904, 1200, 3)


def test_limits_hold_for_the_size_that_the_file_has():
    data = jpeg(picture(904, 1200))
    with pytest.raises(InvalidImage, match="1200 x 904 is 1084800 pixels"):
        decode_for(data, CROP, DecodeLimits(max_pixels=1_000_000))
    with pytest.raises(InvalidImage, match="truncated"):
        decode_for(data[:-1000], CROP)
    image, original_hw = decode_for(data, CROP)
    with pytest.raises(InvalidImage, match="this model takes at most 1000000"):
        preprocess(image, CROP.model_copy(update={"max_pixels": 1_000_000}), original_hw)
