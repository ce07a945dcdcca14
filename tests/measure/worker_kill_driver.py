"""Kills the workers of sweeps at random moments, and reads what is stored at the end.

Run with a folder, a number of kills and a seed. A timer's signal interrupts the sweep and kills
whatever child there is. Workers are forked from this process, which has one thread, so that one
starts in milliseconds. Prints `kills=N sweeps=N stops=N second_tries=N quarantined=N` when every
planned point has one row, right or CRASH; fails with an assertion otherwise.
"""

from __future__ import annotations

import os
import random
import signal
import sys
from pathlib import Path

import torch

from attnbench.errors import InfrastructureError
from attnbench.measure import MeasureOptions, plan_workloads
from attnbench.measure.sweep import Isolation
from attnbench.store import ResultsFolder
from attnbench.workload.suite import expand_workloads
from tests.measure.faults import CPU, assert_not_mistimed, attention_rows, sweep

SPEC = "{1..20}q1s{20..40+20} heads=4/2 head_size=32 dtype=fp32"
OPTIONS = MeasureOptions(timer="fake", replicates=2, timeout_s=20.0)


class Killer:
    """Kills a child of this process, again and again."""

    def __init__(self, seed: int) -> None:
        self.kills = 0
        self._random = random.Random(seed)
        self._children = Path(f"/proc/self/task/{os.getpid()}/children")
        signal.signal(signal.SIGALRM, self._kill)

    def arm(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, self._random.uniform(0.002, 0.08))

    def disarm(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)

    def _kill(self, *_: object) -> None:
        for pid in self._children.read_text().split():
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            if state != "Z":
                os.kill(int(pid), signal.SIGKILL)
                self.kills += 1
        self.arm()


def main(path: Path, kills: int, seed: int) -> None:
    killer = Killer(seed)
    plan = plan_workloads(expand_workloads([SPEC]), ["CPU_ATTN"], CPU)
    isolation = Isolation(always=True, start_method="fork")
    sweep(plan[:2], ResultsFolder(path / "warm-up"), Isolation())
    sweeps = stops = second_tries = quarantined = 0
    while killer.kills < kills:
        folder = ResultsFolder(path / str(sweeps))
        sweeps += 1
        header = None
        while True:
            killer.arm()
            try:
                outcome = sweep(plan, folder, isolation, OPTIONS, header)
                break
            except InfrastructureError:
                # Two workers in a row were killed while they started: the sweep stops, resumable.
                header = folder.header("last")
                stops += 1
            finally:
                killer.disarm()
        rows = attention_rows(folder)
        assert set(rows) == {
            (point.backend, point.workload.text, r) for point in plan for r in range(2)
        }
        for row in rows.values():
            if row["status"] == "OK":
                assert_not_mistimed(row)
            else:
                assert row["status"] == "CRASH", row["reasons"]
                assert row["samples"] == []
                assert "SIGKILL" in row["reasons"][0]
            second_tries += any(reason.startswith("first try") for reason in row["reasons"])
        quarantined += len(outcome.quarantined)
        assert folder.check().is_ok
    print(
        f"kills={killer.kills} sweeps={sweeps} stops={stops} second_tries={second_tries} "
        f"quarantined={quarantined}"
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
