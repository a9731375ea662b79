"""Post-training quantization by NNCF: int8 weights and activations, their scales measured on the user's images."""

from __future__ import annotations

import logging
import platform
from pathlib import Path
from typing import Any

from vision_service.errors import ConfigError
from vision_service.runtimes._exported import first_line
from vision_service.runtimes._openvino_library import load_library
from vision_service.runtimes.base import CannotCompile, Workload
from vision_service.runtimes.calibration import Calibration

_WITH_WEIGHTS = {
    "Convolution",
    "GroupConvolution",
    "ConvolutionBackpropData",
    "GroupConvolutionBackpropData",
    "MatMul",
}

_X86 = {"x86_64", "AMD64"}
_DOT_PRODUCTS = {"avx512_vnni", "avx_vnni", "amx_int8"}
"""Flags of x86 processors that add up products of 8-bit numbers in 32 bits."""


def weight_bits(machine: str | None = None, cpuinfo: Path = Path("/proc/cpuinfo")) -> int:
    """How many of the eight bits weights may use.

    AVX2 and AVX-512 without VNNI add two products of eight by eight bits in 16, which overflow and are cut off
    (``vpmaddubsw``). With weights of seven bits no sum of two does: 2 x 255 x 64 < 32768.

    Args:
        machine: its kind; ``None``: this one's.
        cpuinfo: where the kernel writes the processor's flags; without it seven are safe.
    """
    if (machine or platform.machine()) not in _X86:
        return 8
    try:
        flags = {flag for line in cpuinfo.read_text().splitlines() if line.startswith("flags") for flag in line.split()}
    except OSError:
        return 7
    return 8 if flags & _DOT_PRODUCTS else 7


def need_calibration(work: Workload) -> Calibration:
    """The workload's images.

    Raises:
        ConfigError: there are none; says how to give some.
    """
    if work.calibration is None:
        raise ConfigError(
            "precision int8 needs images to measure its scales on: set calibration_folder (or "
            "model.NAME.calibration_folder) to a folder of a hundred or more photos like those that will come"
        )
    return work.calibration


def quantize(model: Any, work: Workload) -> Any:
    """A model of OpenVINO in int8.

    Args:
        model: takes uint8 ``[N, h, w, 3]`` and int64 ``[N, 2]``.
        work: with the images to calibrate with.

    Raises:
        ConfigError: NNCF is not installed, or there are no images.
        CannotCompile: it cannot quantize this one.
    """
    calibration = need_calibration(work)
    nncf = load_library("nncf", "int8")
    logging.getLogger("nncf").setLevel(logging.ERROR)
    batches = [[images.numpy(), sizes_hw.numpy()] for images, sizes_hw in calibration.batches()]
    try:
        # Mixed: symmetric scales for weights, asymmetric ones for activations, which are not centred on zero here.
        return nncf.quantize(
            model,
            nncf.Dataset(batches),
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=len(batches),
            # The default is right for the first layer alone. NNCF leaves depthwise layers eight bits either way.
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                overflow_fix=nncf.OverflowFix.ENABLE if weight_bits() == 7 else nncf.OverflowFix.FIRST_LAYER
            ),
            ignored_scope=nncf.IgnoredScope(names=_tail(model), validate=False),
        )
    except Exception as error:  # its errors have no base class of their own
        raise CannotCompile(f"NNCF cannot quantize the network: {first_line(error)}") from error


def _tail(model: Any) -> list[str]:
    """Names of the operations after the last layers with weights: 256 steps are too few for coordinates.

    They cost next to nothing, and a picture larger than those calibrated with would be cut off.
    """
    ahead: set[str] = set()  # from which a layer with weights is reached, or that are one
    tail = []
    for op in reversed(model.get_ordered_ops()):
        readers = {
            port.get_node().get_friendly_name() for output in op.outputs() for port in output.get_target_inputs()
        }
        if op.get_type_name() in _WITH_WEIGHTS or readers & ahead:
            ahead.add(op.get_friendly_name())
        elif op.get_type_name() not in ("Result", "Parameter", "Constant"):
            tail.append(op.get_friendly_name())
    return tail
