"""Limits that keep a latency objective, from a curve."""

import pytest

from vision_service.config import BatchingSpec
from vision_service.engine.tuning import LatencyCurve, Tuner, choose

GAINS = LatencyCurve(((1, 10.0), (2, 12.0), (4, 20.0), (8, 40.0)))  # a batch of 8 costs 5 ms an image, 1 costs 10
LINEAR = LatencyCurve(((1, 10.0), (2, 20.0), (4, 40.0), (8, 80.0)))


def test_between_two_measured_sizes_lies_a_line():
    assert [GAINS.ms(size) for size in (1, 2, 3, 4, 6, 8, 16)] == [10, 12, 16, 20, 30, 40, 80]


def test_without_an_objective_the_spec_is_kept():
    spec = BatchingSpec(max_batch_size=8, max_delay_ms=3, max_queued_jobs=20)
    choice = choose(spec, LatencyCurve(((1, 10.0), (2, 12.0), (4, 20.0), (8, 36.0))))
    assert (choice.limits.max_batch_size, choice.limits.max_delay_s, choice.limits.max_queued_jobs) == (8, 0.003, 20)
    assert choice.within_ms == 4 * 36  # 20 wait in three batches, and one runs
    assert choice.kept


@pytest.mark.parametrize(
    ("points", "most", "batch"),
    [
        (((1, 10.0), (2, 12.0), (4, 20.0), (8, 40.0)), 8, 4),  # twice the batch for nothing
        (((1, 10.0), (2, 12.0), (4, 20.0), (8, 36.0)), 8, 8),  # 4.5 ms an image instead of 5
        (((1, 10.0), (2, 12.0), (4, 20.0), (8, 48.0)), 8, 4),  # 6 ms an image: too large for the caches
        (((1, 10.0), (2, 12.0), (4, 20.0), (8, 20.0)), 4, 4),  # no larger than the spec says
        (((1, 100.0), (2, 204.0), (4, 410.0), (6, 610.0)), 6, 1),  # about as little, whatever the size
        (((1, 10.0), (2, 20.0), (4, 40.0), (8, 80.0)), 8, 4),  # the same network, but a batch is 2 ms of other work
        (((1, 1.0), (2, 2.0), (4, 4.0), (8, 8.0), (16, 16.0)), 16, 16),  # which is most of a tiny network's
        (((1, 10.0), (2, 18.0), (4, 36.5)), 4, 2),  # 9 + 1 against 9.125 + 0.5
        (((1, 10.0), (2, 18.0), (4, 34.5)), 4, 4),  # against 8.625 + 0.5: nine per cent
    ],
)
def test_the_smallest_batch_that_costs_an_image_about_as_little_as_any(points, most, batch):
    assert choose(BatchingSpec(max_batch_size=most), LatencyCurve(points)).limits.max_batch_size == batch


def test_passes_beside_others_choose_the_batch_where_there_are_any():
    """Alone, on all cores, large batches gain; on a share of them they do not."""
    alone = ((1, 10.0), (2, 12.0), (4, 16.0), (8, 24.0))
    assert choose(BatchingSpec(max_batch_size=8), LatencyCurve(alone)).limits.max_batch_size == 8
    curve = LatencyCurve(alone, beside=((1, 15.0), (2, 20.0), (4, 40.0), (8, 90.0)))
    choice = choose(BatchingSpec(max_batch_size=8, max_queued_jobs=20), curve)
    assert choice.limits.max_batch_size == 2
    assert choice.within_ms == 11 * 12  # how long calls wait is still told by passes on all cores
    assert choose(BatchingSpec(max_batch_size=8, target_p99_ms=48), curve).limits.max_batch_size == 8


@pytest.mark.parametrize(
    ("target_ms", "batch", "delay_ms", "queued", "within_ms", "kept"),
    [
        (1000, 8, 10, 24 * 8, 1000, True),
        (80, 8, 10, 8, 80, True),  # one runs, one waits
        (79, 4, 10, 8, 60, True),
        (39, 2, 10, 4, 36, True),
        (23, 1, 0, 1, 20, True),
        (19, 1, 0, 1, 20, False),  # not even single images can keep it
    ],
)
def test_the_largest_batch_that_keeps_the_objective(target_ms, batch, delay_ms, queued, within_ms, kept):
    choice = choose(BatchingSpec(max_batch_size=8, target_p99_ms=target_ms), GAINS)
    limits = choice.limits
    assert (limits.max_batch_size, 1000 * limits.max_delay_s, limits.max_queued_jobs) == (batch, delay_ms, queued)
    assert (choice.within_ms, choice.kept) == (within_ms, kept)
    assert choice.within_ms <= target_ms or not kept


def test_no_delay_where_a_fuller_batch_gains_nothing():
    assert choose(BatchingSpec(max_batch_size=8, target_p99_ms=1000), LINEAR).limits.max_delay_s == 0


def test_what_the_spec_fixes_wins():
    spec = BatchingSpec(max_batch_size=4, max_delay_ms=0, max_queued_jobs=5, target_p99_ms=1000)
    limits = choose(spec, GAINS).limits
    assert (limits.max_batch_size, limits.max_delay_s, limits.max_queued_jobs) == (4, 0, 5)
    # A delay that is given counts: two batches of 8 would fit into 90 ms, but not after 60 ms of waiting.
    assert choose(BatchingSpec(max_delay_ms=60, target_p99_ms=90), GAINS).limits.max_batch_size == 4


def test_slower_batches_than_the_curve_says_lead_to_smaller_ones_and_back():
    tuner = Tuner(BatchingSpec(max_batch_size=8, target_p99_ms=90), GAINS)
    assert tuner.choice.limits.max_batch_size == 8
    changes = sum(tuner.observe(8, 80.0) for _ in range(100))
    assert tuner.choice.limits.max_batch_size == 4
    assert 1 <= changes <= 8  # and not with every batch
    for _ in range(200):
        tuner.observe(4, 10.0)  # quicker than measured counts as measured
    assert tuner.choice.limits.max_batch_size == 8


def test_without_an_objective_nothing_is_chosen_again():
    tuner = Tuner(BatchingSpec(), GAINS)
    assert not any(tuner.observe(8, 4000.0) for _ in range(100))
