"""A point that fails is tried once more in a fresh worker; failing twice, it is quarantined.

A row says of both tries how they ended. Later replicates of a quarantined point are not tried: it
has failed in two processes, and each further try costs up to a timeout. A backend of which several
points have failed twice for the same reason gets no second tries for that reason either.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from attnbench.errors import InfrastructureError
from attnbench.measure.executor import Executor
from attnbench.measure.plan import PlannedPoint
from attnbench.store.record import Measurement, Status

#: Ends that may be the worker's or the machine's fault.
_FAILURES = (Status.CRASH, Status.TIMEOUT, Status.OOM, Status.ERROR)

#: Points of a backend that must have failed twice with one reason before it is taken as known.
_KNOWN_AFTER = 3


class Quarantine:
    """The points of one sweep that failed, over all its rounds.

    Attributes:
        points: the points that failed twice, by id.
        broken: why no further point can be measured, once the machine itself has failed.
    """

    def __init__(self) -> None:
        self.points: dict[str, PlannedPoint] = {}
        self.broken: InfrastructureError | None = None
        self._ends: dict[str, Measurement] = {}
        self._known: Counter[tuple[str, str, str]] = Counter()

    def measure(self, planned: PlannedPoint, executor: Executor) -> list[Measurement]:
        """Rows of one planned point, whatever happens to it.

        Raises InfrastructureError if no worker could be had to try it. If the machine fails after
        a try, its row is returned and `broken` is set.
        """
        if (end := self._ends.get(planned.point_id)) is not None:
            first, *others = end.reasons
            reasons = (f"quarantined: {first}", *others)
            return [executor.row(planned, Status(end.status), *reasons)]
        rows = executor.measure(planned)
        first_try = rows[0]
        if first_try.status not in _FAILURES:
            self._guard(lambda: executor.look_after(rows))
            return rows
        if _is_refusal(first_try) or self._known[_failure(first_try)] >= _KNOWN_AFTER:
            if not _is_refusal(first_try):
                why = f"no second try: {_KNOWN_AFTER} points of {planned.backend} failed twice so"
                rows[0] = _remark(first_try, why)
            self._guard(lambda: executor.look_after(rows))
            return rows
        if not self._guard(executor.renew):
            return [_remark(first_try, "no second try: the machine failed")]
        rows = executor.measure(planned)
        rows[0] = _remark(rows[0], f"first try: {first_try.status}: {'; '.join(first_try.reasons)}")
        if rows[0].status in _FAILURES:
            self._known[_failure(rows[0])] += 1
            self._ends[planned.point_id] = rows[0]
            self.points[planned.point_id] = planned
        self._guard(lambda: executor.look_after(rows))
        return rows

    def _guard(self, action: Callable[[], None]) -> bool:
        try:
            action()
        except InfrastructureError as error:
            self.broken = error
        return self.broken is None


def _is_refusal(row: Measurement) -> bool:
    """An error that says that there is nothing to try."""
    return bool(row.reasons) and row.reasons[0].startswith("NotImplementedError")


def _failure(row: Measurement) -> tuple[str, str, str]:
    return row.backend, row.status, row.reasons[0] if row.reasons else ""


def _remark(row: Measurement, text: str) -> Measurement:
    return replace(row, reasons=(*row.reasons, text))
