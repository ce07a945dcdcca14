"""Our Triton kernels against the libraries', side by side in one run.

    python benchmarks/kernel_speed.py [--part decode|prefill|mla] [--timer graph] [--block 16 64]

Every point is measured by the way `attnbench run` goes, output checked, the backends of a point in
random order within seconds of each other; the rows are kept in --results. Printed per point: each
backend's median, and our time as a share of the best other's (1.00: as fast; 0.50: twice as long);
then the geometric mean and the worst, and per other backend. A backend that is not here, or refuses
a point, is listed with its reason and counts for nothing.

Prints Markdown with date, device and versions. A CPU will do to try it: --timer wall, when nothing
but the interpreter times ours: use --ours CPU_ATTN --against TORCH_SDPA there.
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
from attnbench.measure import MeasureOptions, plan_workloads, run_sweep
from attnbench.measure.device_lock import device_lock
from attnbench.measure.environment import Environment, read_environment
from attnbench.measure.header import new_header
from attnbench.measure.options import TIMERS
from attnbench.selection import current_device
from attnbench.store import ResultsFolder
from attnbench.workload import Workload
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


def tables(found: Measured, ours: str, others: Sequence[str], target: float) -> Iterator[str]:
    backends = [ours, *others]
    for l2_state in sorted({state for _, state in found.medians}):
        yield ""
        yield f"L2 {l2_state}, µs:"
        yield ""
        yield f"| point | {' | '.join(backends)} | best other / ours |"
        yield "|---|" + "---:|" * (len(backends) + 1)
        shares: dict[str, float] = {}
        beside: dict[str, list[float]] = {name: [] for name in others}
        for (workload, state), medians in found.medians.items():
            if state != l2_state:
                continue
            mine = of(ours, medians)
            theirs = {name: us for name in others if (us := of(name, medians)) is not None}
            if mine is not None and theirs:
                shares[workload] = min(theirs.values()) / mine
                for name, us in theirs.items():
                    beside[name].append(us / mine)
            cells = [of(name, medians) for name in backends]
            shown = ["–" if us is None else f"{us:.2f}" for us in cells]
            shown.append(f"{shares[workload]:.2f}" if workload in shares else "–")
            yield f"| {workload} | {' | '.join(shown)} |"
        yield ""
        if not shares:
            yield f"No point has both {ours} and another: no ratio."
            continue
        mean = geometric_mean(shares.values())
        worst = min(shares, key=lambda workload: shares[workload])
        yield (
            f"Geometric mean {mean:.2f} (target {target:.2f}: "
            f"{'reached' if mean >= target else 'MISSED'}), worst {shares[worst]:.2f} at {worst}."
        )
        for name, ratios in beside.items():
            if ratios:
                yield (
                    f"- {name}: geometric mean {geometric_mean(ratios):.2f}, worst "
                    f"{min(ratios):.2f}, over {len(ratios)} points"
                )


def geometric_mean(values: Iterable[float]) -> float:
    return math.exp(statistics.mean(math.log(value) for value in values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--part", choices=sorted(PARTS), action="append")
    parser.add_argument("--timer", choices=TIMERS, default="graph")
    parser.add_argument("--block", type=int, nargs="+", help="block sizes, instead of the part's")
    parser.add_argument("--ours", help="instead of our Triton kernel")
    parser.add_argument("--against", nargs="+", help="instead of the part's others")
    parser.add_argument("--results", type=Path, default=Path("results"))
    args = parser.parse_args()
    device = current_device()
    environment = read_environment(device)
    print(
        f"{datetime.now(UTC):%Y-%m-%d}, {environment.device_name}, driver "
        f"{environment.driver_version or 'none'}; {', '.join(environment.stack)}"
    )
    options = MeasureOptions(timer=args.timer, l2_states=("cold", "hot"), target_rel_ci=0.01)
    for part in args.part or sorted(PARTS):
        ours, others, target, points = PARTS[part]
        ours = args.ours or ours
        against = args.against or [*others, PEERS[part]]
        for block in args.block or BLOCKS[part]:
            workloads = expand_workloads([f"{point} block={block}" for point in points])
            print(f"\n## {part}, blocks of {block}, {args.timer}", flush=True)
            found = measure(workloads, [ours, *against], options, device, environment, args.results)
            for line in tables(found, ours, against, target):
                print(line, flush=True)
            said = {
                f"{name}: {why}"
                for reasons in found.reasons.values()
                for name, why in reasons.items()
            }
            for line in sorted(said):
                print(f"- not measured: {line}", flush=True)


if __name__ == "__main__":
    main()
