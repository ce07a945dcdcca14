"""The build before: another environment's Python, which measures what this one measures.

Its process is started once and serves every round; what it measures is measured by fresh workers of
its own, as here. This build holds the device for both.
"""

from __future__ import annotations

import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from attnbench.errors import InfrastructureError, UsageError
from attnbench.measure.environment import Environment
from attnbench.measure.executor import START_TIMEOUT_S, TRUTH_TIMEOUT_S
from attnbench.measure.options import MeasureOptions
from attnbench.measure.plan import PlannedPoint
from attnbench.store import ResultsFolder
from attnbench.store.record import PROTOCOL_VERSION, Measurement, Status
from attnbench.store.schema import table_to_rows

_SCRIPT = Path(__file__).parent / "reference_side.py"

#: What would lead the other interpreter to this one's packages, or give its rows this commit.
_OURS = (
    "PYTHONPATH",
    "PYTHONHOME",
    "PYTHONEXECUTABLE",
    "PYTHONSTARTUP",
    "VIRTUAL_ENV",
    "__PYVENV_LAUNCHER__",
    "ASV_COMMIT",
    "ASV_CONF_DIR",
)

#: Options that are not the other side's: it measures one replicate, on a device that is held, and
#: rehearsed slow-downs are the new build's.
_NOT_SENT = frozenset(
    {
        *("replicates", "first_replicate", "shard", "reference", "confirm_points"),
        *("fake_slowdown", "locked_clock_hz"),
    }
)


@dataclass(frozen=True, slots=True)
class ReferenceFacts:
    """What the other side is. Fields are named after the record's columns."""

    protocol_version: int
    device_class: str
    device_uuid: str
    commit: str
    stack: tuple[str, ...]
    stack_id: str
    harness_version: str
    package: str

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ReferenceFacts:
        names = cls.__dataclass_fields__
        return cls(**{**{name: value[name] for name in names}, "stack": tuple(value["stack"])})

    def title(self, environment: Environment) -> str:
        """What it has that this build has not: `commit 1a2b3c4, torch==2.12.0`."""
        words = [entry for entry in self.stack if entry not in environment.stack]
        if self.commit != environment.commit:
            words = [f"commit {self.commit[:7] or 'unknown'}", *words]
        return ", ".join(words) or "fewer packages"


