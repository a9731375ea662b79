import math

import numpy as np
import pytest
import torch
from torch import nn

from tests.helpers import tiny_spec
from vision_service.backends.table import create_backend
from vision_service.errors import ConfigError
from vision_service.networks.lenet import C3_TABLE, LeNet5, scaled_tanh
from vision_service.types import Params

DIGITS = tuple("0123456789")
RESIZE = {"resize": {"mode": "stretch", "size_hw": (32, 32)}, "mean": (20.0,) * 3, "std": (200.0,) * 3}


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_trainable_parameters_are_those_of_the_paper():
    # Section II.B states each: 156, 12, 1516, 32, 48120, 10164; 60 000 in all.
    network = LeNet5()
    layers = (network.c1, network.s2, network.c3, network.s4, network.c5, network.f6)
    assert [count(layer) for layer in layers] == [156, 12, 1516, 32, 48_120, 10_164]
    assert count(network) == 60_000


def test_the_table_of_c3():
    # Table I by its rule: six maps take three in a row, six take four in a row, three take some four, one takes all.
    ring = [{(start + i) % 6 for i in range(3)} for start in range(6)]
    assert [set(maps) for maps in C3_TABLE[:6]] == ring
    assert [set(maps) for maps in C3_TABLE[6:12]] == [{(start + i) % 6 for i in range(4)} for start in range(6)]
    assert sorted(len(maps) for maps in C3_TABLE) == [3] * 6 + [4] * 9 + [6]
    assert all(sum(c in maps for maps in C3_TABLE) == 10 for c in range(6))  # its columns have ten marks each


def test_c3_sees_the_maps_of_its_table_and_no_others():
    torch.manual_seed(0)
    c3 = LeNet5().c3
    for column in range(6):
        x = torch.zeros(1, 6, 14, 14)
        x[:, column] = torch.randn(14, 14)
        with torch.no_grad():
            moved = (c3(x) - c3(torch.zeros_like(x))).abs().amax((0, 2, 3)) > 0
        assert [row for row in range(16) if moved[row]] == [row for row, maps in enumerate(C3_TABLE) if column in maps]


def test_the_tanh_maps_one_to_one():
    torch.testing.assert_close(
        scaled_tanh(torch.tensor([-1.0, 0.0, 1.0])), torch.tensor([-1.0, 0.0, 1.0]), atol=1e-4, rtol=0
    )
    assert scaled_tanh(torch.tensor(1e6)).item() == pytest.approx(1.7159)


def test_subsampling_adds_four_scales_and_squashes():
    layer = LeNet5().s2
    nn.init.constant_(layer.coefficient, 0.5)
    nn.init.constant_(layer.bias, 0.1)
    x = torch.zeros(1, 6, 2, 2)
    x[0, 0] = torch.tensor([[0.1, 0.2], [0.3, 0.4]])
    assert layer(x)[0, 0].item() == pytest.approx(1.7159 * math.tanh(2 / 3 * (0.5 * 1.0 + 0.1)), rel=1e-5)


def test_the_output_is_minus_the_squared_distance_to_each_centre():
    network = LeNet5(3).eval()
    assert set(network.output.centres.unique().tolist()) == {-1.0, 1.0}
    assert network.output.centres.shape == (3, 84)
    with torch.no_grad():
        assert network.output(network.output.centres[1:2])[0, 1] == 0.0
        moved = network.output.centres[1:2].clone()
        moved[0, :5] *= -1  # each of five coordinates is 2 away
        assert network.output(moved)[0, 1] == 20.0
    assert torch.equal(LeNet5(3).output.centres, network.output.centres), "the centres belong to the architecture"


def test_colours_count_by_their_luminance():
    torch.manual_seed(0)
    network = LeNet5().eval()
    colour = torch.rand(1, 3, 32, 32)
    grey = (colour * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True).expand(1, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(network(colour), network(grey), atol=1e-4, rtol=1e-5)


def test_dark_ink_is_light_ink_of_the_negative():
    photo = np.random.RandomState(0).randint(0, 256, (1, 32, 32, 3), np.uint8)
    fields = {"backend": "lenet5", "task": "classify", "classes": DIGITS, "preprocess": RESIZE}
    outputs = []
    for dark_ink, pixels in ((False, photo), (True, 255 - photo)):
        torch.manual_seed(0)
        network = create_backend(tiny_spec(**fields, options={"dark_ink": dark_ink})).build().eval()
        with torch.inference_mode():
            outputs.append(network(torch.from_numpy(pixels), torch.tensor([[32, 32]]))[0])
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-3, rtol=1e-5)


def digit_images(rng, n):
    """Three shapes a child would draw, shifted about: float [N, 3, 32, 32], int64 [N]."""
    marks = np.full((3, 12, 12), -0.1, np.float32)
    marks[0, :, 5:7] = 1.175
    marks[1, 5:7] = 1.175
    marks[2, [*range(12)], [*range(12)]] = 1.175
    x, y = np.full((n, 3, 32, 32), -0.1, np.float32), rng.integers(0, 3, n)
    for image, kind in zip(x, y, strict=True):
        top, left = rng.integers(6, 14, 2)
        image[:, top : top + 12, left : left + 12] = marks[kind]
    return torch.from_numpy(x), torch.from_numpy(y)


def test_it_learns():
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    network = LeNet5(3)
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    for _ in range(60):
        x, y = digit_images(rng, 32)
        loss = nn.functional.cross_entropy(network(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x, y = digit_images(rng, 100)
    with torch.inference_mode():
        assert (network(x).argmax(1) == y).float().mean() > 0.9


def test_the_scores_are_a_softmax_over_the_distances():
    backend = create_backend(tiny_spec(backend="lenet5", classes=("a", "b"), preprocess=RESIZE))
    (found,) = backend.postprocess((torch.tensor([[-3.0, -1.0]]),), [None], [Params()])
    assert found.class_names == ("b", "a")
    assert found.scores[0] == pytest.approx(1 / (1 + math.exp(-2)), rel=1e-6)


@pytest.mark.parametrize(
    ("resize", "clause"),
    [
        (
            {"mode": "stretch", "size_hw": (28, 28)},
            r"takes 32 x 32 pixels, but preprocess.resize is stretch \(28, 28\)",
        ),
        ({"mode": "native"}, "is native : use stretch or letterbox"),
        ({"mode": "shortest_side_crop", "shortest_side": 32, "crop_hw": (32, 40)}, r"shortest_side_crop \(32, 40\)"),
    ],
)
def test_other_sizes_are_refused(resize, clause):
    with pytest.raises(ConfigError, match=clause):
        create_backend(tiny_spec(backend="lenet5", classes=DIGITS, preprocess={"resize": resize}))
