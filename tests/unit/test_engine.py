"""Host, catalog and pipeline, on a tiny network that a third-party package brings."""

import gc
import os
import threading
import time
import weakref
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress

import cv2
import numpy as np
import pytest
from tiny_backend import BATCHES, SEEN

from tests.helpers import red_image, tiny_spec, until
from vision_service.engine.build import replace_fields
from vision_service.engine.call import Call
from vision_service.engine.catalog import Catalog, version_key
from vision_service.engine.host import ModelHost
from vision_service.engine.pace import Pace
from vision_service.engine.pipeline import Pipeline
from vision_service.engine.queue import BatchLimits, Job
from vision_service.engine.threads import ForwardGate, in_a_nicer_thread
from vision_service.errors import (
    ConfigError,
    DeadlineExceeded,
    InferenceFailed,
    InvalidImage,
    InvalidInput,
    ModelNotFound,
    ModelUnavailable,
    QueueFull,
)
from vision_service.imaging.source import RawPixels
from vision_service.model_info import ModelState
from vision_service.runtimes import Execution
from vision_service.types import ParamOverrides, Task
from vision_service.weights.manifest import find_model

CLASSIFY = {"task": Task.CLASSIFY}


@pytest.fixture(autouse=True)
def _forget():
    SEEN.clear()
    BATCHES.clear()


@pytest.fixture
def pipeline():
    pipelines = []

    def make(*specs, **kwargs):
        made = Pipeline(Catalog(), **({"decode_workers": 2} | kwargs))
        pipelines.append(made)
        for spec in specs or (tiny_spec(),):
            made.catalog.load(spec)
        SEEN.clear()
        BATCHES.clear()  # of the warm-up
        return made

    yield make
    for made in pipelines:
        made.close(5)


@pytest.fixture
def gate(tmp_path):
    return tmp_path / "gate"


def gated(pipeline, gate, **spec):
    """A pipeline whose model is busy with one image until the gate file exists."""
    gate.touch()  # for the warm-up
    made = pipeline(tiny_spec(options={"gate": str(gate)}, **spec))
    gate.unlink()
    first = made.submit(red_image(1), **CLASSIFY)
    while not SEEN[1]:
        time.sleep(0.005)
    return made, first


def test_every_kind_of_input_gives_the_same_answer(pipeline, tmp_path):
    image = red_image(77)
    png = cv2.imencode(".png", image[..., ::-1])[1].tobytes()
    (tmp_path / "a.png").write_bytes(png)
    bgr = RawPixels(image[..., ::-1].tobytes(), 16, 24, 3, "bgr")
    made = pipeline()
    for source in (image, png, tmp_path / "a.png", str(tmp_path / "a.png"), bgr):
        result = made.predict(source, **CLASSIFY)
        assert result.prediction.class_names == ("red 77",)
        assert result.original_hw == (16, 24)
        assert (result.model_name, result.model_version) == ("tiny", "1")


def test_timings_are_measured_per_stage(pipeline):
    timings = pipeline(tiny_spec(options={"sleep_s": 0.02})).predict(red_image(5), **CLASSIFY).timings
    assert timings.forward_ms >= 20
    assert timings.batch_size == 1
    assert 0 < timings.preprocess_ms < 1000
    assert 0 <= timings.queue_ms < 1000
    assert 0 < timings.postprocess_ms < 1000


def test_a_batch_that_is_fixed_is_kept_and_shown(pipeline):
    """A larger one as well than this network would be given, whose images cost the same in any batch."""
    made = pipeline(tiny_spec(options={"sleep_each_s": 0.06}, batching={"max_batch_size": 4}))
    host = made.catalog.find("tiny")
    assert host.info(is_default=True).max_batch_size == 1
    for size in (3, 2):
        BATCHES.clear()
        host.fix_batch(size)
        assert host.info(is_default=True).max_batch_size == size
        for future in [made.submit(red_image(1), **CLASSIFY) for _ in range(8)]:
            future.result(10)
        assert max(BATCHES) == size
    with pytest.raises(ModelUnavailable, match="tiny:1 is loading"):
        ModelHost(tiny_spec()).fix_batch(3)


def test_warm_up_runs_each_batch_size_before_the_model_is_ready():
    Catalog().load(tiny_spec(batching={"max_batch_size": 6})).close(5)
    assert sorted(set(BATCHES)) == [1, 2, 4, 6]


