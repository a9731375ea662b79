"""Make the files in weights/ from the originals that they came from.

    python scripts/convert_pretrained.py [--originals ../shared/pretrained] [--out weights] [--check]

Needs the extra ``fidelity`` (onnx and ai-edge-litert read two of the formats). The result depends on the originals
alone: the same bytes come out again. ``--check`` writes nothing and fails if a file in ``--out`` differs. After a
change, copy the printed sha256 sums into the manifest.

Batch norms are folded where the original graph has them folded (all but MobileNetV2). Half precision is stored where
the original is stored in half precision, and for MobileNetV2's convolutions and its classifier; ``docs/fidelity.md``
has the effect.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor
from torchvision.models import MobileNet_V2_Weights

Parameters = dict[str, Tensor]


def _half_if_exact(parameters: Parameters) -> Parameters:
    """In half precision, provided that no value changes."""
    half = {name: value.half() for name, value in parameters.items()}
    changed = [name for name, value in parameters.items() if not torch.equal(half[name].float(), value)]
    if changed:
        sys.exit(f"not stored in half precision by the original: {changed[:5]}")
    return half


def mobilenet_v2(originals: Path) -> Parameters:
    """Torchvision's state dict; convolutions and classifier in half precision, batch norms as they are."""
    state = torch.load(originals / "mobilenet_v2/mobilenet_v2-b0353104.pth", weights_only=True)
    return {
        name: value.half() if value.ndim > 1 else value
        for name, value in state.items()
        if not name.endswith("num_batches_tracked")  # counts training steps; inference has no use for it
    }


def _csp_block(name: str, blocks: int) -> list[str]:
    inner = [f"{name}.blocks.{i}.{part}.conv" for i in range(blocks) for part in ("squeeze", "mix")]
    return [f"{name}.enter.conv", *inner, f"{name}.leave.conv"]


def nanodet_g(originals: Path) -> Parameters:
    """The ONNX graph's convolutions, in its order, under our names."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(originals / "nanodet_g/nanodet_g_416.onnx").graph
    constants = {n.output[0]: numpy_helper.to_array(n.attribute[0].t) for n in graph.node if n.op_type == "Constant"}
    kernels = [constants[node.input[1]] for node in graph.node if node.op_type == "Conv"]
    biases = [constants[n.input[1]] for n in graph.node if n.op_type == "Add" and n.input[1] in constants]
    names = ["backbone.stem.conv", *_csp_block("backbone.stage4", 1)]
    for level, (stage, blocks) in enumerate((("stage8", 2), ("stage16", 2), ("stage32", 3))):
        names += [*_csp_block(f"backbone.{stage}", blocks), f"neck.laterals.{level}"]
    names += [f"heads.{level}.{part}" for level in range(3) for part in ("shared.conv", "predict")]
    parameters: Parameters = {}
    for name, kernel, bias in zip(names, kernels, biases, strict=True):
        parameters[f"{name}.weight"] = torch.from_numpy(kernel.copy())
        parameters[f"{name}.bias"] = torch.from_numpy(bias.copy())
    return _half_if_exact(parameters)


def _selfie_names() -> list[str]:
    """Our names for the graph's convolutions, in its order."""
    attention = ["attention.reduce", "attention.expand"]
    names = ["stem"]
    for block, attended in [("encoder4", True), ("encoder8.0", False), ("encoder8.1", False)] + [
        (f"encoder16.{i}", True) for i in range(5)
    ]:
        names += [f"{block}.{p}" for p in ["expand", "filter", *(attention if attended else []), "project"]]
    names += ["aspp.features", "aspp.context"]
    for stage in ("decoder8", "decoder4", "decoder2"):
        names += [f"{stage}.{p}" for p in ["reduce", *attention, "mix", "filter"]]
    return [*names, "predict"]


