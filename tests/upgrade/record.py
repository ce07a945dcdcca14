"""Records what three real releases of vLLM choose, as tests/upgrade/recorded_answers.json.

Run it when the grid changes, or when an answer is meant to: `python -m tests.upgrade.record`. The
versions come from the cache, or the network. The file is a record to see drift by: the answers are
the releases' own, so a difference means that the probe or what it stands in for has changed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from attnbench.upgrade.cells import default_grid
from attnbench.upgrade.probe import VersionAnswer, probe_all
from attnbench.upgrade.probe_env import PreparedVersion, prepare
from attnbench.upgrade.tell import Silent
from attnbench.upgrade.versions import parse_source

FILE = Path(__file__).parent / "recorded_answers.json"
VERSIONS = ("0.22.1", "0.30.0", "0.33.0")
CAPABILITIES = ("7.5", "8.0", "8.9", "9.0", "10.0", "12.0")

Answers = dict[str, dict[str, list[str]]]
"""cell -> capability -> the backend of each of VERSIONS, "none" where every backend refuses."""


def ask(versions: Sequence[PreparedVersion], capabilities: Sequence[str]) -> list[VersionAnswer]:
    """Every cell of the grid, of each version on each device."""
    asked = [(version, one) for one in capabilities for version in versions]
    return probe_all(asked, default_grid())


def prepared(cache: Path | None = None) -> list[PreparedVersion]:
    """The three releases; ATTNBENCH_TEST_CACHE names a folder that keeps what came."""
    folder = os.environ.get("ATTNBENCH_TEST_CACHE")
    kept = Path(folder) if folder else cache
    return [prepare(parse_source(f"vllm=={one}"), Silent(), kept) for one in VERSIONS]


def as_record(answers: Sequence[VersionAnswer]) -> Answers:
    """Answers in the form of the file; of each device those of all versions, in their order."""
    found: Answers = {}
    for answer in answers:
        for text, one in answer.cells.items():
            untold = [why for why in one.not_evaluated if why.startswith("selection")]
            assert not untold, (answer.version, text, untold)
            backends = found.setdefault(text, {}).setdefault(answer.capability, [])
            backends.append(one.backend or "none")
    return found


def write(answers: Answers) -> None:
    """One line a cell, so that a difference reads well."""
    lines = [f"{json.dumps(cell)}: {json.dumps(backends)}" for cell, backends in answers.items()]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def main() -> None:
    answers = ask(prepared(), CAPABILITIES)
    for answer in answers:
        print(f"{answer.version} on {answer.capability}: {answer.duration_s:.1f} s")
    write(as_record(answers))


if __name__ == "__main__":
    main()
