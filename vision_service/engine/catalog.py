"""Which models are served: names and versions to hosts."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Mapping

from vision_service.config import ModelSpec
from vision_service.engine.host import ModelHost
from vision_service.engine.threads import ForwardGate
from vision_service.errors import ConfigError, InvalidInput, ModelNotFound, ModelUnavailable, choices
from vision_service.model_info import ModelInfo, ModelState
from vision_service.runtimes import Execution
from vision_service.types import Task

logger = logging.getLogger(__name__)


def version_key(version: str) -> tuple[tuple[int, int, str], ...]:
    """Order of versions: numbers by value, so that 10 comes after 9; what follows a common start comes after it."""
    parts = re.findall(r"\d+|[^\d.]+", version)
    return tuple((1, int(part), "") if part.isdigit() else (0, 0, part) for part in parts)


class Catalog:
    """The models of this process.

    Args:
        defaults: for a task, the model that answers calls that name none; a task left out has the model that was
            registered first.
        execution: what the process gives the models' runtimes.
        cpu_gate: whose turn forward passes on the CPU wait for, all models together.
    """

    def __init__(
        self,
        defaults: Mapping[Task, str] | None = None,
        execution: Execution | None = None,
        cpu_gate: ForwardGate | None = None,
    ) -> None:
        self._defaults = dict(defaults or {})
        self._execution = execution
        self._cpu_gate = cpu_gate or ForwardGate()
        self._lock = threading.Lock()
        self._changing = threading.Lock()  # one load, unload or close at a time
        self._closed = False
        self._hosts: dict[str, dict[str, ModelHost]] = {}

    def load(self, spec: ModelSpec) -> ModelHost:
        """Load a model and serve it. Blocks until it is ready.

        A model of the same name and version goes on answering until the new one is ready; then calls go to the new
        one and the old one drains. If the new one fails, the old one stays.

        Raises:
            VisionError: it could not be loaded. Where there was none before, it is listed as FAILED.
        """
        with self._changing:
            if self._closed:
                raise ModelUnavailable(f"model {spec.name!r} is not loaded: the service is stopping")
            host = ModelHost(spec, self._execution, self._cpu_gate)
            with self._lock:
                self._check_task(spec)
                old = self._hosts.setdefault(spec.name, {}).setdefault(spec.version, host)
            host.load()
            if old is not host:
                with self._lock:
                    self._hosts[spec.name][spec.version] = host
                old.close()
            return host

    def unload(self, name: str, version: str) -> None:
        """Take a model out and drain it.

        Raises:
            ModelNotFound: there is no such model.
        """
        with self._changing:
            with self._lock:
                host = self._find(name, version)
                del self._hosts[name][version]
                if not self._hosts[name]:
                    del self._hosts[name]
            host.close()

    def get(self, task: Task, name: str = "", version: str = "") -> ModelHost:
        """The host that answers a call.

        Args:
            task: what the call wants.
            name: a model; empty: the task's default.
            version: of that model; empty: the newest that is ready, else the newest.

        Raises:
            ModelNotFound: no such model or version; lists what exists.
            InvalidInput: the model does something else.
        """
        with self._lock:
            host = self._find(name or self._default(task), version)
        if host.spec.task is not task:
            raise InvalidInput(
                "model", f"{host.spec.name!r} is a {host.spec.task} model; {task} has {self._listing(task)}"
            )
        return host

    def find(self, name: str, version: str = "") -> ModelHost:
        """A host by name, whatever its task.

        Raises:
            ModelNotFound: no such model or version; lists what exists.
        """
        with self._lock:
            return self._find(name, version)

    def hosts(self, task: Task | None = None) -> list[ModelHost]:
        """All hosts, ordered by task, name and version."""
        return sorted(
            self.hosts_unordered(task),
            key=lambda host: (host.spec.task, host.spec.name, version_key(host.spec.version)),
        )

    def hosts_unordered(self, task: Task | None = None) -> list[ModelHost]:
        """All hosts, for who asks at every call."""
        with self._lock:
            found = [host for versions in self._hosts.values() for host in versions.values()]
        return [host for host in found if task is None or host.spec.task is task]

    def info(self, host: ModelHost) -> ModelInfo:
        """What clients may know of a model."""
        with self._lock:
            default = self._default_or_none(host.spec.task)
        return host.info(is_default=host.spec.name == default)

    def ready(self, task: Task) -> bool:
        """Whether calls of a task that name no model would be answered."""
        with self._lock:
            default = self._default_or_none(task)
            versions = self._hosts.get(default, {}) if default is not None else {}
            return any(host.state is ModelState.READY for host in versions.values())

    def close(self, timeout_s: float | None = None) -> bool:
        """Drain every model and load no more. A load under way is waited for: it cannot be stopped half-way.

        Returns:
            Whether everything queued was answered in time.
        """
        with self._changing:
            self._closed = True
        until_s = None if timeout_s is None else time.monotonic() + timeout_s
        drained = True
        for host in self.hosts():
            left_s = None if until_s is None else max(0.0, until_s - time.monotonic())
            drained = host.close(left_s) and drained
        return drained

    def _check_task(self, spec: ModelSpec) -> None:
        for host in self._hosts.get(spec.name, {}).values():
            if host.spec.task is not spec.task:
                raise ConfigError(
                    f"model {spec.name!r} is registered for {host.spec.task}; one for {spec.task} needs another name"
                )

    def _find(self, name: str, version: str) -> ModelHost:
        versions = self._hosts.get(name)
        if not versions:
            raise ModelNotFound(f"there is no model {name!r}; {choices(name, self._hosts)}")
        if version:
            if version not in versions:
                raise ModelNotFound(f"model {name!r} has no version {version!r}; {choices(version, versions)}")
            return versions[version]
        if len(versions) == 1:
            return next(iter(versions.values()))
        newest_first = sorted(versions.values(), key=lambda host: version_key(host.spec.version), reverse=True)
        return next((host for host in newest_first if host.state is ModelState.READY), newest_first[0])

    def _default_or_none(self, task: Task) -> str | None:
        if task in self._defaults:
            return self._defaults[task]
        return next(
            (name for name, versions in self._hosts.items() if any(h.spec.task is task for h in versions.values())),
            None,
        )

    def _default(self, task: Task) -> str:
        name = self._default_or_none(task)
        if name is None:
            raise ModelNotFound(f"no model is served for {task}; {self._listing(None)}")
        return name

    def _listing(self, task: Task | None) -> str:
        names = sorted(
            name
            for name, versions in self._hosts.items()
            if task is None or any(host.spec.task is task for host in versions.values())
        )
        return ", ".join(names) if names else "none"
