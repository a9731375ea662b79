"""Run the original graphs of the embedded models in engines other than ours. For checks; nothing is served by this.

NanoDet-g: the ONNX file, by ONNX Runtime.

Selfie segmentation: the TFLite file, by LiteRT. Its last layer is ``Convolution2DTransposeBias``, an operator that
MediaPipe brings and LiteRT does not have; it is replaced by the built-in ``TRANSPOSE_CONV`` with the same weights,
strides and padding. Everything before it runs as it is in the file.

ESRGAN-slim: the Keras layers in ``model.json``, rebuilt one by one as ONNX operators, by ONNX Runtime.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray

CUSTOM_OPERATOR = b"Convolution2DTransposeBias"


def nanodet_g(originals: Path) -> Callable[[Array], list[tuple[Array, Array]]]:
    """The original detector.

    Returns:
        A function from normalised BGR float32 ``[1, 3, 416, 416]`` to, for each stride 8, 16 and 32, scores after
        the sigmoid ``[1, A, 80]`` and distance logits ``[1, A, 44]``.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(
        originals / "nanodet_g/nanodet_g_416.onnx", providers=["CPUExecutionProvider"]
    )

    def run(x: Array) -> list[tuple[Array, Array]]:
        outputs = session.run(None, {"x": x})
        return list(zip(outputs[0::2], outputs[1::2], strict=True))

    return run


