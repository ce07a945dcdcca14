"""Is everything that was stored still there, and still what was stored?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from attnbench.errors import DataError
from attnbench.store.header import month_of
from attnbench.store.journal import read_journal
from attnbench.store.layout import Layout, run_id_of
from attnbench.store.publish import betrayed_columns
from attnbench.store.record import Status, point_id, stack_id, workload_id
from attnbench.store.schema import ROW_KEY, rows_to_table
from attnbench.store.sealed import SealedFile


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with one file, and what to do."""

    path: Path
    text: str


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What was looked at and what is wrong with it."""

    num_files: int
    num_rows: int
    problems: tuple[Problem, ...]

    @property
    def is_ok(self) -> bool:
        return not self.problems

    @property
    def bad_files(self) -> tuple[Path, ...]:
        """Every file something is wrong with, once."""
        return tuple(dict.fromkeys(problem.path for problem in self.problems))


def check_folder(layout: Layout) -> CheckReport:
    """Read everything and compare it with its checksums and with itself. Raises nothing for data.

    Of every sealed file: both SHA-256 digests (every byte), page checksums, schema version; rows
    with unique keys, known statuses, samples on OK and NOISY only, and ids that are the hashes of
    what they stand for. Of every journal: the checksum of each line, and the same of its rows. Of
    published files also that no name of a machine or GPU is in its column as it is.
    """
    problems: list[Problem] = []
    own = frozenset(run_id_of(path) for path in layout.run_paths())
    num_files = num_rows = 0
    owners: dict[tuple[Path, str], Path] = {}
    counted = set(own)
    counted.update(run_id_of(path) for path in layout.ended_journals())
    for path in [*layout.month_paths(), *layout.run_paths(), *layout.published_paths()]:
        num_files += 1
        try:
            file = SealedFile.open(path)
            file.verify()
            problems.extend(Problem(path, text) for text in _check_place(file, layout, owners))
            checker = _RowChecker(file.run_ids)
            betrayed: set[str] = set()
            for table in file.row_groups():
                checker.add(table)
                if path.parent == layout.published:
                    betrayed.update(betrayed_columns(table))
            hidden = {layout.runs: frozenset(), layout.months: own}.get(path.parent, counted)
            num_rows += checker.count_rows(frozenset(hidden))
            counted.update(file.run_ids)
            problems.extend(Problem(path, text) for text in checker.findings())
            if betrayed:
                text = f"tells the {' and '.join(sorted(betrayed))} of a machine; remove it and "
                problems.append(Problem(path, text + "write it with `results export --public`"))
        except DataError as error:
            text = str(error).removeprefix(f"{path}: ")
            problems.append(Problem(path, text))
    for path in layout.journal_paths():
        num_files += 1
        try:
            contents = read_journal(path)
        except DataError as error:
            problems.append(Problem(path, str(error).removeprefix(f"{path}: ")))
            continue
        if contents.corrupt_lines:
            text = f"corrupt: {contents.corrupt_text()}; type `attnbench results compact`, which "
            problems.append(Problem(path, text + "keeps its good rows and sets the file aside"))
        checker = _RowChecker((run_id_of(path),))
        checker.add(rows_to_table(contents.rows))
        num_rows += len(contents.rows)
        problems.extend(Problem(path, text) for text in checker.findings())
    for path in layout.set_aside_paths():
        num_files += 1
        lines = ", ".join(str(number) for number in read_journal(path).corrupt_lines)
        text = f"set aside: line {lines} was lost, the others are sealed; measure the points again"
        problems.append(Problem(path, text + " with --resume and remove the file"))
    return CheckReport(num_files, num_rows, tuple(problems))


def _check_place(
    file: SealedFile, layout: Layout, owners: dict[tuple[Path, str], Path]
) -> Iterator[str]:
    """Whether a file lies where its runs belong, and holds no run another file of its kind has."""
    in_runs = file.path.parent == layout.runs
    if in_runs and file.run_ids != (run_id_of(file.path),):
        yield f"holds the runs {', '.join(file.run_ids)}; rename it back to <run id>.parquet"
    if in_runs:
        return
    for run_id in file.run_ids:
        if file.path.parent == layout.months and month_of(run_id) != file.path.stem:
            yield f"holds run {run_id} of another month; rename it back to <YYYY-MM>.parquet"
        place = (file.path.parent, run_id)
        if place in owners:
            yield f"holds run {run_id}, as does {owners[place]}; move one of them away"
        owners[place] = file.path


class _RowChecker:
    """Looks at the rows of one file, piece by piece, keeping only their keys."""

    def __init__(self, run_ids: tuple[str, ...]) -> None:
        self._run_ids = pa.array(run_ids, pa.string())
        self._statuses = pa.array([status.value for status in Status])
        self._timed = pa.array([status.value for status in Status if status.is_timed])
        self._keys: list[pa.Table] = []
        self._counts: dict[str, int] = {}

    def add(self, table: pa.Table) -> None:
        self._keys.append(table.select(list(ROW_KEY)))
        carries = pc.greater(pc.list_value_length(table["samples"]), 0)
        timed = pc.is_in(table["status"], self._timed)
        self._count("rows of other runs", pc.invert(pc.is_in(table["run_id"], self._run_ids)))
        self._count(
            "rows of an unknown status", pc.invert(pc.is_in(table["status"], self._statuses))
        )
        self._count("rows with samples but neither OK nor NOISY", pc.and_not(carries, timed))
        self._count("rows OK or NOISY without samples", pc.and_not(timed, carries))
        self._ids("workload_id", table, ("workload",), workload_id)
        self._ids("point_id", table, ("workload", "backend", "variant"), point_id)
        joined = table.append_column("joined", pc.binary_join(table["stack"], "\n"))
        self._ids("stack_id", joined, ("joined",), _stack_id_of_joined)

    def count_rows(self, hidden: frozenset[str]) -> int:
        """How many rows belong to none of the `hidden` runs."""
        hides = pa.array(sorted(hidden), pa.string())
        return sum(
            keys.num_rows - pc.sum(pc.is_in(keys["run_id"], hides)).as_py()
            for keys in self._keys
            if keys.num_rows
        )

    def findings(self) -> Iterator[str]:
        for what, count in self._counts.items():
            yield f"{count} {what}; move the file out of the folder and measure again"
        keys = pa.concat_tables(self._keys) if self._keys else None
        if keys is None or keys.num_rows == 0:
            return
        distinct = keys.group_by(list(ROW_KEY)).aggregate([]).num_rows
        if distinct != keys.num_rows:
            yield (
                f"{keys.num_rows - distinct} rows have the key of another row; "
                "move the file out of the folder and measure again"
            )

    def _count(self, what: str, flags: pa.ChunkedArray) -> None:
        count = pc.sum(flags).as_py() or 0
        if count:
            self._counts[what] = self._counts.get(what, 0) + count

    def _ids(
        self, name: str, table: pa.Table, parts: tuple[str, ...], identify: Callable[..., str]
    ) -> None:
        groups = table.group_by([name, *parts]).aggregate([([], "count_all")])
        wrong = sum(
            group["count_all"]
            for group in groups.to_pylist()
            if group[name] != identify(*(group[part] for part in parts))
        )
        if wrong:
            what = f"rows whose {name} is not that of their {' and '.join(parts)}"
            what = what.replace("joined", "stack")
            self._counts[what] = self._counts.get(what, 0) + wrong


def _stack_id_of_joined(joined: str) -> str:
    return stack_id(tuple(joined.split("\n"))) if joined else stack_id(())
