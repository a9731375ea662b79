"""The models that ship, on the photos that ship, through a real server."""

from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest

from tests.helpers import run_server
from vision_service.client import VisionClient
from vision_service.config.settings import ServerSettings
from vision_service.imaging.decode import DecodeLimits, decode_image

FIXED_SIZE = ("mobilenet_v2", "nanodet_g", "selfie_segmentation")


@pytest.fixture(scope="module")
def server():
    with run_server(ServerSettings.read(host="127.0.0.1", port=0, device="cpu")) as running:
        for model in FIXED_SIZE:  # a busy machine may choose batches of one, in which nothing could be mixed up
            running.pipeline.catalog.find(model).fix_batch(8)
        yield running


@pytest.fixture(scope="module")
def client(server):
    with VisionClient(f"127.0.0.1:{server.port}", timeout_s=60) as client:
        yield client


@pytest.fixture(scope="module")
def crops(samples):
    """64 JPEGs of 64 different sizes, cut from the photos: [64]."""
    rng = np.random.default_rng(7)
    photos = [decode_image(data, DecodeLimits()) for data in samples.values()]
    made = []
    for i in range(64):
        photo = photos[i % len(photos)]
        height, width = 96 + 3 * i % 200, 90 + 5 * i % 210
        y, x = rng.integers(0, photo.shape[0] - height), rng.integers(0, photo.shape[1] - width)
        crop = photo[y : y + height, x : x + width]
        made.append(cv2.imencode(".jpg", crop[..., ::-1])[1].tobytes())
    assert len({decode_image(data, DecodeLimits()).shape for data in made}) == 64
    return made


def test_what_is_plainly_there_is_found(client, samples):
    found = {name: client.detect(data).prediction for name, data in samples.items()}
    assert found["astronaut"].class_names[0] == "person"
    assert found["chelsea"].class_names[0] == "cat"
    assert "cup" in found["coffee"].class_names
    assert client.classify(samples["chelsea"]).prediction.class_names[0] == "Egyptian cat"
    assert client.classify(samples["coffee"]).prediction.class_names[0] == "espresso"
    # The astronaut fills the middle of her portrait; the upper left corner is a flag.
    mask = client.segment(samples["astronaut"]).prediction.mask(1)
    assert mask[250:500, 150:300].mean() > 0.95
    assert mask[:100, :50].mean() < 0.05


def test_super_resolution_doubles_and_resembles(client, samples):
    crop = decode_image(samples["chelsea"], DecodeLimits())[80:200, 100:260]
    image = client.translate(np.ascontiguousarray(crop)).prediction.image
    assert image.shape == (240, 320, 3)
    back = cv2.resize(image, (160, 120), interpolation=cv2.INTER_AREA)
    assert np.abs(back.astype(int) - crop).mean() < 6


@pytest.mark.parametrize("task", ["classify", "detect", "segment"])
def test_64_calls_at_once_answer_as_64_calls_one_by_one(client, crops, task):
    call = getattr(client, task)
    alone = [call(crop) for crop in crops]
    assert {result.timings.batch_size for result in alone} == {1}
    with ThreadPoolExecutor(64) as threads:
        together = list(threads.map(call, crops))
    assert max(result.timings.batch_size for result in together) > 1
    for one, other in zip(alone, together, strict=True):
        assert one.original_hw == other.original_hw
        same_prediction(one.prediction, other.prediction)


def same_prediction(one, other):
    if hasattr(one, "class_map"):
        # A pixel within rounding of the threshold may fall on either side.
        assert np.mean(one.class_map != other.class_map) <= 1e-4
        return
    np.testing.assert_allclose(one.scores, other.scores, atol=1e-4)
    if hasattr(one, "boxes_xyxy"):
        np.testing.assert_allclose(one.boxes_xyxy, other.boxes_xyxy, atol=1e-4 * 300)  # relative to the image's size
    distinct = np.abs(np.diff(one.scores, prepend=2, append=-1))
    clear = np.minimum(distinct[1:], distinct[:-1]) > 2e-4  # rows of equal score may change places
    np.testing.assert_array_equal(one.class_ids[clear], other.class_ids[clear])


def test_options_have_their_effect(client, samples):
    coffee, astronaut = samples["coffee"], samples["astronaut"]
    assert len(client.classify(coffee, top_k=3).prediction) == 3
    assert (client.classify(coffee, score_threshold=0.5).prediction.scores >= 0.5).all()
    cats = client.classify(coffee, classes=["Egyptian cat", 281]).prediction
    assert sorted(cats.class_names) == ["Egyptian cat", "tabby"]

    many = client.detect(astronaut, score_threshold=0.15).prediction
    few = client.detect(astronaut, score_threshold=0.3).prediction
    assert len(many) > len(few) > 0
    assert many.scores.min() >= 0.15
    assert client.detect(astronaut, score_threshold=0.0, max_detections=7).prediction.scores.shape == (7,)
    people = client.detect(astronaut, score_threshold=0.05, classes=["person"]).prediction
    assert set(people.class_names) == {"person"}
    overlapping = client.detect(astronaut, score_threshold=0.15, iou_threshold=0.95).prediction
    assert len(overlapping) > len(many)

    areas = [client.segment(astronaut, score_threshold=t).prediction.areas()[1] for t in (0.1, 0.5, 0.9)]
    assert areas[0] > areas[1] > areas[2] > 0
    assert client.segment(coffee, mask_encoding="png").timings.encode_ms > 0
    assert client.segment(coffee, score_threshold=0.0).prediction.mask(1).all()  # "at least 0" is everywhere
    assert client.segment(astronaut, classes=["background"]).prediction.areas()[1] == 0
    exact = client.segment(astronaut, mask_encoding="coco_rle").prediction.class_map
    np.testing.assert_array_equal(client.segment(astronaut, mask_encoding="png").prediction.class_map, exact)
    outlined = client.segment(astronaut, mask_encoding="polygon").prediction.class_map
    assert np.mean(outlined != exact) < 0.01

    tile = np.ascontiguousarray(decode_image(coffee, DecodeLimits())[100:164, 200:264])
    lossless = client.translate(tile).prediction.image
    np.testing.assert_array_equal(client.translate(tile, image_encoding="raw").prediction.image, lossless)
    coarse = [client.translate(tile, image_encoding="jpeg", quality=q).prediction.image for q in (95, 10)]
    errors = [np.abs(image.astype(int) - lossless).mean() for image in coarse]
    assert 0 < errors[0] < errors[1]


def test_an_image_too_large_for_a_model_is_refused_by_name(client):
    from vision_service.errors import InvalidInput

    with pytest.raises(InvalidInput, match="image"):
        client.translate(np.zeros((1200, 1200, 3), np.uint8))
