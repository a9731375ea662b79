"""Decoding, checked against Pillow and against the pixels that the files were made from."""

import io
import struct
import time
import warnings
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from vision_service.errors import InvalidImage
from vision_service.imaging.decode import DecodeLimits, decode_image, from_array, from_raw, read_header

H, W = 41, 62
ROWS, COLUMNS = np.mgrid[:H, :W]
RGB = np.stack([COLUMNS * 4, ROWS * 6, (COLUMNS + ROWS) * 2], axis=-1).astype(np.uint8)
ALPHA = np.clip(COLUMNS * 5, 0, 255).astype(np.uint8)
RGB16 = RGB.astype(np.uint16) * 256 + 200
PICTURE = Image.fromarray(RGB)
PICTURE_RGBA = Image.fromarray(np.dstack([RGB, ALPHA]))
FORMATS = {"JPEG": {"quality": 95}, "PNG": {}, "WEBP": {"lossless": True}, "BMP": {}, "TIFF": {}}


def save(picture, format, **options):
    file = io.BytesIO()
    picture.save(file, format, **(FORMATS[format] | options))
    return file.getvalue()


def on_white(picture):
    rgba = np.asarray(picture.convert("RGBA")).astype(np.float64)
    alpha = rgba[..., 3:] / 255
    return rgba[..., :3] * alpha + 255 * (1 - alpha)


def by_pillow(data):
    return on_white(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))


def png(color_type, depth, rows, *chunks, size=(W, H)):
    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, color_type, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows)))
    parts = b"".join(chunk(name, body) for name, body in chunks)
    return b"\x89PNG\r\n\x1a\n" + header + parts + pixels + chunk(b"IEND", b"")


def tiff_big_endian(*more_tags, height=H):
    grey = RGB[..., 0]
    tags = [
        (256, W),
        (257, height),
        (258, 8),
        (259, 1),
        (262, 1),
        (273, 250),
        (277, 1),
        (278, height),
        (279, grey.size),
    ]
    entries = b"".join(struct.pack(">HHII", tag, 4, 1, value) for tag, value in [*tags, *more_tags])
    head = b"MM\0*" + struct.pack(">IH", 8, len(tags) + len(more_tags)) + entries + bytes(4)
    return head.ljust(250, b"\0") + grey.tobytes()


def bmp_from_the_top():
    head = struct.pack("<2sIIIIiiHHIIIIII", b"BM", 54 + H * 188, 0, 54, 40, W, -H, 1, 24, 0, 0, 0, 0, 0, 0)
    return head + np.pad(RGB[..., ::-1].reshape(H, -1), ((0, 0), (0, 2))).tobytes()


def ycck():
    """A CMYK JPEG whose marker says that its first three channels are YCC."""
    data = bytearray(save(PICTURE.convert("CMYK"), "JPEG"))
    data[data.index(b"Adobe") + 11] = 2
    return bytes(data)


def palette(colors=64):
    return PICTURE.convert("P", palette=Image.Palette.ADAPTIVE, colors=colors)


