"""From models to files: the cache, families, what is missing, offline, and the commands over it."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import types

import pytest
from typer.testing import CliRunner

from tests.file_server import file_server
from tests.helpers import ROOT, tiny_spec
from vision_service import zoo
from vision_service.cli import app
from vision_service.config import ModelSpec
from vision_service.errors import ModelNotFound, WeightsError
from vision_service.weights.download import FetchOptions
from vision_service.weights.manifest import find_model, known_models, list_models
from vision_service.weights.pull import pull, wanted

SHA256 = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("one", "two", "cfg")}


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def model(name="one", url="", version="1", **weights):
    weights = {
        "file": f"{name}.pth",
        "url": url,
        "sha256": SHA256.get(name, ""),
        "licence": "MIT",
        "source": "the moon",
    } | weights
    return tiny_spec(name=name, version=version, weights=weights)


@pytest.fixture
def server():
    with file_server() as running:
        for name in SHA256:
            running.add(f"/{name}", name.encode())
        yield running


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VISION_SERVICE_WEIGHTS_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def family(server, monkeypatch):
    """A library with two models, the first in two versions; one of them has a name that ships as well."""
    specs = {
        ("one", ""): model("one", f"{server.url}/one", "v2"),
        ("one", "v2"): model("one", f"{server.url}/one", "v2"),
        ("one", "v1"): model("one", f"{server.url}/two", "v1", file="old.pth", sha256=SHA256["two"]),
        ("nanodet_g", ""): model("nanodet_g", f"{server.url}/two", "theirs", file="two.pth", sha256=SHA256["two"][:8]),
    }
    specs["nanodet_g", "theirs"] = specs["nanodet_g", ""]
    module = types.ModuleType("tiny_family")
    module.names = lambda: ["one", "nanodet_g"]
    module.spec = lambda name, version="": specs.get((name, version))
    monkeypatch.setitem(sys.modules, "tiny_family", module)
    monkeypatch.setattr(zoo, "FAMILIES", {"tiny": "tiny_family"})


def files(cache):
    return sorted(path.name for path in cache.glob("*") if not path.name.startswith("."))


class TestLookup:
    def test_a_family_is_asked_after_the_manifests(self, family, cache):
        assert find_model("one").version == "v2"
        assert find_model("one@v1").weights.file == str(cache / "old.pth")
        assert find_model("nanodet_g").backend == "nanodet"
        assert find_model("nanodet_g@theirs").weights.file == str(cache / "two.pth")

    def test_an_explicit_cache_wins(self, family, cache, tmp_path):
        assert find_model("one", weights_dir=tmp_path).weights.file == str(tmp_path / "one.pth")

    def test_list_has_both_of_a_name(self, family, cache):
        found = {one.key: one.family for one in list_models(families=["tiny"])}
        assert found["nanodet_g"] == "embedded"
        assert found["nanodet_g@theirs"] == "tiny"
        assert found["one"] == "tiny"
        assert known_models(families=["tiny"])["one"].version == "v2"
        assert "one" not in known_models()

    @pytest.mark.parametrize(
        ("name", "clause"),
        [
            ("onne", r"no model 'onne' is known; did you mean 'one'\?"),
            ("one@v9", r"did you mean 'one@v2'"),
            ("nanodet", r"did you mean 'nanodet_g'"),
            ("zzz", r"there are: 'esrgan_slim_x2', .*, and 2 in the libraries' families; `vision-service models list`"),
        ],
    )
    def test_unknown_names(self, family, cache, name, clause):
        with pytest.raises(ModelNotFound, match=clause):
            find_model(name)

    def test_companions_are_placed_too(self, cache, tmp_path):
        companion = '[[model.weights.companions]]\nfile = "net.cfg"\n'
        text = (
            '[[model]]\nname = "m"\ntask = "classify"\nbackend = "tiny"\nclasses = ["a"]\n'
            'preprocess.resize = { mode = "stretch", size_hw = [8, 8] }\n'
            '[model.weights]\nfile = "w/net.weights"\nlicence = "MIT"\nsource = "me"\n'
        )
        (tmp_path / "m.toml").write_text(text + companion)
        weights = find_model("m", [tmp_path / "m.toml"]).weights
        assert (weights.file, weights.companions[0].file) == (
            str(tmp_path / "w/net.weights"),
            str(tmp_path / "net.cfg"),
        )

    def test_models_of_manifests_need_no_library(self):
        code = (
            "import sys; from vision_service.weights.manifest import find_model, known_models;"
            "find_model('nanodet_g'); known_models();"
            "sys.exit(bool({'torch', 'torchvision', 'timm'} & set(sys.modules)))"
        )
        assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def placed(spec: ModelSpec, cache) -> ModelSpec:
    from vision_service.weights.manifest import place

    return place(spec, cache)


class TestPull:
    def test_nothing_to_do(self, cache):
        assert wanted([tiny_spec()]) == []
        pull([], FetchOptions(cache))
        assert not cache.exists()

    def test_each_file_once_with_its_companions(self, server, cache):
        companions = ({"file": "net.cfg", "url": f"{server.url}/cfg", "sha256": SHA256["cfg"]},)
        one = placed(model("one", f"{server.url}/one", companions=companions), cache)
        two = placed(model("two", f"{server.url}/two", companions=companions), cache)
        pull(wanted([one, two]), FetchOptions(cache))
        assert files(cache) == ["net.cfg", "one.pth", "two.pth"]
        assert sorted(request.path for request in server.requests) == ["/cfg", "/one", "/two"]
        assert wanted([one, two]) == []
        assert len(wanted([one, two], also_here=True)) == 3

    def test_one_that_fails_does_not_hinder_another(self, server, cache):
        specs = [placed(model("one", f"{server.url}/none"), cache), placed(model("two", f"{server.url}/two"), cache)]
        with pytest.raises(WeightsError, match=r"^model 'one': cannot fetch .*404 Not Found"):
            pull(wanted(specs), FetchOptions(cache))
        assert files(cache) == ["two.pth"]

    @pytest.mark.parametrize(("parallel", "at_once"), [(1, 1), (3, 3)])
    def test_several_at_a_time(self, server, cache, parallel, at_once):
        specs = []
        for number in range(6):
            url = server.add(f"/{number}", b"x", delays_s=[0.15])
            specs.append(placed(model(f"m{number}", url), cache))
        pull(wanted(specs), FetchOptions(cache, parallel=parallel))
        assert server.most_at_once == at_once

    def test_offline_touches_nothing_and_names_everything(self, server, cache):
        specs = [placed(model(name, f"{server.url}/{name}"), cache) for name in ("one", "two")]
        with pytest.raises(
            WeightsError, match=r"offline, .*one\.pth of model 'one' \(http.*two\.pth .*models pull one two`"
        ):
            pull(wanted(specs), FetchOptions(cache, offline=True))
        assert server.requests == []

    def test_offline_may_read_files(self, cache, tmp_path):
        (tmp_path / "there").write_bytes(b"one")
        spec = placed(model("one", "https://unreachable.invalid/there"), cache)
        pull(wanted([spec]), FetchOptions(cache, offline=True, mirror=tmp_path.as_uri()))
        assert (cache / "one.pth").read_bytes() == b"one"

    def test_without_an_address(self, cache):
        spec = placed(model("one"), cache)
        with pytest.raises(
            WeightsError, match=r"cannot be fetched: .*one\.pth .*it came from: the moon\)\. Put them there"
        ):
            pull(wanted([spec]), FetchOptions(cache))


class TestCommands:
    def test_pull_says_what_it_does(self, family, server, cache):
        result = run("models", "pull", "one", "one@v1")
        assert result.exit_code == 0, result.output
        assert f"pulling one.pth (0.0 MB) from {server.url}/one" in result.stderr
        assert "sha256 is right" in result.stderr
        assert result.stdout == f"one: {cache / 'one.pth'}\none@v1: {cache / 'old.pth'}\n"
        assert (cache / "one.pth").read_bytes() == b"one"
        assert run("models", "pull", "one").stderr == ""  # it is here

    def test_pull_force_mirror_and_config(self, family, server, cache, tmp_path, monkeypatch):
        server.add("/deep/one", b"one")
        (cache).mkdir()
        (cache / "one.pth").write_bytes(b"altered")
        assert run("models", "pull", "one", "--force", "--mirror", f"{server.url}/deep").exit_code == 0
        assert (cache / "one.pth").read_bytes() == b"one"
        assert [request.path for request in server.requests] == ["/deep/one"]
        monkeypatch.delenv("VISION_SERVICE_WEIGHTS_DIR")  # it wins over the file
        config = tmp_path / "s.toml"
        config.write_text(f'offline = true\nweights_dir = "{tmp_path / "other"}"\n')
        result = run("models", "pull", "one", "--config", config)
        assert result.exit_code == 2
        assert f"offline, and these files are not here: {tmp_path / 'other' / 'one.pth'}" in result.stderr

    def test_pull_parallel_has_an_effect(self, family, server, cache):
        for name in ("/one", "/two"):
            server.files[name].delays_s = [0.15]
        assert run("models", "pull", "one", "one@v1", "--parallel", "1").exit_code == 0
        assert server.most_at_once == 1

    def test_list_and_verify(self, family, cache):
        def row():
            rows = json.loads(run("models", "list", "--family", "tiny", "--json").stdout)
            return next((one["here"], one["verified"], one["size_bytes"]) for one in rows if one["name"] == "one")

        assert row() == (False, "", None)
        assert run("models", "verify").exit_code == 0
        result = run("models", "verify", "one")
        assert (result.exit_code, result.stdout) == (1, f"one: {cache / 'one.pth'}: missing\n")
        run("models", "pull", "one", "nanodet_g@theirs")
        assert row() == (True, "yes", 3)
        result = run("models", "verify", "one", "nanodet_g@theirs")
        assert result.exit_code == 0
        assert [line.rpartition(": ")[2] for line in result.stdout.splitlines()] == [
            "right",
            "right in the 8 digits that are known",
        ]
        (cache / "one.pth").write_bytes(b"altered")
        assert row() == (True, "not yet", 7)
        result = run("models", "verify")
        assert result.exit_code == 1
        assert f"one: {cache / 'one.pth'}: ALTERED: its sha256 is" in result.stdout
        assert f"nanodet_g@theirs: {cache / 'two.pth'}: right in" in result.stdout
        assert "mobilenet_v2: " in result.stdout  # what ships is here, too
        assert "models pull --force" in result.stderr
        assert row() == (True, "altered", 7)

    def test_show_says_whether_it_is_here(self, family, cache):
        assert json.loads(run("models", "show", "one", "--json").stdout)["here"] is False
        run("models", "pull", "one")
        shown = json.loads(run("models", "show", "one", "--json").stdout)
        assert (shown["here"], shown["verified"], shown["size_bytes"]) == (True, "yes", 3)

    def test_sizes_that_are_only_known_roughly_say_so(self, cache):
        (row,) = (
            row
            for row in json.loads(run("models", "list", "--family", "torchvision", "--json").stdout)
            if row["name"] == "squeezenet1_1"
        )
        assert (row["size_is_about"], row["here"]) == (True, False)
        assert f"about {row['size_bytes'] / 1e6:.1f} MB" in run("models", "list", "--family", "torchvision").stdout
        cache.mkdir(exist_ok=True)
        (cache / "squeezenet1_1-b8a52dc0.pth").write_bytes(b"four")
        shown = json.loads(run("models", "show", "squeezenet1_1", "--json").stdout)
        assert (shown["size_is_about"], shown["size_bytes"]) == (False, 4)

    def test_a_companion_of_unknown_size_makes_the_sum_a_rough_one(self, cache):
        rows = json.loads(run("models", "list", "--family", "darknet", "--json").stdout)
        sizes = {row["name"]: (row["size_bytes"], row["size_is_about"]) for row in rows}
        assert sizes["yolov4"] == (257717640, True)
        assert sizes["yolov4-csp"] == (None, False)  # nobody names it

    def test_list_by_family_and_task(self, family, cache):
        def names(*arguments):
            return [row["name"] for row in json.loads(run("models", "list", "--json", *arguments).stdout)]

        assert names("--family", "tiny") == ["one", "nanodet_g@theirs"]
        assert names("--family", "embedded", "--task", "detect") == ["nanodet_g"]
        assert names("--family", "tiny", "--task", "detect") == []
        assert len(names()) == 6
        assert "no family 'tinny'; did you mean 'tiny'?" in run("models", "list", "--family", "tinny").stderr
        assert (
            "has no effect together with --address"
            in run("models", "list", "--family", "tiny", "--address", "x:1").stderr
        )

    def test_a_large_family_is_listed_on_request(self, family, cache, monkeypatch):
        from vision_service.cli import models

        monkeypatch.setattr(models, "_AT_A_GLANCE", 1)
        result = run("models", "list", "--json")
        assert "2 models of tiny are not listed; --family tiny lists them" in result.stderr
        assert len(json.loads(result.stdout)) == 4
