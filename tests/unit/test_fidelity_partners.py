"""Who is whose partner, and what is put down to rounding: only what the library itself decides both ways."""

import importlib
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import nms

from tests.helpers import ROOT
from vision_service.engine.build import replace_fields
from vision_service.types import Detections
from vision_service.zoo import torchvision as zoo

sys.path.insert(0, str(ROOT / "scripts"))
partners = importlib.import_module("partners")
trained = importlib.import_module("fidelity_trained")

SAMPLE = ROOT / "samples/coffee.jpg"
NAMES = trained.CELLS
BOXES = np.array([[0, 0, 100, 100], [50, 50, 90, 90], [200, 0, 300, 80]], np.float32)


def ours(boxes=BOXES, scores=(0.9, 0.8, 0.7), ids=(1, 2, 2)):
    return Detections(boxes, np.array(ids), tuple("c" for _ in ids), np.array(scores, np.float32))


def theirs(boxes=BOXES, scores=(0.9, 0.8, 0.7), ids=(1, 2, 2)):
    return {"boxes": torch.from_numpy(boxes), "scores": torch.tensor(scores), "labels": torch.tensor(ids)}


@pytest.mark.parametrize(
    ("other", "pairs"),
    [
        (theirs(), {(0, 0), (1, 1), (2, 2)}),
        (theirs(BOXES[::-1].copy(), (0.7, 0.8, 0.9), (2, 2, 1)), {(0, 2), (1, 1), (2, 0)}),
        (theirs(scores=(0.9, 0.82, 0.7)), {(0, 0), (2, 2)}),
        (theirs(ids=(2, 2, 2)), {(1, 1), (2, 2)}),
        (theirs(BOXES + np.float32([0, 0, 3, 0])), set()),
        (theirs(BOXES[:0], (), ()), set()),
    ],
)
def test_partners_are_of_one_class_with_nearly_the_same_box_and_score(other, pairs):
    found, overlaps, gaps = partners.pairs(ours(), other)
    assert set(found) == pairs
    assert len(overlaps) == len(gaps) == len(pairs)
    assert (overlaps >= 0.98).all()
    assert (gaps <= 0.01).all()


def test_a_partner_is_taken_once():
    twins = ours(np.stack([BOXES[0], BOXES[0]]), (0.9, 0.9), (1, 1))
    assert len(partners.pairs(twins, theirs())[0]) == 1


def excused(mine, plain, answers):
    """Indices that are put down to rounding, ours and theirs, of all that have no partner."""
    found, _, _ = partners.pairs(mine, plain)
    lone = [
        sorted(set(range(size)) - {pair[side] for pair in found})
        for side, size in enumerate((len(mine), len(plain["scores"])))
    ]
    return partners.decided_by_rounding(mine, plain, lone, answers, NAMES)


FEWER = theirs(BOXES[:2], (0.9, 0.8), (1, 2))


@pytest.mark.parametrize(
    ("answers", "shown"),
    [
        ([], set()),
        ([FEWER, FEWER], set()),
        ([FEWER, theirs()], {2}),
        ([theirs(scores=(0.9, 0.8, 0.68))], set()),
        ([theirs(ids=(1, 2, 1))], set()),
        ([theirs(BOXES + np.float32([0, 0, 3, 0]))], set()),
    ],
)
def test_what_only_we_have_must_appear_in_an_answer_of_the_librarys(answers, shown):
    assert excused(ours(), FEWER, answers) == (shown, set())


@pytest.mark.parametrize(("answers", "shown"), [([], set()), ([theirs(), theirs()], set()), ([theirs(), FEWER], {2})])
def test_what_only_the_library_has_must_be_absent_from_one(answers, shown):
    assert excused(ours(BOXES[:2], (0.9, 0.8), (1, 2)), theirs(), answers) == (set(), shown)


def test_a_score_that_jumps_is_absent_in_the_one_and_new_in_the_other():
    jumped = theirs(scores=(0.9, 0.8, 0.68))
    assert excused(ours(), jumped, [jumped]) == (set(), set())
    assert excused(ours(), jumped, [jumped, theirs()]) == ({2}, {2})


def test_an_object_that_we_report_twice_is_not_one_that_appears():
    twice = ours(np.concatenate([BOXES, BOXES[2:]]), (0.9, 0.8, 0.7, 0.7), (1, 2, 2, 2))
    assert excused(twice, theirs(), [theirs(), theirs()]) == (set(), set())


