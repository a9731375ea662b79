"""The kernel's slices of threads, read back from the kernel: there is nothing else that could know them."""

import os
import threading

import pytest

from vision_service.engine.slices import SHORT_US, short_slices, slice_us, usual_slices
from vision_service.engine.threads import be_nicer


def in_a_thread(run):
    """What something returns in a thread that ends with it, so that no other test has its slices."""
    found = []
    thread = threading.Thread(target=lambda: found.append(run()))
    thread.start()
    thread.join(10)
    assert found, "the thread failed"
    return found[0]


def slices_can_be_set() -> bool:
    return in_a_thread(lambda: short_slices() and slice_us() == SHORT_US)


needs_slices = pytest.mark.skipif(not slices_can_be_set(), reason="this system gives no slices (Linux does since 6.12)")


@needs_slices
def test_a_thread_has_short_slices_and_gets_its_usual_ones_back():
    def run():
        usual = slice_us()
        short_slices()
        short = slice_us()
        usual_slices()
        return usual, short, slice_us()

    usual, short, after = in_a_thread(run)
    assert short == SHORT_US < usual == after


@needs_slices
def test_threads_that_a_thread_starts_have_its_slices_unless_they_are_nicer():
    def run():
        usual = slice_us()
        short_slices()
        nicer = in_a_thread(lambda: be_nicer(2) or slice_us())
        not_nicer = in_a_thread(lambda: be_nicer(0) or slice_us())
        return usual, nicer, not_nicer

    usual, nicer, not_nicer = in_a_thread(run)
    assert nicer == usual
    assert not_nicer == SHORT_US


@needs_slices
def test_a_thread_that_somebody_has_scheduled_otherwise_is_left_alone():
    def run():
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        return short_slices(), os.sched_getscheduler(0)

    assert in_a_thread(run) == (False, os.SCHED_IDLE)
