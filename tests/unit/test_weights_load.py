from __future__ import annotations

import hashlib

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.helpers import tiny_spec
from vision_service.errors import WeightsError
from vision_service.weights.load import load_weights


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))


def spec_for(path, sha256=None):
    digest = sha256 or hashlib.sha256(path.read_bytes()).hexdigest()
    return tiny_spec(weights={"file": str(path), "sha256": digest, "licence": "MIT", "source": "the moon"})


def trained():
    return {k: torch.full_like(v, 3) for k, v in network().state_dict().items()}


def test_without_weights_nothing_changes():
    net = network()
    load_weights(net, tiny_spec())
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), network().parameters(), strict=True))


@pytest.mark.parametrize("kind", ["safetensors", "half", "pt", "wrapped"])
def test_loads(tmp_path, kind):
    state = trained()
    path = tmp_path / ("w.pt" if kind in {"pt", "wrapped"} else "w.safetensors")
    match kind:
        case "safetensors":
            save_file(state, path)
        case "half":
            save_file({k: v.half() if v.is_floating_point() else v for k, v in state.items()}, path)
        case "pt":
            torch.save(state, path)
        case "wrapped":
            torch.save({"state_dict": state, "epoch": 3}, path)
    net = network()
    load_weights(net, spec_for(path))
    assert all(torch.equal(v, torch.full_like(v, 3)) for v in net.state_dict().values())
    assert net[0].weight.dtype == torch.float32


def test_training_counters_may_be_left_out(tmp_path):
    save_file({k: v for k, v in trained().items() if "num_batches" not in k}, tmp_path / "w.safetensors")
    net = network()
    load_weights(net, spec_for(tmp_path / "w.safetensors"))
    assert net[1].running_mean.tolist() == [3.0] * 4


def test_missing_file(tmp_path):
    with pytest.raises(
        WeightsError, match=r"model 'tiny': weights .*gone\.pt: cannot be read .*it came from: the moon"
    ):
        load_weights(network(), spec_for(tmp_path / "gone.pt", "0" * 64))


def test_altered_file_is_not_read(tmp_path):
    path = tmp_path / "w.pt"
    path.write_bytes(b"cposix\nsystem\n(S'touch pwned'\ntR.")  # would run code if it were unpickled
    with pytest.raises(WeightsError, match=r"its sha256 is [0-9a-f]{64}, the manifest expects 0{64}"):
        load_weights(network(), spec_for(path, "0" * 64))


def test_a_pickle_that_would_run_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "w.pt"
    path.write_bytes(b"cposix\nsystem\n(S'touch pwned'\ntR.")
    with pytest.raises(WeightsError, match="is not a weight file that can be read safely"):
        load_weights(network(), spec_for(path))
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
@pytest.mark.parametrize("content", [b"", b"no weights at all"])
def test_not_a_weight_file(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(WeightsError, match="is not a weight file"):
        load_weights(network(), spec_for(path))


def test_not_a_state_dict(tmp_path):
    torch.save([torch.zeros(1)], tmp_path / "w.pt")
    with pytest.raises(WeightsError, match="need a state dict"):
        load_weights(network(), spec_for(tmp_path / "w.pt"))


def test_other_architecture_names_what_does_not_fit(tmp_path):
    state = trained()
    state["0.weight"] = torch.zeros(4, 3, 5, 5)
    state["head.bias"] = state.pop("0.bias")
    save_file(state, tmp_path / "w.safetensors")
    net = network()
    with pytest.raises(WeightsError) as raised:
        load_weights(net, spec_for(tmp_path / "w.safetensors"))
    message = str(raised.value)
    assert "1 missing: 0.bias" in message
    assert "1 unknown to the network: head.bias" in message
    assert "0.weight is [4, 3, 5, 5], the network has [4, 3, 1, 1]" in message
    assert torch.equal(net[1].weight, network()[1].weight), "nothing is loaded when something does not fit"
