"""Ways to execute a network."""

from vision_service.runtimes.base import CannotCompile, Execution, Forward, Forwards, Precision, Runtime, Workload
from vision_service.runtimes.calibration import Calibration
from vision_service.runtimes.choose import Compiled, choose_precision, compile_network
from vision_service.runtimes.table import RUNTIMES, create_runtime

__all__ = [
    "RUNTIMES",
    "Calibration",
    "CannotCompile",
    "Compiled",
    "Execution",
    "Forward",
    "Forwards",
    "Precision",
    "Runtime",
    "Workload",
    "choose_precision",
    "compile_network",
    "create_runtime",
]