class AtALimit(nn.Module):
    """Torchvision's own input and suppression; its second box is kept or not, and depends on all pixels.

    Args:
        overlap: of the two boxes, by IoU, on the undisturbed picture; suppression begins above 0.5.
    """

    def __init__(self, picture, overlap=0.5):
        super().__init__()
        self.transform = GeneralizedRCNNTransform(
            320, 320, [0.5] * 3, [0.5] * 3, size_divisible=1, fixed_size=(320, 320)
        )
        self.inputs = []
        self.left = 30 * (1 - overlap) / (1 + overlap)  # of two boxes 30 wide
        self.before = self.transform([picture])[0].tensors[0].double().sum()

    def forward(self, images):
        batch, _ = self.transform(images)
        self.inputs.append(batch.tensors)
        shift = float(batch.tensors[0].double().sum() - self.before)
        boxes = torch.tensor([[0.0, 0, 30, 10], [self.left - shift, 0, self.left - shift + 30, 10]])
        scores = torch.tensor([0.9, 0.8])
        kept = nms(boxes, scores, 0.5)
        return [
            {"boxes": boxes[kept], "scores": scores[kept], "labels": torch.ones(len(kept), dtype=torch.int64)}
        ] * len(images)


@pytest.fixture(scope="module")
def picture():
    return partners.read(SAMPLE)


def shown(network, spec, capsys):
    """Of one object that only we report, how many are put down to rounding."""
    plain = {"boxes": torch.tensor([[0.0, 0, 30, 10]]), "scores": torch.tensor([0.9]), "labels": torch.tensor([1])}
    found = ours(np.float32([[0, 0, 30, 10], [10, 0, 40, 10]]), (0.9, 0.8), (1, 1))
    count = trained._shown(network, spec, SAMPLE, SAMPLE, found, plain, ([1], []))
    assert ("as the library itself does" in capsys.readouterr().out) == (count == 1)
    return count


SPEC = zoo.spec("ssdlite320_mobilenet_v3_large")


def test_a_box_at_the_limit_of_suppression_is_put_down_to_rounding(picture, capsys):
    assert shown(AtALimit(picture), SPEC, capsys) == 1


def test_a_box_that_the_library_never_keeps_is_not(picture, capsys):
    assert shown(AtALimit(picture, overlap=0.52), SPEC, capsys) == 0


def test_nothing_is_where_the_inputs_differ_by_more_than_rounding(picture, capsys):
    grey_levels = replace_fields(SPEC, {"preprocess": {"interpolation": "bilinear"}})
    assert partners.input_gap(AtALimit(picture), grey_levels, SAMPLE) > partners.ROUNDING
    assert shown(AtALimit(picture), grey_levels, capsys) == 0
    other_size = replace_fields(SPEC, {"preprocess": {"resize": {"size_hw": (320, 288)}}})
    assert shown(AtALimit(picture), other_size, capsys) == 0


def test_noise_is_no_larger_than_said_is_seeded_and_leaves_the_network_alone(picture):
    network = AtALimit(picture)
    network(torch.stack([picture]))
    first = [answer["scores"].tolist() for answer in partners.perturbed_answers(network, picture, picture, 1e-3, 4)]
    again = [answer["scores"].tolist() for answer in partners.perturbed_answers(network, picture, picture, 1e-3, 4)]
    assert first == again
    plain, *noisy = network.inputs[:5]
    assert [len(batch) for batch in noisy] == [1, 2, 1, 2]
    gaps = [float((batch[0] - plain[0]).abs().max()) for batch in noisy]
    assert max(gaps) <= 1e-3 * (1 + 1e-3)
    assert min(gaps) > 0.9e-3
    network([picture])
    assert torch.equal(network.inputs[-1], plain)


def test_padding_stays_as_it_is():
    transform = GeneralizedRCNNTransform(60, 100, [0.5] * 3, [0.5] * 3)  # padded to 64 x 96

    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.transform = transform

        def forward(self, images):
            return [self.transform(images)[0]]

    noise = torch.rand(3, 60, 90, generator=torch.manual_seed(0))
    (seen,) = partners.perturbed_answers(Keeps(), noise, noise, 1e-3, 1)
    assert seen.tensors.shape[2:] == (64, 96)
    assert seen.tensors[:, :, 60:].abs().max() == 0
    assert seen.tensors[:, :, :, 90:].abs().max() == 0


def test_our_pixels_are_the_librarys_but_for_rounding(picture):
    gap = partners.input_gap(AtALimit(picture), SPEC, SAMPLE)
    assert 0 < gap <= partners.ROUNDING
    assert picture.shape[1:] != (320, 320)
