"""Reading a Darknet cfg, and what is said about one that is wrong."""

from __future__ import annotations

import pytest

from tests.helpers import ROOT
from vision_service.networks.darknet import Darknet
from vision_service.networks.darknet_cfg import DarknetCfgError, parse_cfg

TINY = (ROOT / "tests" / "data" / "darknet_tiny.cfg").read_text()

HEAD = "[net]\nwidth=16\nheight=16\nchannels=3\n[convolutional]\nfilters=8\nsize=1\nactivation=linear\n"  # lines 1..8
YOLO = "[yolo]\nmask=0\nanchors=4,5\nclasses=3\nnum=1\n"  # 5 lines


def test_comments_blanks_and_repeated_sections():
    text = (
        "\ufeff# note\n[net]\n width = 32 # pixels\n\theight=32\n; old\n\n[route]\nlayers = -1, 8,\n[route]\nlayers=0\n"
    )
    net, first, second = parse_cfg(text)
    assert (net.integer("width", 0), net.integer("height", 0), net.index) == (32, 32, -1)
    assert first.integers("layers", ()) == (-1, 8)
    assert (first.index, first.line, first.values["layers"].line) == (0, 7, 8)
    assert (second.index, second.line) == (1, 9)


def test_windows_line_ends():
    assert parse_cfg("[net]\r\nwidth=32\r\n[avgpool]\r\n")[0].integer("width", 0) == 32


def test_size_of_the_input_can_be_replaced():
    assert Darknet(TINY).size_hw == (64, 64)
    assert Darknet(TINY, (32, 96)).size_hw == (32, 96)


def test_aliases_and_absent_keys():
    network = Darknet(HEAD.replace("[net]", "[network]").replace("[convolutional]", "[conv]") + YOLO)
    conv = next(network.convolutions()).conv
    assert (conv.stride, conv.padding, conv.groups, conv.bias is not None) == ((1, 1), (0, 0), 1, True)


