"""The header of a run: who it is and what it was asked to do, so that it can be resumed."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from attnbench.errors import UsageError
from attnbench.store.ceilings import Ceilings

#: The version of the stored columns. `schema.HISTORY` says what each version changed.
SCHEMA_VERSION = 2

_RUN_ID = re.compile(r"\d{8}T\d{6}Z-[0-9a-f]{6}")


def new_run_id(now: datetime | None = None) -> str:
    """An id that sorts by time and is unique: `20261121T015500Z-abc123` (UTC, 24 random bits)."""
    moment = (now or datetime.now(UTC)).astimezone(UTC)
    return f"{moment:%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"


def check_run_id(run_id: str) -> str:
    """`run_id` itself if it has the form of one; it becomes a file name. Raises UsageError."""
    if not _RUN_ID.fullmatch(run_id):
        raise UsageError(
            f"{run_id!r} is not a run id; write one like 20261121T015500Z-abc123, "
            "as `attnbench results query 'SELECT DISTINCT run_id FROM results'` lists them"
        )
    return run_id


def month_of(run_id: str) -> str:
    """`2026-11` of `20261121T015500Z-abc123`."""
    return f"{run_id[:4]}-{run_id[4:6]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunHeader:
    """The first line of a journal, kept in the sealed file's metadata.

    `argv` is what was typed, `spec` the sweep as text, `plan` one JSON object per planned point in
    the planner's own words, `options` how it is measured,
    `environment` on and of what: enough for `--resume` to go on with
    nothing retyped. `ceilings` are the rates the device reached when the run was started; None in
    runs of versions that did not measure them.
    """

    run_id: str
    started_at: datetime
    argv: tuple[str, ...] = ()
    spec: str = ""
    plan: tuple[Mapping[str, Any], ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    ceilings: Ceilings | None = None
    schema_version: int = SCHEMA_VERSION

    @classmethod
    def new(
        cls,
        argv: tuple[str, ...] = (),
        spec: str = "",
        plan: tuple[Mapping[str, Any], ...] = (),
        options: Mapping[str, Any] | None = None,
        environment: Mapping[str, str] | None = None,
        ceilings: Ceilings | None = None,
        now: datetime | None = None,
    ) -> RunHeader:
        """A header with a fresh run id, started now."""
        moment = now or datetime.now(UTC)
        return cls(
            run_id=new_run_id(moment),
            started_at=moment,
            argv=argv,
            spec=spec,
            plan=plan,
            options=options or {},
            environment=environment or {},
            ceilings=ceilings,
        )

    def to_json(self) -> dict[str, Any]:
        value: dict[str, Any] = {
            "run_id": self.run_id,
            "schema_version": self.schema_version,
            "started_at": self.started_at.astimezone(UTC).isoformat(),
            "argv": list(self.argv),
            "spec": self.spec,
            "plan": [dict(point) for point in self.plan],
            "options": dict(self.options),
            "environment": dict(self.environment),
        }
        if self.ceilings is not None:
            value["ceilings"] = self.ceilings.to_json()
        return value

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> RunHeader:
        return cls(
            run_id=value["run_id"],
            schema_version=value["schema_version"],
            started_at=datetime.fromisoformat(value["started_at"]),
            argv=tuple(value.get("argv", ())),
            spec=value.get("spec", ""),
            plan=tuple(value.get("plan", ())),
            options=value.get("options", {}),
            environment=value.get("environment", {}),
            ceilings=Ceilings.from_json(value["ceilings"]) if value.get("ceilings") else None,
        )

    @classmethod
    def salvaged(cls, run_id: str) -> RunHeader:
        """What can be said of a run whose header line is corrupt: its id tells when it began."""
        started = datetime.strptime(run_id[:16], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
        return cls(run_id=run_id, started_at=started)
