"""From models to the files that they miss, and those files to their places, several at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from vision_service.config import FileSpec, ModelSpec
from vision_service.errors import WeightsError
from vision_service.weights.download import FetchOptions, Watcher, address, fetch, reachable


@dataclass(frozen=True, slots=True)
class Wanted:
    """A file that a model needs.

    Attributes:
        model: its name, for messages.
        source: where the weights came from, for people.
        file: with an absolute path.
    """

    model: str
    source: str
    file: FileSpec


def files_of(spec: ModelSpec) -> tuple[FileSpec, ...]:
    """Every file that a model needs: its weights and what goes with them."""
    return () if spec.weights is None else (spec.weights, *spec.weights.companions)


def wanted(specs: Iterable[ModelSpec], *, also_here: bool = False) -> list[Wanted]:
    """The files that models miss, each once.

    Args:
        specs: from `find_model`, with absolute paths.
        also_here: those that are here as well.
    """
    found: dict[str, Wanted] = {}
    for spec in specs:
        for file in files_of(spec):
            if also_here or not Path(file.file).exists():
                found.setdefault(file.file, Wanted(spec.name, spec.weights.source if spec.weights else "", file))
    return list(found.values())


def pull(
    files: Sequence[Wanted], options: FetchOptions, watcher: Watcher | None = None, *, replace: bool = False
) -> None:
    """Fetch files, several at a time; what one failure leaves undone the others do not.

    Args:
        files: from `wanted`.
        options: how.
        watcher: told what happens; the log without one.
        replace: fetch files that are here as well.

    Raises:
        WeightsError: some could not be had; says which, why and what to do next. The others are here.
    """
    if not files:
        return
    lost = [one for one in files if not reachable(one.file, options)]
    problems = [_unreachable(lost, options)] if lost else []
    stop = threading.Event()
    watcher = watcher or Watcher()
    with ThreadPoolExecutor(max(1, options.parallel), thread_name_prefix="fetch") as pool:
        running = {
            pool.submit(fetch, one.file, options, watcher, stop, replace=replace): one
            for one in files
            if one not in lost
        }
        try:
            wait(running)
        except BaseException:  # Ctrl-C: without this the pool would wait for the end of every download
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    for done, one in running.items():
        try:
            done.result()
        except WeightsError as error:
            problems.append(f"model {one.model!r}: {error}")
    if problems:
        raise WeightsError("; ".join(problems))


def _unreachable(lost: Sequence[Wanted], options: FetchOptions) -> str:
    lines = []
    for one in lost:
        origin = address(one.file, options) or f"no address is known, it came from: {one.source}"
        lines.append(f"{one.file.file} of model {one.model!r} ({origin})")
    names = " ".join(dict.fromkeys(one.model for one in lost))
    if options.offline:
        return (
            f"offline, and these files are not here: {', '.join(lines)}. Copy them there from a machine where "
            f"`vision-service models pull {names}` ran, or set offline to false"
        )
    return f"these files are not here and cannot be fetched: {', '.join(lines)}. Put them there by hand"
