"""The self-test of a GPU: do its timers agree with its clocks, are its rates those of its kind?

Written against `GpuRuntime`, so that a simulated device that lies in a known way must be found out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from statistics import median

from attnbench.measure.checks import (
    Check,
    CheckResult,
    percent_text,
    rate_values,
    rates_text,
    seconds_text,
)
from attnbench.measure.gpu.ceilings import Probe, measure_gpu_ceilings
from attnbench.measure.gpu.nvml import INVALIDATING_REASONS
from attnbench.measure.gpu.runtime import GpuRuntime
from attnbench.measure.options import GPU_TIMERS
from attnbench.measure.peaks import peak_of
from attnbench.measure.sampling import Target
from attnbench.measure.timers import Subject, Timer
from attnbench.workload import Workload

MakeTimer = Callable[[str, GpuRuntime], Timer]

#: Kernels of known duration. The difference of the long ones is free of every timer's floor.
_LONG_S = (2e-3, 10e-3)
_SHORT_S = 50e-6

#: A timer may be off by this much of the long difference (the host's clock knows it less well),
#: and by this much on the short kernel.
_MAX_ERROR = 0.01
_MAX_HOST_ERROR = 0.05
_MAX_SHORT_ERROR_S = 1e-6
_REPEATS = 5

#: Share of the published peak a healthy device reaches: an H200 copies at 88 % and multiplies at
#: 81 %, cards with a lower power limit less. Above 103 % the timer is wrong, not the device fast.
_MIN_MEMORY_SHARE = 0.75
_MIN_MATMUL_SHARE = 0.55
_MAX_SHARE = 1.03

#: A clock may read this much above the rated one: boost tables are rounded.
_MAX_CLOCK_SHARE = 1.05

#: Floors above these are worth a warning: an empty kernel takes 1 to 3 µs.
_MAX_FLOOR_S = 10e-6

_SHOWN_CONDITIONS = (
    ("gpu_temperature_c", 1.0, "°C"),
    ("gpu_power_w", 1.0, "W"),
    ("gpu_power_limit_w", 1.0, "W allowed"),
    ("gpu_memory_clock_hz", 1e-6, "MHz memory"),
)

Timers = Mapping[str, Timer]


def make_gpu_timer(name: str, gpu: GpuRuntime) -> Timer:
    """The timer `name` on `gpu`, hot: the canaries have no data."""
    from attnbench.measure.gpu.timers import GpuTimer

    return GpuTimer(name, ("hot",), make_gpu=lambda: gpu)


def check_timers(
    gpu: GpuRuntime, make_timer: MakeTimer = make_gpu_timer
) -> tuple[Check, dict[str, Timer]]:
    """Which timers work here with the floor of each, and the working ones."""
    working: dict[str, Timer] = {}
    floors: dict[str, float] = {}
    missing: dict[str, str] = {}
    for name in GPU_TIMERS:
        if name.startswith("cupti") and gpu.trace_missing:
            missing[name] = gpu.trace_missing
            continue
        try:
            timer = make_timer(name, gpu)
            floors[name] = timer.floor_s()
            working[name] = timer
        # Whatever a driver or a profiler raises is this timer's reason, and no other's.
        except Exception as error:
            missing[name] = _first_line(error)
    words = [f"{name} {seconds_text(floor)}" for name, floor in floors.items()]
    reasons = dict.fromkeys(missing.values())
    absent = [
        f"{', '.join(n for n, r in missing.items() if r == reason)}: {reason}" for reason in reasons
    ]
    slow = [name for name, floor in floors.items() if floor > _MAX_FLOOR_S]
    result, meaning = CheckResult.OK, "what each reads for an empty kernel; a part of every sample"
    if not working:
        result, meaning = CheckResult.FAIL, "no timer works: nothing can be timed here"
    elif missing or slow:
        result = CheckResult.WARN
        meaning += "; " + "; ".join(
            [f"not here: {text}" for text in absent]
            + [f"{', '.join(slow)}: more than an empty kernel takes"] * bool(slow)
        )
    return (
        Check(
            name="timers",
            result=result,
            measured=", ".join(words) or "none works: " + "; ".join(absent),
            meaning=meaning,
            mend="use a timer that works, --timer " + next(iter(working), "wall")
            if missing
            else "",
            values={f"{name}_floor_s": floor for name, floor in floors.items()},
        ),
        working,
    )


def check_canary(gpu: GpuRuntime, timers: Timers) -> Check:
    """Every timer against the device's own clock, on kernels that only wait.

    Timer and clock read the same executions, so that a clock of the multiprocessors that wanders
    changes both. Differences between kernels hold neither's floor: of two long ones for the scale,
    of a short and an empty one for what is lost or added on a few microseconds. Without stamps the
    host's clock is the witness, of other executions, and only for the scale.
    """
    if not timers:
        return Check(
            name="canary", result=CheckResult.NOT_RUN, measured="no timer works to read it with"
        )
    witness = "its own clock" if gpu.has_stamps else "the host's clock"
    truths: list[float] = []
    ratios: dict[str, float] = {}
    lost: dict[str, float] = {}
    for name, timer in timers.items():
        first, second = (_read(timer, gpu, _wait(gpu, seconds)) for seconds in _LONG_S)
        truths.append(second.true_s - first.true_s)
        ratios[name] = (second.read_s - first.read_s) / truths[-1] if truths[-1] > 0 else 0.0
        if gpu.has_stamps:
            short, empty = (
                _read(timer, gpu, _wait(gpu, _SHORT_S)),
                _read(timer, gpu, gpu.empty_kernel),
            )
            lost[name] = (short.read_s - empty.read_s) - (short.true_s - empty.true_s)
    allowed = _MAX_ERROR if gpu.has_stamps else _MAX_HOST_ERROR
    wrong = [name for name, ratio in ratios.items() if not abs(ratio - 1) <= allowed]
    short_wrong = [name for name, error in lost.items() if abs(error) > _MAX_SHORT_ERROR_S]
    result, meaning, mend = CheckResult.OK, "the timers tell the device's time, and agree", ""
    if wrong:
        result = CheckResult.FAIL
        verb = "does" if len(wrong) == 1 else "do"
        meaning = f"{', '.join(wrong)} {verb} not tell the device's time: such numbers are no times"
        mend = "stop other profilers, update the driver, or use --timer " + next(
            (name for name in timers if name not in wrong), "wall"
        )
    elif short_wrong:
        result = CheckResult.WARN
        listed = ", ".join(f"{n} {seconds_text(lost[n])}" for n in short_wrong)
        meaning = f"right on long kernels, off on one of {seconds_text(_SHORT_S)} by: {listed}"
        mend = "do not compare kernels of a few microseconds with that timer"
    words = ", ".join(f"{name} {percent_text(ratio)}" for name, ratio in ratios.items())
    return Check(
        name="canary",
        result=result,
        measured=f"a wait of {seconds_text(median(truths))} by {witness}; {words}",
        meaning=meaning,
        mend=mend,
        values={"true_s": median(truths)}
        | {f"{name}_ratio": ratio for name, ratio in ratios.items()}
        | {f"{name}_short_error_s": error for name, error in lost.items()},
    )


def check_clock(gpu: GpuRuntime) -> Check:
    """The multiprocessors' clock while a kernel waits, against the rated one."""
    if not gpu.has_stamps:
        return Check(
            name="SM clock",
            result=CheckResult.NOT_RUN,
            measured="this device's cycle counters cannot be read",
            meaning="throttled samples cannot be told from others",
        )
    clocks = _clocks_hz(gpu)
    if not clocks:
        return Check(
            name="SM clock",
            result=CheckResult.WARN,
            measured="stamps before and after a kernel were of two multiprocessors",
            meaning="throttled samples cannot be told from others",
        )
    clock, rated = median(clocks), gpu.rated_clock_hz
    share = clock / rated if rated else 0.0
    words = f"{clock / 1e6:.0f} MHz" + (f", {share * 100:.0f} % of the rated" if rated else "")
    result, meaning, mend = CheckResult.OK, "read beside every sample, without root", ""
    if share > _MAX_CLOCK_SHARE:
        result = CheckResult.FAIL
        meaning = "cycles and the global timer disagree: neither clock can be trusted"
        mend = "restart the driver or the machine"
    elif rated and share < _MIN_MEMORY_SHARE:
        result = CheckResult.WARN
        meaning = "the device runs slowly: samples below 75 % of the rated clock are discarded"
        mend = "look at power limit and cooling (nvidia-smi -q -d PERFORMANCE,POWER,CLOCK)"
    return Check(
        name="SM clock",
        result=result,
        measured=words,
        meaning=meaning,
        mend=mend,
        values={"sm_clock_hz": clock, "rated_clock_hz": rated},
    )


