"""A process that stores rows, to be run beside others and to be killed.

python -m tests.store.writer FOLDER NUMBER ROWS RUNS    write RUNS runs of ROWS rows
python -m tests.store.writer FOLDER serve               a child per line `ROWS NUMBER DELAY`
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time

from attnbench.store import ResultsFolder
from tests.store.rows import make_header, make_row


def write_runs(folder: ResultsFolder, number: int, rows: int, runs: int) -> None:
    for index in range(runs):
        with folder.open_run(make_header(number=100 * number + index)) as run:
            for row in range(rows):
                run.append(make_row(run.run_id, row))
        print(json.dumps({"sealed": run.run_id}), flush=True)


def serve(folder: ResultsFolder) -> None:
    """Fork a child per line and kill it after DELAY seconds (0: never); say how it ended.

    A fork costs less than a fresh interpreter.
    """
    for line in sys.stdin:
        rows, number, delay_s = line.split()
        child = os.fork()
        if child == 0:
            _go_on(folder, int(rows), int(number))
        if float(delay_s) > 0:
            time.sleep(float(delay_s))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _go_on(folder: ResultsFolder, rows: int, number: int) -> None:
    """Store what is not stored yet; each row is told to `acknowledged` once it is."""
    header = make_header(number=number)
    told = os.open(folder.path.with_name("acknowledged"), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        known = (folder.path / "runs").is_dir() and any(
            path.name.startswith(header.run_id) and path.stat().st_size > 0
            for path in (folder.path / "runs").iterdir()
        )
        with folder.open_run(header, resume=known) as run:
            for row in range(rows):
                if make_row(run.run_id, row).key not in run.done:
                    run.append(make_row(run.run_id, row))
                    os.write(told, f"{number} {row}\n".encode())
    except BaseException as error:
        print(repr(error), file=sys.stderr)
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    target = ResultsFolder(sys.argv[1])
    if sys.argv[2] == "serve":
        serve(target)
    else:
        write_runs(target, *(int(word) for word in sys.argv[2:5]))
