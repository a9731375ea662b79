"""The whole benchmark: models, peers and memory, then the page and the verdicts.

    make bench
    make bench-short
    python benchmarks/run.py [--part models] [--part peers] [--part soak] [--short]

Each part is a command that can be run by itself; it is printed before it runs. Results go to benchmarks/results, and
docs/performance.md is written from what lies there. With ``--short`` a part of it is measured, for a look: results go
to a temporary folder and the page stays as it is.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
EVALUATION_IMAGES = ROOT.parent / "shared" / "data" / "imagenet100"
PEERS_PYTHON = ROOT / ".venv-bench" / "bin" / "python"
PARTS = ("models", "peers", "soak")
MODELS = ("mobilenet_v2", "resnet50", "nanodet_g")


def main() -> None:
    """Run the parts, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=PARTS, help="only this one; repeatable")
    parser.add_argument("--short", action="store_true", help="one model, short rounds, nothing written")
    parser.add_argument(
        "--images", type=Path, default=EVALUATION_IMAGES if EVALUATION_IMAGES.is_dir() else ROOT / "samples"
    )
    arguments = parser.parse_args()
    parts = arguments.part or PARTS
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) if arguments.short else RESULTS
        for part in PARTS:
            for command in _commands(part, arguments.images, results, short=arguments.short) if part in parts else ():
                print("$", shlex.join(command), file=sys.stderr, flush=True)
                subprocess.run(command, check=part != "soak", cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
        page = [sys.executable, "benchmarks/page.py", "--results", str(results)]
        subprocess.run([*page, *(["--print"] if arguments.short else [])], check=True, cwd=ROOT)


def _commands(part: str, images: Path, results: Path, *, short: bool) -> Iterator[list[str]]:
    if part == "models":
        for precision in ("bf16",) if short else ("bf16", "fp32"):
            yield [
                *(sys.executable, "-m", "vision_service", "bench"),
                *(part for model in (MODELS[:1] if short else MODELS) for part in ("--model", model)),
                *("--manifest", "benchmarks/models.toml", "--runtime", "openvino", "--precision", precision),
                *("--images", str(images), "--in-flight", "32", "--json", str(results / f"models-{precision}.json")),
                *("--rounds", "1" if short else "3", "--seconds", "2" if short else "8"),
                *(("--overload", "3") if precision == "bf16" else ()),
            ]
    elif part == "peers":
        peers = [str(PEERS_PYTHON), "benchmarks/peers/run.py", "--images", str(images)]
        peers += ["--output", str(results / "peers.json")]
        if short:
            yield [*peers, "--model", "mobilenet_v2", "--row", "openvino:bf16", "--seconds", "2", "--rounds", "1"]
            return
        yield [*peers, "--model", "mobilenet_v2", "--seconds", "3", "--rounds", "2"]
        yield [*peers, "--model", "resnet50", "--seconds", "4", "--rounds", "1"]
    else:
        calls = ["--calls", "1000"] if short else []
        yield [sys.executable, "benchmarks/soak.py", *calls, "--output", str(results / "soak.json")]


if __name__ == "__main__":
    main()
