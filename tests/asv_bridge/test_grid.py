"""The parameter lists every asv environment shares."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from attnbench.asv_bridge import grid as grid_module
from attnbench.asv_bridge.grid import (
    GRID_VARIABLE,
    Axes,
    Grid,
    backend_label,
    check_size,
    current_grid,
    grid_id,
    read_grid,
)
from attnbench.errors import UsageError

GRID = Grid(
    preset="smoke",
    device="cpu",
    results="/somewhere/measurements",
    options={"timer": "fake", "replicates": 2, "budget_s": 0.5},
    suites={"decode": Axes(("8q1s4k", "1q1s1k"), ("CPU_ATTN", "FLASH_ATTN:fa3"))},
)


@pytest.fixture(autouse=True)
def _outside_asv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ASV", raising=False)
    monkeypatch.delenv(GRID_VARIABLE, raising=False)


def test_file_round_trip(tmp_path: Path) -> None:
    GRID.save(tmp_path / "new" / "grid.json")
    assert read_grid(tmp_path / "new" / "grid.json") == GRID


def test_outside_asv_there_is_no_grid() -> None:
    assert current_grid() is None


def test_inside_asv_the_plug_in_must_have_made_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASV", "true")
    with pytest.raises(UsageError, match="start it as `attnbench asv run`"):
        current_grid()


def test_the_variable_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    GRID.save(tmp_path / "grid.json")
    monkeypatch.setenv(GRID_VARIABLE, str(tmp_path / "grid.json"))
    assert current_grid() == GRID


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 1, "preset": "smoke"}'])
def test_a_broken_file_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "grid.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"grid\.json.*attnbench asv run"):
        read_grid(path)


def test_another_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "grid.json"
    GRID.save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2}))
    with pytest.raises(UsageError, match="grid format 2 is not 1"):
        read_grid(path)


def test_an_unknown_suite_has_no_axes() -> None:
    assert GRID.axes("prefill") == Axes()


def test_a_thousand_combinations_and_no_more() -> None:
    check_size("decode", Axes(("w",) * 100, ("b",) * 10))
    with pytest.raises(UsageError, match=r"1001 asv combinations.*ATTNBENCH_PRESET=smoke"):
        check_size("decode", Axes(("w",) * 143, ("b",) * 7))


def test_the_grid_id_is_golden_and_follows_the_protocol(monkeypatch: pytest.MonkeyPatch) -> None:
    assert grid_id("decode") == "decode-4eb3d157c41cb060"
    assert grid_id("prefill") != grid_id("decode")
    monkeypatch.setattr(grid_module, "PROTOCOL_VERSION", 2)
    assert grid_id("decode") != "decode-4eb3d157c41cb060"


def test_backend_labels() -> None:
    assert backend_label("CPU_ATTN", "") == "CPU_ATTN"
    assert backend_label("FLASH_ATTN", "fa3") == "FLASH_ATTN:fa3"
