import numpy as np
import pytest
import torch
from torch import nn

from tests.helpers import tiny_spec
from vision_service.backends._translation import planes_to_images
from vision_service.backends.table import create_backend
from vision_service.config import PreprocessSpec
from vision_service.errors import ConfigError, InferenceFailed
from vision_service.imaging.preprocess import preprocess
from vision_service.networks.pix2pix import Generator, Norm2d, PatchDiscriminator

FIELDS = {"backend": "pix2pix", "task": "translate", "classes": ()}
STRETCH = {"resize": {"mode": "stretch", "size_hw": (64, 64)}, "mean": (127.5,) * 3, "std": (127.5,) * 3}


def test_the_sizes_of_the_published_networks():
    # What the authors' release prints: "[Network G] Total number of parameters : 54.414 M", D 2.769 M.
    assert round(sum(p.numel() for p in Generator().parameters()) / 1e6, 3) == 54.414
    assert round(sum(p.numel() for p in PatchDiscriminator().parameters()) / 1e6, 3) == 2.769


def test_the_generators_layers_are_those_of_the_paper():
    generator = Generator()
    down = [m.out_channels for m in generator.modules() if isinstance(m, nn.Conv2d)]
    up = [m.in_channels for m in generator.modules() if isinstance(m, nn.ConvTranspose2d)]
    assert down == [64, 128, 256, 512, 512, 512, 512, 512]
    # Section 6.1.1: what the decoder's layers take once the skip connections are joined.
    assert up == [512, 1024, 1024, 1024, 1024, 512, 256, 128]
    assert sum(isinstance(m, nn.Dropout) for m in generator.modules()) == 3
    assert sum(isinstance(m, Norm2d) for m in generator.modules()) == 13  # none outermost, none at the bottleneck down


def test_parameters_have_the_names_of_the_authors_release():
    names = set(Generator().state_dict())
    # Nested blocks: outermost conv 0, block 1; inner ones conv 1, norm 2, block 3, transposed conv 5, norm 6.
    inner = "model.model.1.model"
    assert {"model.model.0.weight", "model.model.3.weight", "model.model.3.bias"} <= names
    assert {f"{inner}.1.weight", f"{inner}.2.running_mean", f"{inner}.5.weight", f"{inner}.6.bias"} <= names
    bottleneck = "model.model.1" + ".model.3" * 6
    assert {f"{bottleneck}.model.1.weight", f"{bottleneck}.model.3.weight", f"{bottleneck}.model.4.weight"} <= names
    assert "model.model.0.bias" not in names


def test_skip_connections_carry_the_image():
    torch.manual_seed(0)
    generator = Generator(4, 5).eval()
    seen = []
    block = generator.model.model[1]
    block.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    generator(torch.rand(1, 3, 32, 32))
    ((came_in, went_out),) = seen
    assert torch.equal(went_out[:, : came_in.shape[1]], came_in)
    assert went_out.shape[1] == 2 * came_in.shape[1]


def test_the_output_lies_between_minus_one_and_one():
    generator = Generator(2, 5).eval()
    with torch.no_grad():
        generator.model.model[3].weight.mul_(1e4)
        y = generator(torch.randn(1, 3, 64, 32))
    assert y.shape == (1, 3, 64, 32)
    assert y.abs().max() == 1.0


def test_dropout_is_for_training_only():
    torch.manual_seed(0)
    generator = Generator(4, 7, per_image=True)
    x = torch.randn(1, 3, 256, 256)
    generator.train()
    with torch.no_grad():
        assert not torch.equal(generator(x), generator(x))
        generator.eval()
        assert torch.equal(generator(x), generator(x))


