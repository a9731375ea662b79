"""Coroutines that wait for futures of other threads, on a real event loop."""

import asyncio
import gc
import threading
import weakref
from concurrent.futures import Future
from functools import partial

import pytest

from vision_service.engine.together import together
from vision_service.server.arrivals import Arrivals


class CountingLoop(asyncio.SelectorEventLoop):
    """Counts how often other threads wake it."""

    woken = 0

    def call_soon_threadsafe(self, *args, **kwargs):
        self.woken += 1
        return super().call_soon_threadsafe(*args, **kwargs)


def run(main):
    """Run ``main(loop)`` on a loop of its own."""
    with asyncio.Runner(loop_factory=CountingLoop) as runner:
        return runner.run(main(runner.get_loop()))


async def waiting(arrivals, futures):
    """Tasks that wait for futures, all of them waiting already."""
    tasks = [asyncio.create_task(arrivals.wait_for(future)) for future in futures]
    await asyncio.sleep(0)
    return tasks


def finish(futures, results):
    """As a batch's answers are handed over."""
    with together():
        for future, result in zip(futures, results, strict=True):
            future.set_result(result)


def in_a_thread(action):
    thread = threading.Thread(target=action)
    thread.start()
    return thread


def test_what_is_done_together_wakes_the_loop_once_and_each_gets_its_own():
    async def main(loop):
        arrivals, futures = Arrivals(), [Future() for _ in range(20)]
        tasks = await waiting(arrivals, futures)
        thread = in_a_thread(lambda: finish(futures, range(20)))
        results = await asyncio.wait_for(asyncio.gather(*tasks), 10)
        thread.join()
        return results, loop.woken

    results, woken = run(main)
    assert results == list(range(20))
    assert woken == 1


def test_what_is_done_one_by_one_arrives_one_by_one():
    async def main(loop):
        arrivals, futures = Arrivals(), [Future() for _ in range(3)]
        tasks = await waiting(arrivals, futures)
        for number in (2, 0, 1):
            in_a_thread(lambda number=number: futures[number].set_result(number)).join()
            assert await asyncio.wait_for(tasks[number], 10) == number
        return loop.woken

    assert run(main) == 3


def test_a_future_that_is_done_already():
    async def main(_):
        future = Future()
        future.set_result(5)
        return await asyncio.wait_for(Arrivals().wait_for(future), 10)

    assert run(main) == 5


def test_an_error_is_raised_and_kept_by_nothing():
    class Trouble(Exception):
        pass

    async def main(_):
        future = Future()
        future.set_exception(trouble := Trouble())
        known = weakref.ref(trouble)
        del trouble
        with pytest.raises(Trouble):
            await Arrivals().wait_for(future)
        del future
        return known

    gc.disable()
    try:
        assert run(main)() is None
    finally:
        gc.enable()


def test_a_future_is_freed_with_its_answer():
    async def main(_):
        future = Future()
        known = weakref.ref(future)
        (task,) = await waiting(Arrivals(), [future])
        in_a_thread(partial(future.set_result, 1)).join()
        del future
        return await asyncio.wait_for(task, 10), known

    gc.disable()
    try:
        answer, known = run(main)
        assert (answer, known()) == (1, None)
    finally:
        gc.enable()


def test_a_shared_error_does_not_collect_the_frames_of_all_its_callers():
    def frames(error):
        traceback, count = error.__traceback__, 0
        while traceback is not None:
            traceback, count = traceback.tb_next, count + 1
        return count

    async def main(_):
        error, futures = KeyError("shared"), [Future() for _ in range(10)]
        tasks = await waiting(Arrivals(), futures)
        for future in futures:
            future.set_exception(error)
        answers = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)
        return answers == [error] * 10, frames(error)

    assert run(main) == (True, 1)


def test_a_cancelled_coroutine_cancels_its_future_and_no_other():
    async def main(_):
        arrivals, futures = Arrivals(), [Future() for _ in range(2)]
        tasks = await waiting(arrivals, futures)
        tasks[0].cancel()
        with pytest.raises(asyncio.CancelledError):
            await tasks[0]
        in_a_thread(lambda: futures[1].set_result(1)).join()
        return futures[0].cancelled(), await asyncio.wait_for(tasks[1], 10)

    assert run(main) == (True, 1)


def test_a_result_that_comes_after_its_coroutine_was_cancelled_is_nobodys():
    async def main(_):
        arrivals, futures = Arrivals(), [Future() for _ in range(2)]
        futures[0].set_running_or_notify_cancel()  # too late to be cancelled
        tasks = await waiting(arrivals, futures)
        tasks[0].cancel()
        with pytest.raises(asyncio.CancelledError):
            await tasks[0]
        in_a_thread(lambda: finish(futures, [9, 9])).join()
        return await asyncio.wait_for(tasks[1], 10)

    assert run(main) == 9


def test_a_future_that_someone_else_cancels_cancels_its_coroutine():
    async def main(_):
        future = Future()
        (task,) = await waiting(Arrivals(), [future])
        future.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, 10)

    run(main)


def test_a_result_after_the_loop_was_closed_is_nobodys(caplog):
    future = Future()

    async def main(_):
        task = asyncio.ensure_future(Arrivals().wait_for(future))
        await asyncio.sleep(0)
        task.cancel()

    future.set_running_or_notify_cancel()
    run(main)
    finish([future], [1])  # raises nothing
    assert caplog.records == []
