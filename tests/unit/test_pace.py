"""How many calls are let in, by how long those before them took. The clock is the test's own."""

import pytest

from vision_service.engine import pace
from vision_service.engine.pace import Pace
from vision_service.errors import QueueFull


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(pace.time, "monotonic", lambda: now[0])
    return now


def let_in(made, most=1000):
    """How many calls are let in at once."""
    for under_way in range(most):
        try:
            made.check(under_way, "model m")
        except QueueFull:
            return under_way
    return most


def serve(made, clock, call_s, *, under_way, calls):
    """A queue of so many calls at any time, of which one is answered every so many seconds."""
    waiting = [made.enter(under_way) for _ in range(under_way)]
    for _ in range(calls):
        clock[0] += call_s
        made.answered(waiting.pop(0))
        waiting.append(made.enter(under_way))


@pytest.mark.parametrize(("call_s", "within"), [(0.01, 75), (0.05, 15), (0.001, 750)])
def test_lets_in_what_is_answered_in_three_quarters_of_the_bound(clock, call_s, within):
    made = Pace(1.0, 1, call_s=0.02)
    serve(made, clock, call_s, under_way=10, calls=400)
    assert let_in(made) == pytest.approx(within, abs=1)


def test_before_anything_was_answered_goes_by_what_it_is_told(clock):
    assert let_in(Pace(1.0, 1, call_s=0.05)) == 15


def test_follows_when_calls_become_slower_and_the_wait_stays_within_the_bound(clock):
    """Little's law is the oracle: calls under way, times what each takes, is what the last one waits."""
    made = Pace(1.0, 1, call_s=0.01)
    for call_s in (0.01, 0.03, 0.005):
        serve(made, clock, call_s, under_way=let_in(made), calls=300)
        assert 0.6 < let_in(made) * call_s <= 0.76


def test_so_many_are_let_in_however_long_they_take(clock):
    assert let_in(Pace(1.0, 32, call_s=5.0)) == 32
    assert let_in(Pace(1.0, 0, call_s=5.0)) == 1


def test_no_bound(clock):
    made = Pace(None, 1, call_s=1.0)
    serve(made, clock, 10.0, under_way=3, calls=10)
    assert let_in(made) == 1000


def test_says_what_is_wrong_and_when_to_come_back(clock):
    with pytest.raises(QueueFull) as caught:
        Pace(2.0, 1, call_s=0.05).check(40, "model resnet50:1")
    assert str(caught.value) == (
        "40 calls to model resnet50:1 are under way and one more would be expected to take 2.05 s, which is too near "
        "to max_wait_ms, 2000; call again in 1.00 s"
    )
    assert caught.value.retry_after_s == 1.0  # half of them are answered then
    assert caught.value.backlog_s == 2.0