def _without_custom_operator(data: bytes) -> bytes:
    """The TFLite model with its one custom operator replaced by the built-in equivalent."""
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    model = schema.ModelT.InitFromObj(schema.Model.GetRootAsModel(data, 0))
    graph = model.subgraphs[0]
    (index,) = [i for i, code in enumerate(model.operatorCodes) if code.customCode == CUSTOM_OPERATOR]
    code = model.operatorCodes[index]
    code.customCode, code.version = None, 3  # from version 3 on, TRANSPOSE_CONV takes a bias
    code.builtinCode = code.deprecatedBuiltinCode = schema.BuiltinOperator.TRANSPOSE_CONV
    (op,) = [op for op in graph.operators if op.opcodeIndex == index]
    padding, stride_w, stride_h = np.frombuffer(bytes(op.customOptions), "<i4").tolist()
    if (padding, stride_w, stride_h) != (1, 2, 2):
        raise ValueError(f"{CUSTOM_OPERATOR.decode()}: expected no padding and stride 2, got {op.customOptions}")
    shape = np.asarray(graph.tensors[op.outputs[0]].shape, np.int32)
    model.buffers.append(schema.BufferT())
    model.buffers[-1].data = np.frombuffer(shape.tobytes(), np.uint8)
    tensor = schema.TensorT()
    tensor.name, tensor.shape, tensor.type = b"output_shape", np.asarray([4], np.int32), schema.TensorType.INT32
    tensor.buffer = len(model.buffers) - 1
    graph.tensors.append(tensor)
    op.inputs = np.asarray([len(graph.tensors) - 1, op.inputs[1], op.inputs[0], op.inputs[2]], np.int32)
    op.customOptions = None
    op.builtinOptionsType = schema.BuiltinOptions.TransposeConvOptions
    op.builtinOptions = schema.TransposeConvOptionsT()
    op.builtinOptions.padding = schema.Padding.VALID
    op.builtinOptions.strideW = op.builtinOptions.strideH = 2
    builder = flatbuffers.Builder(len(data) + 1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def selfie_segmentation(originals: Path) -> Callable[[Array], Array]:
    """The original segmentation graph.

    Returns:
        A function from RGB float32 ``[256, 256, 3]`` in 0..1 to the probability of a person, float32 ``[256, 256]``.
    """
    from ai_edge_litert.interpreter import Interpreter

    data = (originals / "selfie_segmentation/selfie_segmentation.tflite").read_bytes()
    interpreter = Interpreter(model_content=_without_custom_operator(data), num_threads=1)
    interpreter.allocate_tensors()
    source, sink = interpreter.get_input_details()[0]["index"], interpreter.get_output_details()[0]["index"]

    def run(x: Array) -> Array:
        interpreter.set_tensor(source, x[None])
        interpreter.invoke()
        return np.array(interpreter.get_tensor(sink)[0, :, :, 0])

    return run


def _keras_layer(layer: dict[str, Any], weights: dict[str, Array]) -> tuple[list[Any], list[Any]]:
    """One Keras layer as ONNX nodes and constants; NCHW."""
    from onnx import helper, numpy_helper

    kind, config, name = layer["class_name"], layer["config"], layer["name"]
    inputs = [connection[0] for node in layer["inbound_nodes"] for connection in node]
    if kind == "Conv2D":
        kernel = weights[f"{name}/kernel"].transpose(3, 2, 0, 1)
        if config["strides"] != [1, 1] or config["activation"] != "linear":
            raise ValueError(f"layer {name}: only plain convolutions with stride 1 are known, got {config}")
        constants = [
            numpy_helper.from_array(np.ascontiguousarray(kernel), f"{name}/kernel"),
            numpy_helper.from_array(weights[f"{name}/bias"], f"{name}/bias"),
        ]
        padding = {"same": "SAME_UPPER", "valid": "VALID"}[config["padding"]]
        return [helper.make_node("Conv", [*inputs, *(c.name for c in constants)], [name], auto_pad=padding)], constants
    if kind == "UpSampling2D":
        scales = numpy_helper.from_array(np.asarray([1, 1, *config["size"]], np.float32), f"{name}/scales")
        how = {"mode": config["interpolation"], "nearest_mode": "floor"}
        how["coordinate_transformation_mode"] = "asymmetric"
        return [helper.make_node("Resize", [inputs[0], "", scales.name], [name], **how)], [scales]
    plain = {"Activation": "Relu", "Add": "Add", "Concatenate": "Concat"}[kind]
    if kind == "Activation" and config["activation"] != "relu":
        raise ValueError(f"layer {name}: unknown activation {config['activation']}")
    attributes = {"axis": 1} if kind == "Concatenate" else {}
    return [helper.make_node(plain, inputs, [name], **attributes)], []


def keras_weights(folder: Path) -> dict[str, Array]:
    """The weights beside a TensorFlow.js ``model.json``, by name."""
    (group,) = json.loads((folder / "model.json").read_text())["weightsManifest"]
    values = np.frombuffer(b"".join((folder / path).read_bytes() for path in group["paths"]), "<f4")
    weights = {}
    for entry in group["weights"]:
        count = int(np.prod(entry["shape"]))
        weights[entry["name"]], values = values[:count].reshape(entry["shape"]), values[count:]
    return weights


def esrgan_slim_x2(originals: Path) -> Callable[[Array], Array]:
    """The original super-resolution graph.

    Returns:
        A function from RGB float32 ``[h, w, 3]`` in 0..255 to float32 ``[2 h, 2 w, 3]`` in about 0..255.
    """
    import onnxruntime
    from onnx import TensorProto, helper

    folder = originals / "esrgan_slim/x2"
    config = json.loads((folder / "model.json").read_text())["modelTopology"]["model_config"]["config"]
    weights = keras_weights(folder)
    source, sink = config["input_layers"][0][0], config["output_layers"][0][0]
    nodes, constants = [], []
    for layer in config["layers"]:
        if layer["class_name"] != "InputLayer":
            added, held = _keras_layer(layer, weights)
            nodes += added
            constants += held
    ends = [
        helper.make_tensor_value_info(end, TensorProto.FLOAT, [1, 3, height, width])
        for end, height, width in ((source, "h", "w"), (sink, "H", "W"))
    ]
    graph = helper.make_graph(nodes, "generator", ends[:1], ends[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])

    def run(x: Array) -> Array:
        (y,) = session.run([sink], {source: np.ascontiguousarray(x.transpose(2, 0, 1)[None])})
        return y[0].transpose(1, 2, 0)

    return run
