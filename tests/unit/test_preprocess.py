"""Preprocessing against torchvision's own transforms, and the way back against the way there."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from vision_service.config import Letterbox, Limit, Native, PreprocessSpec, ShortestSideCrop, Stretch
from vision_service.engine.staging import Staging
from vision_service.errors import InvalidImage
from vision_service.imaging import preprocess as preprocessing
from vision_service.imaging.decode import decode_image
from vision_service.imaging.preprocess import (
    boxes_to_input,
    boxes_to_original,
    class_map_to_original,
    plane_to_original,
    preprocess,
)

MODES = {
    "crop": ShortestSideCrop(shortest_side=64, crop_hw=(56, 56)),
    "crop larger": ShortestSideCrop(shortest_side=50, crop_hw=(57, 64)),
    "crop exact": ShortestSideCrop(shortest_side=64, crop_hw=(64, 64)),
    "letterbox": Letterbox(size_hw=(96, 128)),
    "letterbox top left": Letterbox(size_hw=(128, 96), align="top_left", fill=(1, 2, 3)),
    "letterbox no upscale": Letterbox(size_hw=(160, 160), upscale=False),
    "letterbox least": Letterbox(size_hw=(96, 128), pad_multiple=32),
    "stretch": Stretch(size_hw=(80, 112)),
    "limit": Limit(shortest_side=80, longest_side=133, pad_multiple=32),
    "native": Native(pad_multiple=16),
    "native as is": Native(),
}
SIZES = [(1, 1), (2, 3), (75, 100), (100, 75), (64, 64), (333, 47), (1, 5000), (5000, 1), (40, 1300), (3, 97)]
INTERPOLATIONS = ("antialias", "bilinear", "area")


def noise(hw, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*hw, 3), dtype=np.uint8)


def smooth(hw):
    rows, columns = np.mgrid[: hw[0], : hw[1]].astype(np.float32)
    planes = [np.sin(rows / 9) + np.cos(columns / 7), np.cos(rows / 5), np.sin(columns / 11)]
    return np.stack([(plane - plane.min()) / max(np.ptp(plane), 1e-6) * 255 for plane in planes], -1).astype(np.uint8)


def spec(mode, interpolation="antialias", **rest):
    return PreprocessSpec(resize=mode, interpolation=interpolation, **rest)


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("hw", SIZES, ids=str)
def test_any_size_fits_any_mode(mode, hw):
    image = noise(hw)
    for interpolation in INTERPOLATIONS:
        result, meta = preprocess(image, spec(mode, interpolation))
        assert result.dtype == np.uint8
        assert result.flags.c_contiguous
        assert result.shape == (*meta.input_hw, 3)
        assert meta.original_hw == hw
    assert plane_to_original(np.ones(meta.input_hw, np.float32), meta).shape == hw
    assert class_map_to_original(np.ones(meta.input_hw, np.uint8), meta, 0).shape == hw


@pytest.mark.parametrize("mode", [MODES["crop"], MODES["crop larger"], MODES["crop exact"]], ids=str)
@pytest.mark.parametrize(
    "hw", [(1, 1), (2, 3), (75, 100), (100, 75), (64, 64), (333, 47), (91, 61), (63, 2000)], ids=str
)
def test_crop_is_torchvisions(mode, hw):
    image = noise(hw)
    result, meta = preprocess(image, spec(mode))
    reference = transforms.Compose([transforms.Resize(mode.shortest_side), transforms.CenterCrop(mode.crop_hw)])
    by_pillow = np.asarray(reference(Image.fromarray(image)))
    assert np.abs(result.astype(int) - by_pillow).max() <= 1
    tensor = reference(torch.from_numpy(image).permute(2, 0, 1))
    assert np.abs(result.astype(int) - tensor.permute(1, 2, 0).numpy()).max() <= 1
    assert meta.input_hw == mode.crop_hw


def test_crop_of_a_photo_at_the_size_that_is_common(samples):
    mode = ShortestSideCrop(shortest_side=256, crop_hw=(224, 224))
    reference = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)])
    for data in samples.values():
        image = decode_image(data)
        difference = np.abs(
            preprocess(image, spec(mode))[0] - np.asarray(reference(Image.fromarray(image))).astype(int)
        )
        assert difference.max() <= 1
        assert difference.mean() < 0.02


def test_crop_of_a_very_long_image_is_cut_first_but_the_same():
    image = smooth((40, 1300))
    reference = transforms.Compose([transforms.Resize(64), transforms.CenterCrop(56)])
    longer = np.hstack([image[:, ::-1], image, image[:, ::-1]])[:, 13:-13]  # longer than 1:32
    for picture in (longer, np.ascontiguousarray(longer.transpose(1, 0, 2))):
        result, meta = preprocess(picture, spec(MODES["crop"]))
        expected = np.asarray(reference(Image.fromarray(picture))).astype(int)
        assert np.abs(result - expected).max() <= 24  # at most half a pixel apart
        assert np.abs(result - expected).mean() <= 6
        center = np.array([[w / 2 for w in picture.shape[1::-1]] * 2], np.float32)
        np.testing.assert_allclose(boxes_to_input(center, meta), [[28] * 4], atol=0.51)


def test_a_very_long_image_is_not_resized_whole():
    mode = ShortestSideCrop(shortest_side=2048, crop_hw=(2048, 2048))
    result, _ = preprocess(noise((1, 40_000)), spec(mode))  # whole, it would be 503 GB
    assert result.shape == (2048, 2048, 3)


@pytest.mark.parametrize(
    "hw", [(75, 100), (100, 75), (333, 47), (47, 333), (31, 32), (480, 640), (375, 500), (2, 3)], ids=str
)
@pytest.mark.parametrize(("shortest", "longest"), [(80, 133), (64, 64), (800, 1333)])
def test_limit_is_torchvisions(hw, shortest, longest):
    image = smooth(hw)
    mode = Limit(shortest_side=shortest, longest_side=longest, pad_multiple=32)
    result, meta = preprocess(image, spec(mode, "bilinear"))
    reference = GeneralizedRCNNTransform(shortest, longest, [0.0] * 3, [1.0] * 3).eval()
    boxes = torch.tensor([[0.0, 0.0, hw[1], hw[0]], [1.0, 0.5, 2.0, 1.5]])
    images, targets = reference([torch.from_numpy(image).permute(2, 0, 1).float()], [{"boxes": boxes}])
    assert meta.input_hw == tuple(images.tensors.shape[2:])
    expected = images.tensors[0].permute(1, 2, 0).numpy()
    assert np.abs(result - expected).max() <= 1
    np.testing.assert_allclose(boxes_to_input(boxes.numpy(), meta), targets[0]["boxes"].numpy(), rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(
        boxes_to_original(targets[0]["boxes"].numpy(), meta), boxes.numpy(), rtol=1e-5, atol=1e-4
    )


def test_limit_at_an_extreme_keeps_a_row():
    result, meta = preprocess(noise((1, 5000)), spec(MODES["limit"]))
    assert meta.input_hw == (32, 160)
    assert (result[1:] == 0).all()
    assert (result[0, 133:] == 0).all()


@pytest.mark.parametrize(
    ("mode", "hw", "place"),
    [
        (Letterbox(size_hw=(100, 100)), (50, 100), (25, 0, 50, 100)),
        (Letterbox(size_hw=(100, 100)), (100, 50), (0, 25, 100, 50)),
        (Letterbox(size_hw=(101, 100)), (50, 100), (25, 0, 50, 100)),  # the odd row goes below
        (Letterbox(size_hw=(100, 100), align="top_left"), (50, 100), (0, 0, 50, 100)),
        (Letterbox(size_hw=(100, 100)), (10, 20), (25, 0, 50, 100)),
        (Letterbox(size_hw=(100, 100), upscale=False), (10, 20), (45, 40, 10, 20)),
        (Letterbox(size_hw=(100, 100)), (333, 1000), (33, 0, 33, 100)),
        (Letterbox(size_hw=(100, 100)), (1, 5000), (49, 0, 1, 100)),
    ],
    ids=str,
)
@pytest.mark.parametrize("fill", [(114, 114, 114), (10, 20, 30)])
def test_letterbox_places(mode, hw, place, fill):
    white = np.full((*hw, 3), 255, np.uint8)
    result, meta = preprocess(white, spec(mode.model_copy(update={"fill": fill})))
    top, left, height, width = place
    expected = np.full((*mode.size_hw, 3), fill, np.uint8)
    expected[top : top + height, left : left + width] = 255
    np.testing.assert_array_equal(result, expected)
    corners = np.array([[0, 0, hw[1], hw[0]]], np.float32)
    np.testing.assert_allclose(boxes_to_input(corners, meta), [[left, top, left + width, top + height]], atol=1e-3)


@pytest.mark.parametrize(
    ("mode", "hw", "input_hw", "place"),
    [
        (Letterbox(size_hw=(128, 128), pad_multiple=32), (50, 100), (64, 128), (0, 0, 64, 128)),
        (Letterbox(size_hw=(128, 128), pad_multiple=32), (100, 50), (128, 64), (0, 0, 128, 64)),
        (Letterbox(size_hw=(128, 128), pad_multiple=32), (41, 100), (64, 128), (6, 0, 52, 128)),
        (Letterbox(size_hw=(128, 128), pad_multiple=32), (9, 1000), (32, 128), (15, 0, 1, 128)),
        (Letterbox(size_hw=(128, 128), pad_multiple=32, align="top_left"), (41, 100), (64, 128), (0, 0, 52, 128)),
        (Letterbox(size_hw=(128, 128), pad_multiple=32, upscale=False), (10, 20), (32, 32), (11, 6, 10, 20)),
        (Letterbox(size_hw=(100, 128), pad_multiple=32), (50, 100), (68, 128), (2, 0, 64, 128)),  # (100 - 64) % 32
    ],
    ids=str,
)
def test_letterbox_pads_no_more_than_the_multiple_asks(mode, hw, input_hw, place):
    result, meta = preprocess(np.full((*hw, 3), 255, np.uint8), spec(mode))
    top, left, height, width = place
    expected = np.full((*input_hw, 3), 114, np.uint8)
    expected[top : top + height, left : left + width] = 255
    np.testing.assert_array_equal(result, expected)
    corners = np.array([[0, 0, hw[1], hw[0]]], np.float32)
    np.testing.assert_allclose(boxes_to_input(corners, meta), [[left, top, left + width, top + height]], atol=1e-3)


def test_native_pads_with_the_edge():
    image = noise((5, 7))
    result, meta = preprocess(image, spec(Native(pad_multiple=4)))
    np.testing.assert_array_equal(result, np.pad(image, ((0, 3), (0, 1), (0, 0)), mode="edge"))
    assert (meta.scale_xy, meta.offset_xy) == ((1.0, 1.0), (0.0, 0.0))


def test_interpolations_are_those_of_their_libraries():
    image = noise((90, 120))
    mode = Stretch(size_hw=(30, 60))
    results = {name: preprocess(image, spec(mode, name))[0].astype(int) for name in INTERPOLATIONS}
    pillow = np.asarray(Image.fromarray(image).resize((60, 30), Image.Resampling.BILINEAR))
    assert np.abs(results["antialias"] - pillow).max() <= 1
    box = image.reshape(30, 3, 60, 2, 3).mean(axis=(1, 3))
    assert np.abs(results["area"] - box).max() <= 1
    tensor = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    plain = torch.nn.functional.interpolate(tensor, (30, 60), mode="bilinear")[0].permute(1, 2, 0).numpy()
    assert np.abs(results["bilinear"] - plain).max() <= 1


@pytest.mark.parametrize("hw", [(90, 120), (61, 47), (333, 500)], ids=str)
def test_bilinear_float_is_what_torchvisions_detectors_see(hw):
    image = noise(hw)
    transform = GeneralizedRCNNTransform(96, 160, [0.0] * 3, [1.0] * 3, size_divisible=1)
    theirs = transform([torch.from_numpy(image).permute(2, 0, 1) / 255])[0].tensors[0].permute(1, 2, 0).numpy() * 255
    mode = Limit(shortest_side=96, longest_side=160)
    result, meta = preprocess(image, spec(mode, "bilinear_float"))
    assert (result.dtype, result.flags.c_contiguous) == (np.float32, True)
    assert result.shape == (*meta.input_hw, 3) == theirs.shape
    assert np.abs(result - theirs).max() < 0.01
    rounded, _ = preprocess(image, spec(mode, "bilinear"))
    assert 0.4 < np.abs(rounded - theirs).max() <= 1.0  # what the other costs


def test_bilinear_float_is_float_whatever_the_size():
    image = noise((96, 128))
    for mode in (Stretch(size_hw=(96, 128)), Letterbox(size_hw=(128, 128)), Native(pad_multiple=100)):
        result, _ = preprocess(image, spec(mode, "bilinear_float"))
        plain, _ = preprocess(image, spec(mode, "bilinear"))
        assert result.dtype == np.float32
        np.testing.assert_array_equal(result, plain)  # nothing was resized


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_inputs_are_stacked_in_their_own_type(dtype):
    inputs = [np.full((2, 3, 3), 7.5, dtype), np.full((4, 1, 3), 9, dtype)]
    batch = preprocessing.stack(inputs)
    assert (batch.dtype, batch.shape) == (dtype, (2, 4, 3, 3))
    assert batch[0, :2].min() == dtype(7.5)
    assert batch[0, 2:].max() == batch[1, :, 1:].max() == 0
    staged = Staging(pinned=False)
    for _ in range(2):
        np.testing.assert_array_equal(staged.stack(inputs).numpy(), batch)
    assert staged.stack(inputs).numpy().dtype == dtype


def test_area_averages_along_the_axis_that_shrinks_when_the_other_grows():
    image = noise((90, 40))
    result, _ = preprocess(image, spec(Stretch(size_hw=(30, 80)), "area"))
    averaged = image.reshape(30, 3, 40, 3).mean(axis=1)
    assert np.abs(result[:, ::2] - averaged).max() <= 1


def test_max_pixels_is_checked():
    image = noise((10, 20))
    preprocess(image, spec(MODES["stretch"], max_pixels=200))
    with pytest.raises(InvalidImage, match="20 x 10 is 200 pixels; this model takes at most 199"):
        preprocess(image, spec(MODES["stretch"], max_pixels=199))


def test_read_only_and_strided_images_are_the_same():
    image = noise((75, 100))
    expected, _ = preprocess(image, spec(MODES["letterbox"]))
    read_only = np.frombuffer(image.tobytes(), np.uint8).reshape(image.shape)
    np.testing.assert_array_equal(preprocess(read_only, spec(MODES["letterbox"]))[0], expected)
    flipped = np.ascontiguousarray(image[::-1, ::-1])[::-1, ::-1]
    np.testing.assert_array_equal(preprocess(flipped, spec(MODES["letterbox"]))[0], expected)
    np.testing.assert_array_equal(read_only, image)


def test_threads_do_not_disturb_each_other():
    images = [noise((75, 100), seed) for seed in range(8)]
    alone = [preprocess(image, spec(MODES["crop"]))[0] for image in images]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(10):
            together = list(pool.map(lambda image: preprocess(image, spec(MODES["crop"]))[0], images))
            np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("hw", [*SIZES, (1080, 1920)], ids=str)
def test_boxes_round_trip(mode, hw):
    meta = preprocess(np.zeros((*hw, 3), np.uint8), spec(mode))[1]
    rng = np.random.default_rng(1)
    corners = np.sort(rng.random((50, 2, 2)), axis=1).reshape(50, 4) * [hw[1], hw[0], hw[1], hw[0]]
    boxes = np.vstack([np.zeros((0, 4)), corners, [[0, 0, hw[1], hw[0]]]]).astype(np.float32)
    there = boxes_to_input(boxes, meta)
    back = boxes_to_original(there, meta)
    assert back.dtype == there.dtype == np.float32
    rounding = 4 * np.finfo(np.float32).eps * np.abs(there).max() / min(meta.scale_xy)
    np.testing.assert_allclose(back, boxes, atol=rounding, rtol=0)


def test_boxes_empty_and_clipped():
    meta = preprocess(noise((50, 100)), spec(Letterbox(size_hw=(100, 100))))[1]
    empty = np.empty((0, 4), np.float32)
    assert boxes_to_original(empty, meta).shape == boxes_to_input(empty, meta).shape == (0, 4)
    outside = np.array([[-50, -50, 500, 500], [10, 0, 20, 100]], np.float32)
    np.testing.assert_allclose(boxes_to_original(outside, meta), [[0, 0, 100, 50], [10, 0, 20, 50]])


def test_boxes_follow_the_pixels():
    image = np.zeros((300, 400, 3), np.uint8)
    image[120:180, 160:240] = 255
    box = np.array([[160, 120, 240, 180]], np.float32)
    for mode in MODES.values():
        result, meta = preprocess(image, spec(mode))
        content = result[..., 0] > 140
        rows, columns = np.flatnonzero(content.any(1)), np.flatnonzero(content.any(0))
        found = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        np.testing.assert_allclose(boxes_to_input(box, meta)[0], found, atol=1.0)


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("hw", [(240, 320), (320, 240), (97, 403), (61, 61)], ids=str)
def test_a_mask_sent_there_comes_back(mode, hw):
    mask = np.zeros(hw, np.uint8)
    cv2.ellipse(mask, (hw[1] // 2, hw[0] // 2), (min(hw) // 4, min(hw) // 3), 0, 0, 360, 255, -1)
    result, meta = preprocess(np.dstack([mask] * 3), spec(mode))
    seen = plane_to_original(np.ones(meta.input_hw, np.float32), meta) > 0
    expected = (mask > 127) & seen
    plane = result[..., 0].astype(np.float32) / 255
    for found in (
        plane_to_original(plane, meta) > 0.5,
        class_map_to_original((plane > 0.5).astype(np.uint8), meta, 0) == 1,
    ):
        union = (found | expected).sum()
        assert (found & expected).sum() / union > 0.9


def test_planes_return_exactly_what_was_sent():
    """A plane that is linear in the original's coordinates is not changed by bilinear sampling, edges apart."""
    hw = (90, 130)
    rows, columns = np.mgrid[: hw[0], : hw[1]] + 0.5
    for mode in MODES.values():
        meta = preprocess(noise(hw), spec(mode))[1]
        x = (np.arange(meta.input_hw[1]) + 0.5 - meta.offset_xy[0]) / meta.scale_xy[0]
        y = (np.arange(meta.input_hw[0]) + 0.5 - meta.offset_xy[1]) / meta.scale_xy[1]
        plane = np.stack(np.meshgrid(x, y), axis=-1).astype(np.float32)  # where each pixel comes from
        back = plane_to_original(plane, meta)
        seen = plane_to_original(np.ones(meta.input_hw, np.float32), meta) > 0
        inner = cv2.erode(np.pad(seen, 1).astype(np.uint8), np.ones((9, 9)))[1:-1, 1:-1] > 0
        assert inner.any()
        np.testing.assert_allclose(back[inner], np.stack([columns, rows], -1)[inner], atol=2e-2)