# name: (file, largest difference from Pillow)
FILES = {
    "jpeg": (save(PICTURE, "JPEG"), 1),
    "jpeg progressive": (save(PICTURE, "JPEG", progressive=True), 1),
    "jpeg grey": (save(PICTURE.convert("L"), "JPEG"), 1),
    "jpeg cmyk": (save(PICTURE.convert("CMYK"), "JPEG"), 2),
    "jpeg ycck": (ycck(), 2),
    "jpeg with a tail": (save(PICTURE, "JPEG") + b"\0" * 9, 1),
    "png": (save(PICTURE, "PNG"), 0),
    "png alpha": (save(PICTURE_RGBA, "PNG"), 1),
    "png grey": (save(PICTURE.convert("L"), "PNG"), 0),
    "png grey alpha": (save(PICTURE_RGBA.convert("LA"), "PNG"), 1),
    "png grey with a colour key": (save(PICTURE.convert("L"), "PNG", transparency=100), 1),
    "png colour key": (save(PICTURE, "PNG", transparency=(0, 0, 0)), 1),
    "png palette": (save(palette(), "PNG"), 0),
    "png palette of 4 bits": (save(palette(12), "PNG", bits=4), 0),
    "png palette alpha": (save(palette(), "PNG", transparency=bytes([0, 128] + [255] * 62)), 1),
    "png one bit": (save(PICTURE.convert("1"), "PNG"), 0),
    "png with a tail": (save(PICTURE, "PNG") + b"tail", 0),
    "webp": (save(PICTURE, "WEBP"), 0),
    "webp lossy": (save(PICTURE, "WEBP", lossless=False), 0),
    "webp alpha": (save(PICTURE_RGBA, "WEBP"), 1),
    "webp lossy alpha": (save(PICTURE_RGBA, "WEBP", lossless=False), 1),
    "webp animated": (save(PICTURE_RGBA, "WEBP", save_all=True, append_images=[PICTURE_RGBA.rotate(180)]), 1),
    "bmp": (save(PICTURE, "BMP"), 0),
    "bmp grey": (save(PICTURE.convert("L"), "BMP"), 0),
    "bmp palette": (save(palette(), "BMP"), 0),
    "bmp from the top": (bmp_from_the_top(), 0),
    "tiff": (save(PICTURE, "TIFF"), 0),
    "tiff big endian": (tiff_big_endian(), 0),
    "tiff big": (save(PICTURE, "TIFF", big_tiff=True), 0),
    "tiff lzw": (save(PICTURE, "TIFF", compression="tiff_lzw"), 0),
    "tiff alpha": (save(PICTURE_RGBA, "TIFF"), 1),
    "tiff grey": (save(PICTURE.convert("L"), "TIFF"), 0),
    "tiff grey alpha": (save(PICTURE_RGBA.convert("LA"), "TIFF"), 1),
    "tiff cmyk": (save(PICTURE.convert("CMYK"), "TIFF"), 1),
    "tiff lab": (save(PICTURE.convert("LAB"), "TIFF"), 1),
    "tiff one bit": (save(PICTURE.convert("1"), "TIFF", compression="group4"), 0),
    "tiff pages": (save(PICTURE, "TIFF", save_all=True, append_images=[PICTURE.rotate(180), PICTURE.convert("L")]), 0),
}


@pytest.mark.parametrize("name", FILES)
def test_agrees_with_pillow(name):
    data, tolerance = FILES[name]
    image = decode_image(data)
    assert image.dtype == np.uint8
    assert image.flags.c_contiguous
    assert image.shape == (H, W, 3)
    assert np.abs(image - by_pillow(data)).max() <= tolerance
    assert read_header(data).format.upper() == name.split()[0].upper()


def test_lossless_files_return_their_pixels():
    for name in ("png", "webp", "bmp", "bmp from the top", "tiff", "tiff lzw", "tiff big", "tiff pages"):
        np.testing.assert_array_equal(decode_image(FILES[name][0]), RGB)
    assert np.abs(decode_image(FILES["png alpha"][0]) - on_white(PICTURE_RGBA)).max() <= 0.5  # rounded, not cut


@pytest.mark.parametrize("format", ["png", "tiff"])
def test_16_bits_become_the_high_8(format):
    color = cv2.imencode(f".{format}", RGB16[..., ::-1])[1].tobytes()
    assert np.abs(decode_image(color).astype(int) - RGB).max() <= 1
    grey = cv2.imencode(f".{format}", RGB16[..., 0])[1].tobytes()
    assert np.abs(decode_image(grey).astype(int) - RGB[..., :1]).max() <= 1
    alpha = cv2.imencode(f".{format}", np.dstack([RGB16[..., ::-1], ALPHA.astype(np.uint16) * 257]))[1].tobytes()
    assert np.abs(decode_image(alpha) - on_white(PICTURE_RGBA)).max() <= 2


