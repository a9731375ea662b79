import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torchvision.models import vgg

from tests.helpers import tiny_spec
from vision_service.backends.table import create_backend
from vision_service.errors import ConfigError
from vision_service.networks.segnet import ConvNormRelu, SegNet, init_encoder_from_vgg16_bn


def features(letter):
    """The convolutions of torchvision's VGG with batch norm ("D" is VGG-16) and their state dict's names."""
    network = nn.ModuleDict({"features": vgg.make_layers(vgg.cfgs[letter], batch_norm=True)}).eval()
    return network["features"], network.state_dict()


def test_the_encoder_is_vgg16s_thirteen_convolutions_and_the_decoder_mirrors_it():
    network = SegNet(11)
    encoder = [m.conv for m in network.encoder.modules() if isinstance(m, ConvNormRelu)]
    decoder = [m.conv for m in network.decoder.modules() if isinstance(m, ConvNormRelu)]
    vgg16 = [m for m in features("D")[0] if isinstance(m, nn.Conv2d)]
    assert [(c.in_channels, c.out_channels) for c in encoder] == [(c.in_channels, c.out_channels) for c in vgg16]
    up = [(c.in_channels, c.out_channels) for c in [*decoder, network.classifier]]
    assert up == [*[(c.out_channels, c.in_channels) for c in reversed(vgg16)][:-1], (64, 11)]


def test_the_size_of_the_published_network():
    # Table VI of the paper: SegNet's model takes 117 MB, in float32 29.3 million parameters with those of the norms.
    count = sum(p.numel() for p in SegNet(11).parameters())
    assert count * 4 / 1e6 == pytest.approx(117, rel=0.02)


def test_the_encoder_started_from_vgg16_bn_is_vgg16_bn():
    torch.manual_seed(0)
    vgg16, state = features("D")
    for module in vgg16:
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    network = SegNet(3).eval()
    init_encoder_from_vgg16_bn(network, state)
    x = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        y = x
        for stage in network.encoder:
            y = functional.max_pool2d(stage(y), 2)
        torch.testing.assert_close(y, vgg16(x), atol=1e-5, rtol=1e-5)


def test_weights_of_another_network_do_not_start_the_encoder():
    network = SegNet(3)
    before = network.state_dict()["encoder.0.0.conv.weight"].clone()
    with pytest.raises(ValueError, match="need the 26 convolutions and norms of vgg16_bn, got 16"):
        init_encoder_from_vgg16_bn(network, features("A")[1])
    with pytest.raises(ValueError, match=r"features.0.weight: need \[4, 3, 3, 3\], got \[64, 3, 3, 3\]"):
        init_encoder_from_vgg16_bn(SegNet(3, width=4), features("D")[1])
    assert torch.equal(network.state_dict()["encoder.0.0.conv.weight"], before)


def test_unpooling_puts_values_where_the_maxima_were():
    network = SegNet(2, width=1).eval()
    seen = []
    network.decoder[-1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    pooled = []
    network.encoder[0].register_forward_hook(lambda _, inputs, output: pooled.append(output))
    with torch.inference_mode():
        network(torch.randn(1, 3, 32, 32))
    (unpooled,), (before,) = seen, pooled
    maxima = functional.interpolate(functional.max_pool2d(before, 2), scale_factor=2.0) == before
    assert unpooled.count_nonzero() > 0
    assert not unpooled[~maxima].any()


@pytest.mark.parametrize("size", [(32, 32), (45, 60), (67, 33)])
def test_any_size_comes_back(size):
    assert SegNet(4, width=2).eval()(torch.zeros(1, 3, *size)).shape == (1, 4, *size)


def shapes(rng, count):
    """Bright discs on noise: float [N, 3, 48, 48], int64 [N, 48, 48]."""
    y, x = np.mgrid[:48, :48]
    images, masks = [], []
    for _ in range(count):
        row, column, radius = rng.uniform(14, 34), rng.uniform(14, 34), rng.uniform(8, 13)
        mask = (x - column) ** 2 + (y - row) ** 2 < radius**2
        images.append(rng.normal(0, 0.6, (3, 48, 48)) + 1.2 * mask)
        masks.append(mask)
    return torch.tensor(np.array(images), dtype=torch.float32), torch.tensor(np.array(masks)).long()


def test_it_learns():
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    network = SegNet(2, width=4)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    losses = []
    for _ in range(60):
        x, y = shapes(rng, 8)
        loss = functional.cross_entropy(network(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
    x, y = shapes(rng, 16)
    # The norms' running statistics lag behind parameters that have moved so fast.
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # a plain mean over what follows
    with torch.no_grad():
        for _ in range(4):
            network(shapes(rng, 8)[0])
    with torch.inference_mode():
        found = network.eval()(x).argmax(1)
    iou = [((found == c) & (y == c)).sum() / ((found == c) | (y == c)).sum() for c in (0, 1)]
    trivial = [(y == c).float().mean() for c in (0, 1)]  # what "all c" scores on c; on the other class it is 0
    assert iou[0] > trivial[0]
    assert iou[1] > trivial[1]
    assert min(iou) > 0.6


@pytest.mark.parametrize(
    ("fields", "clause"),
    [
        ({"options": {"width": 0}}, "option 'width' must be 1 or more, got 0"),
        ({"classes": ("road",)}, "needs two or more, got .'road'.: add the background"),
    ],
)
def test_what_it_refuses(fields, clause):
    with pytest.raises(ConfigError, match=clause):
        create_backend(tiny_spec(**{"backend": "segnet", "task": "segment", "classes": ("a", "b")} | fields))


def test_the_width_changes_the_network():
    spec = tiny_spec(backend="segnet", task="segment", classes=("a", "b", "c"), options={"width": 3})
    network = create_backend(spec).build_network()
    assert network.encoder[4][2].conv.out_channels == 24
    assert network.classifier.out_channels == 3
