"""A night whose slow-down is accepted: from the alarm to the entry to the next alarm."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.cli.conftest import Attnbench

NIGHT = ("nightly", "--timer", "fake", "--backend", "TORCH_SDPA", "--replicates", "1")


@pytest.mark.slow
def test_an_accepted_slow_down_passes_until_it_is_worse(
    attnbench: Attnbench, project: Path
) -> None:
    assert attnbench(*NIGHT).returncode == 0
    slow = attnbench(*NIGHT, "--fake-slowdown", "TORCH_SDPA=1.3")
    assert slow.returncode == 1, slow.stdout + slow.stderr
    soon = (datetime.now(UTC).date() + timedelta(days=9)).isoformat()
    words = ("--reason", "known", "--by", "me", "--expires", soon)
    added = attnbench("acknowledge", "TORCH_SDPA *", *words)
    assert added.returncode == 0, added.stderr
    assert "covers 2 alarm(s)" in added.stderr

    again = attnbench(*NIGHT, "--fake-slowdown", "TORCH_SDPA=1.3")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "known" in again.stdout
    assert "accepted by me until " + soon in again.stdout
    worse = attnbench(*NIGHT, "--fake-slowdown", "TORCH_SDPA=1.6")
    assert worse.returncode == 1, worse.stdout + worse.stderr
    assert "+60.0 %, and +30." in worse.stdout
    assert "acknowledged.toml, line 1" in worse.stdout


def test_a_wrong_file_costs_no_night(attnbench: Attnbench, project: Path) -> None:
    (project / "acknowledged.toml").write_text("[[known]]\nkind = 1\n", encoding="utf-8")
    done = attnbench(*NIGHT)
    assert done.returncode == 2
    assert "acknowledged.toml, line 2: kind = 1" in done.stderr
    assert not (project / "results").exists()
