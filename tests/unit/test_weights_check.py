"""Which files are taken for the right ones, and which may run code."""

from __future__ import annotations

import hashlib
import logging

import pytest

from tests.helpers import tiny_spec
from vision_service.config import FileSpec, WeightsSpec
from vision_service.config.settings import ServerSettings
from vision_service.engine.build import resolve_specs
from vision_service.errors import ConfigError, WeightsError
from vision_service.weights.check import check_trusted, read_checked, sha256_of

CONTENT = b"weights"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "w.pt"
    file.write_bytes(CONTENT)
    return file


def weights(path, sha256):
    return WeightsSpec(file=str(path), sha256=sha256, licence="MIT", source="the moon")


def test_sha256_is_the_standard_one(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")  # FIPS 180-2, appendix B.1
    assert sha256_of(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.parametrize("digits", [64, 63, 8])
def test_known_in_full_or_in_part(path, digits, caplog):
    assert read_checked("model 'm'", FileSpec(file=str(path), sha256=SHA256[:digits])) == CONTENT
    assert not caplog.records
    with pytest.raises(
        WeightsError, match=rf"model 'm': its sha256 is {SHA256}, the manifest expects 0{{{digits}}}: the"
    ):
        read_checked("model 'm'", FileSpec(file=str(path), sha256="0" * digits))


def test_unknown_is_said_once(path, caplog):
    with caplog.at_level(logging.WARNING):
        assert [read_checked("model 'm'", FileSpec(file=str(path))) for _ in range(3)] == [CONTENT] * 3
    assert [record.message.partition(":")[0] for record in caplog.records] == [f"{path} is unverified"]


@pytest.mark.parametrize(
    ("sha256", "trusted", "refusal"),
    [
        (SHA256, False, None),
        (SHA256, True, None),
        ("", True, None),
        (SHA256[:8], True, None),
        ("", False, r"is a pickle, which can run any code .* no sha256 is known for it\. .*`serve --trust NAME`"),
        (SHA256[:63], False, "only the first 63 digits of its sha256 are known"),
        ("0" * 64, False, f"its sha256 is {SHA256}, the manifest expects 0{{64}}"),
        ("0" * 64, True, f"its sha256 is {SHA256}, the manifest expects 0{{64}}"),
        ("0" * 8, True, "the manifest expects 0{8}:"),
    ],
)
def test_who_may_run_code(path, sha256, trusted, refusal):
    if refusal is None:
        check_trusted(path, weights(path, sha256), trusted)
    else:
        with pytest.raises(WeightsError, match=refusal):
            check_trusted(path, weights(path, sha256), trusted)


def test_a_missing_file_is_not_trusted(tmp_path):
    with pytest.raises(WeightsError, match=r"cannot be read \(No such file.*it came from: the moon"):
        check_trusted(tmp_path / "gone.pt", weights(tmp_path / "gone.pt", SHA256), trusted=False)


class TestSettings:
    def test_trust_reaches_the_spec_of_that_model_only(self):
        assert not tiny_spec().trusted
        models = ("nanodet_g", "mobilenet_v2@1")
        settings = ServerSettings.read(models=models, trusted_models=("mobilenet_v2@1",))
        assert [spec.trusted for spec in resolve_specs(settings)] == [False, True]

    def test_from_the_environment(self, monkeypatch):
        monkeypatch.setenv("VISION_SERVICE_TRUSTED_MODELS", "nanodet_g, mobilenet_v2")
        assert ServerSettings.read().trusted_models == ("nanodet_g", "mobilenet_v2")

    def test_trust_in_a_model_that_is_not_served(self):
        with pytest.raises(
            ConfigError, match=r"trusted_models has 'nanodet', which is not served; did you mean 'nanodet_g"
        ):
            resolve_specs(ServerSettings.read(trusted_models=("nanodet",)))

    def test_where_the_cache_is(self, monkeypatch, tmp_path):
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.delenv("VISION_SERVICE_WEIGHTS_DIR")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        assert ServerSettings.read().weights_dir == tmp_path / ".cache" / "vision-service" / "weights"
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        assert ServerSettings.read().weights_dir == tmp_path / "xdg" / "vision-service" / "weights"
        monkeypatch.setenv("VISION_SERVICE_WEIGHTS_DIR", "~/mine")
        assert ServerSettings.read().weights_dir == tmp_path / "mine"
        assert ServerSettings.read(weights_dir="/elsewhere").weights_dir.as_posix() == "/elsewhere"

    def test_a_mirror_is_an_address(self):
        with pytest.raises(ConfigError, match="weights_mirror"):
            ServerSettings.read(weights_mirror="mirror.example")
