"""Compare vision-service with LitServe, mosec, Ray Serve and a bare loop: same model, images and load, in one run.

    python benchmarks/run.py --part peers
    python benchmarks/peers/run.py --model mobilenet_v2 --row openvino:bf16 --images FOLDER --output results.json

Every system runs alone, the others are stopped. vision-service is measured first and again last, so that a machine that
drifts shows, by calls and on a stream in turn. Results of several runs may go into one file: rows that are measured
again replace the older ones. The row openvino:int8 is ours alone: its scales are measured on --calibration-folder.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median

from http_load import HttpConnection
from photos import read_jpegs

from vision_service.bench import served
from vision_service.bench.cpu import cpu_model
from vision_service.bench.generators import run_load
from vision_service.bench.load import Load, LoadResult
from vision_service.bench.plan import Plan, Setup, Variant
from vision_service.bench.stats import Percentiles
from vision_service.engine.threads import usable_cores

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SETUP = Setup(manifests=(ROOT / "benchmarks" / "models.toml",))
START_S = 180


@dataclass(frozen=True)
class Peer:
    """Another server.

    Attributes:
        package: on PyPI.
        path: of its method and the kind of body, for `HttpConnection`.
        workers: processes that run the network; what ``--tune`` found best on two cores.
    """

    package: str
    path: str
    workers: int


PEERS = {
    "litserve": Peer("litserve", "/predict#form", 1),
    "mosec": Peer("mosec", "/inference#raw", 1),
    "ray": Peer("ray", "/#raw", 1),
}
SYSTEMS = ("vision-service", "loop", *PEERS)
STREAM = "vision-service-stream"
"""The same server, whose requests come on one stream of Predict; measured in turn with calls."""


def main() -> None:
    """Measure what the command line says."""
    arguments = _arguments()
    arguments.images = arguments.images.resolve()
    if arguments.calibration_folder is not None:  # the server that is started reads it there
        os.environ["VISION_SERVICE_CALIBRATION_FOLDER"] = str(arguments.calibration_folder.resolve())
    images = read_jpegs(arguments.images)
    results = json.loads(arguments.output.read_text()) if arguments.output.exists() else {"rows": []}
    results["machine"] = {
        "processor": cpu_model(),
        "cores": usable_cores(),
        "versions": {name: version(name) for name in ("torch", "openvino", *(peer.package for peer in PEERS.values()))},
    }
    for model in arguments.model:
        for row in arguments.row:
            runtime, _, precision = row.partition(":")
            for found in _measure(arguments, model, runtime, precision, images):
                keys = ("model", "runtime", "precision", "system", "workers")
                kept = [one for one in results["rows"] if any(one[key] != found[key] for key in keys)]
                results["rows"] = [*kept, found]
                arguments.output.write_text(json.dumps(results, indent=1) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=["mobilenet_v2", "resnet50"])
    parser.add_argument("--row", action="append", help="eager:fp32, openvino:fp32, openvino:bf16 or openvino:int8")
    parser.add_argument("--calibration-folder", type=Path, help="photos that are not measured, for openvino:int8")
    parser.add_argument("--system", action="append", choices=SYSTEMS)
    parser.add_argument("--images", type=Path, default=ROOT / "samples")
    parser.add_argument("--in-flight", type=int, action="append")
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tune", action="store_true", help="try every peer with one worker and with one a core")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "peers-bf16.json")
    arguments = parser.parse_args()
    arguments.model = arguments.model or ["mobilenet_v2", "resnet50"]
    arguments.row = arguments.row or ["eager:fp32", "openvino:fp32", "openvino:bf16"]
    arguments.system = arguments.system or list(SYSTEMS)
    arguments.in_flight = arguments.in_flight or [16, 32]
    if any(row.endswith(":int8") for row in arguments.row) and arguments.calibration_folder is None:
        parser.error("int8 measures its scales on photos; name some with --calibration-folder")
    return arguments


def _measure(arguments, model: str, runtime: str, precision: str, images: list[bytes]) -> Iterator[dict]:
    """A result for each system; our own speed is that of the first and the last place in the order."""
    ours: list[dict[str, dict]] = []
    order = [one for one in arguments.system if one != "vision-service" and precision != "int8"]
    if "vision-service" in arguments.system:
        order = ["vision-service", *order, "vision-service"]
    for system in order:
        for workers in _workers(system, arguments.tune):
            print(f"{model} {runtime} {precision}: {system}, {workers} workers", file=sys.stderr)
            what = {"model": model, "runtime": runtime, "precision": precision, "system": system, "workers": workers}
            if system == "vision-service":
                ours.append(_ours(arguments, what, images))
                if len(ours) == 1:
                    continue
                first, last = ours
                found = {name: {load: first[name][load] + last[name][load] for load in last[name]} for name in last}
            else:
                found = {system: _loads(arguments, what, images)}
            for name, loads in found.items():
                summaries = {load: _summary(rounds) for load, rounds in loads.items()}
                print(
                    f"  {name}: { ({load: one['images_per_s'] for load, one in summaries.items()}) }", file=sys.stderr
                )
                measured = datetime.now(UTC).isoformat(timespec="seconds")
                yield {**what, "system": name, "loads": summaries, "measured": measured}


def _workers(system: str, tune: bool) -> tuple[int, ...]:
    if system not in PEERS:
        return (1,)
    return (1, usable_cores()) if tune else (min(PEERS[system].workers, usable_cores()),)


def _loads(arguments, what: dict, images: list[bytes]) -> dict[str, list[dict]]:
    """Rounds of measurements of a peer or the loop, by the number of calls in flight."""
    system = what["system"]
    with _process(what) as (process, port):
        if system == "loop":
            rounds = [_loop_round(process, arguments) for _ in range(arguments.rounds)]
            return {str(in_flight): rounds for in_flight in arguments.in_flight}
        address, path = f"127.0.0.1:{port}", PEERS[system].path
        answer = _wait(process, address, path, images[0])
        _check(what, answer)
        load = Load(address, path, images, seconds=arguments.seconds, wire=HttpConnection)
        return _rounds(arguments, {system: lambda in_flight: run_load(replace(load, in_flight=in_flight))})[system]


ANSWERS: dict[tuple, list[list]] = {}
"""What the first peer of a row said about the first image."""


def _check(what: dict, answer: list[list]) -> None:
    """Every peer must run the same network: a worker that missed its options would go unnoticed otherwise."""
    if what["model"] == "resnet50":  # random weights, different ones in each process
        return
    first = ANSWERS.setdefault((what["model"], what["runtime"], what["precision"]), answer)
    (known, score), (found, other) = first[0], answer[0]
    if known != found or abs(score - other) > 0.002:
        raise SystemExit(
            f"{what['system']} answers {answer[0]}, another peer answered {first[0]}: not the same network"
        )


def _ours(arguments, what: dict, images: list[bytes]) -> dict[str, dict[str, list[dict]]]:
    """The same of our server, by calls and on a stream."""
    # Runtime torch is eager too, but channels-last: what vision-service does where there is no OpenVINO.
    runtime = "torch" if what["runtime"] == "eager" else what["runtime"]
    variant = Variant(what["model"], runtime, what["precision"])
    plan = Plan([variant], SETUP, images, seconds=arguments.seconds)
    with served.server(SETUP, variant) as target:
        ways = {"vision-service": False, STREAM: True}
        loads = {
            name: lambda in_flight, streamed=streamed: target.load(plan, streamed=streamed, in_flight=in_flight)
            for name, streamed in ways.items()
        }
        return _rounds(arguments, loads)


def _rounds(arguments, ways: dict[str, Callable[[int], LoadResult]]) -> dict[str, dict[str, list[dict]]]:
    """Rounds of measurements, by the way that is loaded and the number of calls in flight; the ways take turns."""
    found = {name: {str(in_flight): [] for in_flight in arguments.in_flight} for name in ways}
    for _ in range(arguments.rounds):
        for in_flight in arguments.in_flight:
            for name, load in ways.items():
                found[name][str(in_flight)].append(_figures(load(in_flight)))
    return found


def _figures(result: LoadResult) -> dict:
    late = Percentiles.of(result.latencies_s.get("OK", ()))
    return {
        "images_per_s": result.in_time / result.seconds,
        "p50_ms": late.p50 if late else 0.0,
        "p99_ms": late.p99 if late else 0.0,
        "failed": result.ended - len(result.latencies_s.get("OK", ())),
        "generator_ms": 1000 * result.generator_cpu_s / max(1, result.in_time),
    }


def _loop_round(process: subprocess.Popen, arguments) -> dict:
    process.stdin.write(f"{arguments.images} {arguments.seconds}\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


def _summary(rounds: list[dict]) -> dict:
    """Medians, and the spread of the speed."""
    found = {key: round(median(one[key] for one in rounds), 3) for key in rounds[0]}
    speeds = [one["images_per_s"] for one in rounds]
    return {**found, "lowest": round(min(speeds), 3), "highest": round(max(speeds), 3), "rounds": len(rounds)}


@contextlib.contextmanager
def _process(what: dict) -> Iterator[tuple[subprocess.Popen, int]]:
    """A peer's server, or the loop, in a session of its own; all of it is gone on the way out."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = "loop" if what["system"] == "loop" else f"{what['system']}_server"
    threads = max(1, usable_cores() // what["workers"])
    flags = {name: what[name] for name in ("model", "runtime", "precision", "workers")} | {
        "port": port,
        "threads": threads,
    }
    command = [sys.executable, str(HERE / f"{script}.py"), *(f"--{name}={value}" for name, value in flags.items())]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE if script == "loop" else log,
            stderr=log,
            text=True,
            start_new_session=True,
            cwd=HERE,
            env=os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": str(threads)},
        )
        try:
            if script == "loop" and process.stdout.readline() != "ready\n":
                raise SystemExit("the loop did not start")
            yield process, port
        except BaseException:
            log.seek(0)
            sys.stderr.writelines(log.readlines()[-15:])
            raise
        finally:
            _stop(process)


def _stop(process: subprocess.Popen) -> None:
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(20)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _wait(process: subprocess.Popen, address: str, path: str, image: bytes) -> list[list]:
    """Until it answers an image; returns the answer, best class first."""
    connection = HttpConnection(address, path)
    request = connection.prepare(image)
    head, _, body = request.partition(b"\r\n\r\n")
    kind = head.partition(b"Content-Type: ")[2].split(b"\r\n")[0].decode()
    until_s = time.monotonic() + START_S
    while time.monotonic() < until_s and process.poll() is None:
        asked = urllib.request.Request(f"http://{address}{path.partition('#')[0]}", body, {"Content-Type": kind})
        try:
            with urllib.request.urlopen(asked, timeout=60) as reply:  # noqa: S310 - our own address
                return json.loads(reply.read())["classes"]
        except urllib.error.HTTPError as error:
            if error.code not in (404, 503):  # not up yet
                break
            time.sleep(0.5)
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.5)
    raise SystemExit(f"{address}{path} does not answer")


if __name__ == "__main__":
    main()