def test_statistics_of_the_image_are_those_of_a_batch_of_one():
    torch.manual_seed(0)
    norm = Norm2d(5, per_image=True)
    nn.init.normal_(norm.bias)
    x = torch.randn(3, 5, 8, 8) * 3 + 1
    own = norm.eval()(x)
    norm.train()
    for index in range(3):  # the library's batch norm, training, one image at a time
        torch.testing.assert_close(norm(x[index : index + 1])[0], own[index], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("point", [(0, 0), (12, 17), (29, 29)])
def test_the_discriminator_sees_patches_of_70_pixels(point):
    torch.manual_seed(0)
    # Norms look beyond the patch while they train; in evaluation they do not.
    discriminator = PatchDiscriminator(4).eval()
    x = torch.randn(1, 3, 256, 256, requires_grad=True)
    judged = discriminator(x, torch.randn(1, 3, 256, 256))
    assert judged.shape == (1, 1, 30, 30)
    judged[0, 0, point[0], point[1]].backward()
    touched = x.grad[0].abs().sum(0).nonzero()
    for axis in (0, 1):
        low, high = int(touched[:, axis].min()), int(touched[:, axis].max())
        centre = 8 * point[axis] + 11.5  # of the patch, whose ends the border cuts off
        assert (low, high) == (max(0, centre - 34.5), min(255, centre + 34.5))


def test_the_discriminator_sees_both_images():
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(4).eval()
    a, b = torch.randn(2, 1, 3, 128, 128)
    with torch.no_grad():
        judged = discriminator(a, b)
        assert not torch.allclose(judged, discriminator(a, b + 0.5))
        assert not torch.allclose(judged, discriminator(a + 0.5, b))


def test_they_learn_against_each_other():
    torch.manual_seed(0)
    generator, discriminator = Generator(8, 5), PatchDiscriminator(8)
    steps = [torch.optim.Adam(n.parameters(), 1e-3, betas=(0.5, 0.999)) for n in (generator, discriminator)]
    loss = nn.BCEWithLogitsLoss()
    gaps = []
    for _ in range(60):
        x = torch.nn.functional.interpolate(torch.rand(4, 3, 8, 8) * 2 - 1, 32)
        wanted = -x  # the translation to learn: the negative
        made = generator(x)
        real, fake = discriminator(x, wanted), discriminator(x, made.detach())
        cost = (loss(real, torch.ones_like(real)) + loss(fake, torch.zeros_like(fake))) / 2
        steps[1].zero_grad()
        cost.backward()
        steps[1].step()
        judged = discriminator(x, made)
        gap = (made - wanted).abs().mean()
        cost = loss(judged, torch.ones_like(judged)) + 100 * gap
        steps[0].zero_grad()
        cost.backward()
        steps[0].step()
        gaps.append(gap.item())
    assert np.mean(gaps[-5:]) < 0.7 * np.mean(gaps[:5])


def backend(preprocess=STRETCH, **options):
    return create_backend(tiny_spec(**FIELDS, preprocess=preprocess, options={"width": 2, "levels": 5} | options))


@pytest.mark.parametrize(
    "resize",
    [
        {"mode": "stretch", "size_hw": (64, 64)},
        {"mode": "native", "pad_multiple": 32},
        {"mode": "letterbox", "size_hw": (64, 96)},
    ],
)
def test_the_answer_has_the_size_and_the_place_of_the_original(resize):
    spec = PreprocessSpec.model_validate(STRETCH | {"resize": resize})
    image = np.zeros((50, 70, 3), np.uint8)
    image[:25, :35] = (200, 100, 50)
    pixels, meta = preprocess(image, spec)
    output = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1  # a network that changes nothing
    (found,) = backend(STRETCH | {"resize": resize}).postprocess((output,), [meta], [None])
    assert found.image.shape == image.shape
    inside = np.ones((50, 70), bool)
    inside[22:28], inside[:, 32:38] = False, False  # resizing there and back blurs the edge
    assert np.abs(found.image.astype(int) - image)[inside].max() <= 1


def test_minus_one_is_black_and_one_is_white():
    _, meta = preprocess(np.zeros((64, 64, 3), np.uint8), PreprocessSpec.model_validate(STRETCH))
    output = torch.stack([torch.full((3, 64, 64), value) for value in (-1.0, 0.0, 1.0)])
    found = backend().postprocess((output,), [meta] * 3, [None] * 3)
    assert [int(f.image.max()) for f in found] == [0, 128, 255]


def test_enlarged_outputs_enlarge_the_original():
    spec = PreprocessSpec.model_validate({"resize": {"mode": "native", "pad_multiple": 8}})
    pixels, meta = preprocess(np.full((13, 21, 3), 7, np.uint8), spec)
    twice = torch.from_numpy(pixels.repeat(2, 0).repeat(2, 1)).permute(2, 0, 1)[None].float()
    twice[..., 26:, :] = 99  # padding
    twice[..., 42:] = 99
    (found,) = planes_to_images(twice, [meta])
    assert found.image.shape == (26, 42, 3)
    assert (found.image == 7).all()


def test_nonsense_is_refused():
    _, meta = preprocess(np.zeros((64, 64, 3), np.uint8), PreprocessSpec.model_validate(STRETCH))
    with pytest.raises(InferenceFailed, match="image 0 of a batch of 1"):
        planes_to_images(torch.full((1, 3, 64, 64), torch.nan), [meta])


def test_statistics_option_changes_the_answer():
    torch.manual_seed(0)
    running = backend(statistics="running").build_network().eval()
    image = backend(statistics="image").build_network().eval()
    image.load_state_dict(running.state_dict())
    x = torch.rand(1, 3, 64, 64)
    assert not torch.allclose(running(x), image(x))


@pytest.mark.parametrize(
    ("fields", "clause"),
    [
        ({"options": {"levels": 4}}, "'levels' 5 or more"),
        ({"options": {"width": 0}}, "'width' must be 1 or more"),
        ({"options": {"statistics": "mine"}}, "must be 'running' or 'image', got 'mine'"),
        ({"preprocess": STRETCH}, r"8 levels takes sides that are multiples of 256, .* \[64, 64\]: use \[256, 256\]"),
        ({"preprocess": {"resize": {"mode": "native"}}}, "pad_multiple is 1: set it to 256"),
        (
            {"preprocess": {"resize": {"mode": "shortest_side_crop", "shortest_side": 300, "crop_hw": (256, 300)}}},
            "crop_hw",
        ),
    ],
)
def test_what_it_refuses(fields, clause):
    with pytest.raises(ConfigError, match=clause):
        create_backend(tiny_spec(**FIELDS | fields))
