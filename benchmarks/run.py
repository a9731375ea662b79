"""The whole benchmark: models, peers and memory, then the page and the verdicts.

    make bench
    make bench-short
    python benchmarks/run.py [--part models] [--part peers] [--part soak] [--short]

Each part is a command that can be run by itself; it is printed before it runs. Results go to benchmarks/results, and
docs/performance.md is written from what lies there. A processor without bf16 instructions is measured in fp32 alone,
and what was measured in bf16 on another one stays. With ``--short`` a part of it is measured, for a look: results go to
a temporary folder and the page stays as it is.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from vision_service.errors import ConfigError
from vision_service.runtimes.table import create_runtime

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
EVALUATION_IMAGES = ROOT.parent / "shared" / "data" / "imagenet100"
CALIBRATION_IMAGES = ROOT.parent / "shared" / "data" / "voc30"
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
    precisions = _precisions()
    if "bf16" not in precisions:
        print("this processor has no bf16 instructions: fp32 alone is measured", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) if arguments.short else RESULTS
        for part in PARTS:
            if part not in parts:
                continue
            for command in _commands(part, arguments.images, results, precisions, short=arguments.short):
                print("$", shlex.join(command), file=sys.stderr, flush=True)
                subprocess.run(command, check=part != "soak", cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
        page = [sys.executable, "benchmarks/page.py", "--results", str(results)]
        subprocess.run([*page, *(["--print"] if arguments.short else [])], check=True, cwd=ROOT)


def _precisions() -> tuple[str, ...]:
    """What OpenVINO has instructions for here, the fastest first."""
    try:
        create_runtime("openvino", torch.device("cpu")).check_precision("bf16")
    except ConfigError:
        return ("fp32",)
    return ("bf16", "fp32")


def _commands(part: str, images: Path, results: Path, precisions: Sequence[str], *, short: bool) -> Iterator[list[str]]:
    """What measures a part.

    Args:
        part: one of `PARTS`.
        images: a folder of JPEG files.
        results: where figures go.
        precisions: the first one in full, the others without overload; for a look the first one alone.
        short: for a look.
    """
    fastest = precisions[0]
    if part == "models":
        for precision in precisions[:1] if short else precisions:
            yield [
                *(sys.executable, "-m", "vision_service", "bench"),
                *(part for model in (MODELS[:1] if short else MODELS) for part in ("--model", model)),
                *("--manifest", "benchmarks/models.toml", "--runtime", "openvino", "--precision", precision),
                *("--images", str(images), "--in-flight", "32", "--json", str(results / f"models-{precision}.json")),
                *(
                    "--rounds",
                    "1" if short else "3",
                    "--seconds",
                    "2" if short else "16",
                    "--turns",
                    "2" if short else "8",
                ),
                *(("--overload", "3") if precision == fastest else ()),
            ]
    elif part == "peers":
        peers = [str(PEERS_PYTHON), "benchmarks/peers/run.py", "--images", str(images)]
        peers += ["--output", str(results / f"peers-{fastest}.json")]
        if short:
            row = f"openvino:{fastest}"
            yield [*peers, "--model", "mobilenet_v2", "--row", row, "--seconds", "2", "--starts", "1", "--rounds", "1"]
            return
        for row in ("eager:fp32", *(f"openvino:{precision}" for precision in reversed(precisions))):
            peers += ["--row", row]
        calibration = CALIBRATION_IMAGES if CALIBRATION_IMAGES.is_dir() else ROOT / "samples"
        int8 = ["--row", "openvino:int8", "--calibration-folder", str(calibration)]
        yield [*peers, *int8, "--model", "mobilenet_v2", "--seconds", "3", "--starts", "3", "--rounds", "2"]
        yield [*peers, "--model", "resnet50", "--seconds", "4", "--starts", "1", "--rounds", "2"]
    else:
        calls = ["--calls", "1000"] if short else []
        soak = [sys.executable, "benchmarks/soak.py", *calls, "--precision", fastest]
        yield [*soak, "--output", str(results / "soak.json")]


if __name__ == "__main__":
    main()
