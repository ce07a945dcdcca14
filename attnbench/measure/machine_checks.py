"""Checks of what every machine has: software, processor, backends, folder, the host's clock."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

from attnbench.backends.device import Device
from attnbench.backends.host_compiler import compiler_works
from attnbench.measure.ceilings import measure_quiet_cpu_ceilings
from attnbench.measure.checks import (
    Check,
    CheckResult,
    percent_text,
    rate_values,
    rates_text,
    seconds_text,
)
from attnbench.measure.options import GPU_TIMERS
from attnbench.measure.sampling import Target
from attnbench.measure.timers import Subject, Timer, WallTimer
from attnbench.store.disk import DISK_FULL
from attnbench.workload import Workload

#: The canary of the wall clock: a wait of known length, and how far off its median may be.
_CANARY_S = 200e-6
_MAX_CANARY_ERROR = 0.05
_CANARY_BLOCKS = 5

#: A call that does nothing takes well under a microsecond; more is a slow clock.
_MAX_WALL_FLOOR_S = 2e-6

#: Cores other processes may use (`measure/point.py` doubts a time above it).
_MAX_OTHER_CORES = 0.25

_MIN_FREE_BYTES = 1 << 30


def check_software() -> Check:
    """Versions of what kernels depend on, and whether torch and triton are a pair."""
    versions = {"python": platform.python_version()}
    for name in ("torch", "triton"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = ""
    measured = ", ".join(f"{name} {version or 'absent'}" for name, version in versions.items())
    wanted = _triton_of_torch()
    if wanted and versions["triton"] and versions["triton"] != wanted:
        return Check(
            name="software",
            result=CheckResult.WARN,
            measured=measured,
            meaning=f"this torch was built for triton {wanted}: its compiler may fail or be slow",
            mend=f"pip install triton=={wanted}",
        )
    if not versions["triton"]:
        return Check(
            name="software",
            result=CheckResult.WARN,
            measured=measured,
            meaning="without triton its backends cannot run",
            mend="pip install triton",
        )
    return Check(name="software", result=CheckResult.OK, measured=measured)


def _triton_of_torch() -> str:
    """The triton version torch's package asks for; "": it asks for none (CPU builds)."""
    for requirement in importlib.metadata.requires("torch") or ():
        if match := re.match(r"triton\s*\(?==\s*([\w.]+)", requirement):
            return match[1]
    return ""


def check_device(device: Device) -> Check:
    """What will be measured on."""
    import torch

    from attnbench.measure.environment import read_environment

    name = read_environment(device).device_name
    if device.kind != "cpu":
        count = torch.cuda.device_count()
        free, total = torch.cuda.mem_get_info()
        more = f"; 1 of {count}, CUDA_VISIBLE_DEVICES chooses another" if count > 1 else ""
        return Check(
            name="device",
            result=CheckResult.OK,
            measured=f"{name} ({device}), {free / 2**30:.0f} of {total / 2**30:.0f} GiB free{more}",
            values={"free_bytes": float(free), "total_bytes": float(total)},
        )
    threads, allowed = torch.get_num_threads(), allowed_cores()
    measured = f"CPU {name}, {threads} torch threads on {allowed:g} cores"
    values = {"threads": float(threads), "cores": allowed}
    if threads > allowed:
        return Check(
            name="device",
            result=CheckResult.WARN,
            measured=measured,
            meaning="more threads than cores: they wait for each other, and times jump",
            mend=f"export OMP_NUM_THREADS={max(1, int(allowed))}",
            values=values,
        )
    if Path("/dev/nvidiactl").exists():
        return Check(
            name="device",
            result=CheckResult.WARN,
            measured=measured,
            meaning=f"an NVIDIA GPU is here that this torch ({torch.__version__}) cannot use",
            mend="install a CUDA build of torch, and check nvidia-smi",
            values=values,
        )
    meaning = "no GPU that torch can use: CPU backends are measured"
    return Check(
        name="device", result=CheckResult.OK, measured=measured, meaning=meaning, values=values
    )


