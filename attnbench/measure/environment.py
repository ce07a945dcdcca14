"""What a row was measured on: machine, installed versions, the commit under test, conditions."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import attnbench
from attnbench.backends.device import Device
from attnbench.backends.registry import ENTRY_POINT_GROUP
from attnbench.measure.gpu import nvml
from attnbench.store.record import stack_id

#: Distributions whose version can change a kernel's speed or a selector's choice.
STACK_DISTRIBUTIONS = (
    "torch",
    "triton",
    "numpy",
    "flash-attn",
    "flashinfer-python",
    "flashinfer-cubin",
    "flash-mla",
    "nvidia-cutlass-dsl",
    "vllm",
    "aiter",
)


@dataclass(frozen=True, slots=True)
class Environment:
    """The facts all rows of one run share. Fields are named after the record's columns."""

    device_kind: str
    device_name: str
    device_class: str
    device_uuid: str
    compute_capability: str
    driver_version: str
    cuda_version: str
    hostname: str
    container_digest: str
    stack: tuple[str, ...]
    stack_id: str
    harness_version: str
    commit: str
    commit_time: datetime | None
    commit_subject: str

    def columns(self) -> dict[str, object]:
        """The record's columns, by name."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def read_environment(device: Device) -> Environment:
    """Look at this machine once, at the start of a run. Imports torch for the device's facts."""
    import torch

    stack = read_stack()
    name, uuid, driver, cuda = _cpu_name(), "", "", ""
    if device.kind in ("cuda", "rocm") and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        name, uuid = properties.name, str(getattr(properties, "uuid", ""))
        cuda = torch.version.cuda or ""
        driver = read_driver_version()
        device_class = _slug(name)
    else:
        device_class = cpu_class(name, torch.get_num_threads())
    commit = read_commit()
    return Environment(
        device_kind=device.kind,
        device_name=name,
        device_class=device_class,
        device_uuid=uuid,
        compute_capability=str(device.capability or ""),
        driver_version=driver,
        cuda_version=cuda,
        hostname=socket.gethostname(),
        container_digest=os.environ.get("CONTAINER_DIGEST", ""),
        stack=stack,
        stack_id=stack_id(stack),
        harness_version=attnbench.__version__,
        commit=commit.sha,
        commit_time=commit.time,
        commit_subject=commit.subject,
    )


def class_of_name(device_name: str) -> str:
    """The device class of a GPU that its driver calls this."""
    return _slug(device_name)


def read_driver_version() -> str:
    """NVIDIA's driver, as the kernel names it; from NVML in a container that hides /proc/driver."""
    return _first_line("/proc/driver/nvidia/version") or nvml.driver_version()


def read_stack() -> tuple[str, ...]:
    """Sorted `name==version` of everything that can change a kernel, the compilers included.

    A package that brings backends by entry point is one of them.
    """
    versions = {"python": platform.python_version()}
    for name in (*STACK_DISTRIBUTIONS, *_plugin_distributions()):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if compiler := _compiler_version():
        versions["gxx"] = compiler  # compiles FLEX_ATTENTION's kernels on a CPU
    return tuple(sorted(f"{name}=={version}" for name, version in versions.items()))


def _plugin_distributions() -> list[str]:
    points = importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)
    names = {re.sub(r"[-_.]+", "-", p.dist.name).lower() for p in points if p.dist is not None}
    return sorted(names)


def _compiler_version() -> str:
    try:
        done = subprocess.run(
            [os.environ.get("CXX", "g++"), "-dumpfullversion"],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    if match := re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE):
        return match[1].strip()
    return platform.processor() or platform.machine()


