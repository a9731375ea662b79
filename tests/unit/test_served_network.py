import torch
from torch import nn

from vision_service.backends.base import ServedNetwork
from vision_service.config import PreprocessSpec

LIMIT = {"mode": "limit", "shortest_side": 4, "longest_side": 8, "pad_multiple": 4}
STRETCH = {"mode": "stretch", "size_hw": (4, 8)}


def served(resize, network=None, **fields):
    spec = PreprocessSpec(resize=resize, mean=(10, 20, 30), std=(2, 4, 5), **fields)
    return ServedNetwork(network or nn.Identity(), spec, with_sizes=network is not None)


def inputs():
    images = torch.randint(0, 256, (2, 4, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return images, torch.tensor([[4, 8], [3, 5]])


def test_normalises_in_the_networks_colour_order():
    images, sizes = inputs()
    (x,) = served(STRETCH)(images, sizes)
    assert torch.allclose(x[0, 2], (images[0, ..., 2].float() - 30) / 5)
    (x,) = served(STRETCH, color_order="bgr")(images, sizes)
    assert torch.allclose(x[0, 0], (images[0, ..., 2].float() - 10) / 2)


def test_padding_is_zero_after_normalisation_in_limit_mode_only():
    images, sizes = inputs()
    (x,) = served(LIMIT)(images, sizes)
    assert x[1, :, 3:].abs().sum() == x[1, :, :, 5:].abs().sum() == 0
    assert (x[0] == served(STRETCH)(images, sizes)[0][0]).all()
    assert (x[1, :, :3, :5] == served(STRETCH)(images, sizes)[0][1, :, :3, :5]).all()
    assert served(STRETCH)(images, sizes)[0][1, :, 3:].abs().sum() > 0


def test_sizes_reach_the_networks_that_want_them():
    class Sizes(nn.Module):
        def forward(self, x, sizes_hw):
            return sizes_hw

    images, sizes = inputs()
    assert (served(LIMIT, Sizes())(images, sizes)[0] == sizes).all()


def test_constants_keep_their_precision_in_half():
    spec = PreprocessSpec(resize=STRETCH, mean=(103.53, 116.28, 123.675), std=(57.375, 57.12, 58.395))
    network = ServedNetwork(nn.Conv2d(3, 1, 1), spec).half()
    assert network.mean.dtype == torch.float32
    assert network.mean.flatten().tolist() == torch.tensor(spec.mean).tolist()
    assert network.network.weight.dtype == torch.float16
