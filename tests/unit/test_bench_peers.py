"""How peers and our server take turns in `benchmarks/peers`."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from argparse import Namespace
from collections import defaultdict
from contextlib import contextmanager, nullcontext

import pytest

from tests.helpers import ROOT, until

PEERS = ROOT / "benchmarks" / "peers"


@pytest.fixture(scope="module")
def peers():
    """Its module, under another name than that of benchmarks/run.py."""
    sys.path.insert(0, str(PEERS))
    try:
        spec = importlib.util.spec_from_file_location("peers_run", PEERS / "run.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(PEERS))
    return module


def test_eager_peers_meet_all_of_ours_and_nobody_runs_int8(peers):
    rows = ["eager:fp32", "openvino:fp32", "openvino:int8"]
    assert list(peers.meetings(rows)) == [("eager:fp32", rows), ("openvino:fp32", ["openvino:fp32"])]
    assert list(peers.meetings(["openvino:bf16"])) == [("openvino:bf16", ["openvino:bf16"])]


def take_turns(peers, speeds, rounds=2, starts=1):
    """Speeds by system, one a round; what was measured, and who was asked when."""
    asked, left = [], {name: list(reversed(found)) for name, found in speeds.items()}
    stopped = []

    @contextmanager
    def still():
        stopped.append(True)
        yield
        stopped.pop()

    def way(name):
        def load(in_flight):
            asked.append((name, in_flight))
            assert bool(stopped) == (name != "mosec"), "the other one stands still"
            return {"images_per_s": left[name].pop()}

        return load

    found = defaultdict(peers.Measured)
    ours = {("openvino:fp32", name, 1): way(name) for name in speeds if name != "mosec"}
    theirs = ("openvino:fp32", "mosec", 1)
    other = peers.systems.Other(way("mosec"), still)
    for start in range(starts):
        peers._take_turns(Namespace(rounds=rounds, in_flight=[8], seconds=1.0), found, ours, theirs, other, start)
    return found[theirs].summary(), asked


def test_what_is_compared_was_measured_beside_each_other_in_both_orders(peers):
    speeds = {"vision-service": [120.0, 30.0, 66.0], "vision-service-stream": [100.0, 20.0, 60.0]}
    summary, asked = take_turns(peers, {**speeds, "mosec": [100.0, 10.0, 60.0]}, rounds=3)
    there = [(name, 8) for name in (*speeds, "mosec")]
    assert asked == there + there[::-1] + there
    expected = {"median": 1.2, "low": 1.1, "high": 3.0, "ours": 66.0, "theirs": 60.0, "starts": [1.2]}
    assert summary["ours_over"]["openvino:fp32"]["vision-service"] == {"8": expected}
    assert summary["ours_over"]["openvino:fp32"]["vision-service-stream"]["8"]["median"] == 1.0
    assert summary["loads"]["8"] == {"images_per_s": 60.0, "lowest": 10.0, "highest": 100.0, "rounds": 3}


def test_starts_have_one_voice_each_and_the_order_goes_on_from_one_to_the_next(peers):
    speeds = {"vision-service": [10.0, 20.0, 30.0, 90.0, 80.0, 70.0], "mosec": [10.0] * 6}
    summary, asked = take_turns(peers, speeds, rounds=1, starts=6)
    there = [("vision-service", 8), ("mosec", 8)]
    assert asked == (there + there[::-1]) * 3
    assert summary["ours_over"]["openvino:fp32"]["vision-service"]["8"]["starts"] == [1.0, 2.0, 3.0, 9.0, 8.0, 7.0]
    summary, _ = take_turns(peers, speeds, rounds=2, starts=3)
    found = summary["ours_over"]["openvino:fp32"]["vision-service"]["8"]
    assert found["starts"] == [1.5, 6.0, 7.5]
    assert (found["median"], found["low"], found["high"]) == (6.0, 1.0, 9.0)  # of all six rounds it would be 5


def test_servers_are_started_as_often_as_is_asked_for(peers, monkeypatch):
    started = []

    @contextmanager
    def ours(job):
        started.append(job.row)
        yield {"vision-service": lambda in_flight: {"images_per_s": 2.0}}

    @contextmanager
    def other(job, system, workers):
        started.append(system)
        yield peers.systems.Other(lambda in_flight: {"images_per_s": 1.0}, nullcontext)

    monkeypatch.setattr(peers.systems, "ours", ours)
    monkeypatch.setattr(peers.systems, "other", other)
    job = peers.systems.Job("mobilenet_v2", "openvino:fp32", None, [], 1.0, None)
    arguments = Namespace(starts=3, rounds=2, in_flight=[8], seconds=1.0, system=["mosec", "ray"], tune=False)
    *_, rows = peers._measure(arguments, {job.row: job})
    assert started == ["openvino:fp32", "mosec", "ray"] * 3
    beside = {row["system"]: row["ours_over"] for row in rows if row["system"] != "vision-service"}
    assert beside["ray"]["openvino:fp32"]["vision-service"]["8"]["starts"] == [2.0] * 3


@pytest.mark.parametrize("option", ["--starts", "--rounds"])
def test_a_run_that_would_measure_nothing_is_refused(peers, monkeypatch, capsys, option):
    monkeypatch.setattr(sys, "argv", ["run.py", option, "0"])
    with pytest.raises(SystemExit):
        peers._arguments()
    assert "at least 1" in capsys.readouterr().err


def test_who_answers_nothing_is_named(peers):
    with pytest.raises(SystemExit, match=r"mosec, openvino:fp32, answered nothing in 1 s"):
        take_turns(peers, {"vision-service": [1.0], "mosec": [0.0]})


def test_a_session_of_processes_stands_still_and_goes_on(peers):
    """A shell and what it has started."""
    with subprocess.Popen(["sh", "-c", "sleep 60 & cat"], stdin=-1, stdout=-1, start_new_session=True) as process:
        try:
            until(lambda: len(peers.systems._session(process.pid)) >= 3)
            with peers.systems._still(process):
                assert set(peers.systems._session(process.pid).values()) == {"T"}
            until(lambda: "T" not in peers.systems._session(process.pid).values())
            process.stdin.write(b"still there")
            process.stdin.close()
            assert process.stdout.read(11) == b"still there"
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def test_calls_that_failed_in_any_round_are_counted(peers):
    rounds = [{"images_per_s": 10.0, "failed": failed} for failed in (0, 0, 0, 7)]
    assert peers._summary(rounds)["failed"] == 7
