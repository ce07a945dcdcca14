"""The same plan measured in two environments, by turns, on one device."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from attnbench.errors import ExitCode, InfrastructureError, UsageError
from attnbench.measure import MeasureOptions
from attnbench.upgrade.side_env import OWN, Side

_SCRIPT = Path(__file__).parent / "side_run.py"
_MATRIX = "from attnbench.cli.main import main; main(['matrix', '--format', 'json'])"


@dataclass(frozen=True, slots=True)
class PlanPart:
    """Workload texts on backends (none: all that run here), of a suite or of none."""

    workloads: tuple[str, ...]
    backends: tuple[str, ...]
    suite: str = ""


def measure_by_turns(
    sides: tuple[Side, Side],
    plans: tuple[Sequence[PlanPart], Sequence[PlanPart]],
    options: MeasureOptions,
    results: Path,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[str, str]:
    """Each side's run id. A replicate is a process of one side: A B, B A, A B, …

    So a device that warms up or slows down does so for both alike.

    Raises:
        UsageError: a side does not know the plan, or cannot be imported.
        InfrastructureError: a side's machine or process failed; what was measured is stored.
    """
    run_ids = ["", ""]
    total, done = 2 * options.replicates, 0
    for replicate in range(options.replicates):
        for place in (0, 1) if replicate % 2 == 0 else (1, 0):
            one = replace(options, replicates=1, first_replicate=replicate)
            request = {
                "plan": [asdict(part) for part in plans[place]],
                "options": asdict(one),
                "results": str(results.absolute()),
                "run_id": run_ids[place],
                "distribution": sides[place].distribution,
            }
            run_ids[place] = _measure(sides[place], request)
            done += 1
            if progress is not None:
                progress(done, total)
    return run_ids[0], run_ids[1]


def measure_once(
    side: Side, plan: Sequence[PlanPart], options: MeasureOptions, results: Path
) -> str:
    """One process of one side, as a run of its own: its id. Raises as `measure_by_turns`."""
    request = {
        "plan": [asdict(part) for part in plan],
        "options": asdict(replace(options, replicates=1, first_replicate=0)),
        "results": str(results.absolute()),
        "run_id": "",
        "distribution": side.distribution,
    }
    return _measure(side, request)


def _measure(side: Side, request: dict[str, Any]) -> str:
    with tempfile.TemporaryDirectory(prefix="attnbench-side-") as folder:
        answer_file = Path(folder) / "answer.json"
        request_file = Path(folder) / "request.json"
        request_file.write_text(json.dumps({**request, "answer": str(answer_file)}))
        done = _run(side, ["-P", str(_SCRIPT), str(request_file)])
        if not answer_file.exists():
            last = (done.stderr.strip().splitlines() or ["no output"])[-1]
            raise InfrastructureError(
                f"{side.label}: its process died with exit code {done.returncode}: {last}"
            )
        answer: Mapping[str, Any] = json.loads(answer_file.read_text(encoding="utf-8"))
    if "failed" in answer:
        usage = answer["code"] == ExitCode.USAGE or "ModuleNotFoundError" in answer["failed"]
        lacks = "No module named 'attnbench'" in answer["failed"]
        mend = f"; install it there: {side.python} -m pip install attnbench" if lacks else ""
        raise (UsageError if usage else InfrastructureError)(
            f"{side.label} cannot measure this: {answer['failed']}{mend}"
        )
    if side.distribution == OWN and side.first is not None:
        found = Path(answer["package"]).resolve()
        if not found.is_relative_to(side.first.resolve()):
            raise InfrastructureError(f"{side.label}: {found} was imported in its place")
    return str(answer["run_id"])


def read_matrix(side: Side) -> list[dict[str, Any]]:
    """The selection matrix of a side's attnbench, a row a cell.

    Raises InfrastructureError where it cannot be asked.
    """
    done = _run(side, ["-P", "-c", _MATRIX])
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise InfrastructureError(f"{side.label}: its matrix cannot be read: {last}")
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows


def _run(side: Side, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **side.variables}
    if side.first is not None:
        words = [str(side.first), *filter(None, [os.environ.get("PYTHONPATH", "")])]
        environment["PYTHONPATH"] = os.pathsep.join(words)
    try:
        return subprocess.run(
            [str(side.python), *arguments],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError as error:
        raise UsageError(
            f"{side.label}: {side.python} does not start ({error.strerror})"
        ) from error
