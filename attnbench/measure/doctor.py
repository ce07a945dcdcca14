"""The self-test of a machine: can it measure, how well, and what would make it better.

Each check is one `Check` in plain words. They come one by one, as a person waits for them; none
raises, whatever the machine does.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from attnbench.backends.device import Device
from attnbench.measure import machine_checks as machine
from attnbench.measure.checks import Check, CheckResult, seconds_text
from attnbench.measure.environment import OtherLoad, read_environment
from attnbench.measure.options import GPU_TIMERS, MeasureOptions

#: The A/A test: a point any backend runs in well under a millisecond, in so many fresh processes.
_POINT = "4q1s1k heads=8/2 head_size=64"
_PROCESSES = 3
_BUDGET_S = 0.3

#: Expected range of n normal values in standard deviations (d2 of control charts; Montgomery,
#: *Introduction to Statistical Quality Control*, appendix VI).
_RANGE_SIGMAS = {2: 1.128, 3: 1.693, 4: 2.059, 5: 2.326}

#: What 95 % of differences of two normal values stay below, in standard deviations.
_DIFFERENCE_SIGMAS = 1.96 * 2**0.5

#: A/A differences above these are worth a mend: the verdict's practical floors.
_MAX_CPU_DIFFERENCE = 0.10
_MAX_GPU_DIFFERENCE = 0.02

#: Three values that agree by chance prove no less than this; above the other, nothing compares.
_LEAST_DIFFERENCE = 0.01
_HOPELESS_DIFFERENCE = 0.5


def examine(results: Path, device: Device) -> Iterator[Check]:
    """Every check of this machine, for measuring on `device` into the folder `results`.

    About 10 s on two CPU cores, most of it the starts of the A/A test's processes.
    """
    yield _guarded("software", machine.check_software)
    yield _guarded("device", lambda: machine.check_device(device))
    yield from _several("backends", lambda: machine.check_backends(device))
    yield _guarded("compiler", lambda: machine.check_compiler(device))
    yield _guarded("results folder", lambda: machine.check_results_folder(results))
    others = OtherLoad()
    if device.kind == "cpu":
        yield _guarded("timers", machine.check_cpu_timers)
        yield _guarded("canary", machine.check_cpu_canary)
        yield _guarded("rates", machine.check_cpu_rates)
        timer = "wall"
    else:
        timer = ""
        for check in _several("timers", lambda: _gpu_checks(device)):
            timer = timer or _working_timer(check)
            yield check
    yield _guarded("quiet", lambda: machine.check_quiet(others.cores()))
    yield _guarded("A/A", lambda: check_repeats(device, timer))


def check_repeats(device: Device, timer: str, processes: int = _PROCESSES) -> Check:
    """The same point in fresh processes, by the way `attnbench run` goes: what differs is noise."""
    if not timer:
        return Check(name="A/A", result=CheckResult.NOT_RUN, measured="no timer works")
    from attnbench.measure.plan import plan_workloads
    from attnbench.measure.sweep import run_sweep
    from attnbench.selection import config_of, select
    from attnbench.store import ResultsFolder, RunHeader
    from attnbench.workload import Workload

    workload = Workload.parse(_POINT)
    backend = select(config_of(workload), device).backend
    plan = plan_workloads([workload], [backend], device)
    options = MeasureOptions(timer=timer, replicates=processes, budget_s=_BUDGET_S, timeout_s=60.0)
    with tempfile.TemporaryDirectory(prefix="attnbench-doctor-") as folder:
        store = ResultsFolder(folder)
        with store.open_run(RunHeader.new()) as run:
            run_sweep(plan, run, options, device, read_environment(device))
        rows = store.table(where={"metric": "attention"}).to_pylist()
    timed = [row for row in rows if row["samples"]]
    return judge_repeats(
        f"{backend} {_POINT.split()[0]}",
        [median(row["samples"]) for row in timed],
        _MAX_CPU_DIFFERENCE if device.kind == "cpu" else _MAX_GPU_DIFFERENCE,
        failures=[
            f"{row['status']}: {'; '.join(row['reasons'])}" for row in rows if not row["samples"]
        ],
        doubts=[reason for row in timed for reason in row["reasons"]],
    )


def judge_repeats(
    what: str,
    medians: Sequence[float],
    accepted: float,
    failures: Sequence[str] = (),
    doubts: Sequence[str] = (),
) -> Check:
    """From medians of several processes to the difference that means something here.

    Args:
        what: the point.
        medians: seconds, one a process.
        accepted: a difference worth no mend.
        failures: why processes came back without a time.
        doubts: reasons stored with times: three that waited for the same program agree well.
    """
    if failures or len(medians) < 2:
        said = "; ".join(dict.fromkeys(failures)) or "no process came back with a time"
        return Check(
            name="A/A",
            result=CheckResult.FAIL,
            measured=f"{what}: {said}",
            meaning="a small point of the default backend cannot be measured here",
            mend="attnbench backends says who runs here; attnbench run q1s16 shows the error",
        )
    spread = (max(medians) - min(medians)) / median(medians)
    difference = spread / _RANGE_SIGMAS[min(len(medians), 5)] * _DIFFERENCE_SIGMAS
    difference = max(difference, _LEAST_DIFFERENCE)
    if doubts:
        meaning = f"these are no times of the kernel: {doubts[0]}"
    elif difference > _HOPELESS_DIFFERENCE:
        meaning = "times of two runs cannot be compared here: something else uses this machine"
    else:
        percent = f"{difference * 100:.{1 if difference < 0.095 else 0}f}"
        meaning = f"between two runs, differences below about {percent} % mean nothing"
    noisy = bool(doubts) or difference > accepted
    return Check(
        name="A/A",
        result=CheckResult.WARN if noisy else CheckResult.OK,
        measured=f"{what} in {len(medians)} processes: "
        + ", ".join(seconds_text(value) for value in medians),
        meaning=meaning,
        mend="stop other work on this machine, or measure with --replicates 5" if noisy else "",
        values={"spread": spread, "difference": difference},
    )


def _gpu_checks(device: Device) -> Iterator[Check]:
    if device.kind != "cuda":
        yield Check(
            name="timers",
            result=CheckResult.FAIL,
            measured=f"attnbench has no timer for kernels of {device.kind} yet",
            meaning="backends can be checked there, not timed",
        )
        return
    import torch

    from attnbench.measure.gpu import checks, nvml
    from attnbench.measure.gpu.ceilings import torch_probes
    from attnbench.measure.gpu.cuda import CudaRuntime

    gpu = CudaRuntime()
    uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
    before = nvml.read_gpu_conditions(uuid)
    yield _guarded("SM clock", lambda: checks.check_clock(gpu))
    found, timers = checks.check_timers(gpu)
    yield found
    yield _guarded("canary", lambda: checks.check_canary(gpu, timers))
    name = torch.cuda.get_device_name()
    probes = torch_probes(gpu, ("bf16", "fp32"))
    yield _guarded("rates", lambda: checks.check_rates(gpu, probes, name))
    # After the load of the rates: an idle device throttles nothing.
    readings = [before, nvml.read_gpu_conditions(uuid)]
    yield _guarded(
        "conditions",
        lambda: checks.check_conditions(
            nvml.nvml_missing(uuid),
            readings,
            nvml.throttle_reasons(*readings),
            other_gpu_processes(nvml.find_device(uuid)),
        ),
    )


def other_gpu_processes(device: Any) -> int | None:
    """Compute processes on the device besides this one; None: the driver does not tell.

    In a container the driver may give process numbers of the host, or hide other containers'.
    """
    if isinstance(device, str):
        return None
    try:
        running = device.nvml.nvmlDeviceGetComputeRunningProcesses(device.handle)
    except device.nvml.NVMLError:
        return None
    # This process is among them, if maybe under another number.
    return max(0, len(running) - 1)


def _working_timer(check: Check) -> str:
    """The first GPU timer with a floor in `check`; "": none."""
    return next((name for name in GPU_TIMERS if f"{name}_floor_s" in check.values), "")


def _guarded(name: str, check: Callable[[], Check]) -> Check:
    """The check's finding; what it raises is one."""
    return next(_several(name, lambda: iter([check()])))


def _several(name: str, checks: Callable[[], Iterator[Check]]) -> Iterator[Check]:
    try:
        yield from checks()
    # A self-test must outlive whatever a broken driver or library raises.
    except Exception as error:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        yield Check(
            name=name,
            result=CheckResult.FAIL,
            measured=f"{type(error).__name__}: {first}"[:300],
            meaning="this part of the machine, or of attnbench, is broken",
            mend="mend what it names, and ask again",
        )
