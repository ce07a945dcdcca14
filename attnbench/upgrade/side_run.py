"""One replicate of a plan, by the interpreter that runs this file: started as a script.

It may import another commit's attnbench, so it uses only what asv's suites have always used, and
nothing of the room it lies in.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any


def main(request_file: Path) -> None:
    """Measure what the request (JSON) says, and write the answer beside it."""
    request = json.loads(request_file.read_text(encoding="utf-8"))
    try:
        answer = measure(request)
    # Whatever another version of attnbench or a library raises is said by the parent.
    except Exception as error:
        answer = {"failed": f"{type(error).__name__}: {error}", "code": _code(error)}
    Path(request["answer"]).write_text(json.dumps(answer), encoding="utf-8")


def _code(error: Exception) -> int:
    return int(getattr(error, "exit_code", 4))


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """The run's id, and what was imported."""
    import attnbench
    from attnbench.measure import MeasureOptions, plan_workloads, run_sweep
    from attnbench.measure.device_lock import device_lock
    from attnbench.measure.environment import read_environment
    from attnbench.measure.header import new_header
    from attnbench.selection import current_device
    from attnbench.store import ResultsFolder
    from attnbench.store.record import stack_id
    from attnbench.workload import Workload

    device = current_device()
    plan = []
    for group in request["plan"]:
        workloads = [Workload.parse(text) for text in group["workloads"]]
        plan += plan_workloads(workloads, group["backends"], device, group["suite"])
    if not plan:
        raise ValueError(f"no backend of {device} takes these workloads")
    known = {field.name for field in fields(MeasureOptions)}
    values = {name: value for name, value in request["options"].items() if name in known}
    for name in ("l2_states", "fake_slowdown"):
        values[name] = tuple(tuple(v) if isinstance(v, list) else v for v in values.get(name, ()))
    values["l2_states"] = values["l2_states"] or ("cold",)
    options = MeasureOptions(**values)
    environment = read_environment(device)
    name, version = request["distribution"], ""
    if name != "attnbench":
        version = importlib.metadata.version(name)
        stack = tuple(sorted({*environment.stack, f"{name}=={version}"}))
        environment = replace(environment, stack=stack, stack_id=stack_id(stack))
    results = ResultsFolder(Path(request["results"]))
    again = bool(request["run_id"])
    header = results.header(request["run_id"]) if again else new_header(plan, options, environment)
    with (
        device_lock(environment.device_uuid),
        results.open_run(header, resume=again) as run,
    ):
        outcome = run_sweep(plan, run, options, device, environment)
        run.seal()
    return {
        "run_id": outcome.run_id,
        "version": version,
        "package": attnbench.__file__,
        "statuses": dict(outcome.counts),
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