def check_conditions(
    missing: str,
    conditions: Sequence[Mapping[str, float]],
    reasons: Sequence[str],
    others: int | None,
) -> Check:
    """What the driver says of the device, and who else uses it.

    Args:
        missing: why the driver tells nothing; "": it does.
        conditions: readings before and after the device worked (`nvml.read_gpu_conditions`).
        reasons: what held its clocks back then (`nvml.throttle_reasons`).
        others: processes of others on the device; None: not known.
    """
    if missing:
        return Check(
            name="conditions",
            result=CheckResult.WARN,
            measured=f"clocks, power and heat are not known: {missing}",
            meaning="throttling is seen by cycle counters only",
            mend="" if "pip install" in missing else "pip install nvidia-ml-py",
        )
    now = conditions[-1]
    words = [
        f"{now[key] * scale:.0f} {unit}"
        for key, scale, unit in _SHOWN_CONDITIONS
        if now.get(key) is not None
    ]
    locked = any(reading.get("gpu_clocks_locked", 0.0) > 0 for reading in conditions)
    words.append("clocks locked" if locked else "clocks not locked")
    if reasons:
        words.append(f"held back by {', '.join(reasons)}")
    words.append(
        {None: "other processes not known", 0: "no other process"}.get(
            others, f"{others} other process{'es' * ((others or 0) > 1)}"
        )
    )
    bad = [reason for reason in reasons if reason in INVALIDATING_REASONS]
    meanings, mends = [], []
    if bad:
        meanings.append("too hot or short of power: its times are the machine's, not the kernels'")
        mends.append("mend its cooling or power supply")
    if others:
        meanings.append("kernels wait for those of others, and times jump")
        mends.append("stop them: nvidia-smi lists them")
    if not locked:
        meanings.append("clocks move with heat and power: read beside every sample")
    return Check(
        name="conditions",
        result=CheckResult.WARN if bad or others else CheckResult.OK,
        measured=", ".join(words),
        meaning="; ".join(meanings),
        mend="; ".join(mends),
        values=dict(now),
    )


