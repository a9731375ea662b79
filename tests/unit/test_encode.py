"""Encoding, read back with Pillow."""

import io

import numpy as np
import pytest
from PIL import Image

from vision_service.errors import InvalidInput
from vision_service.imaging.decode import decode_image
from vision_service.imaging.encode import encode_image


@pytest.fixture(scope="module")
def photo(samples):
    return decode_image(samples["chelsea"])


@pytest.mark.parametrize(("format", "difference"), [("png", 0.0), ("jpeg", 4.0), ("webp", 4.0)])
def test_what_pillow_reads_is_what_was_written(photo, format, difference):
    picture = Image.open(io.BytesIO(encode_image(photo, format)))
    assert picture.format == format.upper()
    assert np.abs(np.asarray(picture.convert("RGB")).astype(float) - photo).mean() <= difference


@pytest.mark.parametrize("format", ["jpeg", "webp"])
def test_quality_changes_size_and_error(photo, format):
    def error(data):
        return np.abs(decode_image(data).astype(float) - photo).mean()

    low, default, high = (encode_image(photo, format, quality) for quality in (20, 90, 98))
    assert len(low) < len(default) < len(high)
    assert error(low) > error(default) > error(high)
    assert default == encode_image(photo, format)


@pytest.mark.parametrize("quality", [0, 101, -1])
def test_quality_out_of_range_is_refused(photo, quality):
    with pytest.raises(InvalidInput, match="from 1 to 100") as error:
        encode_image(photo, "jpeg", quality)
    assert error.value.field == "quality"


def test_unknown_formats_are_refused(photo):
    with pytest.raises(InvalidInput, match="png, jpeg, webp"):
        encode_image(photo, "gif")


@pytest.mark.parametrize(("format", "side"), [("webp", 16_384), ("jpeg", 65_501)])
def test_sides_that_the_format_cannot_hold_are_refused(format, side):
    strip = np.zeros((1, side, 3), np.uint8)
    with pytest.raises(InvalidInput, match=f"at most {side - 1} pixels a side"):
        encode_image(strip, format)
    assert decode_image(encode_image(strip[:, 1:], format)).shape == (1, side - 1, 3)
    assert decode_image(encode_image(strip, "png")).shape == strip.shape


@pytest.mark.parametrize(
    "image",
    [np.zeros((0, 4, 3), np.uint8), np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3))],
)
def test_only_rgb_images_are_written(image):
    with pytest.raises(ValueError, match="uint8"):
        encode_image(image, "png")


def test_arrays_of_any_stride_are_written(photo):
    np.testing.assert_array_equal(decode_image(encode_image(photo[::2, ::-1], "png")), photo[::2, ::-1])
