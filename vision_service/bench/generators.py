"""Load from processes of their own: each has its share, and what they measure is put together."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace

from vision_service.bench.load import Load, LoadResult, generate


class Generators:
    """Processes that generate load, one load after the other.

    Args:
        count: how many; each has its share of the calls in flight or of the rate.
    """

    def __init__(self, count: int = 1) -> None:
        self._count = count
        self._pool = ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"))

    def run(self, load: Load) -> LoadResult:
        """Generate load.

        Args:
            load: for all of them together.

        Raises:
            ModelUnavailable: as `generate`.
        """
        shares = [_share(load, index, self._count) for index in range(min(self._count, load.in_flight))]
        futures: list[Future[LoadResult]] = [self._pool.submit(generate, share) for share in shares]
        return merged([future.result() for future in futures])

    def __enter__(self) -> Generators:
        for ready in [self._pool.submit(_ready) for _ in range(self._count)]:
            ready.result()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._pool.shutdown()


def run_load(load: Load, generators: int = 1) -> LoadResult:
    """Generate one load, from so many processes of their own. Errors as in `Generators.run`."""
    with Generators(generators) as processes:
        return processes.run(load)


def _ready() -> None:
    """Of a process that has imported this."""


def merged(results: Sequence[LoadResult]) -> LoadResult:
    """What several generators measured at the same time, as one.

    Their windows differ a little: what is added are speeds, and uses of the processor.
    """
    speed = sum(result.in_time / result.seconds for result in results)
    in_time = sum(result.in_time for result in results)
    whole = LoadResult(in_time / speed if speed else max(result.seconds for result in results), in_time=in_time)
    for result in results:
        for status, latencies_s in result.latencies_s.items():
            whole.latencies_s.setdefault(status, []).extend(latencies_s)
        scale = whole.seconds / result.seconds
        whole.generator_cpu_s += scale * result.generator_cpu_s
        whole.server_cpu_s += scale * result.server_cpu_s / len(results)
        whole.replies += result.replies
    return whole


def _share(load: Load, index: int, of: int) -> Load:
    return replace(
        load,
        messages=[*load.messages[index:], *load.messages[:index]],
        in_flight=load.in_flight // of + (index < load.in_flight % of),
        rate=load.rate / of,
        held_callers=max(1, load.held_callers // of + (index < load.held_callers % of)) if load.held_callers else 0,
    )
