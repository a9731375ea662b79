import threading
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import CancelledError, wait

import pytest

from vision_service.engine.batcher import Batcher
from vision_service.engine.queue import BatchLimits, Job, JobQueue
from vision_service.engine.threads import ForwardGate, GateShare
from vision_service.engine.together import once_at_end
from vision_service.errors import DeadlineExceeded, DeviceOutOfMemory, InferenceFailed, ModelUnavailable, QueueFull


class Executor:
    """Doubles numbers, remembers its batches, and waits at a gate when told to."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()

    def __call__(self, payloads: Sequence[int]) -> list[int]:
        self.batches.append(list(payloads))
        self.entered.set()
        assert self.gate.wait(10)
        return [2 * x for x in payloads]

    @property
    def seen(self) -> list[int]:
        return [x for batch in self.batches for x in batch]


@pytest.fixture
def executor():
    return Executor()


@pytest.fixture
def make(executor):
    made = []

    def make(execute=None, **limits):
        expected = limits.pop("expected", ())
        batcher = Batcher(execute or executor, BatchLimits(**limits), name="model m:1", expected=expected)
        made.append(batcher)
        return batcher

    yield make
    executor.gate.set()
    for batcher in made:
        batcher.close(5)


def occupy(batcher, executor):
    """Hold the executor in a first batch, so that a queue can form."""
    executor.gate.clear()
    executor.entered.clear()
    first = batcher.submit(0)
    assert executor.entered.wait(5)
    return first


def test_idle_executor_runs_a_single_job_at_once(make, executor):
    ride = make(max_batch_size=8).submit(21).result(5)
    assert (ride.value, ride.batch_size) == (42, 1)
    assert ride.queue_s < 1


def test_busy_executor_lets_a_batch_form_up_to_its_limit(make, executor):
    batcher = make(max_batch_size=4)
    first = occupy(batcher, executor)
    futures = [batcher.submit(i) for i in range(1, 7)]
    executor.gate.set()
    assert [f.result(5).value for f in [first, *futures]] == [0, 2, 4, 6, 8, 10, 12]
    assert executor.batches == [[0], [1, 2, 3, 4], [5, 6]]
    assert [f.result().batch_size for f in futures] == [4, 4, 4, 4, 2, 2]


def test_jobs_of_different_keys_never_share_a_batch_and_the_oldest_goes_first(make, executor):
    batcher = make(max_batch_size=8)
    occupy(batcher, executor)
    futures = [batcher.submit(i, key=key) for i, key in enumerate("abab", start=1)]
    executor.gate.set()
    wait(futures, 5)
    assert executor.batches == [[0], [1, 3], [2, 4]]


def test_a_full_batch_does_not_wait(make, executor):
    batcher = make(max_batch_size=3, max_delay_s=60)
    wait([batcher.submit(i) for i in range(3)], 5)
    assert executor.batches == [[0, 1, 2]]


def test_delay_counts_from_the_oldest_job(make, executor):
    batcher = make(max_batch_size=3, max_delay_s=1.0)
    oldest = batcher.submit(3)
    time.sleep(0.5)
    newest = batcher.submit(4)
    assert oldest.result(5).queue_s >= 0.99
    assert newest.result(5).queue_s < 0.9  # a second job does not prolong it
    assert executor.batches == [[3, 4]]


def test_queue_is_bounded_by_jobs_and_says_when_to_come_back(make, executor):
    batcher = make(max_batch_size=1, max_queued_jobs=2)
    occupy(batcher, executor)
    batcher.submit(1)
    batcher.submit(2)
    with pytest.raises(QueueFull, match="2 calls are waiting and the limit is 2") as caught:
        batcher.submit(3)
    assert caught.value.retry_after_s > 0
    with pytest.raises(QueueFull):
        batcher.check_room()
    executor.gate.set()


def test_a_full_queue_says_how_long_it_will_take_as_far_as_that_is_known(make, executor):
    batcher = make(max_batch_size=1, max_queued_jobs=4)
    occupy(batcher, executor)
    waiting = [batcher.submit(number) for number in range(4)]
    with pytest.raises(QueueFull) as caught:
        batcher.submit(5)
    assert caught.value.backlog_s == 0, "no batch has ended yet"
    executor.gate.set()
    wait(waiting, 5)
    occupy(batcher, executor)
    for number in range(4):
        batcher.submit(number)
    with pytest.raises(QueueFull) as caught:
        batcher.submit(5)
    assert caught.value.backlog_s > 0
    executor.gate.set()


def test_queue_is_bounded_by_bytes_but_always_takes_one(make, executor):
    batcher = make(max_batch_size=1, max_queued_bytes=100)
    occupy(batcher, executor)
    large = batcher.submit(1, nbytes=1000)
    with pytest.raises(QueueFull, match="1000 bytes are waiting and the limit is 100"):
        batcher.submit(2, nbytes=1)
    executor.gate.set()
    assert large.result(5).value == 2
    assert batcher.submit(2, nbytes=1).result(5).value == 4  # the bytes were given back


def test_expired_job_leaves_by_timer_while_the_executor_is_busy(make, executor):
    batcher = make()
    first = occupy(batcher, executor)
    doomed = batcher.submit(13, deadline_s=time.monotonic() + 0.05)
    sooner = batcher.submit(14, deadline_s=time.monotonic() + 0.01)
    patient = batcher.submit(15, deadline_s=time.monotonic() + 60)
    with pytest.raises(DeadlineExceeded):
        sooner.result(2)
    with pytest.raises(DeadlineExceeded):
        doomed.result(2)
    assert not first.done()
    assert batcher.queued_jobs == 1
    executor.gate.set()
    assert patient.result(5).value == 30
    assert executor.seen == [0, 15]


def test_deadline_in_the_past_is_refused_at_once(make, executor):
    with pytest.raises(DeadlineExceeded):
        make().submit(1, deadline_s=time.monotonic() - 1)
    assert executor.seen == []


def test_cancelled_job_gives_its_place_back_and_never_runs(make, executor):
    batcher = make(max_batch_size=1, max_queued_jobs=1)
    occupy(batcher, executor)
    cancelled = batcher.submit(1)
    assert cancelled.cancel()
    kept = batcher.submit(2)  # there is room again
    executor.gate.set()
    assert kept.result(5).value == 4
    with pytest.raises(CancelledError):
        cancelled.result(0)
    assert executor.seen == [0, 2]


def test_a_number_is_never_given_twice():
    """`id` is: it is an address, and what was freed there makes room for the next job."""
    jobs = JobQueue(BatchLimits(max_queued_jobs=10**6))
    gone = Job("gone", None, 0, None)
    number, address = gone.number, id(gone)
    jobs.add(gone)
    jobs.remove([gone])
    del gone
    kept = []
    while not kept or id(kept[-1]) != address:
        assert len(kept) < 10**5, "no job came to lie there"
        kept.append(Job("new", None, 0, None))
        jobs.add(kept[-1])
    jobs.discard(None, number)
    assert len(jobs) == len(kept)


def test_halving_finds_the_job_at_fault_and_answers_its_mates(make, executor):
    calls = []

    def execute(payloads):
        calls.append(list(payloads))
        if payloads == [0]:
            return executor(payloads)
        if 13 in payloads:
            raise ValueError("unlucky")
        return [2 * x for x in payloads]

    batcher = make(execute, max_batch_size=8)
    occupy(batcher, executor)
    futures = {i: batcher.submit(i) for i in (10, 11, 12, 13, 14, 15)}
    executor.gate.set()
    for i, future in futures.items():
        if i == 13:
            with pytest.raises(InferenceFailed, match="model m:1 failed on this image") as caught:
                future.result(5)
            assert "unlucky" not in str(caught.value)  # callers do not get the inside of the house
            assert isinstance(caught.value.__cause__, ValueError)
        else:
            assert future.result(5).value == 2 * i
    assert calls[1:] == [[10, 11, 12, 13, 14, 15], [10, 11, 12], [13, 14, 15], [13], [14, 15]]


def test_out_of_memory_halves_until_it_fits_and_fails_only_what_cannot(make, executor):
    def execute(payloads):
        if payloads == [0]:
            return executor(payloads)
        if sum(payloads) > 10:
            raise DeviceOutOfMemory("does not fit")
        return [2 * x for x in payloads]

    batcher = make(execute, max_batch_size=8, expected=(DeviceOutOfMemory,))
    occupy(batcher, executor)
    futures = {i: batcher.submit(i) for i in (4, 5, 6, 99)}
    executor.gate.set()
    assert [futures[i].result(5).value for i in (4, 5, 6)] == [8, 10, 12]
    assert futures[4].result().batch_size == 2
    with pytest.raises(DeviceOutOfMemory):
        futures[99].result(5)


def test_the_thread_outlives_whatever_the_executor_raises(make):
    def execute(payloads):
        if payloads[0] == 1:
            raise SystemExit("a library called exit")
        return list(payloads)

    batcher = make(execute)
    with pytest.raises(InferenceFailed, match="SystemExit"):
        batcher.submit(1).result(5)
    assert batcher.submit(2).result(5).value == 2


def test_wrong_number_of_answers_is_a_failure(make):
    with pytest.raises(InferenceFailed, match="returned 2 answers for 1 images"):
        make(lambda payloads: [1, 2]).submit(1).result(5)


def test_deadline_is_checked_again_before_a_half_runs(make, executor):
    seen = []

    def execute(payloads):
        if payloads == [0]:
            return executor(payloads)
        seen.append(list(payloads))
        if len(payloads) > 1:
            time.sleep(0.15)
            raise ValueError("again, smaller")
        return [2 * x for x in payloads]

    batcher = make(execute)
    occupy(batcher, executor)
    patient = batcher.submit(1)
    doomed = batcher.submit(2, deadline_s=time.monotonic() + 0.1)
    executor.gate.set()
    assert patient.result(5).value == 2
    with pytest.raises(DeadlineExceeded):
        doomed.result(5)
    assert seen == [[1, 2], [1]]


class Payload:
    """Something whose life can be watched."""


def test_nothing_keeps_a_payload_once_it_is_answered(make):
    batcher = make(lambda payloads: [0] * len(payloads))
    payload = Payload()
    watch = weakref.ref(payload)
    future = batcher.submit(payload)
    del payload
    future.result(5)
    for _ in range(200):  # the thread that ran it is on its way back to waiting
        if watch() is None:
            break
        time.sleep(0.01)
    assert watch() is None


def test_an_error_does_not_keep_the_payload_either(make, caplog):
    caplog.set_level("CRITICAL", "vision_service.engine.runner")  # pytest would keep the record, and all behind it

    def execute(payloads):
        raise ValueError("no")

    payload = Payload()
    watch = weakref.ref(payload)
    future = make(execute).submit(payload)
    del payload
    error = future.exception(5)
    for _ in range(200):
        if watch() is None:
            break
        time.sleep(0.01)
    assert isinstance(error, InferenceFailed)
    assert watch() is None


def test_a_callback_that_raises_anything_does_not_stop_the_thread(make, executor):
    batcher = make(max_batch_size=8)
    occupy(batcher, executor)
    rude, polite = batcher.submit(1), batcher.submit(2)

    def leave(_):
        raise SystemExit("a callback left")

    rude.add_done_callback(leave)
    executor.gate.set()
    with pytest.raises(InferenceFailed, match="interrupted"):
        polite.result(5)
    assert batcher.submit(3).result(5).value == 6


def test_the_answers_of_a_batch_are_handed_over_together(make, executor):
    batcher = make(max_batch_size=4)
    first = occupy(batcher, executor)
    answered = []

    def once():
        answered.append([job.done() for job in jobs])

    jobs = [batcher.submit(n) for n in range(1, 5)]
    for job in jobs:
        job.add_done_callback(lambda _: once_at_end(once))
    executor.gate.set()
    wait([first, *jobs], 10)
    eventually(lambda: answered)
    assert answered == [[True] * 4]


def test_close_from_a_callback_does_not_wait_for_itself(make, executor):
    batcher = make(max_batch_size=1)
    first = occupy(batcher, executor)
    closed = threading.Event()
    first.add_done_callback(lambda _: (batcher.close(), closed.set()))
    second = batcher.submit(1)
    executor.gate.set()
    assert closed.wait(5)
    assert second.result(5).value == 2


def test_close_runs_what_is_queued_and_refuses_the_rest(make, executor):
    batcher = make(max_batch_size=2, max_delay_s=60)
    futures = [batcher.submit(i) for i in range(3)]
    assert batcher.close(5)
    assert [f.result(0).value for f in futures] == [0, 2, 4]
    with pytest.raises(ModelUnavailable):
        batcher.submit(9)


def test_close_in_a_hurry_fails_what_still_waits(make, executor):
    batcher = make(max_batch_size=1)
    first = occupy(batcher, executor)
    late = batcher.submit(1)
    assert not batcher.close(0.05)
    with pytest.raises(ModelUnavailable):
        late.result(1)
    executor.gate.set()
    assert first.result(5).value == 0


def test_threads_end_with_the_batcher(make):
    before = threading.active_count()
    batchers = [make() for _ in range(5)]
    assert threading.active_count() == before + 10
    for batcher in batchers:
        batcher.submit(1).result(5)
        batcher.close(5)
    assert threading.active_count() == before


def test_many_threads_get_their_own_answers(make):
    batcher = make(lambda payloads: [3 * x for x in payloads], max_batch_size=16, max_queued_jobs=10_000)
    answers = {}

    def client(base):
        for i in range(base, base + 300):
            answers[i] = batcher.submit(i, key=i % 3).result(10).value

    threads = [threading.Thread(target=client, args=(1000 * n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(answers) == 2400
    assert all(answer == 3 * i for i, answer in answers.items())


class TwoStages:
    """Doubles numbers in the first stage and makes words of them in the second, which can be held up at a gate."""

    def __init__(self) -> None:
        self.executed: list[list[int]] = []
        self.finished: list[list[int]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.finishing = threading.Event()

    def execute(self, payloads):
        self.executed.append(list(payloads))
        return [2 * x for x in payloads]

    def finish(self, payloads, outcome, start):
        self.finished.append(list(payloads))
        self.finishing.set()
        assert self.gate.wait(10)
        if 13 in payloads:
            raise ValueError("unlucky")
        return [f"{x} {y}" for x, y in zip(payloads, outcome[start : start + len(payloads)], strict=True)]


@pytest.fixture
def stages():
    return TwoStages()


@pytest.fixture
def staged(stages):
    batcher = Batcher(stages.execute, BatchLimits(max_batch_size=4), name="model m:1", finish=stages.finish)
    yield batcher
    stages.gate.set()
    batcher.close(5)


def eventually(condition):
    deadline = time.monotonic() + 5
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.002)
    assert condition()


def test_the_next_batch_executes_while_the_last_one_is_finished(staged, stages):
    stages.gate.clear()
    first = staged.submit(1)
    assert stages.finishing.wait(5)  # in the executor's own thread, since nothing else waited
    waiting = [staged.submit(x) for x in (2, 3, 4, 5, 6, 7, 8, 9, 10)]
    assert stages.executed == [[1]]
    stages.gate.set()
    assert [future.result(5).value for future in (first, *waiting)] == [f"{x} {2 * x}" for x in range(1, 11)]

    stages.gate.clear()
    stages.executed.clear()
    stages.finishing.clear()
    more = [staged.submit(x) for x in range(20, 26)]
    assert stages.finishing.wait(5)
    more += [staged.submit(x) for x in range(26, 40)]
    stages.gate.set()
    assert [future.result(5).value for future in more] == [f"{x} {2 * x}" for x in range(20, 40)]


def test_two_batches_are_under_way_and_not_three(stages):
    entered = threading.Semaphore(0)
    held = threading.Event()

    def execute(payloads):
        entered.release()
        return stages.execute(payloads)

    batcher = Batcher(execute, BatchLimits(max_batch_size=1, max_delay_s=0.2), finish=stages.finish)
    stages.gate.clear()
    try:
        with batcher._lock:  # so that all are queued before the first is taken
            held.set()
        futures = [batcher.submit(x) for x in range(5)]
        eventually(lambda: len(stages.executed) >= 2 or len(stages.finished) >= 1)
        time.sleep(0.1)
        assert len(stages.finished) == 1
        assert len(stages.executed) <= 2  # the second waits with its outcome in hand
        stages.gate.set()
        assert [future.result(5).value for future in futures] == [f"{x} {2 * x}" for x in range(5)]
    finally:
        stages.gate.set()
        batcher.close(5)


def test_halving_the_second_stage_does_not_execute_again(staged, stages):
    stages.gate.clear()
    first = staged.submit(1)
    assert stages.finishing.wait(5)
    futures = {x: staged.submit(x) for x in (12, 13, 14, 15)}
    stages.gate.set()
    assert first.result(5).value == "1 2"
    for x, future in futures.items():
        if x == 13:
            with pytest.raises(InferenceFailed, match="failed on this image"):
                future.result(5)
        else:
            assert future.result(5).value == f"{x} {2 * x}"
            assert future.result().batch_size == 4
    assert stages.executed == [[1], [12, 13, 14, 15]]
    assert stages.finished[1:] == [[12, 13, 14, 15], [12, 13], [12], [13], [14, 15]]


def test_close_waits_for_the_second_stage(staged, stages):
    stages.gate.clear()
    first = staged.submit(1)
    assert stages.finishing.wait(5)
    closer = threading.Thread(target=staged.close)
    closer.start()
    assert not first.done()
    stages.gate.set()
    closer.join(5)
    assert not closer.is_alive()
    assert first.result(0).value == "1 2"


def test_what_is_coming_takes_a_place_in_the_queue(make, executor):
    batcher = make(max_batch_size=1, max_queued_jobs=2)
    occupy(batcher, executor)
    batcher.check_room(coming=1)
    with pytest.raises(QueueFull, match="2 calls are waiting and the limit is 2"):
        batcher.check_room(coming=2)
    executor.gate.set()


def test_limits_may_change_while_jobs_wait(make, executor):
    batcher = make(max_batch_size=1, max_delay_s=60)
    occupy(batcher, executor)
    futures = [batcher.submit(x) for x in (1, 2, 3)]
    batcher.set_limits(BatchLimits(max_batch_size=3, max_queued_jobs=3))
    assert batcher.limits.max_batch_size == 3
    with pytest.raises(QueueFull, match="the limit is 3"):
        batcher.submit(4)
    executor.gate.set()
    wait(futures, 5)
    assert executor.batches == [[0], [1, 2, 3]]


def test_executors_behind_one_gate_take_turns_and_batches_grow_meanwhile():
    gate, running, most = ForwardGate(1), [], []
    share = GateShare(gate, beside=1, alone=1)

    def execute(payloads):
        running.append(1)
        most.append(len(running))
        time.sleep(0.01)
        running.pop()
        return payloads

    batchers = [Batcher(execute, BatchLimits(max_batch_size=64), gate=share) for _ in range(3)]
    try:
        share.acquire()
        futures = [batcher.submit(x) for batcher in batchers for x in range(8)]
        time.sleep(0.05)
        assert not most
        share.release(wide=False)
        assert {future.result(5).batch_size for future in futures} == {8}
        assert most == [1, 1, 1]
    finally:
        for batcher in batchers:
            batcher.close(5)
    assert gate.try_acquire(1)  # it was given back


def test_a_gate_is_given_back_when_all_that_waited_has_gone(executor):
    share = GateShare(ForwardGate(1), beside=1, alone=1)
    batcher = Batcher(executor, BatchLimits(), gate=share)
    try:
        share.acquire()
        batcher.submit(1).cancel()
        time.sleep(0.02)
        share.release(wide=False)
        assert batcher.submit(2).result(5).value == 4
        assert executor.seen == [2]
    finally:
        batcher.close(5)


class Beside:
    """A batcher with two executors that may run at one time, and what it is told to be coming.

    Args:
        gate: of the batcher.
        limits: of the batcher.
    """

    def __init__(self, gate=None, **limits):
        self.alone, self.both = Executor(), (Executor(), Executor())
        self.coming = 0
        self.batcher = Batcher(
            self.alone, BatchLimits(**limits), gate=gate, beside=self.both, coming=lambda: self.coming
        )

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.let_go()
        self.batcher.close(5)

    def hold(self):
        for executor in (self.alone, *self.both):
            executor.gate.clear()

    def let_go(self):
        for executor in (self.alone, *self.both):
            executor.gate.set()

    def two_behind_one(self):
        """A job that runs until `let_go`, two that wait while others are coming."""
        self.hold()
        self.coming = 6
        futures = [self.batcher.submit(0)]
        self.begun(1)
        return futures + [self.batcher.submit(x) for x in (1, 2)]

    def batches(self):
        """Those that ran alone, and those that ran beside others."""
        return [self.alone.batches, sorted(self.both[0].batches + self.both[1].batches)]

    def begun(self, count):
        """`batches`, once so many have begun."""
        until_s = time.monotonic() + 5
        while sum(map(len, self.batches())) < count and time.monotonic() < until_s:
            time.sleep(0.002)
        return self.batches()


def test_a_job_without_company_runs_alone():
    with Beside(max_batch_size=4) as made:
        assert [made.batcher.submit(x).result(5).value for x in (1, 2, 3)] == [2, 4, 6]
        assert made.batches() == [[[1], [2], [3]], []]


def test_under_load_batches_run_at_one_time_and_every_caller_gets_its_own_answer():
    with Beside(max_batch_size=2) as made:
        made.hold()
        made.coming = 4  # two full batches are on their way, so the first one leaves room
        futures = [made.batcher.submit(0)]
        assert made.begun(1) == [[], [[0]]]
        futures += [made.batcher.submit(x) for x in (1, 2, 3, 4)]
        assert made.begun(2) == [[], [[0], [1, 2]]]
        time.sleep(0.05)
        assert made.batches() == [[], [[0], [1, 2]]]  # two at one time; the others wait
        made.coming = 0
        made.let_go()
        assert [future.result(5).value for future in futures] == [0, 2, 4, 6, 8]
        assert sum(executor.seen.count(4) for executor in (made.alone, *made.both)) == 1


def test_a_second_batch_waits_to_be_full_while_jobs_are_coming_and_no_longer():
    with Beside(max_batch_size=3) as made:
        futures = made.two_behind_one()
        time.sleep(0.05)
        assert made.batches() == [[], [[0]]]
        futures.append(made.batcher.submit(3))
        assert made.begun(2) == [[], [[0], [1, 2, 3]]]
        made.let_go()
        assert [future.result(5).value for future in futures] == [0, 2, 4, 6]
        # What nobody else is coming to join runs at once.
        made.hold()
        futures = [made.batcher.submit(4)]
        made.begun(3)
        made.coming = 0
        futures.append(made.batcher.submit(5))
        assert made.begun(4) == [[], [[0], [1, 2, 3], [4], [5]]]
        made.let_go()
        assert [future.result(5).value for future in futures] == [8, 10]


def test_a_second_batch_does_not_wait_for_jobs_that_will_not_come_after_all():
    with Beside(max_batch_size=3) as made:
        futures = made.two_behind_one()
        made.coming = 0
        made.batcher.reconsider()
        assert made.begun(2) == [[], [[0], [1]]]  # of three a third each
        made.let_go()
        assert [future.result(5).value for future in futures] == [0, 2, 4]


def test_batches_that_run_at_one_time_leave_as_much_for_the_next_one():
    """With 9 under way no batch of two executors has more than 3, though 8 are allowed."""
    with Beside(max_batch_size=8) as made:
        made.hold()
        made.coming = 8
        futures = [made.batcher.submit(0)]
        assert made.begun(1) == [[], [[0]]]
        for x in range(1, 9):
            made.coming -= 1
            futures.append(made.batcher.submit(x))
        assert made.begun(2) == [[], [[0], [1, 2, 3]]]
        made.let_go()
        assert [future.result(5).value for future in futures] == [2 * x for x in range(9)]
        sizes = [len(batch) for batches in made.batches() for batch in batches]
        assert max(sizes) <= 3, sizes


def test_with_many_under_way_batches_are_as_large_as_they_may_be():
    with Beside(max_batch_size=4) as made:
        made.hold()
        made.coming = 30
        futures = [made.batcher.submit(x) for x in range(12)]
        assert max(map(len, made.begun(2)[1])) == 4
        made.coming = 0
        made.let_go()
        assert [future.result(5).value for future in futures] == [2 * x for x in range(12)]


def test_a_batch_that_is_held_back_to_be_full_is_not_cut_to_its_share():
    with Beside(max_batch_size=3, max_delay_s=30) as made:
        futures = [made.batcher.submit(x) for x in range(3)]
        assert [future.result(5).value for future in futures] == [0, 2, 4]
        assert made.batches() == [[[0, 1, 2]], []]


def test_a_second_batch_that_waits_goes_on_when_the_first_one_ends():
    with Beside(max_batch_size=3) as made:
        made.hold()
        made.coming = 6
        futures = [made.batcher.submit(0)]
        made.begun(1)
        futures.append(made.batcher.submit(1))
        made.let_go()
        assert [future.result(5).value for future in futures] == [0, 2]  # though others are coming still


def test_a_batch_runs_beside_where_another_model_has_cores():
    gate = ForwardGate(2)
    with Beside(GateShare(gate, beside=1, alone=2), max_batch_size=4) as made:
        assert gate.try_acquire(1)  # another model's
        assert made.batcher.submit(1).result(5).value == 2
        assert made.batches() == [[], [[1]]]
        gate.release(1)
        assert made.batcher.submit(2).result(5).value == 4
        assert made.batches() == [[[2]], [[1]]]
    assert gate.try_acquire(2)  # all were given back


def test_nothing_runs_beside_a_batch_that_has_all_cores():
    with Beside(GateShare(ForwardGate(2), beside=1, alone=2), max_batch_size=4) as made:
        made.hold()
        futures = [made.batcher.submit(1)]
        assert made.begun(1) == [[[1]], []]
        futures.append(made.batcher.submit(2))
        time.sleep(0.05)
        assert made.batches() == [[[1]], []]
        made.let_go()
        assert [future.result(5).value for future in futures] == [2, 4]


def test_executors_that_run_at_one_time_blame_the_job_at_fault():
    def doubled(payloads):
        if 13 in payloads:
            raise ValueError("unlucky")
        time.sleep(0.002)
        return [2 * x for x in payloads]

    batcher = Batcher(doubled, BatchLimits(max_batch_size=4), beside=[doubled, doubled], coming=lambda: 8)
    try:
        futures = [batcher.submit(x) for x in range(40)]
        assert [x for x, future in enumerate(futures) if future.exception(5)] == [13]
        assert isinstance(futures[13].exception(0), InferenceFailed)
        assert all(future.result(0).value == 2 * x for x, future in enumerate(futures) if x != 13)
    finally:
        assert batcher.close(5)


def test_closing_runs_what_waits_for_several_executors_and_ends_their_threads():
    with Beside(max_batch_size=2) as made:
        made.hold()
        made.coming = 4
        futures = [made.batcher.submit(x) for x in range(9)]
        made.begun(2)
        threading.Timer(0.05, made.let_go).start()
        assert made.batcher.close(5)  # though jobs are said to be coming
        assert [future.result(0).value for future in futures] == [2 * x for x in range(9)]
        assert not any(thread.is_alive() for thread in made.batcher._threads)


def test_answers_of_batches_that_ran_at_one_time_are_made_one_batch_after_the_other():
    making, most = [], []

    def finish(payloads, outcome, start):
        making.append(1)
        most.append(len(making))
        time.sleep(0.003)
        making.pop()
        return outcome[start : start + len(payloads)]

    def doubled(payloads):
        return [2 * x for x in payloads]

    limits = BatchLimits(max_batch_size=4)
    batcher = Batcher(doubled, limits, finish=finish, beside=[doubled, doubled], coming=lambda: 8)
    try:
        futures = [batcher.submit(x) for x in range(60)]
        assert [future.result(5).value for future in futures] == [2 * x for x in range(60)]
        assert set(most) == {1}
    finally:
        assert batcher.close(5)
