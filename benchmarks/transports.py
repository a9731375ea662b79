"""What takes calls, compared: gRPC's own server and ours, on two ports of one server with one model, in turn.

Two servers that are started one after the other differ by more than this does: their models chose batches and their
memory by themselves. So one process has both, and each window of one stands beside the next of the other.

    python benchmarks/transports.py --model mobilenet_v2 --precision fp32 --images DIR --json FILE
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from vision_service.bench.plan import Plan, Setup, Variant
from vision_service.bench.served import Target, running
from vision_service.bench.stats import Percentiles

ROOT = Path(__file__).resolve().parent.parent
TRANSPORTS = ("grpcio", "asyncio")


def serve(model: str, precision: str) -> None:
    """A server that listens with gRPC's server, and with ours on a second port; prints both."""
    os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_listener")  # as `serve` does for grpcio
    from vision_service.config.settings import ServerSettings
    from vision_service.rpc.server import RpcServer
    from vision_service.server.app import VisionServer, serve

    settings = ServerSettings.read(
        host="127.0.0.1",
        port=0,
        models=(model,),
        manifests=(ROOT / "benchmarks" / "models.toml",),
        runtime="openvino",
        precision=precision,
        transport="grpcio",
    )
    second: list[RpcServer] = []

    def ready(server: VisionServer) -> None:
        ours = RpcServer(settings.max_message_bytes)
        ours.add_generic_rpc_handlers((server.calls,))
        port = ours.add_insecure_port("127.0.0.1:0")
        second.append(ours)
        starting = asyncio.ensure_future(ours.start())
        starting.add_done_callback(lambda _: print("ports", server.port, port, flush=True))

    sys.exit(asyncio.run(serve(settings, ready)))


def compare(target: dict[str, Target], plan: Plan, pairs: int, rate: float) -> dict[str, object]:
    """Windows of both in turn; rate 0: 32 calls in flight."""
    load = {"in_flight": 32, "seconds": 2.0, "warmup_s": 0.6}
    if rate:
        load = {"rate": rate, "seconds": 3.0, "warmup_s": 2.0}  # until the queue is full
    found: dict[str, list[dict[str, float]]] = {name: [] for name in TRANSPORTS}
    for pair in range(pairs):
        for name in TRANSPORTS if pair % 2 else TRANSPORTS[::-1]:
            result = target[name].load(plan, **load)
            refused = Percentiles.of(result.latencies_s.get("RESOURCE_EXHAUSTED", ()))
            found[name].append(
                {
                    "images_per_s": result.in_time / result.seconds,
                    "server_cpu_ms": 1000 * result.server_cpu_s / max(1, result.in_time),
                    "refused_p99_ms": refused.p99 if refused else 0.0,
                }
            )
    ratios = [b["images_per_s"] / a["images_per_s"] for a, b in zip(*found.values(), strict=True)]
    again = sorted(statistics.median(random.choices(ratios, k=pairs)) for _ in range(2000))  # noqa: S311 - bootstrap
    report: dict[str, object] = {"rate": rate, "pairs": pairs, "ratio": statistics.median(ratios)}
    report["ratio_90"] = again[100], again[1900]
    for name, rows in found.items():
        report[name] = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    return report


def main() -> None:
    """Parse, start, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mobilenet_v2")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--images", type=Path, default=ROOT.parent / "shared" / "data" / "imagenet100")
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.serve:
        serve(chosen.model, chosen.precision)
    images = [path.read_bytes() for path in sorted(chosen.images.iterdir())[:100]]
    plan = Plan([Variant(chosen.model, "openvino", chosen.precision)], Setup(None, ()), images)
    command = [sys.executable, __file__, "--serve", "--model", chosen.model, "--precision", chosen.precision]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None, "it is a pipe"
        ports = next((line.split()[1:] for line in process.stdout if line.startswith("ports ")), None)
        if ports is None:
            sys.exit(f"the server did not start; {' '.join(command)} says why")
        with running(f"127.0.0.1:{ports[0]}", chosen.model) as first:
            target = {
                name: replace(first, address=f"127.0.0.1:{port}", pid=process.pid)
                for name, port in zip(TRANSPORTS, ports, strict=True)
            }
            closed = compare(target, plan, chosen.pairs, 0.0)
            print(json.dumps(closed, indent=1), flush=True)
            over = compare(target, plan, chosen.pairs // 2, 3.0 * closed["asyncio"]["images_per_s"])
            print(json.dumps(over, indent=1))
    finally:
        process.terminate()
        process.wait(60)
    if chosen.json:
        report = {"model": chosen.model, "precision": chosen.precision, "closed": closed, "overload": over}
        chosen.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