def allowed_cores(cgroup: Path = Path("/sys/fs/cgroup/cpu.max")) -> float:
    """Cores this process may use: its affinity, and the container's quota if that is less."""
    cores = float(len(os.sched_getaffinity(0)))
    try:
        quota, period = cgroup.read_text(encoding="ascii").split()
        return min(cores, float(quota) / float(period))
    except (OSError, ValueError):  # no quota: the file is absent, or says `max`
        return cores


def check_backends(device: Device) -> Iterator[Check]:
    """Who runs here in one line, and one line for each that should and does not."""
    from attnbench.backends.registry import (
        backend_entry,
        backend_status,
        get_backend_class,
        runnable_backend_names,
    )
    from attnbench.errors import BackendUnavailableError

    here: list[str] = []
    interpreted: list[str] = []
    elsewhere: list[str] = []
    absent: dict[str, str] = {}
    for name in runnable_backend_names():
        try:
            backend = get_backend_class(name)
        except BackendUnavailableError as error:
            absent[name] = str(error)
            continue
        if not backend.supports_device(device):
            elsewhere.append(name)
        elif reason := backend_status(name):
            absent[name] = reason
        elif device.kind == "cpu" and backend.interpreted_on_cpu:
            interpreted.append(name)
        elif reason := backend_status(name, device):
            absent[name] = reason
        else:
            here.append(name)
    parts = []
    if interpreted:
        parts.append(f"{', '.join(interpreted)}: checked by Triton's interpreter, never timed")
    if elsewhere:
        parts.append(f"{', '.join(elsewhere)}: for other devices")
    yield Check(
        name="backends",
        result=CheckResult.OK if here else CheckResult.FAIL,
        measured=f"{len(here)} can be timed: {', '.join(here)}" if here else "none can be timed",
        meaning="; ".join(parts),
        mend="" if here else "install one of the backends below",
        values={"timed": float(len(here))},
    )
    for name, reason in absent.items():
        install = backend_entry(name).install
        yield Check(
            name="backend",
            result=CheckResult.WARN,
            measured=f"{name} is absent: {reason}",
            # A reason that says what to install knows better than the package's name.
            mend="" if "install" in reason else install,
        )


def check_compiler(device: Device) -> Check:
    """torch.compile needs a C++ compiler for CPU kernels, triton a C compiler for its launchers."""
    variable, default, package = (
        ("CXX", "g++", "g++") if device.kind == "cpu" else ("CC", "gcc", "gcc")
    )
    compiler = os.environ.get(variable, default)
    path = shutil.which(compiler)
    if compiler_works(compiler):
        return Check(name="compiler", result=CheckResult.OK, measured=path or compiler)
    return Check(
        name="compiler",
        result=CheckResult.WARN,
        measured=f"{compiler!r} " + ("does not answer to --version" if path else "is not found"),
        meaning="FLEX_ATTENTION cannot be compiled"
        + ("" if device.kind == "cpu" else ", nor Triton's launchers"),
        mend=f"apt-get install {package}, or name one in {variable}",
    )


def check_results_folder(results: Path) -> Check:
    """Whether rows can be stored, found out by writing a file where they would go."""
    folder = results.absolute()
    while not folder.exists():
        folder = folder.parent
    mend = "make it writable, or name another with --results"
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(b"attnbench")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return Check(
            name="results folder",
            result=CheckResult.FAIL,
            measured=f"{results} cannot be written: {error.strerror}",
            meaning="nothing that is measured could be stored",
            mend="free some space there" if error.errno in DISK_FULL else mend,
        )
    free = shutil.disk_usage(folder).free
    made = "" if results.is_dir() else ", will be made"
    low = free < _MIN_FREE_BYTES
    return Check(
        name="results folder",
        result=CheckResult.WARN if low else CheckResult.OK,
        measured=f"{results} can be written{made}, {free / 2**30:.3g} GiB free",
        meaning="a long sweep may fill the disk" if low else "",
        mend="free some space" if low else "",
        values={"free_bytes": float(free)},
    )