def test_training_keys_pass_and_the_network_stays_the_same():
    plain = Darknet(HEAD + YOLO)
    busy = Darknet(
        HEAD.replace("channels=3", "channels=3\nmosaic=1\nunheard_of=7\nsteps=1,2\nbatch=1\nbatch=64").replace(
            "size=1", "size=1\nlearning_rate=.1\nbinary=0\nstopbackward=1"
        )
        + YOLO.replace(
            "num=1", "num=1\njitter=.3\niou_loss=ciou\nnms_kind=diounms\nmax_delta=5\ncounters_per_class=1,2,3"
        )
    )
    assert repr(plain) == repr(busy)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", r"first section must be \[net\], got nothing"),
        ("[convolutional]\nsize=1\n", r"first section must be \[net\], got \[convolutional\], line 1"),
        ("[net]\nwidth=8\n", r"no layer after \[net\]"),
        ("width=8\n[net]\n", r"line 1: 'width=8' stands before the first"),
        ("[net]\nwidth 8\n", r"line 2: 'width 8' is neither"),
        ("[net\nwidth=8\n", r"line 1: '\[net' begins with '\[' but is no section"),
        ("[net]\nheight=8\n[avgpool]\n", r"\[net\], line 1: needs width="),
        ("[net]\nheight=8\nwidth=x\n[avgpool]\n", r"line 3, width=x: need a whole number"),
        ("[net]\nheight=8\nwidth=0\n[avgpool]\n", r"line 3, width=0: width must be 1 or more"),
        (HEAD, r"no \[yolo\] layer among the 1"),
        (HEAD + "[lstm]\n" + YOLO, r"layer 1 \[lstm\], line 9: this kind of layer is not supported; there are: avg"),
        (HEAD + "[route]\nlayers=-2\n" + YOLO, r"layer 1 \[route\], line 9: line 10, layers=-2: there is no layer -2"),
        (HEAD + "[route]\nlayers=1\n" + YOLO, r"line 10, layers=1: there is no layer 1 before it; from -1 to 0"),
        (HEAD + "[route]\n" + YOLO, r"layer 1 \[route\], line 9: needs layers="),
        (HEAD + "[route]\nlayers=-1\ngroups=3\n" + YOLO, r"line 11, groups=3: 8 channels of layer 0 do not make 3"),
        (HEAD + "[route]\nlayers=-1\ngroups=2\ngroup_id=2\n" + YOLO, r"line 12, group_id=2: of 2 groups"),
        (
            HEAD + "[maxpool]\nsize=2\nstride=2\n[route]\nlayers=-1,0\n" + YOLO,
            r"line 13.*layer 0 is 16 x 16 and layer 1",
        ),
        (HEAD + "[maxpool]\nsize=2\nstride=2\n[shortcut]\nfrom=0\n" + YOLO, r"layer 2 \[shortcut\], line 12: line 13"),
        (HEAD + "[shortcut]\nfrom=-1\nweights_type=per_feature\n" + YOLO, r"line 11, weights_type=per_feature: is not"),
        (HEAD + "[maxpool]\nstrid=2\n" + YOLO, r"line 10, strid=2: unknown key.*did you mean stride"),
        (HEAD + "[maxpool]\nsize=2\nantialiasing=1\n" + YOLO, r"line 11, antialiasing=1: is not supported; only"),
        (HEAD + "[maxpool]\nsize=2\npadding=3\n" + YOLO, r"line 11, padding=3: a window of 2 would lie in the padding"),
        (HEAD.replace("size=1", "size=1\ngroups=2") + YOLO, r"layer 0 .*groups=2: 3 channels that come in do not make"),
        (HEAD.replace("size=1", "size=1\nsize=3") + YOLO, r"line 7, size=1: line 8 gives it again as 3"),
        (HEAD.replace("size=1", "size=99") + YOLO, r"layer 0 .*its output would be -82 x -82 pixels"),
        (
            HEAD.replace("size=1", "size=3\ndilation=2\npadding=2") + YOLO,
            r"dilation=2: dilation is supported with pad=1",
        ),
        (HEAD.replace("linear", "maxout") + YOLO, r"line 8, activation=maxout: is not supported; there are: linear"),
        (HEAD.replace("size=1", "size=1\ndontload=1") + YOLO, r"line 8, dontload=1: is not supported"),
        (
            HEAD + YOLO.replace("4,5", "4,5,6"),
            r"layer 1 \[yolo\], line 9: line 11.*num=1 anchors need 2 numbers, got 3",
        ),
        (HEAD + YOLO.replace("mask=0", "mask=1"), r"line 10, mask=1: must choose from the num=1 anchors"),
        (HEAD + YOLO.replace("mask=0", "mask=0,0"), r"layer 1 \[yolo\], line 9: 2 anchors .* need 16 channels, but 8"),
        (
            HEAD + YOLO.replace("classes=3", "classes=4"),
            r"1 anchors .*4 classes, need 9 channels, but 8 come in: correct filters=",
        ),
        (HEAD + YOLO.replace("classes=3", "classes=3,4"), r"line 12, classes=3,4: need one number, got 2"),
        (HEAD + YOLO + "[upsample]\n", r"layer 2 \[upsample\], line 14: takes the output of layer 1 \[yolo\], line 9"),
        (HEAD + YOLO.replace("num=1", "num=1\nmap=9k.map"), r"line 14, map=9k.map: unknown key"),
        (HEAD + "[scale_channels]\nfrom=0\n" + YOLO, r"layer 1 \[scale_channels\].*by \(8, 1, 1\), but \(8, 16, 16\)"),
    ],
)
def test_says_what_is_wrong_and_where(text, says):
    with pytest.raises(DarknetCfgError, match=says):
        Darknet(text)


def test_layers_must_agree_on_classes():
    six = "[route]\nlayers=0\n[convolutional]\nfilters=6\nactivation=linear\n" + YOLO.replace("classes=3", "classes=1")
    with pytest.raises(DarknetCfgError, match=r"must agree on classes=, got \[3, 1\]"):
        Darknet(HEAD + YOLO + six)