def test_answers_do_not_cross_between_threads(pipeline):
    made = pipeline(tiny_spec(batching={"max_batch_size": 16}))
    wrong = {}

    def client(start):
        for red in range(start, 256, 8):
            names = made.predict(red_image(red, 10 + red % 7, 12 + red % 5), **CLASSIFY).prediction.class_names
            if names != (f"red {red}",):
                wrong[red] = names

    threads = [threading.Thread(target=client, args=(start,)) for start in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert wrong == {}
    assert sum(SEEN.values()) == 256


def test_a_bad_image_fails_alone_and_before_the_queue(pipeline, gate):
    made, first = gated(pipeline, gate)
    futures = [made.submit(image, **CLASSIFY) for image in (red_image(2), b"not an image", red_image(3))]
    with pytest.raises(InvalidImage):
        futures[1].result(5)  # while its neighbours still wait
    assert not futures[0].done()
    gate.touch()
    assert [f.result(5).prediction.class_names for f in (first, futures[0], futures[2])] == [
        ("red 1",),
        ("red 2",),
        ("red 3",),
    ]


def test_missing_file_is_named(pipeline, tmp_path):
    with pytest.raises(InvalidImage, match=r"nowhere\.jpg cannot be read: No such file"):
        pipeline().predict(tmp_path / "nowhere.jpg", **CLASSIFY)


def test_the_image_that_breaks_the_network_is_found_and_its_mates_are_answered(pipeline, gate):
    gate.touch()
    made = pipeline(tiny_spec(options={"gate": str(gate), "fail_red": 13, "nan_red": 14}))
    gate.unlink()
    futures = {red: made.submit(red_image(red), **CLASSIFY) for red in (11, 12, 13, 14, 15)}
    time.sleep(0.1)
    gate.touch()
    for red, future in futures.items():
        if red in (13, 14):
            with pytest.raises(InferenceFailed, match="failed on this image"):
                future.result(5)
        else:
            assert future.result(5).prediction.class_names == (f"red {red}",)


def test_a_backend_that_loses_an_image_is_caught_at_load():
    catalog = Catalog()
    with pytest.raises(InferenceFailed, match="made 0 predictions of 1 images"):
        catalog.load(tiny_spec(options={"lose_one": True}))
    assert catalog.find("tiny").state is ModelState.FAILED


def test_deadline_passes_in_the_queue_and_the_network_never_sees_the_image(pipeline, gate):
    made, first = gated(pipeline, gate)
    doomed = made.submit(red_image(66), timeout_s=0.05, **CLASSIFY)
    with pytest.raises(DeadlineExceeded):
        doomed.result(5)
    gate.touch()
    first.result(5)
    assert made.predict(red_image(2), **CLASSIFY).prediction.class_names == ("red 2",)
    assert SEEN == {1: 1, 2: 1}


def test_cancelled_call_never_reaches_the_network_and_its_place_is_free(pipeline, gate):
    made, first = gated(pipeline, gate, batching={"max_queued_jobs": 1})
    cancelled = made.submit(red_image(66), **CLASSIFY)
    while made.catalog.find("tiny").info(is_default=True).queued_jobs == 0:
        time.sleep(0.005)
    with pytest.raises(QueueFull):
        made.submit(red_image(67), **CLASSIFY)
    assert cancelled.cancel()
    kept = made.submit(red_image(2), **CLASSIFY)
    gate.touch()
    first.result(5)
    assert kept.result(5).prediction.class_names == ("red 2",)
    with pytest.raises(CancelledError):
        cancelled.result(0)
    assert SEEN[66] == SEEN[67] == 0


def test_what_may_be_decoding_is_bounded(pipeline):
    blocked = threading.Event()
    made = pipeline(decode_workers=1, max_decoding_jobs=2)
    made.workers.submit(blocked.wait, 10)
    futures = [made.submit(red_image(i), **CLASSIFY) for i in (1, 2)]
    with pytest.raises(QueueFull, match="wait to be decoded"):
        made.submit(red_image(3), **CLASSIFY)
    blocked.set()
    assert [f.result(5).prediction.class_names for f in futures] == [("red 1",), ("red 2",)]
    assert made.predict(red_image(3), **CLASSIFY).prediction.class_names == ("red 3",)


def test_what_may_be_decoding_is_bounded_in_bytes_too(pipeline):
    blocked = threading.Event()
    made = pipeline(decode_workers=1, max_decoding_bytes=2000)
    made.workers.submit(blocked.wait, 10)
    first = made.submit(red_image(1), **CLASSIFY)  # 1152 bytes
    with pytest.raises(QueueFull, match="1152 bytes wait to be decoded"):
        made.submit(red_image(2), **CLASSIFY)
    blocked.set()
    first.result(5)


def test_predict_many_keeps_order_bounds_its_window_and_yields_errors(pipeline):
    made = pipeline(tiny_spec(batching={"max_batch_size": 2}))
    taken = []

    def images():
        for red in range(40):
            taken.append(red)
            yield b"broken" if red == 7 else red_image(red)

    outcomes = made.predict_many(images(), **CLASSIFY)
    first = next(outcomes)
    assert first.prediction.class_names == ("red 0",)
    assert len(taken) <= 10  # 4 batches of 2, and not the whole folder
    rest = list(outcomes)
    assert isinstance(rest[6], InvalidImage)
    names = [None if isinstance(r, InvalidImage) else r.prediction.class_names[0] for r in (first, *rest)]
    assert names == [None if red == 7 else f"red {red}" for red in range(40)]


def test_predict_many_of_nothing(pipeline):
    assert list(pipeline().predict_many([], **CLASSIFY)) == []


def test_params_are_checked_against_the_model(pipeline):
    made = pipeline()
    with pytest.raises(InvalidInput, match=r"no class 'red 25x'; did you mean 'red 25"):
        made.predict(red_image(1), overrides=ParamOverrides(classes=("red 25x",)), **CLASSIFY)
    with pytest.raises(InvalidInput, match="class ids 0 to 255, got 256"):
        made.predict(red_image(1), overrides=ParamOverrides(classes=(256,)), **CLASSIFY)
    with pytest.raises(InvalidInput, match="score_threshold: must be a number from 0 to 1, got nan"):
        made.predict(red_image(1), overrides=ParamOverrides(score_threshold=float("nan")), **CLASSIFY)
    made.predict(red_image(1), **CLASSIFY)
    assert made.close(1)  # refused calls left nothing behind that a drain would wait for


def test_unknown_model_version_and_wrong_task(pipeline):
    made = pipeline()
    with pytest.raises(ModelNotFound, match=r"there is no model 'tinny'; did you mean 'tiny'\?"):
        made.submit(red_image(1), model="tinny", **CLASSIFY)
    with pytest.raises(ModelNotFound, match="model 'tiny' has no version '9'; there are: '1'"):
        made.submit(red_image(1), model="tiny", version="9", **CLASSIFY)
    with pytest.raises(InvalidInput, match="model: 'tiny' is a classify model; detect has none"):
        made.submit(red_image(1), task=Task.DETECT, model="tiny")
    with pytest.raises(ModelNotFound, match="no model is served for detect"):
        made.submit(red_image(1), task=Task.DETECT)


def test_a_failed_model_keeps_its_reason_and_refuses_calls():
    catalog = Catalog()
    with pytest.raises(ConfigError, match="could not be loaded: RuntimeError: told to fail"):
        catalog.load(tiny_spec(options={"refuse_to_build": True}))
    host = catalog.find("tiny")
    assert host.info(is_default=True).state_reason == "RuntimeError: told to fail"
    assert not catalog.ready(Task.CLASSIFY)
    with pytest.raises(ModelUnavailable, match=r"tiny:1 is failed \(RuntimeError: told to fail\)"):
        Pipeline(catalog, decode_workers=1).submit(red_image(1), **CLASSIFY)


def test_versions_order_by_number_and_the_newest_answers(pipeline):
    assert sorted(["10", "9", "2.1", "2", "b", "2-rc"], key=version_key) == ["b", "2", "2-rc", "2.1", "9", "10"]
    made = pipeline(tiny_spec(version="9"), tiny_spec(version="10"))
    assert made.predict(red_image(1), **CLASSIFY).model_version == "10"
    assert made.predict(red_image(1), version="9", **CLASSIFY).model_version == "9"
    made.catalog.unload("tiny", "10")
    assert made.predict(red_image(1), **CLASSIFY).model_version == "9"


def test_defaults_choose_the_model_of_a_task():
    with Pipeline(Catalog({Task.CLASSIFY: "b"}), decode_workers=1) as made:
        made.catalog.load(tiny_spec(name="a"))
        made.catalog.load(tiny_spec(name="b"))
        assert made.predict(red_image(1), **CLASSIFY).model_name == "b"
        assert [made.catalog.info(host).is_default for host in made.catalog.hosts()] == [False, True]


def test_swap_under_load_answers_every_call(pipeline):
    made = pipeline(tiny_spec(options={"sleep_s": 0.002}))
    old = made.catalog.find("tiny")
    answered, stop = [], threading.Event()

    def client():
        while not stop.is_set():
            answered.append(made.predict(red_image(3), **CLASSIFY).prediction.class_names)

    threads = [threading.Thread(target=client) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(3):
        made.catalog.load(tiny_spec(options={"sleep_s": 0.001}))
    before = len(answered)
    time.sleep(0.05)
    stop.set()
    for thread in threads:
        thread.join(10)
    assert made.catalog.find("tiny") is not old
    assert len(answered) > before > 0  # a client whose call failed would have ended
    assert set(answered) == {("red 3",)}


def test_a_swap_that_fails_leaves_the_old_model_serving(pipeline):
    made = pipeline()
    with pytest.raises(ConfigError):
        made.catalog.load(tiny_spec(options={"refuse_to_build": True}))
    assert made.predict(red_image(4), **CLASSIFY).prediction.class_names == ("red 4",)


def test_one_name_serves_one_task(pipeline):
    made = pipeline()
    other = tiny_spec(task="translate", backend="tiny_translate", version="2")
    with pytest.raises(ConfigError, match="registered for classify"):
        made.catalog.load(other)


def test_loads_of_one_name_at_once_leave_one_host_and_no_threads(pipeline):
    before = threading.active_count()
    catalog = Catalog()
    loaders = [threading.Thread(target=catalog.load, args=(tiny_spec(),)) for _ in range(4)]
    for loader in loaders:
        loader.start()
    for loader in loaders:
        loader.join(10)
    assert len(catalog.hosts()) == 1
    assert threading.active_count() == before + 3  # the host's own
    assert catalog.close(5)
    assert threading.active_count() == before


def test_unload_waits_for_a_load_under_way(tmp_path):
    gate, catalog = tmp_path / "gate", Catalog()
    loader = threading.Thread(target=catalog.load, args=(tiny_spec(options={"gate": str(gate)}),))
    loader.start()
    while not BATCHES:
        time.sleep(0.005)  # it is warming up
    unloader = threading.Thread(target=catalog.unload, args=("tiny", "1"))
    unloader.start()
    time.sleep(0.05)
    gate.touch()
    for thread in (loader, unloader):
        thread.join(10)
    assert catalog.hosts() == []


def test_a_closed_catalog_loads_no_more():
    catalog = Catalog()
    catalog.close()
    with pytest.raises(ModelUnavailable, match="the service is stopping"):
        catalog.load(tiny_spec())
    assert catalog.hosts() == []


def test_a_swapped_host_frees_its_network(pipeline):
    made = pipeline()
    old = made.catalog.find("tiny")
    watch = weakref.ref(old._model)
    made.catalog.load(tiny_spec())
    assert old.state is ModelState.DRAINING
    gc.collect()
    assert watch() is None


def test_cancelled_calls_drop_their_image_and_count_until_a_worker_has_passed_them(pipeline):
    blocked = threading.Event()
    made = pipeline(decode_workers=1, max_decoding_jobs=3)
    made.workers.submit(blocked.wait, 10)

    class Watched(np.ndarray):
        pass

    watches = []
    for _ in range(3):
        image = red_image(9).view(Watched)
        watches.append(weakref.ref(image))
        made.submit(image, **CLASSIFY).cancel()
        del image
    assert [watch() for watch in watches] == [None] * 3
    with pytest.raises(QueueFull):
        made.submit(red_image(1), **CLASSIFY)
    blocked.set()
    while True:
        try:
            result = made.submit(red_image(1), **CLASSIFY).result(5)
            break
        except QueueFull:
            time.sleep(0.005)
    assert result.prediction.class_names == ("red 1",)
    assert SEEN[9] == 0


@pytest.mark.parametrize(
    "ending", ["answered", "finished", "unwritten", "failed", "undecodable", "expired", "cancelled"]
)
def test_nothing_of_a_call_waits_for_the_collector(pipeline, caplog, ending):
    for name in ("runner", "call"):  # pytest would keep the record, and all behind it
        caplog.set_level("CRITICAL", f"vision_service.engine.{name}")
    made = pipeline(tiny_spec(options={"fail_red": 13}))
    more = {
        "finished": {"finish": lambda result: result.prediction},
        "unwritten": {"finish": lambda result: result.nothing},
        "expired": {"timeout_s": 1e-9},
    }
    image = cv2.imencode(".png", red_image(13 if ending == "failed" else 5)[..., ::-1])[1].tobytes()
    gc.collect()
    gc.disable()
    try:
        futures = []
        for _ in range(20):
            # A copy for each, as from a socket.
            source = image[:40] if ending == "undecodable" else bytes(bytearray(image))
            future = made.submit(source, **CLASSIFY, **more.get(ending, {}))
            if ending == "cancelled":
                future.cancel()
            else:
                assert (future.exception(10) is None) == (ending in ("answered", "finished"))
            futures.append(weakref.ref(future))
            del future, source
        made.predict(red_image(1), **CLASSIFY)  # the threads let go of what they had in hand
        until(lambda: sum(known() is not None for known in futures) <= 1, "futures are kept")
        until(lambda: sum(type(one) in (Call, Job) for one in gc.get_objects()) <= 1, "calls are kept")
    finally:
        gc.enable()


def test_finish_runs_ahead_of_images_that_wait_to_be_decoded(pipeline):
    blocked = threading.Event()
    made = pipeline(decode_workers=1)
    first = made.submit(red_image(1), finish=lambda r: (threading.current_thread().name, r.model_name), **CLASSIFY)
    made.workers.submit(blocked.wait, 10)  # behind the first image's decoding
    thread, model = first.result(5)
    blocked.set()
    assert thread.startswith("finish")
    assert model == "tiny"


def test_finish_that_fails_or_comes_too_late(pipeline, caplog):
    made = pipeline(tiny_spec(options={"sleep_s": 0.1}))

    def broken(result):
        raise KeyError("secret")

    with pytest.raises(InferenceFailed, match="answer could not be written") as caught:
        made.submit(red_image(1), finish=broken, **CLASSIFY).result(5)
    assert "secret" not in str(caught.value)
    assert "in broken" in caplog.text  # where, and not only what
    assert "KeyError: 'secret'" in caplog.text
    ran = []
    with pytest.raises(DeadlineExceeded):
        made.submit(red_image(1), finish=ran.append, timeout_s=0.05, **CLASSIFY).result(5)
    assert ran == []


@pytest.mark.parametrize("needed", [True, False])
def test_last_work_is_done_where_it_is_needed(pipeline, needed):
    ran = []
    work = {"finish": lambda result: ran.append(result) or "done", "finish_needed": lambda result: needed}
    outcome = pipeline().submit(red_image(1), **work, **CLASSIFY).result(5)
    assert len(ran) == needed
    assert (outcome if not needed else ran[0]).prediction.class_names == ("red 1",)
    assert (outcome == "done") == needed


def test_calls_under_way_are_bounded_per_model(pipeline):
    slow = threading.Event()
    made = pipeline(tiny_spec(batching={"max_batch_size": 1, "max_queued_jobs": 2}))
    futures = []
    for _ in range(6):
        futures.append(made.submit(red_image(1), finish=lambda _: slow.wait(10), **CLASSIFY))
        while SEEN[1] < len(futures):
            time.sleep(0.005)  # it leaves the queue; its answer is still to be written
    with pytest.raises(QueueFull, match="6 calls to model tiny:1 are under way and the limit is 6"):
        made.submit(red_image(1), **CLASSIFY)
    slow.set()
    assert [future.result(5) for future in futures] == [True] * 6


def test_admission_is_given_back_when_a_call_is_refused(pipeline):
    made = pipeline(max_decoding_jobs=1)
    for _ in range(3):
        with pytest.raises(InvalidInput):
            made.submit(red_image(1), overrides=ParamOverrides(classes=("none",)), **CLASSIFY)
    made.predict(red_image(1), **CLASSIFY)


def test_close_answers_what_is_under_way(pipeline):
    made = pipeline(tiny_spec(options={"sleep_s": 0.02}, batching={"max_batch_size": 2}))
    futures = [made.submit(red_image(i), **CLASSIFY) for i in range(12)]
    assert made.close(10)
    assert [f.result(0).prediction.class_names for f in futures] == [(f"red {i}",) for i in range(12)]
    with pytest.raises(ModelUnavailable):
        made.submit(red_image(1), **CLASSIFY)


def test_a_call_that_close_has_stopped_waiting_for_is_told_so(pipeline, gate):
    gate.touch()  # for the warm-up
    made = pipeline(tiny_spec(options={"gate": str(gate)}))
    gate.unlink()
    late = made.submit(red_image(1), finish=lambda result: result, **CLASSIFY)
    while not SEEN[1]:
        time.sleep(0.005)
    assert not made.close(0.05)
    gate.touch()
    with pytest.raises(ModelUnavailable, match="stopped before this call was answered"):
        late.result(5)


def test_an_answer_that_can_no_longer_be_written_fails(pipeline):
    made = pipeline(tiny_spec())
    made._finishers.close()  # as a close() that ran out of time does while a batch is on its way back
    with pytest.raises(ModelUnavailable, match="stopped before the answer was written"):
        made.submit(red_image(1), finish=lambda result: result, **CLASSIFY).result(5)


def test_any_size_models_batch_by_shape(pipeline):
    spec = tiny_spec(
        name="any", task="translate", backend="tiny_translate", classes=(), preprocess={"resize": {"mode": "native"}}
    )
    made = pipeline(spec)
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (20 + i % 3, 30, 3), np.uint8) for i in range(12)]
    for image, result in zip(images, made.predict_many(images, task=Task.TRANSLATE), strict=True):
        np.testing.assert_array_equal(result.prediction.image, image)


