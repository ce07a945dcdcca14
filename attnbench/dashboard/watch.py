"""What the pages show of the night watch beside the verdicts themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attnbench.history.acknowledge import Acknowledgement


@dataclass(frozen=True, kw_only=True)
class Watch:
    """Attributes:
    record: the gate's own record, as `history.self_record` gives it; None: no page of it.
    clocks: what each run did with the GPU's clock (`history.attribution.locked_clocks`).
    repository: a clone that knows the commits, so that a range of them is counted and named.
    accepted: the entries of the reviewed file (`history.acknowledge`).
    """

    record: Mapping[str, Any] | None = None
    clocks: Mapping[str, str] = field(default_factory=dict)
    repository: Path | None = None
    accepted: tuple[Acknowledgement, ...] = ()
