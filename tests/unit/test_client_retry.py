from __future__ import annotations

import pytest

from vision_service.client.failures import Failure, to_error
from vision_service.client.retry import Attempts, Polling, RetryPolicy
from vision_service.errors import (
    DeadlineExceeded,
    InferenceFailed,
    InvalidImage,
    InvalidInput,
    ModelNotFound,
    ModelUnavailable,
    QueueFull,
    ResourceExhausted,
    SetupError,
    VisionError,
)

POLICY = RetryPolicy(max_attempts=4, initial_backoff_s=0.2, max_backoff_s=0.5, multiplier=2.0, jitter=0.5)


@pytest.mark.parametrize(
    ("failure", "attempt", "remaining_s", "draw", "expected_s"),
    [
        (Failure("INTERNAL", ""), 1, 9.0, 0.0, None),
        (Failure("INVALID_ARGUMENT", ""), 1, 9.0, 0.0, None),
        (Failure("NOT_FOUND", ""), 1, 9.0, 0.0, None),
        (Failure("DEADLINE_EXCEEDED", ""), 1, 9.0, 0.0, None),
        (Failure("INTERNAL", "", pushback_ms=10), 1, 9.0, 0.0, None),
        # a full queue: as long as the server says, plus jitter
        (Failure("RESOURCE_EXHAUSTED", "", pushback_ms=400), 1, 9.0, 0.0, 0.4),
        (Failure("RESOURCE_EXHAUSTED", "", pushback_ms=400), 3, 9.0, 1.0, 0.6),
        (Failure("RESOURCE_EXHAUSTED", "", pushback_ms=0), 1, 9.0, 1.0, 0.0),
        (Failure("RESOURCE_EXHAUSTED", "", pushback_ms=-1), 1, 9.0, 0.0, None),
        (Failure("RESOURCE_EXHAUSTED", "", pushback_ms=None), 1, 9.0, 0.0, None),
        # away: longer and longer, up to a limit
        (Failure("UNAVAILABLE", ""), 1, 9.0, 0.0, 0.2),
        (Failure("UNAVAILABLE", ""), 2, 9.0, 0.0, 0.4),
        (Failure("UNAVAILABLE", ""), 3, 9.0, 0.0, 0.5),
        (Failure("UNAVAILABLE", ""), 1, 9.0, 1.0, 0.3),
        (Failure("UNAVAILABLE", "", pushback_ms=50), 3, 9.0, 0.0, 0.05),
        (Failure("UNAVAILABLE", "", pushback_ms=-1), 1, 9.0, 0.0, None),
        # limits: attempts, time
        (Failure("UNAVAILABLE", ""), 4, 9.0, 0.0, None),
        (Failure("RESOURCE_EXHAUSTED", "", pushback_ms=400), 1, 0.4, 0.0, None),
        (Failure("RESOURCE_EXHAUSTED", "", pushback_ms=400), 1, 0.41, 0.0, 0.4),
    ],
)
def test_pause(failure, attempt, remaining_s, draw, expected_s):
    pause_s = POLICY.pause_s(failure, attempt, remaining_s, draw)
    assert pause_s is None if expected_s is None else pause_s == pytest.approx(expected_s)


def test_policy_needs_an_attempt():
    with pytest.raises(InvalidInput, match="max_attempts: must be 1 or more, got 0"):
        RetryPolicy(max_attempts=0)


def test_attempts_share_one_deadline():
    now = 100.0
    attempts = Attempts(POLICY, 2.0, clock=lambda: now, draw=lambda: 0.0)
    assert attempts.start() == pytest.approx(2.0)
    now += 1.5
    assert attempts.pause_s(Failure("UNAVAILABLE", "")) == pytest.approx(0.2)
    now += 0.2
    assert attempts.start() == pytest.approx(0.3)
    assert attempts.made == 2
    assert attempts.pause_s(Failure("UNAVAILABLE", "")) is None  # 0.4 s would be past the deadline
    now += 5.0
    assert attempts.remaining_s() == 0.0


@pytest.mark.parametrize("timeout_s", [0.0, -1.0, float("nan")])
def test_attempts_need_time(timeout_s):
    with pytest.raises(InvalidInput, match="timeout_s: must be above 0"):
        Attempts(POLICY, timeout_s)


def test_polling_slows_down_and_gives_up():
    now = 0.0
    polling = Polling("host:1", 10.0, clock=lambda: now)
    pauses = []
    with pytest.raises(DeadlineExceeded, match="host:1 was not ready within 10 s"):  # noqa: PT012
        while True:
            pauses.append(polling.pause_s())
            now += pauses[-1]
    assert pauses[0] == pytest.approx(0.05)
    assert max(pauses) == pytest.approx(1.0)
    assert sum(pauses) == pytest.approx(10.0)


@pytest.mark.parametrize(
    ("failure", "kind", "text"),
    [
        (Failure("INVALID_ARGUMENT", ""), InvalidInput, ""),
        (Failure("INVALID_ARGUMENT", "top_k: must be 1"), InvalidInput, "top_k: must be 1"),
        (Failure("INVALID_ARGUMENT", "No field: here"), InvalidInput, "No field: here"),
        (Failure("INVALID_ARGUMENT", "image: is not set"), InvalidImage, "image: is not set"),
        (Failure("INVALID_ARGUMENT", "image.raw.data: short"), InvalidImage, "image.raw.data: short"),
        (Failure("NOT_FOUND", "no model"), ModelNotFound, "no model"),
        (Failure("UNAVAILABLE", "loading"), ModelUnavailable, "loading"),
        (Failure("RESOURCE_EXHAUSTED", "full", 250), QueueFull, "full"),
        (Failure("RESOURCE_EXHAUSTED", "too big"), ResourceExhausted, "too big"),
        (Failure("DEADLINE_EXCEEDED", "late"), DeadlineExceeded, "late"),
        (Failure("INTERNAL", "nan"), InferenceFailed, "nan"),
        (Failure("FAILED_PRECONDITION", "sha"), SetupError, "sha"),
        (Failure("UNIMPLEMENTED", "no such method"), VisionError, "UNIMPLEMENTED: no such method"),
    ],
)
def test_status_becomes_the_class_that_owns_it(failure, kind, text):
    error = to_error(failure, "host:1")
    assert type(error) is kind
    assert str(error) == text
    assert kind is VisionError or error.status == failure.status


def test_error_keeps_what_the_status_says():
    wrong = to_error(Failure("INVALID_ARGUMENT", "top_k: must be 1: or\nmore"), "host:1")
    assert isinstance(wrong, InvalidInput)
    assert (wrong.field, str(wrong)) == ("top_k", "top_k: must be 1: or\nmore")

    full = to_error(Failure("RESOURCE_EXHAUSTED", "full", 250, "abc"), "host:1", attempts=3)
    assert isinstance(full, QueueFull)
    assert full.retry_after_s == 0.25
    assert (vars(full)["request_id"], vars(full)["address"]) == ("abc", "host:1")
    assert full.__notes__ == ["RESOURCE_EXHAUSTED from host:1, request abc, attempt 3"]


def test_an_endless_timeout_is_a_long_one():
    for timeout_s in (float("inf"), 1e300):
        assert 1e6 < Attempts(RetryPolicy(), timeout_s).start() < 1e7
