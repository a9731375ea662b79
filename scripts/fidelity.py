"""Compare what is served with what the models' original implementations give, and write docs/fidelity.md.

    make fidelity           everything, and the page
    make fidelity-short     what can be compared in some minutes; writes nothing
    python scripts/fidelity.py [--only SECTION]... [--short] [--data ../shared] [--output docs/fidelity.md]

Our side is `vision_service.engine.build.local_pipeline`: the same decoding, preprocessing, batching, networks and
postprocessing that the server runs. The other side is described in the page itself. Needs the extra ``fidelity`` and a
folder with ``data/`` and ``pretrained/`` that is not part of the project. Fails if a figure misses what is required.
``--only`` replaces those sections of the page and leaves the others, if they were made with the same versions.
"""

from __future__ import annotations

import argparse
import re
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from fidelity_page import Page, Run, Section

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    *("torch", "torchvision", "numpy", "opencv-python", "pycocotools"),
    *("openvino", "onnxruntime", "onnx", "ai-edge-litert"),
)

SECTIONS = ("embedded", "darknet", "smp_timm", "torchvision", "trained", "runtimes", "ultralytics")
"""In the page's order. NAME is the constant `SECTION` of the module fidelity_NAME."""

INTRODUCTION = """# Fidelity

How far what is served agrees with the models' original implementations. Written by

    make fidelity

which runs `scripts/fidelity.py`: change that, not this page. It needs the extra `fidelity` and a folder that is not
part of the project, `../shared` unless `--data` says otherwise, with the photos (`data/`) and the original model files
(`pretrained/`). The command fails if a figure misses what is required of it. `tests/unit/test_networks_reference.py`
holds the networks alone to the originals' outputs, within 1e-4 (MobileNetV2, whose weights are rounded: probabilities
within 2e-3), and needs neither.

"Ours" is the whole way of a request in process, from the file's bytes to the prediction, which is the path that the
server runs; on {device}, {precision}, in the runtime that `auto` takes ([runtimes.md](runtimes.md)) where a row names
none. Made with

{versions}
"""

MARK = "<!-- section {name} -->"


def sections() -> dict[str, Section]:
    """All of them, by name; only their modules are imported that can run here."""
    return {name: import_module(f"fidelity_{name}").SECTION for name in SECTIONS}


def compare(chosen: list[Section], run: Run) -> tuple[dict[str, list[str]], list[str]]:
    """The lines of each section, and the rows that missed their marks."""
    lines, missed = {}, []
    for section in chosen:
        if section.needs and find_spec(section.needs) is None:
            print(f"\nleft out: {section.name}, which needs the package {section.needs}", flush=True)
            continue
        page = Page()
        section.compare(page, run)
        lines[section.name] = page.lines
        missed += page.missed
    return lines, missed


def earlier(page: Path, introduction: str) -> dict[str, list[str]]:
    """The sections of a page that was made with the same versions; exits when it was not."""
    if not page.exists():
        return {}
    head, *parts = re.split(r"<!-- section (\w+) -->\n", page.read_text())
    if head.strip() != introduction.strip():
        sys.exit(f"{page} was made with other versions or options: run everything, without --only")
    bodies = [part.partition("\n## ")[0].rstrip("\n").split("\n") for part in parts[1::2]]
    return dict(zip(parts[::2], bodies, strict=True))


def render(introduction: str, every: dict[str, Section], lines: dict[str, list[str]]) -> str:
    """The page, with the sections that there are."""
    there = [section for name, section in every.items() if name in lines]
    text = introduction
    for section in there:
        text += "\n".join(["", MARK.format(name=section.name), *lines[section.name], ""])
    text += "\n## What the short version covers\n\n`make fidelity-short` compares, by section:\n\n"
    text += "".join(f"- {section.name}: {section.short or 'nothing'}\n" for section in there)
    return text + "\n## What each was compared with\n\n" + "".join(section.against for section in there)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "is not installed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared", help="folder with data/ and pretrained/")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/fidelity.md")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", action="append", choices=SECTIONS, help="section to make again; repeatable")
    parser.add_argument("--short", action="store_true", help="compare less, in some minutes, and write no page")
    args = parser.parse_args()
    if not (args.data / "data").is_dir() or not (args.data / "pretrained").is_dir():
        sys.exit(f"{args.data} has no data/ and pretrained/; say where they are with --data")
    versions = "\n".join(f"- {name} {_version(name)}" for name in PACKAGES)
    precision = "in float32" if args.device == "cpu" else "in half precision"
    introduction = INTRODUCTION.format(versions=versions, device=args.device, precision=precision)
    every = sections()
    kept = earlier(args.output, introduction) if args.only and not args.short else {}
    chosen = [section for name, section in every.items() if not args.only or name in args.only]
    if args.short:
        chosen = [section for section in chosen if section.short]
    photos = sorted((ROOT / "samples").glob("*.jpg"))
    lines, missed = compare(chosen, Run(args.data, photos, args.device, args.short))
    if not args.short:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(render(introduction, every, kept | lines))
        print(f"wrote {args.output}")
    if missed:
        sys.exit("below what is required:\n" + "\n".join(missed))


if __name__ == "__main__":
    main()