def test_16_bit_grey_png_with_alpha_and_with_a_colour_key():
    grey = RGB16[..., 0]
    with_alpha = png(4, 16, np.dstack([grey, ALPHA.astype(np.uint16) * 257]).astype(">u2"))
    expected = on_white(Image.fromarray(np.dstack([RGB[..., :1]] * 3 + [ALPHA])))
    assert np.abs(decode_image(with_alpha) - expected).max() <= 2
    with_key = png(0, 16, grey.astype(">u2"), (b"tRNS", b"\0\0"))
    assert np.abs(decode_image(with_key).astype(int) - RGB[..., :1]).max() <= 1


def test_bmp_alpha_counts_where_the_header_has_a_mask_for_it():
    pixels = np.dstack([RGB[..., ::-1], ALPHA])[::-1].tobytes()
    head = struct.pack("<2sIIIIiiHHI", b"BM", 122 + len(pixels), 0, 122, 108, W, H, 1, 32, 3)
    masks = struct.pack("<20x4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    data = (head + masks).ljust(122, b"\0") + pixels
    assert np.abs(decode_image(data) - on_white(PICTURE_RGBA)).max() <= 1
    np.testing.assert_array_equal(decode_image(save(PICTURE_RGBA, "BMP")), RGB)  # a header without masks


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("picture", [PICTURE, PICTURE_RGBA], ids=["rgb", "rgba"])
def test_exif_orientation_is_applied(format, orientation, picture):
    exif = Image.Exif()
    exif[0x0112] = orientation
    if format == "JPEG":
        picture = picture.convert("RGB")
    data = save(picture, format, exif=exif)
    image = decode_image(data)
    assert image.shape == ((H, W, 3) if orientation < 5 else (W, H, 3))
    assert np.abs(image - by_pillow(data)).max() <= 1
    header = read_header(data)
    assert (header.height, header.width) == (H, W)
    assert header.needs_pillow or format != "WEBP"  # OpenCV before 4.11 ignores the orientation of a WebP


@pytest.mark.parametrize(
    ("data", "clue"),
    [
        (b"", "no bytes"),
        (b"{}", "text that starts with '{}'"),
        ("<html>Größe".encode(), "text"),
        (b"GIF89a" + bytes(99), "a GIF file"),
        (b"%PDF-1.7", "a PDF file"),
        (b"\0\0\0\x18ftypheic" + bytes(99), "a HEIC file"),
        (b"RIFF\x24\0\0\0WAVEfmt " + bytes(40), "not an image"),
        (bytes(range(128, 256)), "not an image"),
        (b"\xff\xd8\xff\xd9", "no picture"),
        (b"\xff\xd8\xff", "truncated JPEG"),
        (b"\x89PNG\r\n\x1a\n", "truncated PNG"),
        (b"RIFF\xff\0\0\0WEBPVP8 ", "truncated WebP"),
        (b"BM", "truncated BMP"),
        (b"II*\0", "truncated TIFF"),
        (png(2, 8, []), "could not be decoded"),
        (png(2, 8, RGB, size=(0, H)), "0 x 41"),
    ],
)
def test_refuses_what_is_no_picture_and_says_why(data, clue):
    with pytest.raises(InvalidImage, match=r"^image: ") as error:
        decode_image(data)
    assert clue in str(error.value)


def test_names_what_is_accepted():
    with pytest.raises(InvalidImage, match="accepted are JPEG, PNG, WebP, BMP and TIFF"):
        decode_image(b"hello")


def test_float_tiff_is_refused_with_its_reason():
    data = save(PICTURE.convert("F"), "TIFF")
    with pytest.raises(InvalidImage, match="32 bits a sample"):
        decode_image(data)


@pytest.mark.parametrize("name", [name for name in FILES if "tail" not in name and "pages" not in name])
def test_every_truncation_is_refused(name):
    data, _ = FILES[name]
    ends = {*range(0, len(data), max(1, len(data) // 60)), *range(max(0, len(data) - 20), len(data))}
    for end in ends:
        # From half on, the header is whole: that the rest is missing is said, and no decoder had to find out.
        with pytest.raises(InvalidImage, match="truncated" if end >= len(data) / 2 else None):
            decode_image(data[:end])


def test_a_truncated_jpeg_is_told_even_if_its_thumbnail_is_whole(samples):
    thumbnail = save(PICTURE, "JPEG")
    photo = samples["coffee"]
    segment = b"\xff\xe1" + struct.pack(">H", len(thumbnail) + 2) + thumbnail
    photo = photo[:2] + segment + photo[2:]
    assert decode_image(photo).shape == (400, 600, 3)
    with pytest.raises(InvalidImage, match="truncated JPEG"):
        decode_image(photo[: len(photo) // 2])


def test_a_tiff_that_holds_less_than_it_says_is_refused():
    with pytest.raises(InvalidImage, match="truncated TIFF"):
        decode_image(tiff_big_endian(height=2 * H))
    pages = FILES["tiff pages"][0]
    (tags,) = struct.unpack_from("<H", pages, 8)
    (second_page,) = struct.unpack_from("<I", pages, 10 + 12 * tags)
    with pytest.raises(InvalidImage, match="truncated TIFF"):
        decode_image(pages[:second_page])


def test_a_tiff_with_huge_tiles_is_refused():
    with pytest.raises(InvalidImage, match="tiles of 65536 x 65536"):
        decode_image(tiff_big_endian((322, 65536), (323, 65536)))


def test_a_failing_decoder_is_an_invalid_image(monkeypatch):
    def out_of_memory(*_):
        raise cv2.error("Insufficient memory")

    with monkeypatch.context() as patch:
        patch.setattr(cv2, "imdecode", out_of_memory)
        with pytest.raises(InvalidImage, match="could not be decoded"):
            decode_image(FILES["jpeg"][0])
    monkeypatch.setattr(cv2, "imdecode", lambda *_: np.zeros((5, 5, 3), np.uint8))
    with pytest.raises(InvalidImage, match="differ in size"):
        decode_image(FILES["jpeg"][0])


@pytest.mark.parametrize("name", FILES)
def test_damage_raises_nothing_but_invalid_image(name):
    data, _ = FILES[name]
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    refused = 0
    for _ in range(60):
        damaged = bytearray(data)
        for position in rng.integers(0, [len(data), min(len(data), 100), min(len(data), 40)]):
            damaged[position] = rng.integers(256)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow's, about odd metadata
                image = decode_image(bytes(damaged[: rng.integers(len(data) // 2, 2 * len(data))]))
        except InvalidImage:
            refused += 1
        else:
            assert image.dtype == np.uint8
            assert image.shape[2] == 3
    assert refused > 0


def test_bytes_are_capped_before_anything_is_read():
    data = save(PICTURE, "PNG")
    assert decode_image(data, DecodeLimits(max_bytes=len(data))).shape == (H, W, 3)
    with pytest.raises(InvalidImage, match=f"at most {len(data) - 1} are accepted"):
        decode_image(data, DecodeLimits(max_bytes=len(data) - 1))


@pytest.mark.parametrize("format", FORMATS)
def test_pixels_are_capped(format):
    data = save(PICTURE, format)
    assert decode_image(data, DecodeLimits(max_pixels=H * W)).shape == (H, W, 3)
    with pytest.raises(InvalidImage, match=f"62 x 41 is 2542 pixels; at most {H * W - 1}"):
        decode_image(data, DecodeLimits(max_pixels=H * W - 1))


def test_a_bomb_costs_nothing():
    bomb = png(2, 8, [], size=(60_000, 60_000))
    start = time.perf_counter()
    with pytest.raises(InvalidImage, match="3600000000 pixels"):
        decode_image(bomb)
    assert time.perf_counter() - start < 0.05


def test_a_chunk_that_claims_gigabytes_costs_nothing():
    data = bytearray(save(PICTURE, "PNG"))
    data[33:37] = struct.pack(">I", 0x7FFF_0000)  # length of the chunk after the header
    start = time.perf_counter()
    with pytest.raises(InvalidImage, match="truncated PNG"):
        decode_image(bytes(data))
    assert time.perf_counter() - start < 0.05


def test_millions_of_segments_cost_little():
    start = time.perf_counter()
    with pytest.raises(InvalidImage, match="no picture"):
        decode_image(b"\xff\xd8" + b"\xff\xfe\0\2" * 2_000_000)
    with pytest.raises(InvalidImage, match="no end within"):
        decode_image(save(PICTURE, "PNG")[:33] + bytes(4) + (b"abcd" + bytes(8)) * 2_000_000)
    assert time.perf_counter() - start < 0.5


def test_limits_must_be_positive():
    with pytest.raises(ValueError, match="1 or more"):
        DecodeLimits(max_pixels=0)


def test_raw_rgb_is_not_copied():
    data = RGB.tobytes()
    image = from_raw(data, H, W, 3, "rgb")
    np.testing.assert_array_equal(image, RGB)
    assert np.shares_memory(image, np.frombuffer(data, np.uint8))


def test_raw_layouts():
    rgba = np.dstack([RGB, ALPHA])
    grey = from_raw(RGB[..., 0].tobytes(), H, W, 1, "bgr")
    np.testing.assert_array_equal(grey, np.repeat(RGB[..., :1], 3, axis=2))
    np.testing.assert_array_equal(from_raw(RGB[..., ::-1].tobytes(), H, W, 3, "bgr"), RGB)
    for image in (
        from_raw(rgba.tobytes(), H, W, 4, "rgb"),
        from_raw(rgba[..., [2, 1, 0, 3]].tobytes(), H, W, 4, "bgr"),
    ):
        assert image.flags.c_contiguous
        assert np.abs(image - on_white(PICTURE_RGBA)).max() <= 0.5


@pytest.mark.parametrize(
    ("data", "height", "width", "channels", "order", "field"),
    [
        (b"", 0, 1, 3, "rgb", "image.raw.height"),
        (b"", 1, 0, 3, "rgb", "image.raw.width"),
        (b"ab", 1, 1, 2, "rgb", "image.raw.channels"),
        (b"abc", 1, 1, 3, "grb", "image.raw.color_order"),
        (b"ab", 1, 1, 3, "rgb", "image.raw.data"),
        (b"abcd", 1, 1, 3, "rgb", "image.raw.data"),
        (b"", 100_000, 100_000, 3, "rgb", "image.raw"),
    ],
)
def test_raw_refuses_and_names_the_field(data, height, width, channels, order, field):
    with pytest.raises(InvalidImage) as error:
        from_raw(data, height, width, channels, order)
    assert error.value.field == field


def test_raw_bytes_are_capped():
    with pytest.raises(InvalidImage, match="at most 2 are accepted"):
        from_raw(b"abc", 1, 1, 3, "rgb", DecodeLimits(max_bytes=2))


def test_arrays():
    assert from_array(RGB) is RGB
    grey = RGB[..., 0]
    np.testing.assert_array_equal(from_array(grey), np.repeat(grey[..., None], 3, axis=2))
    np.testing.assert_array_equal(from_array(grey[..., None]), from_array(grey))
    assert np.abs(from_array(np.dstack([RGB, ALPHA])) - on_white(PICTURE_RGBA)).max() <= 0.5
    mirrored = from_array(RGB[:, ::-1])
    assert mirrored.flags.c_contiguous
    np.testing.assert_array_equal(mirrored, RGB[:, ::-1])


@pytest.mark.parametrize(
    ("array", "got"),
    [
        (np.zeros((0, 5, 3), np.uint8), "[0, 5, 3]"),
        (np.zeros((5, 5, 3), np.float32), "float32"),
        (np.zeros((5, 5, 2), np.uint8), "[5, 5, 2]"),
        (np.zeros((1, 5, 5, 3), np.uint8), "[1, 5, 5, 3]"),
        (np.zeros(5, np.uint8), "[5]"),
        ([[0]], "list"),
    ],
)
def test_arrays_of_another_kind_are_refused(array, got):
    with pytest.raises(InvalidImage) as error:
        from_array(array)
    assert got in str(error.value)
