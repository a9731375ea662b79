"""Which commands `make bench` runs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from tests.helpers import ROOT
from vision_service.errors import ConfigError
from vision_service.runtimes.table import create_runtime

sys.path.insert(0, str(ROOT / "benchmarks"))
import run


def commands(*precisions, short=False):
    return [
        " ".join(command)
        for part in run.PARTS
        for command in run._commands(part, Path("photos"), Path("results"), precisions, short=short)
    ]


def test_a_processor_with_bf16_is_measured_in_both_and_under_overload_in_the_faster():
    bf16, fp32, *peers, soak = commands("bf16", "fp32")
    assert "--precision bf16" in bf16
    assert "--json results/models-bf16.json" in bf16
    assert "--overload 3" in bf16
    assert "--precision fp32" in fp32
    assert "--overload" not in fp32
    assert all("--row eager:fp32 --row openvino:fp32 --row openvino:bf16" in one for one in peers)
    assert all("--output results/peers-bf16.json" in one for one in peers)
    assert ["--row openvino:int8 --calibration-folder" in one for one in peers] == [True, False]
    assert "--precision bf16" in soak


@pytest.mark.parametrize("short", [False, True])
def test_a_processor_without_bf16_is_asked_for_none(short):
    found = commands("fp32", short=short)
    assert len(found) == (3 if short else 4)
    assert not [one for one in found if "bf16" in one]
    assert "--overload 3" in found[0]
    assert "--output results/peers-fp32.json" in found[1]


def test_it_asks_for_what_openvino_takes_here():
    runtime = create_runtime("openvino", torch.device("cpu"))
    for precision in run._precisions():
        runtime.check_precision(precision)
    if "bf16" not in run._precisions():
        with pytest.raises(ConfigError, match="no bf16"):
            runtime.check_precision("bf16")
