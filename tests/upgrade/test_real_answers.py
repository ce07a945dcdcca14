"""What the real releases choose, against what was recorded of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from attnbench.upgrade.cells import default_grid
from tests.upgrade.record import CAPABILITIES, FILE, VERSIONS, Answers, as_record, ask, prepared


def recorded() -> Answers:
    answers: Answers = json.loads(FILE.read_text(encoding="utf-8"))
    return answers


def test_the_record_covers_the_grid() -> None:
    found = recorded()
    assert list(found) == [cell.text for cell in default_grid()]
    for devices in found.values():
        assert tuple(devices) == CAPABILITIES
        assert all(len(backends) == len(VERSIONS) for backends in devices.values())


@pytest.mark.network
@pytest.mark.timeout(900)
def test_the_real_releases_still_answer_so_on_9_0(tmp_path: Path) -> None:
    answers = as_record(ask(prepared(tmp_path), ["9.0"]))
    assert answers == {cell: {"9.0": devices["9.0"]} for cell, devices in recorded().items()}