def check_cpu_timers(make_timer: Callable[[], Timer] = WallTimer) -> Check:
    """The wall clock and its floor, and why the others are not here."""
    timer = make_timer()
    floor = timer.floor_s()
    slow = floor > _MAX_WALL_FLOOR_S
    return Check(
        name="timers",
        result=CheckResult.WARN if slow else CheckResult.OK,
        measured=f"{timer.name} reads {seconds_text(floor)} for a call that does nothing",
        meaning=("a slow clock: calls of a few microseconds are mostly clock; " if slow else "")
        + f"{', '.join(GPU_TIMERS)} read a GPU's clock and are not for a CPU",
        mend="choose the clock source tsc, if the machine allows it" if slow else "",
        values={f"{timer.name}_floor_s": floor},
    )


def check_cpu_canary(make_timer: Callable[[], Timer] = WallTimer) -> Check:
    """The wall timer against another clock, on a call that waits a known time."""
    timer = make_timer()
    subject = Subject(Workload.parse("q1s1"), "", "attention", 0)
    session = timer.open(Target(_wait), subject, "hot")
    samples = [s for _ in range(_CANARY_BLOCKS) for s in session.block().samples]
    ratio = median(samples) / _CANARY_S if samples else 0.0
    wrong = abs(ratio - 1) > _MAX_CANARY_ERROR
    return Check(
        name="canary",
        result=CheckResult.FAIL if wrong else CheckResult.OK,
        measured=f"a wait of {seconds_text(_CANARY_S)} reads {seconds_text(ratio * _CANARY_S)} "
        f"({percent_text(ratio)})",
        meaning="the timer does not tell the time: its numbers are no times"
        if wrong
        else "the timer tells the time",
        mend="too many programs at work, or a broken clock: try again on a quiet machine"
        if wrong
        else "",
        values={"true_s": _CANARY_S, "wall_ratio": ratio},
    )


def _wait() -> None:
    """Busy for `_CANARY_S` by a clock that is neither the timer's nor ever adjusted."""
    clock = getattr(time, "CLOCK_MONOTONIC_RAW", time.CLOCK_MONOTONIC)
    until = time.clock_gettime_ns(clock) + round(_CANARY_S * 1e9)
    while time.clock_gettime_ns(clock) < until:
        pass


def check_cpu_rates() -> Check:
    """The machine's ceilings; runs measure them for themselves, for their rooflines."""
    found, why_not = measure_quiet_cpu_ceilings(("fp32", "bf16"))
    if found is None:
        return Check(
            name="rates",
            result=CheckResult.WARN,
            measured=why_not,
            meaning="a run that starts now has no ceilings, and no percent of roofline",
            mend="stop them (`top` names them)",
        )
    return Check(
        name="rates",
        result=CheckResult.OK,
        measured=rates_text(found),
        meaning="ceilings of rooflines; no published peak of a CPU is known here: no verdict",
        values=rate_values(found),
    )


def check_quiet(other_cores: float | None) -> Check:
    """Whether others computed while the checks before this one ran."""
    if other_cores is None:
        return Check(name="quiet", result=CheckResult.NOT_RUN, measured="too short to tell")
    busy = other_cores > _MAX_OTHER_CORES
    return Check(
        name="quiet",
        result=CheckResult.WARN if busy else CheckResult.OK,
        measured=f"other processes keep {other_cores:.1f} cores busy",
        meaning="times by the wall clock will jump, and rows be NOISY" if busy else "",
        mend="stop them (`top` names them), or measure at night" if busy else "",
        values={"other_cores": other_cores},
    )