def test_forward_passes_of_several_models_take_turns(pipeline):
    running, most = [], []

    class Watched(ForwardGate):
        def acquire(self, wanted):
            super().acquire(wanted)
            running.append(1)
            most.append(len(running))

        def release(self, count):
            running.pop()
            super().release(count)

    made = Pipeline(Catalog(cpu_gate=Watched(2)), decode_workers=2)
    for name in ("a", "b"):
        made.catalog.load(tiny_spec(name=name, options={"sleep_s": 0.005}))
    futures = [made.submit(red_image(i), model="ab"[i % 2], **CLASSIFY) for i in range(24)]
    assert [f.result(10).prediction.class_names for f in futures] == [(f"red {i}",) for i in range(24)]
    made.close(5)
    assert set(most) == {1}
    assert len(most) > 4  # two warm-ups, and batches of both


def waiting(gate, threads, count):
    """Start a thread and wait until so many stand at the gate."""
    threads[-1].start()
    while len(gate._waiting) < count:
        time.sleep(0.001)


def test_a_gate_is_fair_and_gives_out_no_more_cores_than_there_are():
    gate, order, threads = ForwardGate(4), [], []
    gate.acquire(3)

    def passing(number, cores):
        gate.acquire(cores)
        order.append(number)
        gate.release(cores)

    for number, cores in enumerate((2, 1, 100, 1)):  # nobody passes by who waits, though one core is free
        threads.append(threading.Thread(target=passing, args=(number, cores)))
        waiting(gate, threads, number + 1)
    assert not gate.try_acquire(1)
    assert order == []
    gate.release(3)
    for thread in threads:
        thread.join(5)
    assert order[2:] == [2, 3]
    assert set(order[:2]) == {0, 1}  # at the same time
    assert gate.try_acquire(4)
    assert not gate.try_acquire(1)


