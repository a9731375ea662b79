"""The threads that prepare images."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import weakref
from queue import SimpleQueue

import pytest

from tests.helpers import until
from vision_service.engine.workers import Workers


def test_work_is_done_in_order_by_as_many_threads_and_what_was_submitted_before_the_end(request):
    begun, done, blocked = SimpleQueue(), [], threading.Event()
    request.addfinalizer(blocked.set)
    workers = Workers(2, "decode", lambda: begun.put(threading.current_thread().name))
    assert {begun.get(timeout=5), begun.get(timeout=5)} == {"decode_0", "decode_1"}
    workers.submit(blocked.wait)
    for number in range(20):
        workers.submit(done.append, number)
    until(lambda: len(done) == 20)
    assert done == list(range(20))
    workers.submit(blocked.wait)
    workers.submit(done.append, "last")
    threading.Timer(0.05, blocked.set).start()
    workers.close()
    assert done[-1] == "last"
    with pytest.raises(RuntimeError, match="closed"):
        workers.submit(done.append, "too late")
    workers.close()


def test_a_worker_goes_on_after_a_failure_which_the_log_has(caplog):
    workers = Workers(1, "decode")
    with caplog.at_level(logging.ERROR):
        workers.submit(int, "seven")
        workers.close()
    assert "invalid literal" in caplog.text
    workers = Workers(1, "decode")
    found = []
    workers.submit(int, "seven")
    workers.submit(found.append, 1)
    workers.close()
    assert found == [1]


def test_a_thread_whose_beginning_fails_works_all_the_same(caplog):
    found = []
    with caplog.at_level(logging.ERROR):
        workers = Workers(1, "decode", lambda: int("seven"))
        workers.submit(found.append, 1)
        workers.close()
    assert found == [1]
    assert "invalid literal" in caplog.text
    with pytest.raises(ValueError, match="0 workers would do nothing"):
        Workers(0, "decode")


ENDS = """
import os, time
from vision_service.engine.workers import Workers
workers = Workers(2, "decode")
for number in range(6):
    workers.submit(lambda number=number: (time.sleep(0.02), os.write(1, b"%d " % number)))
"""


def test_a_process_that_ends_does_first_what_was_submitted():
    done = subprocess.run([sys.executable, "-c", ENDS], capture_output=True, text=True, timeout=60, check=True)
    assert sorted(done.stdout.split()) == list("012345")


def test_a_worker_that_waits_keeps_nothing():
    class Image:
        pass

    workers, done = Workers(1, "decode"), threading.Event()
    image = Image()
    there = weakref.ref(image)
    workers.submit(lambda _: done.set(), image)
    del image
    assert done.wait(5)
    until(lambda: there() is None)
    workers.close()


def test_threads_end_with_whoever_had_them():
    workers = Workers(2, "forgotten")
    del workers
    until(lambda: not any(thread.name.startswith("forgotten") for thread in threading.enumerate()))
