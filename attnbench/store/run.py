"""A run being written: rows go to its journal one by one, and at the end into a sealed file."""

from __future__ import annotations

import math
from collections.abc import Set as AbstractSet
from dataclasses import fields, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from attnbench.store.header import RunHeader
from attnbench.store.journal import Journal, read_journal
from attnbench.store.layout import Layout
from attnbench.store.record import Measurement, Status
from attnbench.store.schema import rows_to_table
from attnbench.store.sealing import SealedRun, seal_journal

_STATUSES = frozenset(Status)


class Run:
    """Made by `ResultsFolder.open_run`. As a context manager it is sealed at a normal end.

    After an exception it is only closed: its rows are on disk and are read, and the next start
    seals them. `orphans` are the killed runs that were sealed when this one was opened.
    """

    def __init__(
        self,
        layout: Layout,
        header: RunHeader,
        journal: Journal,
        done: set[tuple[str, ...]],
        orphans: tuple[SealedRun, ...] = (),
    ) -> None:
        self.header = header
        self.orphans = orphans
        self._layout = layout
        self._journal = journal
        self._done = done
        self._was_removed = False

    @property
    def run_id(self) -> str:
        return self.header.run_id

    @property
    def done(self) -> AbstractSet[tuple[str, ...]]:
        """Keys (`Measurement.key`) of the rows stored in this run, earlier starts included."""
        return self._done

    @property
    def was_removed(self) -> bool:
        """The results folder was removed while the run was written, and made again for it."""
        return self._was_removed

    def append(self, row: Measurement) -> None:
        """Store one row; it is on disk when this returns.

        Raises ValueError or TypeError for a row that must not be stored (another run's, a key that
        is stored already, samples without OK or NOISY or that are no times, a value of a wrong
        kind), InfrastructureError for a full disk.
        """
        if row.run_id != self.run_id:
            raise ValueError(f"a row of run {row.run_id} does not belong to run {self.run_id}")
        if row.key in self._done:
            raise ValueError(f"run {self.run_id} has the row {row.key[1:]} already")
        if row.status not in _STATUSES:
            raise ValueError(f"unknown status {row.status!r}; known: {', '.join(Status)}")
        if Status(row.status).is_timed != bool(row.samples):
            raise ValueError(
                f"a row of status {row.status} with {len(row.samples)} samples: OK and NOISY "
                "carry samples, nothing else does"
            )
        if not all(math.isfinite(sample) and sample > 0 for sample in row.samples):
            raise ValueError("samples are seconds above zero, and one of this row is not")
        row = _printable(row)
        rows_to_table([row])  # what cannot be sealed later must not enter the journal now
        self._keep_in_place()
        self._journal.append(row)
        self._done.add(row.key)

    def seal(self) -> Path:
        """Turn the journal into `runs/<run id>.parquet` and remove it; gives the path.

        A run that was resumed is merged with its earlier rows. Raises InfrastructureError for a
        full disk: the journal is kept then.
        """
        self._keep_in_place()
        with self._layout.locked(exclusive=True):
            sealed = seal_journal(self._layout, read_journal(self._journal.path))
        self._journal.close()
        return sealed.path

    def _keep_in_place(self) -> None:
        """Hours of measuring must not go into a file that nobody can open any more."""
        if self._journal.is_in_place:
            return
        self._layout.create()
        with self._layout.locked(exclusive=True):
            self._journal.put_back()
        self._was_removed = True

    def close(self) -> None:
        """Stop writing without sealing; the next start seals it."""
        self._journal.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None and self._journal.is_open:
            self.seal()
        self.close()


def _printable(row: Measurement) -> Measurement:
    """`row` with every text one that UTF-8 can hold: a library's message may have lone bytes."""
    changes: dict[str, Any] = {}
    for column in fields(row):
        value = getattr(row, column.name)
        if isinstance(value, str):
            cleaned: Any = _clean(value)
        elif isinstance(value, tuple):
            cleaned = tuple(_clean(v) if isinstance(v, str) else v for v in value)
        else:
            continue
        if cleaned != value:
            changes[column.name] = cleaned
    return replace(row, **changes) if changes else row


def _clean(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "backslashreplace").decode()
    return text
