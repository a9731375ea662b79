"""The batch buffer, and a loaded model that runs out of it."""

import numpy as np
import pytest
import torch

from tests.helpers import red_image, tiny_spec
from vision_service.engine.loaded import LoadedModel, Prepared
from vision_service.engine.staging import Staging
from vision_service.errors import InferenceFailed
from vision_service.imaging.preprocess import preprocess


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def test_a_batch_is_put_together_in_the_same_memory_again():
    staging = Staging(pinned=False)
    large = noise(4, 6, 5, 3)
    batch = staging.stack(list(large))
    np.testing.assert_array_equal(batch, large)
    where = batch.data_ptr()
    small = noise(2, 3, 5, 3)
    again = staging.stack(list(small))
    np.testing.assert_array_equal(again, small)
    assert again.data_ptr() == where
    assert staging.stack([noise(50, 50, 3)]).shape == (1, 50, 50, 3)


def test_unequal_inputs_are_padded_with_black_where_there_was_something():
    staging = Staging(pinned=False)
    staging.stack([np.full((8, 8, 3), 255, np.uint8)] * 2)
    first, second = staging.stack([noise(3, 5, 3), noise(6, 4, 3)])
    assert first[3:].sum() == second[:, 4:].sum() == 0
    np.testing.assert_array_equal(first[:3, :5], noise(3, 5, 3))


@pytest.fixture
def model():
    return LoadedModel(tiny_spec(), torch.device("cpu"), None)


def prepared(red, spec):
    return Prepared(*preprocess(red_image(red), spec.preprocess), spec.params)


def test_outcomes_outlive_the_buffer_they_came_from(model):
    batches = [[prepared(red, model.spec) for red in reds] for reds in ((1, 2, 3), (40, 50, 60))]
    outcomes = [model.forward(batch) for batch in batches]
    for batch, outcome, reds in zip(batches, outcomes, ((1, 2, 3), (40, 50, 60)), strict=True):
        names = [answer.prediction.class_names[0] for answer in model.answers(batch, outcome, 0)]
        assert names == [f"red {red}" for red in reds]
    part = model.answers(batches[1][1:], outcomes[1], 1)
    assert [answer.prediction.class_names for answer in part] == [("red 50",), ("red 60",)]


def test_a_network_that_loses_a_row_is_caught(model):
    forward = model.compiled.forward
    model.forward = model._pass(lambda *args: tuple(out[1:] for out in forward(*args)))
    with pytest.raises(InferenceFailed, match="made 1 rows of 2 images"):
        model.forward([prepared(red, model.spec) for red in (1, 2)])


def test_the_curve_has_each_size_that_is_run():
    spec = tiny_spec(batching={"max_batch_size": 6}, options={"sleep_s": 0.01})
    curve = LoadedModel(spec, torch.device("cpu"), None).warm_up()
    assert [size for size, _ in curve.points] == [1, 2, 4, 6]
    assert all(ms >= 10 for _, ms in curve.points)
