"""Our Triton kernels against the libraries', side by side in one run.

    python benchmarks/kernel_speed.py [--part decode|prefill|mla] [--timer graph] [--block 16 64]
    python benchmarks/kernel_speed.py --limits > docs/triton-limits.md      # needs no GPU

Every point is measured by the way `attnbench run` goes, output checked, the backends of a point in
random order within seconds of each other; the rows are kept in --results. Printed per point: each
backend's median, and the best other's time over ours (1.00: as fast; 0.50: we take twice as long);
then the geometric mean and the worst, the same beside each backend, and where vLLM's own Triton
kernel, which is not among the others, is faster. A backend that is not here, or refuses
a point, is listed with its reason and counts for nothing.

Prints Markdown with date, device and versions. Where only the interpreter could run our kernels,
the maths can be tried on a CPU:

    python benchmarks/kernel_speed.py --part decode --timer wall --ours CPU_ATTN \
        --against TORCH_SDPA FLASH_ATTN:FA3 --points 1q1s512 4q1s512 --block 16

--limits: no time, but what bounds one: our kernels at every point, compiled ahead of time for
sm_90 (registers, spills, shared memory, programs that fit a multiprocessor), and the seconds
below which no kernel can come, from the published peaks of an H200.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from attnbench.backends.device import Device
from attnbench.backends.triton_aot import AotRow, compile_report
from attnbench.backends.triton_aot_cases import AotCase
from attnbench.measure import MeasureOptions, plan_workloads, run_sweep
from attnbench.measure.device_lock import device_lock
from attnbench.measure.environment import Environment, read_environment
from attnbench.measure.header import new_header
from attnbench.measure.options import GPU_TIMERS, TIMERS
from attnbench.measure.peaks import PEAKS, Peak
from attnbench.selection import current_device
from attnbench.store import ResultsFolder
from attnbench.workload import Workload
from attnbench.workload.cost import attention_bytes, attention_flops
from attnbench.workload.suite import expand_workloads

#: Part -> (ours, the others, the target by geometric mean, points).
PARTS: Mapping[str, tuple[str, tuple[str, ...], float, tuple[str, ...]]] = {
    "decode": (
        "TRITON_ATTN",
        ("FLASH_ATTN:FA3", "FLASHINFER"),
        0.85,
        (
            *(f"{batch}q1s{context}" for batch in (1, 4, 16, 64) for context in ("1k", "4k", "8k")),
            *("1q1s32k", "4q1s32k", "16q1s32k", "128q1s2k", "256q1s1k", "256q1s2k"),
        ),
    ),
    "prefill": ("TRITON_ATTN", ("FLASH_ATTN:FA3",), 0.6, ("q2k", "q4k", "q8k", "q16k", "4q2k")),
    "mla": (
        "TRITON_MLA",
        ("FLASHMLA",),
        0.5,
        tuple(
            f"{batch}q1s{context} shape=deepseek-v3 tp={tp}"
            for batch in (1, 16, 64, 128)
            for context in ("1k", "4k", "16k")
            for tp in (1, 8)
        ),
    ),
}

#: vLLM's own Triton kernels: at no point may ours be slower.
PEERS = {
    "decode": "VLLM:TRITON_ATTN",
    "prefill": "VLLM:TRITON_ATTN",
    "mla": "VLLM:TRITON_MLA",
}

#: FlashMLA takes blocks of 64 only.
BLOCKS = {"decode": (16, 64), "prefill": (16, 64), "mla": (64,)}


@dataclass
class Measured:
    """Medians in microseconds, or why there is none: by (workload, L2 state), then backend."""

    medians: dict[tuple[str, str], dict[str, float]] = field(default_factory=dict)
    reasons: dict[tuple[str, str], dict[str, str]] = field(default_factory=dict)


def measure(
    workloads: Sequence[Workload],
    backends: Sequence[str],
    options: MeasureOptions,
    device: Device,
    environment: Environment,
    results: Path,
) -> Measured:
    plan = plan_workloads(workloads, backends, device)
    folder = ResultsFolder(results)
    header = new_header(plan, options, environment)
    with device_lock(environment.device_uuid), folder.open_run(header) as run:
        run_sweep(plan, run, options, device, environment)
    found = Measured()
    columns = ["workload", "backend", "variant", "l2_state", "samples", "status", "reasons"]
    where = {"run_id": header.run_id, "metric": "attention"}
    for row in folder.table(columns, where).to_pylist():
        key = (row["workload"], row["l2_state"])
        name = f"{row['backend']}:{row['variant']}".rstrip(":")
        if row["samples"]:
            microseconds = statistics.median(row["samples"]) * 1e6
            found.medians.setdefault(key, {})[name] = microseconds
        else:
            reason = f"{row['status']}: {'; '.join(row['reasons'])}"
            found.reasons.setdefault(key, {})[name] = reason
    return found


def of(name: str, medians: Mapping[str, float]) -> float | None:
    """The median of a backend; of its fastest variant where none is named."""
    found = [us for key, us in medians.items() if key == name or key.startswith(f"{name}:")]
    return min(found, default=None)


def tables(
    found: Measured, ours: str, others: Sequence[str], target: float, peer: str | None = None
) -> Iterator[str]:
    """A table for each L2 state, then how ours stands to the best of `others` and to `peer`."""
    beside = [*others, *([peer] if peer else [])]
    for l2_state in sorted({state for _, state in found.medians}):
        points = {
            workload: medians
            for (workload, state), medians in found.medians.items()
            if state == l2_state
        }
        yield ""
        yield f"L2 {l2_state}, µs:"
        yield ""
        yield f"| point | {' | '.join([ours, *beside])} | best of {', '.join(others)} / ours |"
        yield "|---|" + "---:|" * (len(beside) + 2)
        shares: dict[str, float] = {}
        ratios: dict[str, dict[str, float]] = {name: {} for name in beside}
        for workload, medians in points.items():
            mine = of(ours, medians)
            for name in beside:
                if mine is not None and (us := of(name, medians)) is not None:
                    ratios[name][workload] = us / mine
            best = [ratios[name][workload] for name in others if workload in ratios[name]]
            if best:
                shares[workload] = min(best)
            cells = [of(name, medians) for name in (ours, *beside)]
            shown = ["–" if us is None else f"{us:.2f}" for us in cells]
            shown.append(f"{shares[workload]:.2f}" if workload in shares else "–")
            yield f"| {workload} | {' | '.join(shown)} |"
        yield ""
        if shares:
            mean = geometric_mean(shares.values())
            worst = min(shares, key=lambda workload: shares[workload])
            yield (
                f"Geometric mean {mean:.2f} over {len(shares)} points (target {target:.2f}: "
                f"{'reached' if mean >= target else 'MISSED'}), worst {shares[worst]:.2f} at "
                f"{worst}."
            )
        else:
            yield f"No point has both {ours} and one of {', '.join(others)}: no ratio."
        for name in beside:
            if ratios[name]:
                yield (
                    f"- {name}: geometric mean {geometric_mean(ratios[name].values()):.2f}, worst "
                    f"{min(ratios[name].values()):.2f}, over {len(ratios[name])} points"
                )
        if peer and ratios[peer]:
            slower = [workload for workload, ratio in ratios[peer].items() if ratio < 1]
            yield f"Slower than {peer}: {'at no point' if not slower else ', '.join(slower)}."


def geometric_mean(values: Iterable[float]) -> float:
    return math.exp(statistics.mean(math.log(value) for value in values))


# Of one multiprocessor of compute capability 9.0: CUDA C++ Programming Guide, technical
# specifications per compute capability; a warp takes registers in units of 256.
SM_REGISTERS, SM_SHARED_BYTES, SM_WARPS, SM_PROGRAMS = 65536, 233472, 64, 32
DRIVER_SHARED_BYTES = 1024  # of every program
LIMITS_TARGET, LIMITS_DEVICE = "sm90", "NVIDIA H200"
LIMITS_PAGE = """\
# What limits our Triton kernels, point by point

