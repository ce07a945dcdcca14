"""The saved form of an advice, which the selector loads (`attnbench/selection/choices.py`)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import attnbench
from attnbench.choose.advice import Advice
from attnbench.choose.rank import Outcome
from attnbench.choose.tries import Choice
from attnbench.errors import UsageError
from attnbench.selection import config_of
from attnbench.selection.choices import SCHEMA, VERSION, Here, SavedChoices, layer_fields
from attnbench.upgrade.batches import BatchShare


def to_table(
    advice: Advice, model: str, shares: Sequence[BatchShare], now: datetime | None = None
) -> dict[str, Any]:
    """As JSON. Raises UsageError for an advice without an answer: nothing is saved then.

    Backends in order of time, each once, with the kernels that were fastest; only those measured
    over the winner's block size and layout, since a server has one.
    """
    scope = advice.scope
    if scope is None or advice.whole.winner is None:
        raise UsageError("--save: nothing was chosen, so nothing is saved; measure first")
    if advice.whole.verdict is Outcome.OPEN:
        raise UsageError("--save: the ranking is open, so nothing is saved; measure more first")
    best = advice.by_name[advice.whole.winner.name]
    names = _priorities(advice, best)
    layers = []
    for name, workload in advice.kinds.items():
        layers.append(
            {
                "kind": name,
                "layer": layer_fields(config_of(workload)),
                "block_size": best.block_size,
                "kv_cache_layout": best.kv_cache_layout,
                "priorities": [one.request for one in names],
            }
        )
    return {
        "schema": SCHEMA,
        "version": VERSION,
        "attnbench": attnbench.__version__,
        "made_at": (now or datetime.now(UTC)).isoformat(),
        "model": model,
        "traffic": [{"batch": one.text, "weight": one.weight} for one in shares],
        "verdict": str(advice.whole.verdict),
        "scope": {
            "device_class": scope.how.device_class,
            "device_kind": scope.device_kind,
            "compute_capability": scope.compute_capability,
            "driver_version": scope.how.driver_version,
            "timer": scope.how.timer,
            "l2_state": scope.how.l2_state,
            "execution": scope.how.execution,
            "versions": list(scope.versions),
            "measured_from": scope.measured_from.isoformat(),
            "measured_to": scope.measured_to.isoformat(),
            "expires_at": scope.expires_at.isoformat(),
        },
        "layers": layers,
    }


def save(advice: Advice, model: str, shares: Sequence[BatchShare], path: Path) -> None:
    """Write the table, whole or not at all. Raises UsageError."""
    text = json.dumps(to_table(advice, model, shares), indent=2) + "\n"
    if path.exists() and not path.is_file():
        # Written beside and moved there, it would take the place of a device or a pipe.
        raise UsageError(f"--save {path}: no regular file; name a new file, e.g. choices.json")
    beside = path.with_name(f".{path.name}.new")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        raise UsageError(
            f"--save {path}: cannot be written ({error.strerror}); name a file in a folder that is "
            "there"
        ) from error


def use_saved(path: Path, device_text: str = "") -> SavedChoices:
    """Load a table for this machine and put it before its platform's chain.

    From here on `attnbench.selection.select` and the `Attention` layer follow it. Raises as
    `load_choices`.
    """
    from attnbench.measure.environment import read_environment
    from attnbench.selection import resolve_device
    from attnbench.selection.choices import load_choices, use_choices

    found = read_environment(resolve_device(device_text))
    saved = load_choices(path, Here(found.device_class, found.driver_version, found.stack))
    use_choices(saved)
    return saved


def _priorities(advice: Advice, best: Choice) -> list[Choice]:
    """Each backend once, over the cache that the winner has."""
    found: dict[str, Choice] = {}
    for line in advice.whole.lines:
        choice = advice.by_name[line.name]
        if (choice.block_size, choice.kv_cache_layout) == (best.block_size, best.kv_cache_layout):
            found.setdefault(choice.backend, choice)
    return list(found.values())