def selfie_segmentation(originals: Path) -> Parameters:
    """The TFLite graph's convolutions, in its order, under our names."""
    from ai_edge_litert import schema_py_generated as schema

    data = (originals / "selfie_segmentation/selfie_segmentation.tflite").read_bytes()
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAsModel(data, 0))
    graph = model.subgraphs[0]
    opcode = [max(c.builtinCode, c.deprecatedBuiltinCode) for c in model.operatorCodes]
    kinds = schema.BuiltinOperator
    constants: dict[int, np.ndarray] = {}
    convolutions = []
    for op in graph.operators:
        kind = opcode[op.opcodeIndex]
        if kind == kinds.DEQUANTIZE:
            tensor = graph.tensors[op.inputs[0]]
            stored = np.frombuffer(bytes(model.buffers[tensor.buffer].data), np.float16)
            constants[int(op.outputs[0])] = stored.reshape(tensor.shape)
        elif kind in (kinds.CONV_2D, kinds.DEPTHWISE_CONV_2D, kinds.CUSTOM):
            convolutions.append((kind, constants[int(op.inputs[1])], constants[int(op.inputs[2])]))
    parameters: Parameters = {}
    for name, (kind, kernel, bias) in zip(_selfie_names(), convolutions, strict=True):
        # Stored as [out, kh, kw, in]; depthwise as [1, kh, kw, channels].
        order = (0, 3, 1, 2) if kind == kinds.CONV_2D else (3, 0, 1, 2)
        parameters[f"{name}.weight"] = torch.from_numpy(kernel.transpose(order).copy())
        parameters[f"{name}.bias"] = torch.from_numpy(bias.copy())
    return parameters


ESRGAN_NAMES = {
    "F_m1": "shallow",
    "F_0": "enter",
    "F_1_1": "blocks.0.grow",
    "LFF_1": "blocks.0.fuse",
    "F_2_1": "blocks.1.grow",
    "LFF_2": "blocks.1.fuse",
    "GFF_1": "fuse.0",
    "GFF_2": "fuse.1",
    "UPN1": "refine.0",
    "UPN2": "refine.2",
    "UPN3": "refine.4",
    "SR": "reconstruct",
}


def esrgan_slim_x2(originals: Path) -> Parameters:
    """The Keras layers' kernels, and their biases over 255 (see `vision_service.networks.esrgan_slim`)."""
    folder = originals / "esrgan_slim/x2"
    (group,) = json.loads((folder / "model.json").read_text())["weightsManifest"]
    values = np.frombuffer(b"".join((folder / path).read_bytes() for path in group["paths"]), "<f4")
    parameters: Parameters = {}
    for entry in group["weights"]:
        layer, kind = entry["name"].split("/")
        count = int(np.prod(entry["shape"]))
        value, values = torch.from_numpy(values[:count].reshape(entry["shape"]).copy()), values[count:]
        if kind == "kernel":  # [kh, kw, in, out]
            parameters[f"{ESRGAN_NAMES[layer]}.weight"] = value.permute(3, 2, 0, 1).contiguous()
        else:
            parameters[f"{ESRGAN_NAMES[layer]}.bias"] = (value.double() / 255.0).float()
    if len(values):
        sys.exit(f"{folder}: {len(values)} numbers are left over")
    return parameters


CONVERTERS: dict[str, Callable[[Path], Parameters]] = {
    "mobilenet_v2": mobilenet_v2,
    "nanodet_g": nanodet_g,
    "selfie_segmentation": selfie_segmentation,
    "esrgan_slim_x2": esrgan_slim_x2,
}


def imagenet1k() -> bytes:
    """Torchvision's names of ImageNet's classes, in their order."""
    return ("\n".join(MobileNet_V2_Weights.IMAGENET1K_V1.meta["categories"]) + "\n").encode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--originals", type=Path, default=Path("../shared/pretrained"))
    parser.add_argument("--out", type=Path, default=Path("weights"))
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    args = parser.parse_args()
    files = {f"{name}.safetensors": save(convert(args.originals)) for name, convert in CONVERTERS.items()}
    files["classes/imagenet1k.txt"] = imagenet1k()
    differing = []
    for name, data in files.items():
        target = args.out / name
        if args.check:
            if not target.is_file() or target.read_bytes() != data:
                differing.append(name)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
        print(f"{hashlib.sha256(data).hexdigest()}  {len(data):>9}  {name}")
    if differing:
        sys.exit(f"these differ from what the originals give: {', '.join(differing)}")


if __name__ == "__main__":
    main()