def test_what_was_never_seen_is_zero():
    mode = ShortestSideCrop(shortest_side=50, crop_hw=(50, 50))
    meta = preprocess(noise((100, 200)), spec(mode))[1]
    plane = plane_to_original(np.ones((50, 50), np.float32), meta)
    assert (plane[:, 50:150] == 1).all()
    assert plane.sum() == 100 * 100
    classes = class_map_to_original(np.full((50, 50), 3, np.uint8), meta, 255)
    assert (classes[:, 50:150] == 3).all()
    assert (classes == 255).sum() == 100 * 100


def test_padding_never_bleeds_into_a_plane():
    for name, hw in itertools.product(
        ("letterbox", "limit", "crop larger", "native"), [(75, 100), (100, 75), (33, 47)]
    ):
        result, meta = preprocess(np.full((*hw, 3), 255, np.uint8), spec(MODES[name]))
        inside = (boxes_to_input(np.array([[0, 0, hw[1], hw[0]]], np.float32), meta) + 0.5).astype(int)[0]
        plane = np.full(meta.input_hw, -1000.0, np.float32)
        plane[max(inside[1], 0) : inside[3], max(inside[0], 0) : inside[2]] = 1.0
        assert result.shape[:2] == plane.shape
        assert set(np.unique(plane_to_original(plane, meta))) <= {0.0, 1.0}