class Reference:
    """The other side's process. After `close` it and all it started are gone."""

    def __init__(self, python: str, folder: Path) -> None:
        """Start it, in `folder`, which is its own. Raises UsageError if it does not start."""
        self.python = python
        self._folder = folder
        self._log = folder / "stderr.txt"
        self._rest = b""
        self._rounds = 0
        found = shutil.which(Path(python).expanduser())
        if found is None:
            raise UsageError(
                f"--reference {python}: no such program; name the python of another environment, "
                "e.g. ../before/.venv/bin/python"
            )
        program = Path(found).absolute()  # a link of a virtual environment stays one
        with self._log.open("wb") as log:
            try:
                self._process = subprocess.Popen(
                    [program, "-P", _SCRIPT],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    cwd=folder,  # an attnbench.toml here may have keys that it does not know
                    env=_environment(program),
                    start_new_session=True,
                )
            except OSError as error:
                raise UsageError(
                    f"--reference {python}: does not start ({error.strerror}); name the python of "
                    "another environment"
                ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def describe(self) -> ReferenceFacts:
        """What it is. Raises InfrastructureError if it cannot say."""
        answer = self._ask({}, START_TIMEOUT_S)
        try:
            return ReferenceFacts.from_json(answer)
        except (KeyError, TypeError) as error:
            raise self._failed(f"answers what this build does not read: {error}") from error

    def measure(
        self, points: Sequence[PlannedPoint], options: MeasureOptions, replicate: int, run_id: str
    ) -> list[Measurement]:
        """Rows of `points`, measured once as `options` say, as rows of run `run_id`.

        A point that it does not know has none. Raises InfrastructureError if it fails as a whole.
        """
        self._rounds += 1
        results = self._folder / f"results-{self._rounds}"
        request = {
            "points": [point.to_json() for point in points],
            "options": sent_options(options),
            "replicate": replicate,
            "results": str(results),
        }
        silence_s = START_TIMEOUT_S + TRUTH_TIMEOUT_S + 2 * options.timeout_s
        self._ask(request, silence_s)
        if not results.is_dir():
            return []
        suites = {point.point_id: point.suite for point in points}
        rows = table_to_rows(ResultsFolder(results).table(references=True))
        shutil.rmtree(results, ignore_errors=True)
        if unknown := {row.status for row in rows} - set(Status):
            raise self._failed(f"has statuses this build does not know: {', '.join(unknown)}")
        return [
            replace(row, run_id=run_id, replicate=replicate, suite=suites[row.point_id])
            for row in rows
            if row.point_id in suites
        ]

    def close(self) -> None:
        """End it. Closing twice does nothing."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(OSError):
            self._process.stdin.close()
        with suppress(ProcessLookupError, PermissionError):
            # Its workers die with it: they ask the kernel for that.
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process.stdout.close()

    def _ask(self, request: Mapping[str, Any], silence_s: float) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise self._died() from None
        answer = self._line(silence_s)
        while "done" in answer:
            answer = self._line(silence_s)
        if "failed" in answer:
            lacks = "No module named 'attnbench'" in answer["failed"]
            mend = f"; install it there: {self.python} -m pip install attnbench" if lacks else ""
            raise self._failed(f"{answer['failed']}{mend}")
        return answer

    def _line(self, silence_s: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        deadline = time.monotonic() + silence_s
        with selectors.DefaultSelector() as ready:
            ready.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._rest:
                if not ready.select(deadline - time.monotonic()):
                    raise self._failed(f"nothing was heard of it for {silence_s:g} s")
                data = os.read(self._process.stdout.fileno(), 65536)
                if not data:
                    raise self._died()
                self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        try:
            answer: dict[str, Any] = json.loads(line)
        except ValueError:
            raise self._failed(f"answers {line[:80]!r}, which is no JSON") from None
        return answer

    def _died(self) -> InfrastructureError:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(5.0)
        said = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return self._failed(f"ended ({self._process.poll()}): {(said or ['no output'])[-1][:300]}")

    def _failed(self, why: str) -> InfrastructureError:
        return InfrastructureError(f"--reference {self.python}: {why}")


@contextmanager
def open_reference(python: str) -> Iterator[Reference]:
    """The other side, in a folder of its own. Raises UsageError if it does not start."""
    with (
        tempfile.TemporaryDirectory(prefix="attnbench-reference-") as folder,
        Reference(python, Path(folder)) as reference,
    ):
        yield reference


def check_reference(python: str, environment: Environment) -> ReferenceFacts:
    """Ask the other side what it is, before anything is measured.

    Raises UsageError where its times would say nothing of this build's, InfrastructureError if it
    cannot be asked.
    """
    with open_reference(python) as reference:
        facts = reference.describe()
    ours = {
        "protocol_version": PROTOCOL_VERSION,
        "device_class": environment.device_class,
        "device_uuid": environment.device_uuid,
    }
    for name, own in ours.items():
        if getattr(facts, name) != own:
            raise UsageError(
                f"--reference {python}: its {name} is {getattr(facts, name) or 'unknown'}, and "
                f"{own or 'unknown'} here; times of both are not compared, name another python"
            )
    own_package = str(Path(__file__).parent.parent / "__init__.py")
    same_sources = facts.package == own_package or (
        facts.commit != "" and facts.commit == environment.commit
    )
    if same_sources and facts.stack_id == environment.stack_id:
        raise UsageError(
            f"--reference {python}: it is this build itself (same commit and packages); name the "
            "python of the build before"
        )
    return facts


def sent_options(options: MeasureOptions) -> dict[str, Any]:
    """The options that the other side measures with, without those that have their default."""
    # A lock of its own would be set free at its end, and with it this build's.
    rated_hz = options.locked_clock_hz or options.rated_clock_hz
    chosen = asdict(replace(options, rated_clock_hz=rated_hz))
    usual = asdict(MeasureOptions())
    return {
        name: value
        for name, value in chosen.items()
        if name not in _NOT_SENT and value != usual[name]
    }


def _environment(program: Path) -> dict[str, str]:
    """This process's variables without what leads to its packages."""
    own_scripts = {str(Path(sys.prefix) / "bin"), str(Path(sys.executable).parent)}
    path = [p for p in os.environ.get("PATH", "").split(os.pathsep) if p not in own_scripts]
    variables = {name: value for name, value in os.environ.items() if name not in _OURS}
    return {**variables, "PATH": os.pathsep.join([str(program.parent), *path])}
