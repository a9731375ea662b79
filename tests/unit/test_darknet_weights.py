"""Darknet's weight file: its layout byte by byte, and what is said about one that does not fit."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch

from tests.helpers import ROOT
from vision_service.networks.darknet import Darknet
from vision_service.networks.darknet_weights import DarknetWeightsError, read_weights, write_weights

TINY = (ROOT / "tests" / "data" / "darknet_tiny.cfg").read_text()

# One convolution with batch norm (2 filters, 3 channels, 1 x 1: 2 * 4 + 6 values) and one with bias (8 + 16).
CFG = """[net]
width=8
height=8
[convolutional]
batch_normalize=1
filters=2
activation=linear
[convolutional]
filters=8
activation=linear
[yolo]
mask=0
anchors=4,5
classes=3
num=1
"""
VALUES = [float(v) for v in range(1, 39)]


HEADER = struct.pack("<iiiQ", 0, 2, 5, 32_013_312)


def file(values, header=HEADER):
    return header + struct.pack(f"<{len(values)}f", *values)


def loaded(data):
    network = Darknet(CFG)
    read_weights(network, data)
    return network


def flat(tensor):
    return tensor.detach().flatten().tolist()


@pytest.mark.parametrize(
    "header",
    [
        struct.pack("<iiiQ", 0, 2, 5, 2**40),
        struct.pack("<iiiQ", 0, 2, 0, 7),
        struct.pack("<iiiQ", 1, 0, 0, 7),
        struct.pack("<iiiI", 0, 1, 0, 7),
        struct.pack("<iiiI", 1001, 0, 0, 7),
    ],
)
def test_layout(header):
    normalised, plain = loaded(file(VALUES, header)).convolutions()
    assert flat(normalised.norm.bias) == [1, 2]
    assert flat(normalised.norm.weight) == [3, 4]
    assert flat(normalised.norm.running_mean) == [5, 6]
    assert flat(normalised.norm.running_var) == [7, 8]
    assert normalised.conv.bias is None
    assert normalised.conv.weight[:, :, 0, 0].tolist() == [[9, 10, 11], [12, 13, 14]]
    assert flat(plain.conv.bias) == list(range(15, 23))
    assert plain.conv.weight[:, :, 0, 0].tolist() == [[v, v + 1] for v in range(23, 39, 2)]


@pytest.mark.parametrize("version", [(0, 2, 5), (0, 1, 0)])
def test_written_files_are_read(version):
    data = write_weights(loaded(file(VALUES)), seen=9, version=version)
    counter = struct.pack("<Q" if version[1] == 2 else "<I", 9)
    assert data == file(VALUES, struct.pack("<iii", *version) + counter)
    torch.manual_seed(1)
    first, second = Darknet(TINY), Darknet(TINY)
    read_weights(second, write_weights(first))
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_not_every_parameter_is_at_its_initial_value_after_reading():
    before, after = Darknet(TINY), Darknet(TINY)
    for layer in before.convolutions():
        if layer.norm is not None:
            layer.norm.running_mean.fill_(0.5)
    read_weights(after, write_weights(before))
    assert all(flat(layer.norm.running_mean)[0] == 0.5 for layer in after.convolutions() if layer.norm is not None)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "0 bytes, less than the header"),
        (file([])[:15], "15 bytes, less than the header"),
        (file([]), r"network has 38 values, the file 0: 38 are missing, from layer 0 \[convolutional\], line 4, which"),
        (file(VALUES[:-1]), r"37: 1 are missing, from layer 1 \[convolutional\], line 8, which needs 24 values, 23 of"),
        (
            file(VALUES[:14]),
            r"24 are missing, from layer 1 \[convolutional\], line 8, which needs 24 values, 0 of them",
        ),
        (file(VALUES[:3]), r"35 are missing, from layer 0 \[convolutional\], line 4, which needs 14 values, 3 of them"),
        (file(VALUES)[:-2], r"the file 37: 1 are missing"),
        (file([*VALUES, 1.0, 2.0]), "file 40: 2 values and 0 bytes are left after the last convolution"),
        (file(VALUES) + b"ab", "0 values and 2 bytes are left after the last convolution"),
        (file([*VALUES[:20], float("nan"), *VALUES[21:]]), r"layer 1 \[convolutional\], line 8: holds NaN"),
        (file([*VALUES[:6], -1.0, *VALUES[7:]]), r"layer 0 \[convolutional\], line 4: a variance .* below 0"),
    ],
)
def test_says_what_is_wrong_and_where(data, says):
    with pytest.raises(DarknetWeightsError, match=says):
        loaded(data)


def test_weights_of_another_cfg():
    other = write_weights(Darknet(TINY))
    with pytest.raises(DarknetWeightsError, match=r"are left after the last convolution\. The file belongs to another"):
        loaded(other)
    with pytest.raises(DarknetWeightsError, match=r"are missing, from layer 0 \[convolutional\], line 11"):
        read_weights(Darknet(TINY), file(VALUES))


def test_a_fused_network_is_neither_written_nor_read():
    network = loaded(file(VALUES))
    network.fuse()
    for attempt in (lambda: write_weights(network), lambda: read_weights(network, file(VALUES))):
        with pytest.raises(ValueError, match=r"layer 0 \[convolutional\], line 4: its batch norm is fused"):
            attempt()


def test_fusing_changes_no_answer():
    torch.manual_seed(3)
    network = Darknet(TINY).eval()
    for layer in network.convolutions():
        if layer.norm is not None:
            layer.norm.running_var.uniform_(0.2, 3.0)
            layer.norm.running_mean.normal_()
            torch.nn.init.normal_(layer.norm.weight)
    x = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        before = network(x)
        network.fuse()
        after = network(x)
    assert not any("norm" in name for name in network.state_dict())
    for a, b in zip(before, after, strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), atol=1e-4)
