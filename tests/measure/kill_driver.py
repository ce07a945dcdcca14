"""Kills a sweep at random moments, resumes it, and reads what is stored after each kill.

Run as a program with a results folder, a number of kills and a seed. Children are forked from a
process that has measured one point with one thread, so a round costs no imports. Prints one
line `kills=N points=N` when nothing was lost or doubled; fails with an assertion otherwise.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from attnbench.backends.device import Device
from attnbench.measure import MeasureOptions, plan_workloads, run_sweep
from attnbench.measure.environment import read_environment
from attnbench.measure.header import new_header, read_header
from attnbench.store import ResultsFolder
from attnbench.store.record import Measurement
from attnbench.workload.suite import expand_workloads

CPU = Device("cpu")
SPEC = "{1..30}q1s{20..80+20} heads=4/2 head_size=32 dtype=fp32"


def child(folder: ResultsFolder, run_id: str, report: int) -> None:
    """Go on with the run, and report each point when it is stored."""
    header = folder.header(run_id)
    plan, options = read_header(header)

    def tell(rows: Sequence[Measurement], done: int, total: int) -> None:
        os.write(report, f"{rows[0].point_id}\n".encode())

    with folder.open_run(header, resume=True) as run:
        os.write(report, b"open\n")
        run_sweep(plan, run, options, CPU, ENVIRONMENT, tell)
        run.seal()


def start(folder: ResultsFolder, run_id: str) -> tuple[int, int]:
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(ours)
        try:
            child(folder, run_id, theirs)
        finally:
            os._exit(0)
    os.close(theirs)
    return pid, ours


def reported(pipe: int) -> set[str]:
    data = b""
    while chunk := os.read(pipe, 65536):
        data += chunk
    os.close(pipe)
    return {line.decode() for line in data.split(b"\n")[:-1]} - {"open"}


def stored_points(folder: ResultsFolder) -> dict[tuple[str, str], list[float]]:
    columns = ["point_id", "metric", "samples"]
    rows = folder.table(columns=columns).to_pylist()
    found = {(row["point_id"], row["metric"]): row["samples"] for row in rows}
    assert len(found) == len(rows), "a row is stored twice"
    return found


def main(path: Path, kills: int, seed: int) -> None:
    rng = random.Random(seed)
    folder = ResultsFolder(path)
    plan = plan_workloads(expand_workloads([SPEC]), ["CPU_ATTN"], CPU)
    header = new_header(plan, MeasureOptions(timer="fake"), ENVIRONMENT)
    warm_up = ResultsFolder(path.parent / "warm-up")
    with warm_up.open_run(header) as run:
        run_sweep(plan[:1], run, MeasureOptions(timer="fake"), CPU, ENVIRONMENT)
        run.seal()
    with folder.open_run(header) as run:
        run.seal()
    before: dict[tuple[str, str], list[float]] = {}
    midway = 0
    for kill in range(kills):
        pid, pipe = start(folder, header.run_id)
        if kill % 3:
            assert os.read(pipe, 5) == b"open\n"  # else: killed while it opens the run, perhaps
        time.sleep(rng.uniform(0.0, 0.4))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        points = reported(pipe)
        after = stored_points(folder)
        for key, samples in before.items():
            assert after.get(key) == samples, f"{key} was lost or changed"
        missing = points - {point for point, metric in after if metric == "attention"}
        assert not missing, f"reported as stored, but lost: {missing}"
        midway += len(points) > 0 and len(after) > len(before)
        before = after
        if len({point for point, _ in after}) == len(plan):
            # Everything is measured: go on killing, in a run of its own.
            header = new_header(plan, MeasureOptions(timer="fake"), ENVIRONMENT)
            path = path.parent / f"{path.name}+"
            folder, before = ResultsFolder(path), {}
            with folder.open_run(header) as run:
                run.seal()
    pid, pipe = start(folder, header.run_id)
    reported(pipe)
    os.waitpid(pid, 0)
    final = stored_points(folder)
    assert {point for point, metric in final if metric == "attention"} == {
        point.point_id for point in plan
    }
    assert folder.check().is_ok, folder.check()
    print(f"kills={kills} points={len(plan)} midway={midway}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    ENVIRONMENT = read_environment(CPU)
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
