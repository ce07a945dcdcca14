"""Who wins where and the default's regret, against times that say it by themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from attnbench.choose.maps import choices_of
from attnbench.store.record import Measurement
from tests.choose.fake import FA3, FLASHINFER, FLEX, TRITON, ended, timed, tries


def found(*groups: Sequence[Measurement], **more: Any) -> dict[str, Any]:
    return choices_of(tries(*groups), **more)


def cells(one: dict[str, Any]) -> dict[tuple[int, int], dict[str, Any]]:
    return {(cell["requests"], cell["tokens"]): cell for cell in one["cells"]}


def test_each_cell_has_its_winner_margin_and_tie_class() -> None:
    told = found(
        timed(FA3, 1e-4, "q1s1k"), timed(FLASHINFER, 1.5e-4, "q1s1k"),
        timed(FA3, 3e-4, "q1s4k"), timed(FLASHINFER, 2e-4, "q1s4k"),
        timed(FA3, 4e-4, "8q1s4k"), timed(FLASHINFER, 4.002e-4, "8q1s4k"),
        timed(TRITON, 8e-4, "8q1s4k"),
        timed(FA3, 4e-4, "8q1s1k"), timed(FLASHINFER, [4.2e-4], "8q1s1k"),
    )  # fmt: skip
    (one,) = told["maps"]
    assert (one["device"], one["layer"], one["phase"]) == (
        "nvidia-h200",
        "llama-3-8b bf16",
        "decode",
    )
    assert not one["made_up"]
    grid = cells(one)
    assert set(grid) == {(1, 1024), (1, 4096), (8, 4096), (8, 1024)}
    assert grid[1, 1024]["verdict"] == "decided"
    assert grid[1, 1024]["winner"] == "FLASH_ATTN:FA3"
    assert grid[1, 1024]["margin"]["ratio"] == pytest.approx(1.5)
    assert grid[1, 4096]["winner"] == "FLASHINFER:FA3"
    assert grid[8, 4096]["verdict"] == "tie"
    assert grid[8, 4096]["tied"] == ["FLASH_ATTN:FA3", "FLASHINFER:FA3"]
    assert grid[8, 4096]["margin"]["ratio"] == pytest.approx(2.0)
    assert grid[8, 1024]["verdict"] == "open"
    (cross,) = one["crossovers"]
    assert (cross["axis"], cross["low"], cross["high"]) == ("context", 1023, 4095)
    assert (cross["below"], cross["above"]) == ("FLASH_ATTN:FA3", "FLASHINFER:FA3")


def test_devices_layers_and_phases_are_never_on_one_map() -> None:
    told = found(
        timed(FA3, 1e-4, "q1s1k"), timed(FLASHINFER, 2e-4, "q1s1k"),
        timed(FA3, 1e-4, "q2k"), timed(FLASHINFER, 2e-4, "q2k"),
        timed(FA3, 1e-4, "q2ks4k"), timed(FA3, 1e-4, "q1ks4k"),
        timed(FA3, 1e-4, "q1s1k dtype=fp16"),
        timed(FA3, 1e-4, "q1s1k", device_class="nvidia-h100"),
        timed(FA3, 1e-4, "q1s1k window=4096"),
        timed(FA3, 1e-4, "q1s1k_q2k"),  # no place: unequal requests
    )  # fmt: skip
    places = [(one["device"], one["layer"], one["phase"], one["query"]) for one in told["maps"]]
    assert sorted(places) == sorted(
        [
            ("nvidia-h100", "llama-3-8b bf16", "decode", 1),
            ("nvidia-h200", "llama-3-8b bf16", "decode", 1),
            ("nvidia-h200", "llama-3-8b bf16", "extend", 1024),
            ("nvidia-h200", "llama-3-8b bf16", "extend", 2048),
            ("nvidia-h200", "llama-3-8b bf16", "prefill", 0),
            ("nvidia-h200", "llama-3-8b fp16", "decode", 1),
            ("nvidia-h200", "llama-3-8b bf16 window=4096", "decode", 1),
        ]
    )
    prefill = next(one for one in told["maps"] if one["phase"] == "prefill")
    assert set(cells(prefill)) == {(1, 2048)}


def test_who_is_refused_or_wrong_does_not_win() -> None:
    told = found(
        timed(FLASHINFER, 2e-4, "q1s1k"),
        ended(FLEX, "INCORRECT", "q1s1k"),
        timed(("CUTLASS_MLA", ""), 1e-6, "q1s1k"),
    )
    (cell,) = told["maps"][0]["cells"]
    assert cell["winner"] == "FLASHINFER:FA3"
    assert cell["verdict"] == "only one"
    why = {one["backend"]: one["why"] for one in cell["excluded"]}
    assert why["FLEX_ATTENTION"] == "INCORRECT: made up"
    assert set(why) == {"FLEX_ATTENTION", "CUTLASS_MLA"}


def test_regret_of_the_default_run_by_run() -> None:
    """FLASH_ATTN with FA3 is what the followed release takes on an H200."""
    told = found(
        timed(FA3, 1e-4, "q1s1k", 0), timed(FLASHINFER, 2e-4, "q1s1k", 0),
        timed(FA3, 3e-4, "q1s1k", 1), timed(FLASHINFER, 2e-4, "q1s1k", 1),
        timed(FA3, 2.001e-4, "q1s4k", 1), timed(FLASHINFER, 2e-4, "q1s4k", 1),
        timed(TRITON, 3e-4, "q1s1k", 2), timed(FLASHINFER, 2e-4, "q1s1k", 2),
        timed(TRITON, 3e-4, "8q1s1k", 3),
        timed(("CUTLASS_MLA", ""), 1e-6, "q1s1k", 1),  # faster, and not valid for this layer
    )  # fmt: skip
    (one,) = told["regret"]
    assert one["default"] == "FLASH_ATTN"
    assert one["engine"].startswith("vLLM ")
    assert [run["run"][-1] for run in one["runs"]] == ["0", "1"]
    (first,) = one["runs"][0]["batches"]
    assert (first["ratio"], first["best"]) == (1.0, "FLASH_ATTN:FA3")
    second = {batch["batch"]: batch for batch in one["runs"][1]["batches"]}
    assert second["q1s1k"]["ratio"] == pytest.approx(1.5)
    assert second["q1s1k"]["standing"] == "slower"
    assert second["q1s1k"]["low"] < 1.5 < second["q1s1k"]["high"]
    assert (second["q1s4k"]["standing"], second["q1s4k"]["best"]) == ("tied", "FLASHINFER:FA3")


def test_only_the_newest_runs_and_a_batch_without_the_default_is_counted() -> None:
    told = found(
        *(
            timed(who, level, "q1s1k", run)
            for run in range(5)
            for who, level in ((FA3, 1e-4), (FLASHINFER, 2e-4))
        ),
        timed(FLASHINFER, 2e-4, "q1s4k", 4), timed(TRITON, 2e-4, "q1s4k", 4),
        runs=2,
    )  # fmt: skip
    (one,) = told["regret"]
    assert [run["run"][-1] for run in one["runs"]] == ["3", "4"]
    assert [run["not_measured"] for run in one["runs"]] == [0, 1]


def test_published_runs_stand_beside_themselves_only() -> None:
    mine = timed(FA3, 2e-4, "q1s1k", 0) + timed(FLASHINFER, 1e-4, "q1s1k", 0)
    theirs = timed(FA3, 1e-6, "q1s1k", 1)
    (one,) = found(mine, theirs, published=[theirs[0].run_id])["maps"]
    assert one["cells"][0]["winner"] == "FLASHINFER:FA3"
    assert not one["published"]
    (other,) = found(theirs, published=[theirs[0].run_id])["maps"]
    assert other["published"]


def test_an_unknown_device_or_no_time_is_no_map() -> None:
    rows = timed(FA3, 1e-4, "q1s1k", compute_capability="strange")
    assert found(rows) == {"maps": [], "regret": []}
    assert found(ended(FA3, "CRASH", "q1s1k")) == {"maps": [], "regret": []}
    assert found() == {"maps": [], "regret": []}