@contextmanager
def several_passes(**batching):
    """A pipeline that has two passes at one time, and the sizes of the batches that ran so, noted as they run."""
    pytest.importorskip("openvino")
    spec = replace_fields(find_model("mobilenet_v2"), {"batching": {"max_batch_size": 2} | batching})
    with Pipeline(Catalog(None, Execution(2, None, 2, 1), ForwardGate(2)), decode_workers=2) as made:
        model = made.catalog.load(spec)._model
        sizes = []

        def noted(run):
            def forward(batch):
                sizes.append(len(batch))
                return run(batch)

            return forward

        assert len(model.forwards_beside) == (0 if "target_p99_ms" in batching else 2)
        curve = made.catalog.info(made.catalog.hosts()[0]).latency_beside
        assert [size for size, ms in curve if ms > 0] == ([1, 2] if model.forwards_beside else [])
        model.forwards_beside = tuple(map(noted, model.forwards_beside))
        del model
        yield made, sizes


def test_passes_at_one_time_answer_as_one_alone_and_nobody_gets_anothers_answer(samples):
    photos = list(samples.values())
    with several_passes() as (made, sizes):
        alone = [made.predict(photo, **CLASSIFY).prediction for photo in photos]
        assert sizes == []
        futures = [made.submit(photo, **CLASSIFY) for photo in 8 * photos]
        for expected, future in zip(8 * alone, futures, strict=True):
            found = future.result(30).prediction
            assert found.class_names[0] == expected.class_names[0]
            np.testing.assert_allclose(found.scores[0], expected.scores[0], atol=1e-4)
        assert len(sizes) > len(photos)
        assert set(sizes) <= {1, 2}


