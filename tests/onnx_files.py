"""Small ONNX graphs for tests, built node by node."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

_OPSET = [helper.make_opsetid("", 17)]


def graph(path: Path, nodes, inputs, outputs, **constants) -> Path:
    """Write a graph.

    Args:
        path: where to.
        nodes: (operator, inputs, outputs, attributes) each.
        inputs: name -> shape, float32, or -> (type, shape).
        outputs: likewise.
        constants: name -> array.
    """

    def value(name, what):
        kind, shape = what if isinstance(what, tuple) else (TensorProto.FLOAT, what)
        return helper.make_tensor_value_info(name, kind, shape)

    made = helper.make_graph(
        [helper.make_node(op, takes, gives, **attributes) for op, takes, gives, attributes in nodes],
        "test",
        [value(*item) for item in inputs.items()],
        [value(*item) for item in outputs.items()],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    onnx.save(helper.make_model(made, opset_imports=_OPSET, ir_version=8), str(path))
    return path


def weights(path: Path) -> dict:
    """The field ``weights`` of a spec."""
    return {"file": str(path), "licence": "none", "source": "a test"}


@cache
def tiny_onnx(task: str) -> dict:
    """The field ``weights`` of a spec for a graph of three classes and inputs of 64 x 64."""
    rng = np.random.default_rng(0)
    folder = Path(tempfile.mkdtemp(prefix="vision-service-test-"))
    conv = rng.normal(0, 1, (3, 3, 3, 3)).astype(np.float32)
    planes = ("Conv", ["x", "w"], ["y"], {"pads": [1, 1, 1, 1]})
    batch = {"x": ["N", 3, 64, 64]}
    path = folder / f"{task}.onnx"
    if task == "classify":
        nodes = [planes, ("Relu", ["y"], ["a"], {}), ("GlobalAveragePool", ["a"], ["p"], {})]
        nodes.append(("Flatten", ["p"], ["logits"], {}))
        graph(path, nodes, batch, {"logits": ["N", 3]}, w=conv)
    elif task == "detect":
        w = rng.normal(0, 0.05, (7, 3, 8, 8)).astype(np.float32)
        w[4:] *= 10
        bias = np.array([32, 32, 20, 20, 0, 0, 0], np.float32)
        nodes = [
            ("Conv", ["x", "w", "b"], ["c"], {"strides": [8, 8]}),
            ("Reshape", ["c", "flat"], ["r"], {}),
            ("Split", ["r", "sizes"], ["boxes", "logits"], {"axis": 1}),
            ("Sigmoid", ["logits"], ["scores"], {}),
            ("Concat", ["boxes", "scores"], ["rows"], {"axis": 1}),
        ]
        shapes = {"flat": np.array([0, 7, -1]), "sizes": np.array([4, 3])}
        graph(path, nodes, batch, {"rows": ["N", 7, 64]}, w=w, b=bias, **shapes)
    elif task == "segment":
        graph(path, [planes], batch, {"y": ["N", 3, 64, 64]}, w=conv)
    else:
        nodes = [planes, ("Sigmoid", ["y"], ["image"], {})]
        graph(path, nodes, batch, {"image": ["N", 3, 64, 64]}, w=conv)
    return weights(path)
