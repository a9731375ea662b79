"""What is held back, how long and what is said about it; the clock is the test's."""

from __future__ import annotations

import pytest

from vision_service.client.failures import AttemptFailed, Failure
from vision_service.client.hold_back import HoldBack


class Clock:
    now_s = 100.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def held(clock):
    return HoldBack(clock)


def full(retry_after_ms, message="full; call again in 0.50 s"):
    return Failure("RESOURCE_EXHAUSTED", message, retry_after_ms, "id-1")


def test_until_the_time_that_was_named(clock, held):
    assert held.failure("a") is None
    held.heed("a", full(500))
    clock.now_s += 0.2
    failure = held.failure("a")
    assert (failure.status, failure.pushback_ms, failure.request_id) == ("RESOURCE_EXHAUSTED", 300, "")
    assert failure.message == (
        "not sent: 0.20 s ago the server had no room for such a request; call again in 0.30 s. "
        'The server had said: "full; call again in 0.50 s"'
    )
    assert held.failure("b") is None
    clock.now_s += 0.2999
    assert held.failure("a").pushback_ms == 1  # never 0, which would be: at once
    clock.now_s += 0.0001
    assert held.failure("a") is None


def test_a_server_is_asked_again_after_ten_seconds_whatever_it_had_named(clock, held):
    held.heed("a", full(2**31 - 1))
    assert held.failure("a").pushback_ms == 10_000
    clock.now_s += 10
    assert held.failure("a") is None


def test_what_is_over_is_forgotten(clock, held):
    for model in "abc":
        held.heed(model, full(500))
    clock.now_s += 1
    held.heed("d", full(500))
    assert held._refusals.keys() == {"d"}


def test_the_latest_time_counts(clock, held):
    """By calls a refusal may be about another model, which has room sooner."""
    held.heed("a", full(100, "a bit full"))
    held.heed("a", full(5000, "full"))
    held.heed("a", full(200, "a bit full"))
    assert held.failure("a").message.endswith('had said: "full"')
    clock.now_s += 4.9
    assert held.failure("a").pushback_ms == pytest.approx(100, abs=1)
    clock.now_s += 0.2
    held.heed("a", full(200, "a bit full"))
    assert held.failure("a").message.endswith('had said: "a bit full"')


@pytest.mark.parametrize(
    "failure",
    [full(None), full(-1), full(0), Failure("UNAVAILABLE", "loading", 500), Failure("DEADLINE_EXCEEDED", "late")],
    ids=["does not say when", "never", "at once", "is away", "was late"],
)
def test_other_failures_hold_nothing(held, failure):
    held.heed("a", failure)
    assert held.failure("a") is None


def test_an_attempt_learns_and_obeys(held):
    made = []

    def attempt():
        with held.asking("a"):
            made.append("a")
            raise AttemptFailed(full(500))

    with pytest.raises(AttemptFailed, match="full; call"):
        attempt()
    with pytest.raises(AttemptFailed, match="not sent: "):
        attempt()
    with held.asking("b"):
        made.append("b")
    assert made == ["a", "b"]