def check_rates(gpu: GpuRuntime, probes: Iterable[Probe], device_name: str) -> Check:
    """Copy, read and matrix rates against the published peaks of `device_name`."""
    found = measure_gpu_ceilings(gpu, probes)
    peak = peak_of(device_name)
    values = rate_values(found)
    result, mend = CheckResult.OK, ""
    if peak is None:
        meaning = f"no published peak of {device_name!r} is known here: no verdict"
    else:
        memory = found.memory_bytes_per_s / peak.memory_bytes_per_s
        half = [r for d, r in found.matmul_flops_per_s.items() if d in ("bf16", "fp16")]
        product = max(half, default=0.0) / peak.matmul_flops_per_s
        values |= {"memory_share": memory, "matmul_share": product}
        meaning = f"{memory * 100:.0f} % of the published bandwidth" + (
            f", {product * 100:.0f} % of the published matrix rate" if half else ""
        )
        if max(memory, product) > _MAX_SHARE:
            result = CheckResult.FAIL
            meaning += ": more than the device can do, so its times are too short"
            mend = "another profiler or a wrong clock? compare with nsys, and report it"
        elif memory < _MIN_MEMORY_SHARE or (half and product < _MIN_MATMUL_SHARE):
            result = CheckResult.WARN
            meaning += ": less than a healthy device reaches"
            mend = "look for other processes, a power limit, heat: nvidia-smi -q -d PERFORMANCE"
    return Check(
        name="rates",
        result=result,
        measured=rates_text(found),
        meaning=meaning,
        mend=mend,
        values=values,
    )


def _clocks_hz(gpu: GpuRuntime) -> list[float]:
    """Clock of a multiprocessor over several waits; pairs of two multiprocessors are left out."""
    for slot in range(_REPEATS + 1):
        gpu.stamp(slot)
        if slot < _REPEATS:
            gpu.delay(_LONG_S[0])
    return [
        (end.cycles - begin.cycles) / ((end.time_ns - begin.time_ns) * 1e-9)
        for begin, end in pairwise(gpu.read_stamps(_REPEATS + 1))
        if 0 <= begin.sm == end.sm and end.time_ns > begin.time_ns
    ]


@dataclass(frozen=True, slots=True)
class _Reading:
    read_s: float  # by the timer
    true_s: float  # by the witness, with a floor of its own


def _wait(gpu: GpuRuntime, seconds: float) -> Callable[[], None]:
    return partial(gpu.delay, seconds)


def _read(timer: Timer, gpu: GpuRuntime, call: Callable[[], None]) -> _Reading:
    """Medians of what the timer and the witness say of `call`."""
    subject = Subject(Workload.parse("q1s1"), "", "attention", 0)
    session = timer.open(Target(call), subject, "hot")
    read: list[float] = []
    true: list[float] = []
    for _ in range(_REPEATS):
        block = session.block()
        read += block.samples
        if gpu.has_stamps:  # every sample lies between two stamps (`measure/gpu/layout.py`)
            true += [seconds for seconds in block.stamped_s if not math.isnan(seconds)]
        else:
            started = gpu.now_s()
            call()
            gpu.synchronize()
            true.append(gpu.now_s() - started)
    return _Reading(median(read or [0.0]), median(true or [0.0]))


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))
