"""Turn a checkpoint of Ultralytics, which is a pickle, into safetensors, an architecture and a manifest.

    python scripts/convert_ultralytics.py best.pt --trust --output models/

Loading a pickle runs whatever is in it, so this is to be done once, where it may, with a file whose origin is known;
serving the result needs no pickle: `vision-service serve --manifest models/best.toml --model best`. Needs the package
ultralytics (AGPL-3.0; the converted weights stay under the terms that the checkpoint came with).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from vision_service.backends.ultralytics import read_checkpoint
from vision_service.config import WeightsSpec
from vision_service.errors import VisionError
from vision_service.zoo.ultralytics import preprocess_of


def convert(checkpoint: Path, folder: Path, *, trusted: bool, licence: str = "AGPL-3.0") -> Path:
    """Write NAME.safetensors, NAME.yaml and NAME.toml.

    Args:
        checkpoint: NAME.pt.
        folder: where to; made when it is missing.
        trusted: whether the user trusts the file.
        licence: of the weights.

    Returns:
        The manifest.

    Raises:
        WeightsError: it cannot be read, is no such checkpoint, or is not trusted.
    """
    source = f"converted from {checkpoint.name}"
    weights = WeightsSpec(file=str(checkpoint), licence=licence, source=source)
    module: Any = read_checkpoint(f"weights {checkpoint}", weights, trusted)
    if module is None:
        raise SystemExit(f"{checkpoint} holds tensors only, so there is nothing to convert: serve it as it is")
    folder.mkdir(parents=True, exist_ok=True)
    name = checkpoint.stem
    tensors, architecture = folder / f"{name}.safetensors", folder / f"{name}.yaml"
    save_file({key: value.contiguous().clone() for key, value in module.state_dict().items()}, tensors)
    architecture.write_text(json.dumps(module.yaml, default=str, indent=1) + "\n", encoding="utf-8")  # JSON is YAML
    manifest = folder / f"{name}.toml"
    manifest.write_text(_manifest(name, module, tensors, architecture, licence, source), encoding="utf-8")
    return manifest


def _manifest(name: str, module: Any, tensors: Path, architecture: Path, licence: str, source: str) -> str:
    head = str(module.yaml["head"][-1][2])
    kind = {"Classify": f"{name}-cls", "RTDETRDecoder": "rtdetr"}.get(head, name.removesuffix("-cls"))
    task = "classify" if head == "Classify" else "detect"
    names = [str(module.names[index]) for index in sorted(module.names)]
    fields = preprocess_of(kind)
    lines = [
        "[[model]]",
        f"name = {json.dumps(name)}",
        f'task = "{task}"',
        f'backend = "ultralytics_{"classifier" if task == "classify" else "detector"}"',
        f"classes = {json.dumps(names)}",
        f"params = {_inline(fields['params'])}",
        f"preprocess = {_inline(fields['preprocess'])}",
        "",
        "[model.weights]",
        f'file = "{tensors.name}"',
        f'sha256 = "{_sha256(tensors)}"',
        f"licence = {json.dumps(licence)}",
        f"source = {json.dumps(source)}",
        f'companions = [{{ file = "{architecture.name}", sha256 = "{_sha256(architecture)}" }}]',
    ]
    return "\n".join(lines) + "\n"


def _inline(value: Any) -> str:
    """A value as TOML on one line."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_inline(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_inline, value)) + "]"
    return json.dumps(value)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--output", type=Path, default=Path.cwd(), help="folder, the current one unless given")
    parser.add_argument("--trust", action="store_true", help="the file may run code while it is loaded")
    parser.add_argument("--licence", default="AGPL-3.0", help="of the weights")
    args = parser.parse_args()
    try:
        manifest = convert(args.checkpoint, args.output, trusted=args.trust, licence=args.licence)
    except VisionError as error:
        sys.exit(str(error))
    print(f"wrote {manifest}")


if __name__ == "__main__":
    main()