def cpu_class(name: str, num_threads: int) -> str:
    """Slug of a CPU and the threads used of it: `cpu-xeon-2c`. Frequencies and marks left out."""
    words = [
        w
        for w in re.sub(r"\(.*?\)|@.*$", " ", name.lower()).split()
        if w not in ("cpu", "processor", "intel", "amd", "model", "core")
    ]
    return f"cpu-{_slug(' '.join(words)) or 'unknown'}-{num_threads}c"


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def _first_line(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()[0].strip()
    except (OSError, IndexError):
        return ""


@dataclass(frozen=True, slots=True)
class Commit:
    """The commit under test; all empty when the package was not installed from a repository."""

    sha: str = ""
    time: datetime | None = None
    subject: str = ""


def read_commit() -> Commit:
    """The commit of the installed attnbench, read and never guessed.

    From the repository the package's files lie in, with `+dirty` appended when files of the
    package differ from it or are not in it; else from the installer's own record (PEP 610); else
    nothing.
    asv installs each commit into an environment of its own and names it in `ASV_COMMIT`.
    """
    if sha := os.environ.get("ASV_COMMIT", ""):
        source = Path(os.environ.get("ASV_CONF_DIR", "."))
        return _git_commit(source, sha) or Commit(sha=sha)
    package = Path(attnbench.__file__).resolve().parent
    if (found := _git_commit(package, "HEAD")) and _git(
        package, "ls-files", "--error-unmatch", "__init__.py"
    ):
        if _git(package, "status", "--porcelain", "--", "."):
            return Commit(found.sha + "+dirty", found.time, found.subject)
        return found
    try:
        record = importlib.metadata.distribution("attnbench").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        record = None
    vcs = json.loads(record).get("vcs_info", {}) if record else {}
    return Commit(sha=vcs.get("commit_id", ""))


def count_commits(older: str, newer: str) -> int | None:
    """How many commits lie between two of the installed package's repository; None: unknown."""
    package = Path(attnbench.__file__).resolve().parent
    names = [name.partition("+")[0] for name in (older, newer)]
    count = _git(package, "rev-list", "--count", "..".join(names)) if all(names) else ""
    return int(count) if count else None


def _git(folder: Path, *words: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _git_commit(folder: Path, revision: str) -> Commit | None:
    line = _git(folder, "show", "-s", "--format=%H%x00%ct%x00%s", revision, "--")
    if not line:
        return None
    sha, stamp, subject = line.split("\0", 2)
    return Commit(sha, datetime.fromtimestamp(int(stamp), UTC), subject)


def read_conditions(device_uuid: str = "", locked_clock_hz: float = 0.0) -> Mapping[str, float]:
    """How the machine was doing: read before and after each point; the unit is in each key.

    Args:
        device_uuid: a GPU whose readings are taken too (`Environment.device_uuid`); "": none.
        locked_clock_hz: the clock this run has locked that GPU to; 0.0: it has not.

    What a machine does not tell is left out: a missing sensor must not cost a point its time.
    """
    import psutil

    def temperature() -> float:
        groups: Mapping[str, Any] = getattr(psutil, "sensors_temperatures", dict)()
        return max(float(sensor.current) for group in groups.values() for sensor in group)

    readings: dict[str, Callable[[], float]] = {
        "load_1m": lambda: float(psutil.getloadavg()[0]),
        "memory_available_bytes": lambda: float(psutil.virtual_memory().available),
        "cpu_clock_hz": lambda: float(psutil.cpu_freq().current) * 1e6,
        "temperature_c": temperature,
    }
    values = {}
    for key, read in readings.items():
        with contextlib.suppress(OSError, RuntimeError, ValueError, AttributeError, TypeError):
            values[key] = read()
    if device_uuid:
        values |= nvml.read_gpu_conditions(device_uuid, locked_clock_hz)
    return values


class OtherLoad:
    """What the rest of the machine computes while a point is timed.

    On a shared CPU this, not the kernel, is what moves a wall-clock time: one other busy process on
    two cores turns a parallel call of 60 µs into 8 ms, a slice of the scheduler, in every sample.
    """

    #: Ticks of the kernel's accounting are 10 ms: shorter spans say nothing.
    _MIN_SPAN_S = 0.2

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._others = self._other_seconds()

    @staticmethod
    def _other_seconds() -> float:
        import psutil

        every = psutil.cpu_times()
        own = psutil.Process().cpu_times()
        busy = sum(every) - every.idle - getattr(every, "iowait", 0.0)
        # Guests are counted in user time already.
        busy -= getattr(every, "guest", 0.0) + getattr(every, "guest_nice", 0.0)
        return float(busy - own.user - own.system)

    def cores(self) -> float | None:
        """Cores other processes kept busy since this object was made; None: too short to tell."""
        span = time.perf_counter() - self._started
        if span < self._MIN_SPAN_S:
            return None
        return max(0.0, (self._other_seconds() - self._others) / span)
