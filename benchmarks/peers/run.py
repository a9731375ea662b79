"""Compare vision-service with LitServe, mosec, Ray Serve and a bare loop: same model, images and load, in one run.

    python benchmarks/run.py --part peers
    python benchmarks/peers/run.py --model mobilenet_v2 --row openvino:bf16 --images FOLDER --output results.json

Our server, by calls and on a stream, and one other system take turns of some seconds, every other round the other way
round; it stands still while ours is measured. What is compared was measured beside each other, so that a machine whose
speed changes by the minute does not decide. All are started anew several times (--starts), because a server is faster
or slower from one start to the next. Peers that run eager torch meet our server in every row that is asked for, those
that run OpenVINO meet it in the same precision. The row openvino:int8 is ours alone: its scales are measured on
--calibration-folder. Results of several runs may go into one file: rows that are measured again replace the older ones.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import signal
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median

import systems
from photos import read_jpegs

from vision_service.bench.cpu import cpu_model
from vision_service.bench.generators import Generators
from vision_service.bench.stats import Spread
from vision_service.engine.threads import usable_cores

EAGER = "eager:fp32"

Speeds = list[tuple[float, float]]
"""Images a second, ours and theirs, in each round between two starts."""


@dataclass
class Measured:
    """One system with one network.

    Attributes:
        rounds: figures of each, by the number of calls in flight.
        beside: of another system: the speeds of ours and of it in each round of each start, by our row, our system and
            the calls.
        measured: when it was last.
    """

    rounds: dict[int, list[dict]] = field(default_factory=lambda: defaultdict(list))
    beside: dict[str, dict[str, dict[int, list[Speeds]]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    )
    measured: str = ""

    def add(self, in_flight: int, figures: dict) -> None:
        """A round."""
        self.rounds[in_flight].append(figures)
        self.measured = datetime.now(UTC).isoformat(timespec="seconds")

    def summary(self) -> dict:
        """Medians and spreads."""
        found: dict = {"loads": {str(load): _summary(rounds) for load, rounds in self.rounds.items()}}
        if self.beside:
            found["ours_over"] = {
                row: {
                    name: {str(load): _ratio(starts) for load, starts in loads.items()}
                    for name, loads in by_system.items()
                }
                for row, by_system in self.beside.items()
            }
        return found


def main() -> None:
    """Measure what the command line says."""
    arguments = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("told to stop"))  # what stands still is to end, too
    arguments.images = arguments.images.resolve()
    if arguments.calibration_folder is not None:  # the server that is started reads it there
        os.environ["VISION_SERVICE_CALIBRATION_FOLDER"] = str(arguments.calibration_folder.resolve())
    images = read_jpegs(arguments.images)
    results = json.loads(arguments.output.read_text()) if arguments.output.exists() else {"rows": []}
    packages = ("torch", "openvino", *(peer.package for peer in systems.PEERS.values()))
    results["machine"] = {
        "processor": cpu_model(),
        "cores": usable_cores(),
        "versions": {name: version(name) for name in packages},
    }
    keys = ("model", "runtime", "precision", "system", "workers")
    with Generators() as generators:
        for model in arguments.model:
            jobs = {
                row: systems.Job(model, row, arguments.images, images, arguments.seconds, generators)
                for row in arguments.row
            }
            for rows in _measure(arguments, jobs):
                measured = [{key: row[key] for key in keys} for row in rows]
                kept = [row for row in results["rows"] if {key: row[key] for key in keys} not in measured]
                results["rows"] = [*kept, *rows]
                arguments.output.write_text(json.dumps(results, indent=1) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=["mobilenet_v2", "resnet50"])
    parser.add_argument("--row", action="append", help="eager:fp32, openvino:fp32, openvino:bf16 or openvino:int8")
    parser.add_argument("--calibration-folder", type=Path, help="photos that are not measured, for openvino:int8")
    parser.add_argument("--system", action="append", choices=[systems.LOOP, *systems.PEERS], help="beside ours")
    parser.add_argument("--images", type=Path, default=systems.ROOT / "samples")
    parser.add_argument("--in-flight", type=int, action="append")
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--starts", type=int, default=3, help="how often servers are started anew")
    parser.add_argument("--rounds", type=int, default=2, help="of turns, after each start")
    parser.add_argument("--tune", action="store_true", help="try every peer with one worker and with one a core")
    parser.add_argument("--output", type=Path, default=systems.ROOT / "benchmarks" / "results" / "peers-bf16.json")
    arguments = parser.parse_args()
    arguments.model = arguments.model or ["mobilenet_v2", "resnet50"]
    arguments.row = arguments.row or [EAGER, "openvino:fp32", "openvino:bf16"]
    arguments.system = arguments.system or [systems.LOOP, *systems.PEERS]
    arguments.in_flight = list(dict.fromkeys(arguments.in_flight or [16, 32]))
    if min(arguments.starts, arguments.rounds) < 1:
        parser.error("--starts and --rounds are at least 1")
    if any(row.endswith(":int8") for row in arguments.row):
        if arguments.calibration_folder is None:
            parser.error("int8 measures its scales on photos; name some with --calibration-folder")
        if EAGER not in arguments.row:
            parser.error(f"no peer runs int8: ours is measured beside those of --row {EAGER}, which is missing")
    return arguments


def meetings(rows: Sequence[str]) -> Iterator[tuple[str, Sequence[str]]]:
    """The row of other systems, and those of ours that are measured beside it."""
    for row in rows:
        if not row.endswith(":int8"):
            yield row, rows if row == EAGER else [row]


def _measure(arguments: argparse.Namespace, jobs: Mapping[str, systems.Job]) -> Iterator[list[dict]]:
    """All that is known of a model, again after each other system; its jobs, by row."""
    found: dict[tuple[str, str, int], Measured] = defaultdict(Measured)
    for (row, our_rows), start in itertools.product(meetings(list(jobs)), range(arguments.starts)):
        with contextlib.ExitStack() as stack:
            servers = {our_row: stack.enter_context(systems.ours(jobs[our_row])) for our_row in our_rows}
            ours = [{(one, name, 1): way for name, way in ways.items()} for one, ways in servers.items()]
            for system in arguments.system:
                for workers in _workers(system, tune=arguments.tune):
                    what = f"{jobs[row].model} {row}: {system}, {workers} workers, start {start + 1}"
                    print(what, file=sys.stderr, flush=True)
                    theirs = (row, system, workers)
                    with systems.other(jobs[row], system, workers) as other:
                        for ways in ours:
                            _take_turns(arguments, found, ways, theirs, other, start)
                    rows = [_row(jobs[row].model, what, measured) for what, measured in found.items()]
                    print(f"  {json.dumps(found[theirs].summary())}", file=sys.stderr, flush=True)
                    yield rows


def _workers(system: str, *, tune: bool) -> tuple[int, ...]:
    if system not in systems.PEERS:
        return (1,)
    return tuple(dict.fromkeys((1, usable_cores()))) if tune else (min(systems.PEERS[system].workers, usable_cores()),)


def _take_turns(
    arguments: argparse.Namespace,
    found: Mapping[tuple[str, str, int], Measured],
    ours: Mapping[tuple[str, str, int], systems.Way],
    theirs: tuple[str, str, int],
    other: systems.Other,
    start: int = 0,
) -> None:
    """Rounds of another system and of ours beside it, by calls and on a stream, after a start."""
    for loads in (found[theirs].beside[row][name] for row, name, _ in ours):
        for in_flight in arguments.in_flight:
            loads[in_flight].append([])
    for number in range(start * arguments.rounds, (start + 1) * arguments.rounds):
        for in_flight in arguments.in_flight:
            turns = [*ours.items(), (theirs, other.load)]
            speeds = {}
            for what, load in reversed(turns) if number % 2 else turns:
                with contextlib.nullcontext() if what == theirs else other.still():  # our server is still by itself
                    figures = load(in_flight)
                if not figures["images_per_s"]:
                    raise SystemExit(
                        f"{what[1]}, {what[0]}, answered nothing in {arguments.seconds:g} s: give --seconds"
                    )
                found[what].add(in_flight, figures)
                speeds[what] = figures["images_per_s"]
            for row, name, _ in ours:
                found[theirs].beside[row][name][in_flight][-1].append((speeds[row, name, 1], speeds[theirs]))


def _row(model: str, what: tuple[str, str, int], measured: Measured) -> dict:
    row, system, workers = what
    runtime, _, precision = row.partition(":")
    names = {"model": model, "runtime": runtime, "precision": precision, "system": system, "workers": workers}
    return {**names, **measured.summary(), "measured": measured.measured}


def _summary(rounds: list[dict]) -> dict:
    """Medians, and the spread of the speed; of calls that failed, all."""
    found = {key: round(median(one[key] for one in rounds), 3) for key in rounds[0]}
    if "failed" in found:
        found["failed"] = sum(one["failed"] for one in rounds)
    speeds = [one["images_per_s"] for one in rounds]
    return {**found, "lowest": round(min(speeds), 3), "highest": round(max(speeds), 3), "rounds": len(rounds)}


def _ratio(starts: list[Speeds]) -> dict:
    """Ours divided by theirs: the median of the starts' medians, the spread of all rounds, and the medians of both."""
    medians = [median(ours / theirs for ours, theirs in speeds) for speeds in starts]
    pairs = list(itertools.chain.from_iterable(starts))
    found = asdict(Spread.of([ours / theirs for ours, theirs in pairs])) | {"median": median(medians)}
    for who, values in zip(("ours", "theirs"), zip(*pairs, strict=True), strict=True):
        found[who] = median(values)
    rounded = {key: round(value, 3) for key, value in found.items()}
    return rounded | {"starts": [round(one, 3) for one in medians]}


if __name__ == "__main__":
    main()