Generated by `python benchmarks/kernel_speed.py --limits > docs/triton-limits.md`: nothing here was
timed. Compiled ahead of time for {target}, bf16; blocks of 16 where none is said.

- Tile: rows x keys, warps, Triton's pipeline stages. Programs: of the launch.
- A multiprocessor: how many programs fit one at once, and what allows no more.
- Registers, and spilled ones (words of stack), are of a thread; shared memory is in KiB.
- Roofline: the larger of the bytes and the FLOPs that the mathematics needs, over the published
  {terabytes:g} TB/s and {teraflops:g} TFLOP/s of {device}. Launches, the merge of segments and
  waiting are not in it.

| point | tile | programs | a multiprocessor | registers | spilled | shared | FLOPs a byte \
| bound by | roofline, µs |
|---|---|---:|---|---:|---:|---:|---:|---|---:|"""


def programs_per_sm(row: AotRow) -> tuple[int, str]:
    """(programs that fit one multiprocessor at once, what allows no more)."""
    warp_registers = -(-row.registers * 32 // 256) * 256
    fits = {
        "registers": SM_REGISTERS // (max(warp_registers, 256) * row.num_warps),
        "shared memory": SM_SHARED_BYTES // (row.shared_bytes + DRIVER_SHARED_BYTES),
        "warps": SM_WARPS // row.num_warps,
        "programs": SM_PROGRAMS,
    }
    tightest = min(fits, key=lambda name: fits[name])
    return fits[tightest], tightest


def roofline(workload: Workload, peak: Peak) -> tuple[float, str, float]:
    """(seconds no kernel can beat, `memory` or `products`, FLOPs a byte)."""
    flops, moved = attention_flops(workload), attention_bytes(workload)
    times = {
        "memory": moved / peak.memory_bytes_per_s,
        "products": flops / peak.matmul_flops_per_s,
    }
    bound = max(times, key=lambda name: times[name])
    return times[bound], bound, flops / moved


def limits_of(workload: Workload, row: AotRow, peak: Peak) -> str:
    """One line of the table of limits: our main kernel at a point."""
    fit, tightest = programs_per_sm(row)
    seconds, bound, intensity = roofline(workload, peak)
    cells = [
        workload.text,
        f"{row.block_m}x{row.tile_n}, {row.num_warps}w, {row.num_stages}s",
        str(row.programs),
        f"{fit} ({tightest})",
        str(row.registers),
        str(row.spilled_registers),
        f"{row.shared_bytes / 1024:.0f}",
        f"{intensity:.1f}",
        bound,
        f"{seconds * 1e6:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def limit_cases(parts: Iterable[str], blocks: Sequence[int] | None = None) -> list[AotCase]:
    """Every point as a case to compile, named by its workload."""
    texts = [
        f"{point} block={block}"
        for part in parts
        for block in blocks or BLOCKS[part]
        for point in PARTS[part][3]
    ]
    return [AotCase(workload.text, workload.text) for workload in expand_workloads(texts)]


def limits(cases: Sequence[AotCase]) -> Iterator[str]:
    peak = PEAKS[LIMITS_DEVICE]
    yield LIMITS_PAGE.format(
        terabytes=peak.memory_bytes_per_s / 1e12,
        teraflops=peak.matmul_flops_per_s / 1e12,
        device=LIMITS_DEVICE,
        target=LIMITS_TARGET,
    )
    for row in compile_report([LIMITS_TARGET], ["bf16"], cases=cases):
        if row.kernel in ("attention_kernel", "latent_attention_kernel"):
            if row.reason:
                yield f"| {row.case} | {row.status}: {row.reason} |"
            else:
                yield limits_of(Workload.parse(row.case), row, peak)


def not_measured(
    found: Measured, workloads: Sequence[Workload], backends: Sequence[str]
) -> Iterator[str]:
    """A line for each backend that lacks a figure at some point: where, and why."""
    for name in backends:
        why: dict[str, list[str]] = {}
        for workload in workloads:
            states = [key for key in (*found.medians, *found.reasons) if key[0] == workload.text]
            if any(of(name, found.medians.get(key, {})) is not None for key in states):
                continue
            said = {
                reason
                for key in states
                for key_name, reason in found.reasons.get(key, {}).items()
                if key_name == name or key_name.startswith(f"{name}:")
            }
            why.setdefault("; ".join(sorted(said)) or "no row was stored", []).append(workload.text)
        for reason, texts in why.items():
            where = "at all points" if len(texts) == len(workloads) else f"at {', '.join(texts)}"
            yield f"- {name} not measured {where}: {reason}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--part", choices=sorted(PARTS), action="append")
    parser.add_argument("--timer", choices=TIMERS, default="graph")
    parser.add_argument("--block", type=int, nargs="+", help="block sizes, instead of the part's")
    parser.add_argument("--ours", help="instead of our Triton kernel")
    parser.add_argument("--against", nargs="+", help="instead of the part's others")
    parser.add_argument("--points", nargs="+", help="workloads, instead of the part's")
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--limits", action="store_true", help="compile and say what bounds us")
    args = parser.parse_args()
    if args.limits:
        for line in limits(limit_cases(args.part or sorted(PARTS), args.block)):
            print(line, flush=True)
        return
    device = current_device()
    environment = read_environment(device)
    print(
        f"{datetime.now(UTC):%Y-%m-%d}, {environment.device_name}, driver "
        f"{environment.driver_version or 'none'}; {', '.join(environment.stack)}"
    )
    l2_states = ("cold", "hot") if args.timer in GPU_TIMERS else ("hot",)
    options = MeasureOptions(timer=args.timer, l2_states=l2_states, target_rel_ci=0.01)
    for part in args.part or sorted(PARTS):
        ours, others, target, points = PARTS[part]
        ours = args.ours or ours
        others, peer = (args.against, None) if args.against else (others, PEERS[part])
        backends = [ours, *others, *([peer] if peer else [])]
        for block in args.block or BLOCKS[part]:
            workloads = expand_workloads(
                [f"{point} block={block}" for point in args.points or points]
            )
            print(f"\n## {part}, blocks of {block}, {args.timer}", flush=True)
            found = measure(workloads, backends, options, device, environment, args.results)
            for line in tables(found, ours, others, target, peer):
                print(line, flush=True)
            for line in not_measured(found, workloads, backends):
                print(line, flush=True)


if __name__ == "__main__":
    main()
