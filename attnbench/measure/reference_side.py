"""The build before, measured by turns with the new one: run as a script by its own interpreter.

It may import another commit's attnbench, so it uses only what asv's suites have always used, and
nothing of the room it lies in. A request is a line of JSON on stdin, an answer one on stdout; lines
with `done` in between say that it is alive.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

Say = Callable[[dict[str, Any]], None]


def main() -> None:
    """Answer until stdin ends."""
    with suppress(OSError, AttributeError):  # a sweep that was killed must not go on half alone
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    requests = os.fdopen(os.dup(0), encoding="utf-8")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # what libraries print is no answer

    def say(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    for line in requests:
        request = json.loads(line)
        try:
            say(measure(request, say) if "points" in request else describe())
        # Whatever another version of attnbench or a library raises is said by the parent.
        except Exception as error:
            say({"failed": f"{type(error).__name__}: {error}"})


def describe() -> dict[str, Any]:
    """What this build is, and what it would measure on."""
    import attnbench
    from attnbench.measure.environment import read_environment
    from attnbench.selection import current_device
    from attnbench.store.record import PROTOCOL_VERSION

    found = read_environment(current_device())
    names = ("device_class", "device_uuid", "commit", "stack_id", "harness_version")
    return {
        **{name: getattr(found, name) for name in names},
        "stack": list(found.stack),
        "protocol_version": PROTOCOL_VERSION,
        "package": str(attnbench.__file__),
    }


def measure(request: dict[str, Any], say: Say) -> dict[str, Any]:
    """One process of each point, into a results folder of its own."""
    from attnbench.backends.registry import get_backend_class
    from attnbench.measure import MeasureOptions, PlannedPoint, run_sweep
    from attnbench.measure.environment import read_environment
    from attnbench.measure.header import new_header
    from attnbench.selection import current_device
    from attnbench.store import ResultsFolder
    from attnbench.workload import Workload

    device = current_device()
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in request["options"].items()
    }
    if unknown := values.keys() - {field.name for field in fields(MeasureOptions)}:
        raise ValueError(f"this build does not know {', '.join(sorted(unknown))}")
    options = MeasureOptions(**values, replicates=1, first_replicate=request["replicate"])
    plan, refused = [], {}
    for number, point in enumerate(request["points"]):
        try:
            get_backend_class(point["backend"])
            workload = Workload.parse(point["workload"])
        # A point that this build does not know yet must not cost the others their time.
        except Exception as error:
            refused[number] = f"{type(error).__name__}: {error}"
            continue
        plan.append(PlannedPoint(workload, point["backend"], point["variant"], point["suite"]))
    if plan:
        environment = read_environment(device)
        folder = ResultsFolder(Path(request["results"]))
        with folder.open_run(new_header(plan, options, environment)) as run:
            run_sweep(
                plan,
                run,
                options,
                device,
                environment,
                lambda rows, done, total: say({"done": done}),
                lambda line: say({"done": 0}),
            )
            run.seal()
    return {"refused": refused}


if __name__ == "__main__":
    main()
