"""How many bits weights may use on a processor."""

from __future__ import annotations

import pytest

from vision_service.runtimes._int8 import weight_bits


@pytest.mark.parametrize(
    ("machine", "flags", "bits"),
    [
        ("x86_64", "fma avx avx2", 7),
        ("x86_64", "avx2 avx512f avx512_bf16", 7),
        ("x86_64", "avx2 avx512f avx512_vnni", 8),
        ("AMD64", "avx2 avx_vnni", 8),
        ("x86_64", "avx2 amx_int8", 8),
        ("aarch64", "fp asimd", 8),
    ],
)
def test_seven_where_sums_are_cut_off(machine, flags, bits, tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nmodel name\t: avx512_vnni, it says\nflags\t\t: {flags}\n")
    assert weight_bits(machine, cpuinfo) == bits


def test_seven_where_nobody_says(tmp_path):
    assert weight_bits("x86_64", tmp_path / "missing") == 7
    (tmp_path / "empty").write_text("")
    assert weight_bits("x86_64", tmp_path / "empty") == 7