def test_a_batch_does_not_wait_for_an_image_that_turns_out_to_be_none(samples):
    pytest.importorskip("openvino")
    with Pipeline(Catalog(None, Execution(2, None, 2, 1), ForwardGate(4)), decode_workers=1) as made:
        host = made.catalog.load(find_model("mobilenet_v2"))
        host._batcher.set_limits(BatchLimits(max_batch_size=4))
        alone, began, go, decoder = host._model.forward, threading.Event(), threading.Event(), threading.Event()

        def held(batch):
            began.set()
            assert go.wait(30)
            return alone(batch)

        host._model.forward = held
        first = made.submit(samples["coffee"], **CLASSIFY)
        assert began.wait(30)
        made.workers.submit(decoder.wait, 30)
        second, none = (made.submit(image, **CLASSIFY) for image in (samples["coffee"], b"no image"))
        decoder.set()
        with pytest.raises(InvalidImage):
            none.result(30)
        try:
            assert second.result(10).timings.batch_size == 1  # beside the first, which has not ended
            assert not first.done()
        finally:
            go.set()
        assert first.result(30).prediction.class_names[0] == second.result().prediction.class_names[0]


def test_a_model_with_an_objective_has_all_cores_for_every_pass(samples):
    with several_passes(target_p99_ms=60_000) as (made, sizes):
        for future in [made.submit(samples["coffee"], **CLASSIFY) for _ in range(30)]:
            future.result(30)
        assert sizes == []


