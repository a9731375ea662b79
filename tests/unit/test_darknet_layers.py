"""Each kind of layer against numpy written here, loops and all; none of our code takes part in what is expected."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from vision_service.networks.darknet import Darknet

END = "[convolutional]\nfilters=8\nactivation=linear\n[yolo]\nmask=0\nanchors=4,5\nclasses=3\nnum=1\n"


def run_layers(text, x):
    """Outputs of the layers of a cfg, `END` excepted, for float32 [C, h, w]; and the network."""
    channels, height, width = x.shape
    head = f"[net]\nchannels={channels}\nheight={height}\nwidth={width}\n"
    torch.manual_seed(0)
    network = Darknet(head + text + END).eval()
    kept = []
    for layer in network.layers:
        layer.register_forward_hook(lambda module, inputs, output: kept.append(output))
    with torch.inference_mode():
        network(torch.from_numpy(x)[None])
    return [output[0].numpy() for output in kept[:-2]], network


def image(channels=3, height=7, width=6, seed=0):
    return np.random.RandomState(seed).standard_normal((channels, height, width)).astype(np.float32)


def convolve(x, weight, stride_yx, padding, dilation, groups):
    """By definition: float64 [F, h', w']."""
    filters, per_group, size, _ = weight.shape
    x = np.pad(x.astype(np.float64), ((0, 0), (padding, padding), (padding, padding)))
    reach = dilation * (size - 1) + 1
    out = np.zeros((filters, (x.shape[1] - reach) // stride_yx[0] + 1, (x.shape[2] - reach) // stride_yx[1] + 1))
    for f in range(filters):
        first = f // (filters // groups) * per_group
        for i in range(out.shape[1]):
            for j in range(out.shape[2]):
                top, left = i * stride_yx[0], j * stride_yx[1]
                window = x[first : first + per_group, top : top + reach : dilation, left : left + reach : dilation]
                out[f, i, j] = (window * weight[f]).sum()
    return out


@pytest.mark.parametrize(
    ("keys", "stride_yx", "padding", "dilation", "groups"),
    [
        ("size=3", (1, 1), 0, 1, 1),
        ("size=3\npad=1", (1, 1), 1, 1, 1),
        ("size=3\npad=1\npadding=7", (1, 1), 1, 1, 1),
        ("size=3\npadding=2\nstride=2", (2, 2), 2, 1, 1),
        ("size=2\npad=1", (1, 1), 1, 1, 1),
        ("size=5\npad=1\nstride_x=3\nstride_y=2", (2, 3), 2, 1, 1),
        ("size=3\npad=1\nstride_x=2", (1, 2), 1, 1, 1),
        ("size=3\npad=1\ndilation=2", (1, 1), 2, 2, 1),
        ("size=1\ndilation=2", (1, 1), 0, 1, 1),
        ("size=3\npad=1\ngroups=2", (1, 1), 1, 1, 2),
        ("size=3\npad=1\ngroups=4", (1, 1), 1, 1, 4),
    ],
)
def test_convolution(keys, stride_yx, padding, dilation, groups):
    x = image(channels=4)
    (ours,), network = run_layers(f"[convolutional]\nfilters=4\nactivation=linear\n{keys}\n", x)
    conv = network.layers[0].conv
    expected = convolve(x, conv.weight.detach().numpy(), stride_yx, padding, dilation, groups)
    expected += conv.bias.detach().numpy()[:, None, None]
    np.testing.assert_allclose(ours, expected, atol=1e-5)


@pytest.mark.parametrize("key", ["batch_normalize=1", "cbn=1"])
@pytest.mark.parametrize("fused", [False, True])
def test_batch_norm_has_an_epsilon_of_a_millionth(key, fused):
    x = image()
    text = f"[convolutional]\nfilters=2\nactivation=linear\n{key}\n"
    network = Darknet(f"[net]\nheight=7\nwidth=6\n{text}{END}").eval()
    layer = network.layers[0]
    mean, var, scale, bias = (np.array(v, np.float32) for v in ([0.3, -1], [1e-6, 2.0], [0.5, 3], [1, -2]))
    for tensor, value in zip(
        (layer.norm.running_mean, layer.norm.running_var, layer.norm.weight, layer.norm.bias),
        (mean, var, scale, bias),
        strict=True,
    ):
        tensor.data.copy_(torch.from_numpy(value))
    weight = layer.conv.weight.detach().numpy().copy()
    if fused:
        network.fuse()
        assert layer.norm is None
    plain = convolve(x, weight, (1, 1), 0, 1, 1)
    by_hand = [
        (plain[c] - float(mean[c])) / math.sqrt(float(var[c]) + 1e-6) * float(scale[c]) + float(bias[c]) for c in (0, 1)
    ]
    with torch.inference_mode():
        ours = layer(torch.from_numpy(x)[None])[0].numpy()
    np.testing.assert_allclose(ours, by_hand, rtol=1e-4, atol=1e-4)  # the first channel's values are in the hundreds


def softplus(v):
    return math.log1p(math.exp(v))


FORMULAS = {
    "linear": lambda v: v,
    "leaky": lambda v: v if v > 0 else 0.1 * v,
    "relu": lambda v: max(v, 0.0),
    "relu6": lambda v: min(max(v, 0.0), 6.0),
    "logistic": lambda v: 1 / (1 + math.exp(-v)),
    "tanh": math.tanh,
    "mish": lambda v: v * math.tanh(softplus(v)),
    "swish": lambda v: v / (1 + math.exp(-v)),
    "silu": lambda v: v / (1 + math.exp(-v)),
    "selu": lambda v: 1.0507 * (v if v >= 0 else 1.6732 * (math.exp(v) - 1)),
    "elu": lambda v: v if v >= 0 else math.exp(v) - 1,
    "gelu": lambda v: 0.5 * v * (1 + math.tanh(0.797885 * v + 0.035677 * v**3)),
}


@pytest.mark.parametrize("name", sorted(FORMULAS))
def test_activations(name):
    """As in Darknet's activations.h, whose constants have five or six digits."""
    x = np.linspace(-9, 9, 21, dtype=np.float32).reshape(1, 3, 7)
    (first, ours), _ = run_layers(f"[empty]\n[shortcut]\nfrom=-1\nactivation={name}\n", x)
    np.testing.assert_array_equal(first, x)
    expected = np.vectorize(FORMULAS[name])(2 * x.astype(np.float64))
    np.testing.assert_allclose(ours, expected, atol=2e-4 if name in ("selu", "gelu") else 1e-6)


