"""The way of an image: find, decode, preprocess, queue, batch, forward, postprocess. In process and behind gRPC."""

from __future__ import annotations

import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vision_service.config import PreprocessSpec
from vision_service.engine.admission import Admission
from vision_service.engine.call import Call, Held, cancel_with
from vision_service.engine.catalog import Catalog
from vision_service.engine.host import ModelHost
from vision_service.engine.loaded import Answer, Prepared
from vision_service.engine.pace import Entry
from vision_service.engine.queue import Ride
from vision_service.engine.threads import be_nicer
from vision_service.engine.workers import Workers
from vision_service.errors import (
    DeadlineExceeded,
    InvalidImage,
    InvalidInput,
    ModelNotFound,
    ModelUnavailable,
    QueueFull,
    VisionError,
)
from vision_service.imaging.decode import DecodeLimits, decode_for, from_array, from_raw
from vision_service.imaging.preprocess import preprocess
from vision_service.imaging.source import ImageInput, RawPixels
from vision_service.types import ParamOverrides, Result, Task, UInt8Array


class Pipeline:
    """Runs images through the models of a catalog.

    Thread-safe. Decoding and preprocessing run on threads of its own; a model's network runs on the model's threads.

    Args:
        catalog: the models. Closed with the pipeline.
        decode_workers: threads that decode and preprocess.
        nice: by how much they are nicer than the thread that makes the pipeline, see `be_nicer`.
        limits: largest image, in bytes and pixels.
        max_decoding_jobs: most images decoding or waiting to be; one more raises `QueueFull`.
        max_decoding_bytes: most bytes of images decoding or waiting to be.
    """

    def __init__(
        self,
        catalog: Catalog,
        *,
        decode_workers: int,
        nice: int = 0,
        limits: DecodeLimits | None = None,
        max_decoding_jobs: int = 256,
        max_decoding_bytes: int = 512 * 1024 * 1024,
    ) -> None:
        self.catalog = catalog
        self._limits = limits or DecodeLimits()
        self._workers = Workers(decode_workers, "decode", partial(be_nicer, nice))
        # Not the decoders: what is nearly done would wait there behind everything that has just come in.
        self._finishers = Workers(decode_workers, "finish", partial(be_nicer, nice))
        self._admission = Admission(max_decoding_jobs, max_decoding_bytes)

    @property
    def workers(self) -> Workers:
        """Those that decode and preprocess."""
        return self._workers

    def check_room(self, task: Task) -> None:
        """Whether a call of a task would be let in, whichever model it names: asked before its message is read.

        Raises:
            QueueFull: every model of the task is full, or the decoders are. Of several models that which names the
                soonest time, since it is not known which one is meant.
        """
        self._admission.check()
        full: QueueFull | None = None
        for host in self.catalog.hosts_unordered(task):
            try:
                host.check_room()
            except QueueFull as error:
                if full is None or error.retry_after_s < full.retry_after_s:
                    full = error
            except ModelUnavailable:
                continue
            else:
                return
        if full is not None:
            try:
                raise full
            finally:
                del full  # it holds this frame, which would hold it

    def check_room_of(self, task: Task, model: str, version: str) -> None:
        """Whether a call that names a model would be let in: asked before its image is copied.

        Raises:
            QueueFull: the model is full, or the decoders are. What else is wrong with the call `submit` says.
        """
        self._admission.check()
        try:
            self.catalog.get(task, model, version).check_room()
        except (ModelNotFound, ModelUnavailable, InvalidInput):
            return

    def submit(
        self,
        image: ImageInput,
        *,
        task: Task,
        model: str = "",
        version: str = "",
        overrides: ParamOverrides | None = None,
        timeout_s: float | None = None,
        finish: Callable[[Result[Any]], Any] | None = None,
        finish_needed: Callable[[Result[Any]], bool] = lambda _: True,
    ) -> Future[Any]:
        """Start one image.

        Args:
            image: an encoded file's bytes, a path, raw pixels, or a uint8 array ``[H, W]`` or ``[H, W, 3]`` RGB.
            task: what is wanted.
            model: which model; empty: the task's default.
            version: which version; empty: the newest.
            overrides: what this call chooses.
            timeout_s: seconds from now; past it the image never reaches the device.
            finish: last work on the result, such as encoding masks. It runs on threads of its own, ahead of images
                that still wait to be decoded, and counts as part of the call.
            finish_needed: whether there is such work on a result; without, the result comes as it is.

        Returns:
            The result to come, or what ``finish`` makes of it; its exception is a `VisionError`. Cancelling it takes
            the image out of the queues.

        Raises:
            ModelNotFound, ModelUnavailable, InvalidInput, QueueFull: at once, before work goes into the image.
        """
        host, entry = self._admit(Task(task), model, version)
        try:
            params = host.spec.params
            if overrides is not None:
                params = overrides.resolve(params, host.spec.classes)
            deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
            call = Call(Held(image), host, params, deadline_s, finish, finish_needed)
            self._start(call, _nbytes(image))
        except BaseException:
            host.not_coming()
            host.release(entry, answered=False)
            raise
        call.result.add_done_callback(partial(_over, host, entry, call.held))
        return call.result

    def submit_patiently(self, image: ImageInput, **kwargs: Any) -> Future[Result[Any]]:
        """Submit; wait while other callers keep the queues full; an error becomes the future's. Else as `submit`."""
        while True:
            try:
                return self.submit(image, **kwargs)
            except QueueFull as error:
                time.sleep(min(error.retry_after_s, 1.0))
            except VisionError as error:
                failed: Future[Result[Any]] = Future()
                failed.set_exception(error)
                return failed

    def predict(
        self,
        image: ImageInput,
        *,
        task: Task,
        model: str = "",
        version: str = "",
        overrides: ParamOverrides | None = None,
        timeout_s: float | None = None,
    ) -> Result[Any]:
        """One image, start to end. Arguments and errors as in `submit`."""
        result: Result[Any] = self.submit(
            image, task=task, model=model, version=version, overrides=overrides, timeout_s=timeout_s
        ).result()
        return result

    def predict_many(
        self,
        images: Iterable[ImageInput],
        *,
        task: Task,
        model: str = "",
        version: str = "",
        overrides: ParamOverrides | None = None,
    ) -> Iterator[Result[Any] | VisionError]:
        """Many images, in batches, with bounded memory.

        Returns:
            In the order of ``images``: a result, or the error of that image.
        """
        batching = self.catalog.get(Task(task), model, version).spec.batching
        window = min(4 * batching.max_batch_size, batching.max_queued_jobs, self._admission.max_jobs)
        flying: deque[Future[Result[Any]]] = deque()
        for image in images:
            if len(flying) >= window:
                yield _outcome(flying.popleft())
            flying.append(self.submit_patiently(image, task=task, model=model, version=version, overrides=overrides))
        while flying:
            yield _outcome(flying.popleft())

    def close(self, timeout_s: float | None = None) -> bool:
        """Answer what is on its way, take nothing new, free the models.

        Returns:
            Whether everything was answered in time.
        """
        self._workers.close()
        drained = self.catalog.close(timeout_s)
        self._finishers.close()
        return drained

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _admit(self, task: Task, model: str, version: str) -> tuple[ModelHost, Entry]:
        """Find a host that lets this call in; when a swap comes between the two steps, its successor."""
        while True:
            host = self.catalog.get(task, model, version)
            try:
                entry = host.admit()
            except ModelUnavailable:
                if self.catalog.get(task, model, version) is host:
                    raise
            else:
                return host, entry

    def _start(self, call: Call, nbytes: int) -> None:
        """Have a worker prepare a call's image, which has so many bytes."""
        self._admission.enter(nbytes)
        try:
            self._workers.submit(self._work, call, nbytes)
        except BaseException as error:
            self._admission.leave(nbytes)
            if isinstance(error, RuntimeError):  # they were closed
                raise ModelUnavailable("the service is stopping; call again in a moment") from None
            raise

    def _work(self, call: Call, nbytes: int) -> None:
        """What a worker does for a call."""
        try:
            self._prepare(call)
        finally:
            self._admission.leave(nbytes)

    def _prepare(self, call: Call) -> None:
        """Decode and preprocess on a worker, then queue. Every way out answers the call."""
        prepared: Prepared | None = None
        try:
            prepared = self._prepared(call)
        except Exception as error:
            call.fail_at(error, "the image could not be prepared")
        if prepared is None:
            call.host.not_coming()
            return
        try:
            riding = call.host.submit(prepared, call.deadline_s)
        except VisionError as error:
            call.fail_at(error, "the image could not be queued")
        else:
            riding.add_done_callback(lambda ride: self._arrive(call, ride))
            # Weakly: what riding tells holds the call. The batcher keeps it for as long as it can be cancelled.
            call.result.add_done_callback(partial(cancel_with, weakref.ref(riding)))

    def _prepared(self, call: Call) -> Prepared | None:
        """A call's image, ready for its model; ``None`` when its caller has gone."""
        if call.result.cancelled():
            return None
        if call.deadline_s is not None and time.monotonic() >= call.deadline_s:
            raise DeadlineExceeded("the deadline passed before the image was decoded")
        started_s = time.perf_counter()
        spec = call.host.spec.preprocess
        image, original_hw = self._decode(call.held.image, spec)
        decoded_s = time.perf_counter()
        pixels, meta = preprocess(image, spec, original_hw)
        done_s = time.perf_counter()
        call.decode_ms = 1000 * (decoded_s - started_s)
        call.preprocess_ms = 1000 * (done_s - decoded_s)
        call.original_hw = meta.original_hw
        call.held.drop()
        return Prepared(pixels, meta, call.params)

    def _arrive(self, call: Call, ride: Future[Ride[Answer]]) -> None:
        """Answer a call with what the batcher made of it. Runs on a model's thread, so it only passes work on."""
        if ride.cancelled():
            return
        error = ride.exception()
        if error is not None:
            call.fail(error)
            return
        result = call.outcome(ride.result())
        if call.finish is None or not call.finish_needed(result):
            call.succeed(result)
            return
        try:
            self._finishers.submit(self._finish, call, result)
        except RuntimeError:  # closed by a close() that did not wait for this batch any longer
            call.fail(ModelUnavailable("the service stopped before the answer was written; call again in a moment"))

    def _finish(self, call: Call, result: Result[Any]) -> None:
        """The last work on a result, unless nobody waits for it any more."""
        if call.result.cancelled() or call.finish is None:
            return
        try:
            if call.deadline_s is not None and time.monotonic() >= call.deadline_s:
                raise DeadlineExceeded("the deadline passed before the answer was written")
            done = call.finish(result)
        except Exception as error:
            call.fail_at(error, "the answer could not be written")
        else:
            call.succeed(done)

    def _decode(self, image: ImageInput, spec: PreprocessSpec) -> tuple[UInt8Array, tuple[int, int]]:
        """Pixels, of a large JPEG no more than the model needs, and the size that they have unscaled."""
        if isinstance(image, bytes):
            return decode_for(image, spec, self._limits)
        if isinstance(image, RawPixels):
            pixels = from_raw(image.data, image.height, image.width, image.channels, image.color_order, self._limits)
        elif isinstance(image, np.ndarray):
            pixels = from_array(image)
        else:
            return decode_for(_read(Path(image), self._limits), spec, self._limits)
        return pixels, (pixels.shape[0], pixels.shape[1])


def _read(path: Path, limits: DecodeLimits) -> bytes:
    try:
        size = path.stat().st_size
        if size > limits.max_bytes:
            raise InvalidImage(f"{path} has {size} bytes, the limit is {limits.max_bytes}")
        return path.read_bytes()
    except OSError as error:
        raise InvalidImage(f"{path} cannot be read: {error.strerror or error}") from None


def _over(host: ModelHost, entry: Entry, held: Held, result: Future[Any]) -> None:
    """A call has its result, or nobody waits for it; then its image must not stay in the workers' queue."""
    host.release(entry, answered=not result.cancelled() and result.exception() is None)
    held.drop()


def _outcome(future: Future[Result[Any]]) -> Result[Any] | VisionError:
    try:
        return future.result()
    except VisionError as error:
        return error


def _nbytes(image: ImageInput) -> int:
    if isinstance(image, bytes):
        return len(image)
    if isinstance(image, RawPixels):
        return len(image.data)
    return image.nbytes if isinstance(image, np.ndarray) else 0