@pytest.mark.parametrize("channels", [1, 3, 64, 65, 150])
@pytest.mark.parametrize("name", ["letterbox", "crop"])
def test_channels_are_independent(name, channels):
    meta = preprocess(noise((33, 47)), spec(MODES[name]))[1]
    planes = np.random.default_rng(2).random((*meta.input_hw, channels), dtype=np.float32)
    back = plane_to_original(planes, meta)
    assert back.shape == (33, 47, channels)
    for channel in {0, channels - 1}:
        single = plane_to_original(np.ascontiguousarray(planes[..., channel]), meta)
        np.testing.assert_allclose(back[..., channel], single, atol=1e-4)


def test_planes_of_another_size_are_refused():
    meta = preprocess(noise((33, 47)), spec(MODES["letterbox"]))[1]
    with pytest.raises(ValueError, match="plane of the network's input"):
        plane_to_original(np.zeros((5, 5), np.float32), meta)
    with pytest.raises(ValueError, match="plane of the network's input"):
        class_map_to_original(np.zeros((5, 5), np.uint8), meta, 0)


def test_stack_pads_smaller_inputs_right_and_below():
    small, large = noise((3, 5)), noise((6, 4))
    batch = preprocessing.stack([small, large])
    assert batch.shape == (2, 6, 5, 3)
    assert (batch[0, :3, :5] == small).all()
    assert (batch[1, :6, :4] == large).all()
    assert batch[0, 3:].sum() == batch[1, :, 4:].sum() == 0


@pytest.mark.parametrize(("hw", "content"), [((100, 200), (66, 133)), ((60, 61), (80, 81)), ((7, 700), (1, 133))])
def test_content_is_what_is_not_padding(hw, content):
    _, meta = preprocess(noise(hw), spec(MODES["limit"]))
    assert preprocessing.content_hw(meta) == content