def test_the_activation_is_logistic_where_a_convolution_names_none():
    (ours,), network = run_layers("[convolutional]\nfilters=2\n", image())
    plain = convolve(image(), network.layers[0].conv.weight.detach().numpy(), (1, 1), 0, 1, 1)
    plain += network.layers[0].conv.bias.detach().numpy()[:, None, None]
    np.testing.assert_allclose(ours, 1 / (1 + np.exp(-plain)), atol=1e-6)


@pytest.mark.parametrize(
    ("keys", "size", "stride_yx", "padding"),
    [
        ("size=2\nstride=2", 2, (2, 2), 1),
        ("stride=2", 2, (2, 2), 1),
        ("size=2\nstride=1", 2, (1, 1), 1),
        ("size=3\nstride=2", 3, (2, 2), 2),
        ("size=5\nstride=1", 5, (1, 1), 4),
        ("size=4\nstride=1", 4, (1, 1), 3),
        ("size=2\nstride=2\npadding=0", 2, (2, 2), 0),
        ("size=3\nstride_x=1\nstride_y=2", 3, (2, 1), 2),
    ],
)
def test_maxpool(keys, size, stride_yx, padding):
    """A window starts padding // 2 before the image; (side + padding - size) // stride + 1 of them."""
    x = image() - 5  # all negative: zeros from the padding would win
    (ours,), _ = run_layers(f"[maxpool]\n{keys}\n", x)
    rows, columns = ((side + padding - size) // step + 1 for side, step in zip(x.shape[1:], stride_yx, strict=True))
    assert ours.shape == (3, rows, columns)
    for i in range(rows):
        for j in range(columns):
            top, left = i * stride_yx[0] - padding // 2, j * stride_yx[1] - padding // 2
            window = x[:, max(0, top) : top + size, max(0, left) : left + size]
            np.testing.assert_array_equal(ours[:, i, j], window.max(axis=(1, 2)))


def test_upsample_repeats_pixels():
    x = image()
    (ours,), _ = run_layers("[upsample]\nstride=3\nscale=.5\n", x)
    np.testing.assert_allclose(ours, 0.5 * np.kron(x, np.ones((3, 3), np.float32)))
    assert run_layers("[upsample]\n", x)[0][0].shape == (3, 14, 12)


def test_route_counts_from_the_start_and_from_here_and_takes_a_group_of_each():
    x = image(channels=4)
    text = "[empty]\n[upsample]\nstride=1\nscale=2\n[route]\nlayers=-1,0\n[route]\nlayers=1,-3\ngroups=2\ngroup_id=1\n"
    (_, double, both, groups, _), _ = run_layers(text + "[route]\nlayers=2,3\n", x)
    np.testing.assert_array_equal(both, np.concatenate((double, x)))
    np.testing.assert_array_equal(groups, np.concatenate((double[2:], x[2:])))


def test_what_nobody_takes_is_not_computed():
    (outputs, _) = run_layers("[empty]\n[avgpool]\n[route]\nlayers=0\n", image())
    assert [output.shape for output in outputs] == [(3, 7, 6)] * 2


def test_shortcut_adds_several_and_only_the_channels_that_both_have():
    x = image(channels=4)
    text = "[empty]\n[route]\nlayers=0\ngroups=2\n[shortcut]\nfrom=0\n[route]\nlayers=0\n[shortcut]\nfrom=0,-3\n"
    (_, half, fewer, _, more, _), _ = run_layers(text + "[route]\nlayers=2,4\n", x)
    np.testing.assert_array_equal(fewer, half + x[:2])
    expected = x + x
    expected[:2] += half
    np.testing.assert_allclose(more, expected, rtol=1e-6)


def test_average_and_scaled_channels():
    x = image(channels=4)
    (_, mean, scaled, squared), _ = run_layers("[empty]\n[avgpool]\n[scale_channels]\nfrom=0\n[sam]\nfrom=0\n", x)
    np.testing.assert_allclose(mean[:, 0, 0], x.mean(axis=(1, 2)), atol=1e-6)
    np.testing.assert_allclose(scaled, x * mean, rtol=1e-6)
    np.testing.assert_allclose(squared, scaled * x, rtol=1e-6)


@pytest.mark.parametrize("name", ["dropout", "empty", "silence"])
def test_layers_that_do_nothing_in_inference(name):
    (ours,), _ = run_layers(f"[{name}]\n", image())
    np.testing.assert_array_equal(ours, image())


@pytest.mark.parametrize("new_coords", [0, 1])
def test_yolo_cell_by_cell(new_coords):
    """Two of three anchors, two classes, 3 x 2 cells of 8 x 10 pixels."""
    cfg = (
        "[net]\nchannels=14\nheight=16\nwidth=30\n[maxpool]\nsize=1\nstride_x=10\nstride_y=8\n"
        "[yolo]\nmask=2,0\nanchors=4,5, 6,7, 8.25,9\nnum=3\nclasses=2\nscale_x_y=1.2\n"
        f"new_coords={new_coords}\n"
    )
    x = image(channels=14, height=16, width=30)
    with torch.inference_mode():
        boxes, scores = Darknet(cfg)(torch.from_numpy(x)[None])
    assert (boxes.shape, scores.shape) == ((1, 12, 4), (1, 12, 2))

    def squash(v):
        return v if new_coords else 1 / (1 + math.exp(-v))

    row = 0
    for cell_y in range(2):
        for cell_x in range(3):
            for anchor, (anchor_w, anchor_h) in enumerate(((8.25, 9), (4, 5))):
                p = x[7 * anchor : 7 * anchor + 7, cell_y * 8, cell_x * 10].astype(float)
                centre_x = (cell_x + squash(p[0]) * 1.2 - 0.1) * 10
                centre_y = (cell_y + squash(p[1]) * 1.2 - 0.1) * 8
                width = anchor_w * ((2 * p[2]) ** 2 if new_coords else math.exp(p[2]))
                height = anchor_h * ((2 * p[3]) ** 2 if new_coords else math.exp(p[3]))
                corners = [centre_x - width / 2, centre_y - height / 2, centre_x + width / 2, centre_y + height / 2]
                np.testing.assert_allclose(boxes[0, row].numpy(), corners, rtol=1e-5, atol=1e-4)
                certain = [squash(p[4]) * squash(p[5]), squash(p[4]) * squash(p[6])]
                np.testing.assert_allclose(scores[0, row].numpy(), certain, rtol=1e-5, atol=1e-6)
                row += 1
