"""Conditions of a night, and support over time."""

from __future__ import annotations

from pathlib import Path

from tests.dashboard.browsing import Reader, browses, exported
from tests.dashboard.reading import read_data
from tests.dashboard.watch_history import (
    LOST_AT,
    RUNS,
)
from tests.history.fake import HOSTILE


@browses
def test_the_rows_of_a_night_can_be_sorted_searched_and_taken_away(reader: Reader) -> None:
    page = reader.open("conditions.html#run=7", "noise")
    told = [" ".join(text.split()) for text in reader.texts("#extremes tbody tr")]
    assert any(text.startswith("load 1m0.400 processes") for text in told)
    assert page.locator("#machine").inner_text().count("free") == 1
    page.fill("#search", "throttled")
    assert page.locator("#num-rows").inner_text().startswith("2 of ")
    page.fill("#search", "")
    page.get_by_role("button", name="Median").click()
    shown = page.evaluate("matchingRows().map((i) => details.median_s[i])")
    timed = [one for one in shown if one is not None]
    assert timed == sorted(timed, reverse=True)
    assert shown[: len(timed)] == timed
    page.fill("#search", "torch_sdpa 16q1s4k")
    lines = exported(page, "#export-rows")
    assert [line["replicate"] for line in lines] != []
    assert {line["backend"] for line in lines} == {"TORCH_SDPA"}
    assert {line["before_load_1m"] for line in lines} == {"0.4"}


def test_support_holds_every_cell_in_stretches(watched: Path) -> None:
    cells = {(c["backend"], c["group"]): c for c in read_data(watched, "support")["cells"]}
    plain = cells["FLEX_ATTENTION", "llama-3-8b fp32"]
    assert [stretch[:5] for stretch in plain["stretches"]] == [[0, RUNS - 1, "OK", 4, 4]]
    lost = cells["FLEX_ATTENTION", "llama-3-8b fp32 softcap=30"]["stretches"]
    assert [stretch[:3] for stretch in lost] == [
        [0, LOST_AT - 1, "OK"],
        [LOST_AT, RUNS - 1, "UNSUPPORTED"],
    ]
    assert lost[1][5] == [f"softcap is not supported {HOSTILE}"]
    assert lost[0][5] == []


@browses
def test_support_tells_what_changed_and_why(reader: Reader) -> None:
    page = reader.open("support.html")
    assert page.locator("#changes tbody tr").count() == 1
    change = " ".join(page.locator("#changes tbody tr").inner_text().split())
    assert "✓ OK → – UNSUPPORTED" in change
    assert f"softcap is not supported {HOSTILE}" in change
    page.check("#changed")
    assert reader.texts("#now tbody button") == ["– UNSUPPORTED •"]
    page.locator("#now tbody button").click()
    assert page.locator("#cell-list li").count() == 2
    page.reload()
    assert page.locator("#changed").is_checked()
    assert page.locator("#cell-line span").count() == 2
    page.uncheck("#changed")
    page.fill("#search", "no such cell")
    assert "take a word" in page.locator("#more-cells").inner_text()
    page.fill("#search", "flex softcap")
    (line,) = exported(page, "#export-changes")
    assert (line["before"], line["after"]) == ("OK", "UNSUPPORTED")
