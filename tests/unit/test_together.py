"""What is done once at the end of a block."""

import threading

import pytest

from vision_service.engine.together import once_at_end, together


class Bell:
    def __init__(self):
        self.rung = 0

    def ring(self):
        self.rung += 1


def test_without_a_block_at_once_and_each_time():
    bell = Bell()
    once_at_end(bell.ring)
    once_at_end(bell.ring)
    assert bell.rung == 2


def test_once_at_the_end_of_the_block_in_the_order_of_asking():
    done = []
    first, second = (lambda: done.append("first")), (lambda: done.append("second"))
    with together():
        once_at_end(first)
        once_at_end(second)
        once_at_end(first)
        assert done == []
    assert done == ["first", "second"]
    once_at_end(first)  # the block is over
    assert done == ["first", "second", "first"]


def test_a_block_in_a_block_ends_with_the_outer_one():
    bell = Bell()
    with together():
        with together():
            once_at_end(bell.ring)
        assert bell.rung == 0
        once_at_end(bell.ring)
    assert bell.rung == 1


def test_a_block_that_raises_leaves_nothing_undone():
    bell = Bell()

    @together()
    def ring_and_fail():
        once_at_end(bell.ring)
        raise KeyError

    with pytest.raises(KeyError):
        ring_and_fail()
    assert bell.rung == 1


def test_an_action_that_raises_does_not_keep_the_others_from_being_done():
    bell = Bell()

    def fail():
        raise KeyError

    @together()
    def both():
        once_at_end(fail)
        once_at_end(bell.ring)

    with pytest.raises(KeyError):
        both()
    assert bell.rung == 1
    once_at_end(bell.ring)
    assert bell.rung == 2


def test_a_block_is_its_threads_own():
    bell = Bell()
    with together():
        other = threading.Thread(target=once_at_end, args=(bell.ring,))
        other.start()
        other.join()
        assert bell.rung == 1
