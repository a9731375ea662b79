"""Compiled networks on disk: found, damaged, raced for, and told apart."""

from __future__ import annotations

import copy
import multiprocessing
import os
import time
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from vision_service.runtimes import Execution, Workload, create_runtime
from vision_service.runtimes.cache import CompileCache
from vision_service.runtimes.fingerprint import fingerprint


def write(text="made"):
    return lambda folder: (folder / "network.bin").write_text(text) and None


def test_found_again_by_the_same_parts_alone(tmp_path):
    cache = CompileCache(tmp_path / "new")
    assert cache.find("a", "b") is None
    entry = cache.store(write(), "a", "b")
    assert cache.find("a", "b") == entry
    assert (entry / "network.bin").read_text() == "made"
    assert cache.find("ab") is None
    assert cache.find("a", "c") is None
    assert CompileCache(None).store(write(), "a") is None
    assert CompileCache(None).find("a") is None


@pytest.mark.parametrize("damage", ["other bytes", "cut", "no file", "no index", "index is no json", "index is a list"])
def test_a_damaged_entry_is_removed_and_made_anew(tmp_path, damage, caplog):
    cache = CompileCache(tmp_path)
    entry = cache.store(write(), "a")
    file, index = entry / "network.bin", entry / "entry.json"
    match damage:
        case "other bytes":
            file.write_text("mode")
        case "cut":
            file.write_text("ma")
        case "no file":
            file.unlink()
        case "no index":
            index.unlink()
        case "index is no json":
            index.write_text("{")
        case "index is a list":
            index.write_text("[]")
    assert cache.find("a") is None
    assert "is damaged and is made anew" in caplog.text
    assert not entry.exists()
    assert cache.store(write("again"), "a") == entry
    assert (cache.find("a") / "network.bin").read_text() == "again"
    assert sorted(tmp_path.iterdir()) == [entry], "nothing else is left"


def test_a_folder_that_cannot_be_written(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    assert CompileCache(tmp_path / "file").store(write(), "a") is None
    assert "cannot be kept in" in caplog.text


def test_what_fails_while_it_is_written_leaves_nothing(tmp_path):
    def fail(folder):
        (folder / "half").write_text("")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        CompileCache(tmp_path).store(fail, "a")
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_is_swept_up(tmp_path):
    old, new = tmp_path / ".aside-old", tmp_path / ".aside-new"
    old.mkdir()
    new.mkdir()
    os.utime(old, (time.time() - 100_000,) * 2)
    CompileCache(tmp_path).store(write(), "a")
    assert not old.exists()
    assert new.exists()


def _race(folder, start, number):
    cache = CompileCache(folder)
    start.wait(30)
    for turn in range(20):
        entry = cache.store(write(f"{number}"), str(turn))
        assert entry is not None
        assert (entry / "network.bin").read_text() in {"0", "1", "2"}


def test_processes_that_race_all_get_a_whole_entry(tmp_path):
    context = multiprocessing.get_context("fork")
    start = context.Barrier(3)
    workers = [context.Process(target=_race, args=(tmp_path, start, number)) for number in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert len(list(tmp_path.iterdir())) == 20


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3)
        self.register_buffer("offset", torch.zeros(4), persistent=False)
        self.scale = 2.0

    def forward(self, images, sizes_hw):
        return (self.layer(images.permute(0, 3, 1, 2).float()).mean((2, 3)) * self.scale + self.offset,)


def test_a_fingerprint_tells_networks_apart():
    torch.manual_seed(0)
    network = Net()
    known = {fingerprint(network, "options")}
    assert fingerprint(copy.deepcopy(network), "options") in known
    known.add(fingerprint(network, "other options"))

    def change(how):
        other = copy.deepcopy(network)
        how(other)
        known.add(fingerprint(other, "options"))

    with torch.no_grad():
        change(lambda net: net.layer.weight[0, 0, 0, 0].add_(1e-3))
        change(lambda net: net.offset.add_(1))
    change(lambda net: setattr(net, "scale", 3.0))
    change(lambda net: setattr(net.layer, "padding_mode", "reflect"))
    change(lambda net: setattr(net, "layer", nn.Sequential(net.layer)))
    assert len(known) == 7


@pytest.mark.skipif(find_spec("openvino") is None, reason="needs the package openvino")
def test_the_second_start_converts_nothing_and_a_damaged_network_is_converted_again(tmp_path, monkeypatch):
    from vision_service.runtimes import openvino_cpu

    torch.manual_seed(0)
    network = Net()
    images = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8)
    sizes_hw = torch.tensor([[8, 8]] * 2)
    conversions = []
    original = openvino_cpu.export_network
    monkeypatch.setattr(openvino_cpu, "export_network", lambda *args: conversions.append(1) or original(*args))

    def run(precision="fp32"):
        runtime = create_runtime("openvino", torch.device("cpu"), Execution(1, tmp_path))
        return runtime.compile(network, Workload(images[:1]), precision)(images, sizes_hw)[0]

    first = run()
    assert torch.equal(run(), first)
    assert len(conversions) == 1
    (entry,) = tmp_path.iterdir()
    weights = entry / "network.bin"
    weights.write_bytes(bytes(weights.stat().st_size))
    assert torch.equal(run(), first)
    assert len(conversions) == 2
    with torch.no_grad():
        network.layer.bias.add_(1)
    assert not torch.equal(run(), first)
    assert len(conversions) == 3