def test_the_network_of_an_unloaded_model_is_freed_with_all_its_passes(samples):
    with several_passes() as (made, _):
        model = weakref.ref(made.catalog.hosts()[0]._model)
        made.predict(samples["coffee"], **CLASSIFY)
        made.catalog.unload("mobilenet_v2", made.catalog.hosts()[0].spec.version)
        gc.collect()
        assert model() is None


def niceness(thread):
    return os.getpriority(os.PRIO_PROCESS, thread)


def test_threads_that_compute_are_nicer_than_those_that_talk(pipeline):
    mine = niceness(threading.get_native_id())
    made = Pipeline(Catalog(None, Execution(nice=3)), decode_workers=1, nice=4)
    found = {}

    def note(name):
        found[name] = niceness(threading.get_native_id()) - mine

    try:
        model = made.catalog.load(tiny_spec())._model
        forward = model.forward
        model.forward = lambda batch: note("forward") or forward(batch)
        made.workers.submit(note, "decode")
        made.predict(red_image(1), **CLASSIFY)
    finally:
        made.close(5)
    note("caller")
    assert found == {"decode": 4, "forward": 3, "caller": 0}


def test_a_nicer_thread_returns_and_raises_what_it_runs():
    assert in_a_nicer_thread(lambda: threading.current_thread().name, 0, name="mine") == "mine"
    with pytest.raises(ZeroDivisionError):
        in_a_nicer_thread(lambda: 1 // 0, 1, name="mine")


def test_what_an_error_in_a_nicer_thread_was_about_is_freed_with_the_error():
    class Large:
        pass

    def fail():
        large = Large()
        alive.append(weakref.ref(large))
        raise ValueError(large)

    alive = []
    gc.disable()
    try:
        with pytest.raises(ValueError, match="Large"):
            in_a_nicer_thread(fail, 0, name="mine")
        time.sleep(0.05)  # the thread's own end
        assert alive[0]() is None
    finally:
        gc.enable()


def test_an_objective_chooses_batch_delay_and_queue_and_says_so(pipeline):
    slow = {"options": {"sleep_s": 0.02}}
    made = pipeline(tiny_spec(batching={"max_batch_size": 8, "target_p99_ms": 1000}, **slow))
    info = made.catalog.info(made.catalog.hosts()[0])
    assert info.target_p99_ms == 1000
    assert [size for size, _ in info.latency_curve] == [1, 2, 4, 8]
    assert info.max_batch_size == 8
    assert 20 < info.max_delay_ms < 100  # a batch of 8 costs no more than one of 1
    assert info.max_queued_jobs < 1000 / 20 * 8
    assert info.answer_within_ms <= 1000
    result = made.predict(red_image(3), **CLASSIFY)
    assert result.timings.queue_ms >= 0.9 * info.max_delay_ms  # nothing else came to fill the batch


def test_an_objective_that_cannot_be_kept_is_said(pipeline, caplog):
    made = pipeline(tiny_spec(batching={"max_batch_size": 8, "target_p99_ms": 10}, options={"sleep_s": 0.02}))
    info = made.catalog.info(made.catalog.hosts()[0])
    assert (info.max_batch_size, info.max_queued_jobs, info.max_delay_ms) == (1, 1, 0)
    assert info.answer_within_ms > 40
    assert "target_p99_ms 10 cannot be kept" in caplog.text
    assert made.predict(red_image(3), **CLASSIFY).prediction.class_names == ("red 3",)


def test_images_that_are_being_decoded_have_a_place_in_the_queue(pipeline, gate):
    made, first = gated(pipeline, gate, batching={"max_batch_size": 1, "max_queued_jobs": 3})
    blocked = threading.Event()
    for _ in range(2):
        made.workers.submit(blocked.wait, 10)
    futures = [made.submit(red_image(i), **CLASSIFY) for i in (2, 3, 4)]
    with pytest.raises(QueueFull, match="3 calls are waiting and the limit is 3"):
        made.submit(red_image(5), **CLASSIFY)  # before it is decoded for nothing
    blocked.set()
    gate.touch()
    assert [f.result(5).prediction.class_names for f in (first, *futures)] == [(f"red {i}",) for i in (1, 2, 3, 4)]
    with pytest.raises(InvalidImage):
        made.submit(b"no image", **CLASSIFY).result(5)
    for _ in range(5):  # places of calls that failed or were cancelled come back
        made.submit(red_image(1), **CLASSIFY).cancel()
        while made.catalog.find("tiny")._coming:
            time.sleep(0.001)
    futures = [made.submit(red_image(i), **CLASSIFY) for i in (2, 3, 4)]
    assert [f.result(5).prediction.class_names for f in futures] == [(f"red {i}",) for i in (2, 3, 4)]


def test_places_come_back_when_the_workers_are_gone_or_fail(pipeline, monkeypatch):
    made = pipeline(max_decoding_jobs=1)

    def broken(call):
        call.host.not_coming()
        call.fail(InvalidInput("image", "no"))
        raise RuntimeError("worse")

    def has_room():
        with suppress(QueueFull):
            made.check_room(Task.CLASSIFY)
            return True

    monkeypatch.setattr(made, "_prepare", broken)
    for _ in range(3):
        until(has_room)
        with pytest.raises(InvalidInput):
            made.predict(red_image(1), **CLASSIFY)
    until(has_room)
    made.workers.close()
    for _ in range(3):
        with pytest.raises(ModelUnavailable, match="is stopping"):
            made.submit(red_image(1), **CLASSIFY)
    assert made.close(5)


def test_places_of_calls_that_were_refused_come_back(pipeline):
    made = pipeline(tiny_spec(batching={"max_queued_jobs": 2}))
    for _ in range(5):
        with pytest.raises(InvalidInput):
            made.submit(red_image(1), overrides=ParamOverrides(classes=("none",)), **CLASSIFY)
    assert made.predict(red_image(2), **CLASSIFY).prediction.class_names == ("red 2",)


def test_a_call_that_would_take_too_long_is_refused(pipeline, gate):
    gate.touch()  # for the warm-up, where an image takes 20 ms
    batching = {"max_batch_size": 1, "max_wait_ms": 400}
    made = pipeline(tiny_spec(batching=batching, options={"sleep_s": 0.02, "gate": str(gate)}))
    gate.unlink()
    assert made.catalog.info(made.catalog.hosts()[0]).max_wait_ms == 400
    futures, refusal = [], None
    while refusal is None:
        try:
            futures.append(made.submit(red_image(1), **CLASSIFY))
        except QueueFull as error:
            refusal = error
    assert 1 <= len(futures) <= 15  # 0.75 x 400 ms hold 15 calls of 20 ms, and fewer if the warm-up was slow
    assert "too near to max_wait_ms, 400" in str(refusal)
    assert 0 < refusal.retry_after_s < 0.4
    gate.touch()
    for future in futures:
        assert future.result(5).prediction.class_names == ("red 1",)
    made.predict(red_image(1), **CLASSIFY)  # there is room again


@pytest.mark.parametrize("order", [("fast", "slow"), ("slow", "fast")])
def test_a_call_that_no_model_has_room_for_is_told_the_soonest_time(pipeline, gate, order):
    gate.touch()  # for the warm-up
    tables = {"fast": (0.02, 200), "slow": (0.2, 1000)}
    made = pipeline(
        *(
            tiny_spec(
                name=name,
                batching={"max_batch_size": 1, "max_wait_ms": tables[name][1]},
                options={"sleep_s": tables[name][0], "gate": str(gate)},
            )
            for name in order
        )
    )
    gate.unlink()
    for name, (call_s, max_wait_ms) in tables.items():  # as measured on a machine that is never slow
        made.catalog.find(name)._pace = Pace(max_wait_ms / 1000, 1, call_s)
    refusals = {}
    for name in order:
        made.check_room(Task.CLASSIFY)  # one has room
        while name not in refusals:
            try:
                made.submit(red_image(1), model=name, **CLASSIFY)
            except QueueFull as error:
                refusals[name] = error
    assert refusals["fast"].retry_after_s < refusals["slow"].retry_after_s
    with pytest.raises(QueueFull, match="calls to model fast") as caught:
        made.check_room(Task.CLASSIFY)
    assert caught.value.retry_after_s == refusals["fast"].retry_after_s
    with pytest.raises(QueueFull, match="calls to model slow"):
        made.check_room_of(Task.CLASSIFY, "slow", "")
    made.check_room_of(Task.CLASSIFY, "neither", "")  # which `submit` says
    assert refusal_waits_for_the_collector(made) is False
    gate.touch()


def refusal_waits_for_the_collector(made):
    gc.disable()
    try:
        try:
            made.check_room(Task.CLASSIFY)
        except QueueFull as error:
            refusal = weakref.ref(error)
        return refusal() is not None
    finally:
        gc.enable()


def test_without_a_word_about_it_calls_may_take_two_seconds_but_a_slow_model_keeps_some(pipeline, gate):
    gate.touch()  # for the warm-up; then nothing is answered, however slowly the calls come
    slow = {"sleep_s": 0.1, "gate": str(gate)}
    made = pipeline(tiny_spec(batching={"max_batch_size": 1, "max_queued_jobs": 100}, options=slow))
    gate.unlink()
    assert made.catalog.info(made.catalog.hosts()[0]).max_wait_ms == 2000
    futures = [made.submit(red_image(1), **CLASSIFY) for _ in range(32)]  # would take 3.2 s
    with pytest.raises(QueueFull, match="32 calls to model tiny:1 are under way"):
        made.submit(red_image(1), **CLASSIFY)
    for future in futures:
        future.cancel()
    gate.touch()


def test_an_objective_is_the_only_bound_in_time(pipeline):
    made = pipeline(tiny_spec(batching={"target_p99_ms": 60_000}))
    assert made.catalog.info(made.catalog.hosts()[0]).max_wait_ms == 0
    both = pipeline(tiny_spec(batching={"target_p99_ms": 60_000, "max_wait_ms": 300}))
    assert both.catalog.info(both.catalog.hosts()[0]).max_wait_ms == 300


def test_nothing_is_learnt_from_calls_that_failed(pipeline):
    made = pipeline(tiny_spec(batching={"max_batch_size": 1, "max_wait_ms": 100}))
    pace = made.catalog.find("tiny")._pace
    before = pace._call_s
    for _ in range(5):
        with pytest.raises(InvalidImage):
            made.submit(b"no image", **CLASSIFY).result(5)
    assert pace._call_s == before
    made.predict(red_image(1), **CLASSIFY)
    assert pace._call_s != before
