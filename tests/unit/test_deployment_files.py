"""Dockerfile, compose and KubeRay files say what the code says. That an image runs is shown by `make image`."""

from __future__ import annotations

import importlib
import importlib.util
import re

import pytest
import yaml

from tests.helpers import ROOT
from vision_service.config.settings import EMBEDDED_MODELS, ServerSettings
from vision_service.server.ray_serve import SERVICERS, ReplicaOptions

DOCKER = ROOT / "docker"


@pytest.fixture(scope="module")
def dockerfile():
    return (DOCKER / "Dockerfile").read_text()


@pytest.fixture(scope="module")
def kuberay():
    return list(yaml.safe_load_all((DOCKER / "kuberay.yaml").read_text()))


def requirements():
    spec = importlib.util.spec_from_file_location("requirements", DOCKER / "requirements.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.requirements


def test_images_have_no_agpl_and_only_known_extras(dockerfile):
    (extras,) = re.findall(r"^ARG EXTRAS=(.+)$", dockerfile, re.MULTILINE)
    wanted = requirements()(extras.split(","), ROOT / "pyproject.toml")
    assert any(one.startswith("torch>") for one in wanted)
    assert not any("ultralytics" in one for one in wanted)
    with pytest.raises(SystemExit, match="no extra nonsense"):
        requirements()(["nonsense"], ROOT / "pyproject.toml")


def test_every_setting_in_the_image_exists(dockerfile):
    names = {name.lower() for name in re.findall(r"VISION_SERVICE_([A-Z_]+)=", dockerfile)}
    assert names
    assert names <= set(ServerSettings.model_fields)


def test_the_context_has_what_is_copied_and_built(dockerfile):
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {
        name for line in re.findall(r"^COPY (?!--from)(.+) \./$", dockerfile, re.MULTILINE) for name in line.split()
    }
    assert copied <= kept
    assert all((ROOT / name).exists() for name in kept)


def test_compose_uses_the_dockerfiles_targets_and_drains_in_time(dockerfile):
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    service, batch = compose["services"]["service"], compose["services"]["batch"]
    assert service["build"]["target"] == "${TARGET:-cpu}"
    assert {"cpu", "cuda"} <= set(re.findall(r"^FROM \S+ AS (\S+)$", dockerfile, re.MULTILINE))
    assert service["environment"]["VISION_SERVICE_MODELS"] == f"${{MODELS:-{','.join(EMBEDDED_MODELS)}}}"
    grace_s = int(service["stop_grace_period"].removesuffix("s"))
    assert grace_s > ServerSettings.model_fields["drain_timeout_s"].default
    assert service["read_only"]
    assert batch["read_only"]
    assert batch["command"][0] == "predict"


@pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`")  # Ray's own schema
def test_kuberay_serves_this_application(kuberay):
    from ray.serve.schema import ServeDeploySchema

    service, kubernetes = kuberay
    serve = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    (application,) = serve.applications
    module, _, name = application.import_path.partition(":")
    assert callable(getattr(importlib.import_module(module), name))
    options = ReplicaOptions.model_validate(application.args)
    assert ServerSettings.read(**options.settings).models == EMBEDDED_MODELS
    assert serve.grpc_options.grpc_servicer_functions == SERVICERS
    assert serve.grpc_options.port == kubernetes["spec"]["ports"][0]["targetPort"]
    (worker,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    (container,) = worker["template"]["spec"]["containers"]
    assert int(container["resources"]["limits"]["cpu"]) >= options.cpus
    (pinned,) = re.findall(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert service["spec"]["rayClusterConfig"]["rayVersion"] == pinned
