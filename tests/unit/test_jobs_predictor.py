"""What an image's records say depends on nothing but the image, the models and the parameters."""

from __future__ import annotations

import json
import pickle
import random
from pathlib import PurePosixPath

import cv2
import numpy as np
import pytest

from tests.helpers import red_image, tiny_spec
from vision_service.config.settings import ServerSettings
from vision_service.errors import ConfigError, InvalidInput
from vision_service.jobs.items import Frame, Item
from vision_service.jobs.predictor import Predictor, identity_of, in_order
from vision_service.records import to_prediction
from vision_service.types import ParamOverrides, SegmentationMap
from vision_service.weights.manifest import find_model

NETWORKS = ("mobilenet_v2", "nanodet_g", "selfie_segmentation")


def png(image: np.ndarray) -> bytes:
    return cv2.imencode(".png", image[..., ::-1])[1].tobytes()


def lines(outcomes) -> list[str]:
    return [json.dumps(row) for outcome in outcomes for row in (*outcome.records(), *outcome.failure_records())]


@pytest.fixture(scope="module")
def photos(samples) -> list[tuple[str, bytes]]:
    """Real pictures and pieces of them, so that scores lie close to each other and sizes differ."""
    found = []
    for name, data in samples.items():
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        pieces = [image, image[: image.shape[0] // 2], image[20:, 30:]]
        found += [(f"{name}{i}", cv2.imencode(".png", piece)[1].tobytes()) for i, piece in enumerate(pieces)]
    return found


class TestEqualToTheByte:
    @pytest.mark.parametrize(
        ("runtime", "names"), [("torch", ("mobilenet_v2", "nanodet_g")), ("auto", ("selfie_segmentation",))]
    )
    def test_whatever_the_neighbours_and_the_number_of_workers(self, photos, runtime, names):
        specs = [find_model(name).model_copy(update={"device": "cpu", "runtime": runtime}) for name in names]
        with Predictor(specs, workers=1) as one, Predictor(specs, workers=2) as two:
            alone = sorted(row for pair in photos for row in lines(one.predict_many([pair])))
            assert len(alone) == len(names) * len(photos)
            shuffled = random.Random(1).sample(photos, len(photos))
            assert sorted(lines(two.predict_many(shuffled))) == alone
            assert one.fingerprint == two.fingerprint


class TestPredictor:
    def test_results_in_the_order_of_images_and_models(self):
        specs = [tiny_spec(), tiny_spec(name="b", version="2")]
        with Predictor(specs, workers=2) as predictor:
            images = [(f"{red}.png", png(red_image(red))) for red in range(1, 30)]
            rows = [row for outcome in predictor.predict_many(images) for row in outcome.records()]
        assert [(row["file"], row["model"], row["classes"][0]["class_id"]) for row in rows] == [
            (f"{red}.png", model, red) for red in range(1, 30) for model in ("tiny", "b")
        ]
        assert set(rows[0]) == {"file", "task", "model", "version", "height", "width", "classes"}

    def test_a_bad_image_has_one_failure_whatever_the_number_of_models(self):
        with Predictor([tiny_spec(), tiny_spec(name="b")], workers=1) as predictor:
            good, bad = predictor.predict_many([("a.png", png(red_image(3))), ("b.png", b"not an image")])
        assert (len(good.results), good.failures) == (2, ())
        (row,) = bad.failure_records()
        assert (row["file"], row["model"], row["error"]) == ("b.png", "", "InvalidImage")
        assert not bad.failures[0].passing

    def test_a_model_that_fails_leaves_the_others_answers(self):
        specs = [tiny_spec(options={"fail_red": 3}), tiny_spec(name="b")]
        with Predictor(specs, workers=1) as predictor:
            (outcome,) = predictor.predict_many([("a.png", png(red_image(3)))])
        assert [row["model"] for row in outcome.records()] == ["b"]
        assert [(row["model"], row["error"]) for row in outcome.failure_records()] == [("tiny", "InferenceFailed")]

    def test_a_file_that_cannot_be_read_may_be_tried_again(self, tmp_path):
        with Predictor([tiny_spec()], workers=1) as predictor:
            outcome = predictor.predict(Item(str(tmp_path / "gone.png"), PurePosixPath("gone.png")))
        assert outcome.failures[0].passing
        assert "gone.png cannot be read: No such file" in outcome.failure_records()[0]["message"]

    def test_limits_of_the_settings_hold(self, tmp_path):
        (tmp_path / "a.png").write_bytes(png(red_image(3)))
        item = Item(str(tmp_path / "a.png"), PurePosixPath("a.png"), (tmp_path / "a.png").stat().st_size)
        for field in ("max_image_bytes", "max_image_pixels"):
            with Predictor([tiny_spec()], settings=ServerSettings.read(**{field: 10}), workers=1) as predictor:
                assert predictor.predict(item).failure_records()[0]["error"] == "InvalidImage"

    def test_the_image_is_kept_when_it_is_asked_for(self):
        item = Item("a.png", PurePosixPath("a.png"))
        with Predictor([tiny_spec()], workers=1) as predictor:
            assert predictor.predict(item, png(red_image(3))).image is None
            assert np.array_equal(predictor.predict(item, png(red_image(3)), keep_image=True).image, red_image(3))

    def test_frames_bring_their_pixels(self):
        frame = Item("clip.mp4", PurePosixPath("clip.mp4")).at(Frame(30, 1.001), red_image(9))
        with Predictor([tiny_spec()], workers=1) as predictor:
            (row,) = predictor.predict(pickle.loads(pickle.dumps(frame))).records()
        assert (row["file"], row["frame"], row["time_s"]) == ("clip.mp4#frame=30&t=1.001", 30, 1.001)
        assert row["classes"][0]["class_id"] == 9

    def test_batches_form_where_they_are_allowed(self):
        import tiny_backend

        tiny_backend.BATCHES.clear()
        images = [(str(i), png(red_image(3))) for i in range(40)]
        with Predictor([tiny_spec(options={"sleep_s": 0.01})], workers=1, batch_size=4) as predictor:
            outcomes = list(predictor.predict_many(images))
        assert max(outcome.results[0].timings.batch_size for outcome in outcomes) > 1

    def test_what_cannot_be_done_is_refused(self):
        with pytest.raises(ConfigError, match="at least one model and each once, got none"):
            Predictor([])
        with pytest.raises(ConfigError, match="each once, got tiny@1, tiny@1"):
            Predictor([tiny_spec(), tiny_spec()])
        with pytest.raises(InvalidInput, match="no class 'blue'"):
            Predictor([tiny_spec()], ParamOverrides(classes=("blue",)))


class TestFingerprint:
    def test_changes_with_what_changes_answers(self):
        with (
            Predictor([tiny_spec()], workers=1) as one,
            Predictor([tiny_spec()], ParamOverrides(top_k=2), workers=1) as other,
            Predictor([tiny_spec(version="2")], workers=1) as newer,
            Predictor([tiny_spec()], workers=1, batch_size=2) as batched,
        ):
            assert len({one.fingerprint, other.fingerprint, newer.fingerprint, batched.fingerprint}) == 4

    def test_where_a_file_lies_means_nothing_and_what_is_in_it_does(self):
        spec = find_model("nanodet_g")
        moved = spec.model_copy(update={"weights": spec.weights.model_copy(update={"file": "/elsewhere"})})
        other = spec.model_copy(update={"weights": spec.weights.model_copy(update={"sha256": "0" * 64})})
        assert identity_of(spec) == identity_of(moved) != identity_of(other)


class TestInOrder:
    @pytest.mark.parametrize("count", [0, 1, 50])
    def test_order_and_bounds(self, count):
        taken = []

        def items():
            for i in range(count):
                taken.append(i)
                yield i

        for done, value in enumerate(in_order(lambda i: i * i, items(), 3)):
            assert value == done * done
            assert len(taken) - done <= 2 * 3 + 1


class TestRecords:
    def test_a_prediction_comes_back_from_its_record(self, photos):
        specs = [find_model(name).model_copy(update={"device": "cpu", "runtime": "torch"}) for name in NETWORKS]
        with Predictor(specs, workers=1) as predictor:
            (outcome,) = predictor.predict_many(photos[:1])
        for result, record in zip(outcome.results, outcome.records(), strict=True):
            back = to_prediction(json.loads(json.dumps(record)), specs[0].classes if "classes" in record else None)
            assert type(back) is type(result.prediction)
            if isinstance(back, SegmentationMap):
                assert np.array_equal(back.mask(1), result.prediction.mask(1))
            else:
                assert back.class_names == result.prediction.class_names
                assert np.allclose(back.scores, result.prediction.scores, atol=1e-6)
