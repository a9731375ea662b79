"""The access log on a real event loop and a real logger."""

import asyncio
import logging
import time

import pytest

from vision_service.server import access
from vision_service.server.access import AccessLog


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.INFO, "vision_service.access")
    return lambda: [record for record in caplog.records if record.name == "vision_service.access"]


def test_lines_wait_for_each_other_and_have_the_time_at_which_their_call_ended(lines, monkeypatch):
    monkeypatch.setattr(access, "WAIT_S", 0.15)

    async def main():
        log = AccessLog()
        log.note("/Classify", "OK", "one", "peer", time.perf_counter() - 2.0)
        await asyncio.sleep(0.05)
        log.note("/Detect", "NOT_FOUND", "two", "peer", time.perf_counter())
        at_once = len(lines())
        while len(lines()) < 2:
            await asyncio.sleep(0.01)
        return at_once, time.time()

    at_once, now_s = asyncio.run(main())
    first, second = lines()
    assert at_once == 0
    assert first.getMessage() == "/Classify OK"
    assert (first.method, first.status, first.request_id, first.peer) == ("/Classify", "OK", "one", "peer")
    assert 2000 <= first.duration_ms < 3000
    assert second.status == "NOT_FOUND"
    assert second.created - first.created >= 0.04
    assert second.created < now_s
    assert first.msecs == pytest.approx(1000 * (first.created % 1))


def test_many_lines_do_not_wait_and_none_is_lost(lines, monkeypatch):
    monkeypatch.setattr(access, "WAIT_S", 60.0)
    monkeypatch.setattr(access, "MOST_WAITING", 3)

    async def main():
        log, counts = AccessLog(), []
        for number in range(7):
            log.note("/Classify", "OK", str(number), "peer", time.perf_counter())
            counts.append(len(lines()))
        log.write_rest()
        return counts

    assert asyncio.run(main()) == [0, 0, 3, 3, 3, 6, 6]
    assert [line.request_id for line in lines()] == [str(number) for number in range(7)]


def test_what_is_not_logged_is_not_kept(lines):
    logging.getLogger("vision_service.access").setLevel(logging.WARNING)

    async def main():
        log = AccessLog()
        log.note("/Classify", "OK", "one", "peer", time.perf_counter())
        logging.getLogger("vision_service.access").setLevel(logging.INFO)
        log.write_rest()

    asyncio.run(main())
    assert lines() == []
