import os
import threading
from queue import SimpleQueue

import pytest

from tests.helpers import tiny_spec
from vision_service.config.settings import ServerSettings
from vision_service.engine.build import build_pipeline, replace_fields, resolve_specs
from vision_service.engine.threads import ThreadBudget, quota_cores, usable_cores
from vision_service.errors import ConfigError, ModelNotFound


def test_defaults_serve_the_embedded_models():
    specs = resolve_specs(ServerSettings.read())
    assert [spec.task for spec in specs] == ["classify", "detect", "segment", "translate"]


def test_flags_over_environment_over_file(tmp_path, monkeypatch):
    file = tmp_path / "s.toml"
    file.write_text('port = 1\nhost = "file"\nlog_level = "ERROR"\n[model.nanodet_g.batching]\nmax_batch_size = 3\n')
    monkeypatch.setenv("VISION_SERVICE_PORT", "2")
    monkeypatch.setenv("VISION_SERVICE_HOST", "environment")
    settings = ServerSettings.read(file, port=3)
    assert (settings.port, settings.host, settings.log_level) == (3, "environment", "ERROR")
    detector = next(spec for spec in resolve_specs(settings) if spec.name == "nanodet_g")
    assert detector.batching.max_batch_size == 3


def test_lists_and_nested_values_from_the_environment(monkeypatch):
    monkeypatch.setenv("VISION_SERVICE_MODELS", "nanodet_g, mobilenet_v2")
    monkeypatch.setenv("VISION_SERVICE_MODEL__NANODET_G__PARAMS__SCORE_THRESHOLD", "0.7")
    settings = ServerSettings.read()
    assert settings.models == ("nanodet_g", "mobilenet_v2")
    assert resolve_specs(settings)[0].params.score_threshold == 0.7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prot = 1", "prot: Extra inputs"),
        ("port = 99999", "port: Input should be less than"),
        ("port = ", "is not TOML"),
        ('model.nothing.device = "cpu"', "model 'nothing', which is not served"),
        ('default_models.detect = "mobilenet_v2"', "which is a classify model"),
        ('default_models.detect = "nano"', "which is not served"),
        ('models = ["nanodet_g", "nanodet_g"]', "nanodet_g is named twice"),
        ("model.nanodet_g.batching.max_batch = 3", "batching.max_batch: Extra inputs"),
        ('device = "tpu"', "device: String should match"),
    ],
)
def test_mistakes_in_the_file_are_named(tmp_path, text, message):
    file = tmp_path / "s.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        resolve_specs(ServerSettings.read(file))


def test_default_of_a_model_that_is_named_with_its_version():
    settings = ServerSettings.read(models=("mobilenet_v2@1",), default_models={"classify": "mobilenet_v2"})
    assert [spec.name for spec in resolve_specs(settings)] == ["mobilenet_v2"]


def test_missing_file_unknown_model_and_misspelt_variable(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        ServerSettings.read(tmp_path / "none.toml")
    with pytest.raises(ModelNotFound, match="did you mean 'nanodet_g'"):
        resolve_specs(ServerSettings.read(models=("nanodet",)))
    monkeypatch.setenv("VISION_SERVICE_PROT", "1")
    with pytest.raises(ConfigError, match=r"VISION_SERVICE_PROT: no such setting; did you mean 'port'"):
        ServerSettings.read()


def test_another_resize_mode_replaces_the_old_one_whole():
    spec = replace_fields(tiny_spec(), {"preprocess": {"resize": {"mode": "native", "pad_multiple": 32}}})
    assert spec.preprocess.resize.model_dump() == {"mode": "native", "pad_multiple": 32}
    spec = replace_fields(tiny_spec(), {"preprocess": {"resize": {"size_hw": [4, 6]}, "color_order": "bgr"}})
    assert spec.preprocess.resize.size_hw == (4, 6)
    assert spec.preprocess.color_order == "bgr"


def test_device_setting_reaches_models_that_say_auto():
    settings = ServerSettings.read(models=("mobilenet_v2",), device="cpu")
    assert resolve_specs(settings)[0].device == "cpu"
    settings = ServerSettings.read(models=("mobilenet_v2",), device="cpu", model={"mobilenet_v2": {"device": "cuda:7"}})
    assert resolve_specs(settings)[0].device == "cuda:7"


def test_a_gpu_that_is_not_there_is_a_clear_error():
    from vision_service.engine.catalog import Catalog

    with pytest.raises(ConfigError, match="device cuda:99: torch sees"):
        Catalog().load(tiny_spec(device="cuda:99"))


def test_half_precision_on_a_cpu_is_refused():
    from vision_service.engine.catalog import Catalog

    with pytest.raises(ConfigError, match="fp16 needs a GPU"):
        Catalog().load(tiny_spec(precision="fp16"))


@pytest.mark.parametrize(
    ("content", "cores"),
    [("max 100000", 1_000_000), ("200000 100000", 2), ("150000 100000", 2), ("50000 100000", 1), ("", 1_000_000)],
)
def test_container_quota_version_2(tmp_path, content, cores):
    (tmp_path / "cpu.max").write_text(content)
    assert quota_cores(tmp_path / "cpu.max", tmp_path) == cores


def test_container_quota_version_1(tmp_path):
    (tmp_path / "cpu.cfs_quota_us").write_text("300000\n")
    (tmp_path / "cpu.cfs_period_us").write_text("100000\n")
    assert quota_cores(tmp_path / "none", tmp_path) == 3
    (tmp_path / "cpu.cfs_quota_us").write_text("-1\n")
    assert quota_cores(tmp_path / "none", tmp_path) == 1_000_000
    assert quota_cores(tmp_path / "none", tmp_path / "none") == 1_000_000
    assert usable_cores() >= 1


def test_thread_budget_and_its_effect():
    import cv2
    import torch

    assert ThreadBudget.plan(8, on_gpu=False) == ThreadBudget(8, 8, 2)
    assert ThreadBudget.plan(1, on_gpu=False) == ThreadBudget(1, 1, 1)
    assert ThreadBudget.plan(8, on_gpu=True) == ThreadBudget(7, 1, 1)
    assert ThreadBudget.plan(1, on_gpu=True, forward_passes=2) == ThreadBudget(1, 1, 1)
    assert ThreadBudget.plan(8, on_gpu=False, decode_workers=3, runtime_threads=5) == ThreadBudget(3, 5, 1)
    assert ThreadBudget.plan(8, on_gpu=False, runtime_threads=2) == ThreadBudget(8, 2, 4)
    assert ThreadBudget.plan(8, on_gpu=False, forward_passes=3) == ThreadBudget(8, 8, 3)
    passes = {(8, 0): 4, (8, 3): 2, (8, 1): 8, (2, 0): 1, (1, 0): 1}  # cores and passes to the threads of each pass
    for (cores, wanted), threads in passes.items():
        assert ThreadBudget.plan(cores, on_gpu=False, forward_passes=wanted).threads_beside == threads
    before = torch.get_num_threads()
    try:
        settings = ServerSettings.read(decode_workers=3, runtime_threads=1, compute_nice=2)
        pipeline = build_pipeline(settings, [tiny_spec()])
        mine = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        found = SimpleQueue()
        pipeline.workers.submit(lambda: found.put(os.getpriority(os.PRIO_PROCESS, threading.get_native_id())))
        assert found.get(timeout=5) - mine == 2
        assert pipeline.workers.count == 3
        assert torch.get_num_threads() == 1
        assert cv2.getNumThreads() == 1
        pipeline.close()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("forward_passes", "beside"), [(1, 0), (3, 3)])
def test_forward_passes_reach_the_model(forward_passes, beside):
    pytest.importorskip("openvino")
    settings = ServerSettings.read(models=("mobilenet_v2",), forward_passes=forward_passes, runtime="openvino")
    specs = resolve_specs(settings)
    with build_pipeline(settings, specs) as pipeline:
        model = pipeline.catalog.load(specs[0])._model
        assert len(model.forwards_beside) == beside
