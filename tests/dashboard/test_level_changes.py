"""Change points: what the pages hold, what is kept of them, and how a series shows them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from attnbench.dashboard.level_changes import FILE_NAME, level_changes, restless
from attnbench.history.change_points import change_points_of_panel
from attnbench.history.panel import Panel
from attnbench.store import ResultsFolder, RunHeader
from tests.dashboard.browsing import Reader, browses
from tests.dashboard.reading import read_data, series_id
from tests.dashboard.watch_history import (
    DRIVER_AT,
    RUNS,
    STEP_AT,
    STEPPED,
    watched_rows,
)
from tests.history.fake import row


def test_the_series_data_has_its_change_points(watched: Path, watched_table: pa.Table) -> None:
    own_id = series_id(watched, *STEPPED)
    digits = read_data(watched, "index")["chunk_digits"]
    changes = read_data(watched, f"series-{own_id[:digits] or 'all'}")[own_id]["changes"]
    assert [change[0] for change in changes] == [STEP_AT, DRIVER_AT]
    assert changes[0][3] == pytest.approx(1.08, rel=0.01)
    assert changes[1][3] == pytest.approx(0.93, rel=0.01)
    for first, low, high, *_ in changes:
        assert low < first <= high


def test_kept_change_points_are_those_found_from_nothing(tmp_path: Path) -> None:
    folder = ResultsFolder(tmp_path / "results")
    rows = watched_rows()
    runs = list(dict.fromkeys(one.run_id for one in rows))

    def store(run_ids: list[str]) -> Panel:
        for run_id in run_ids:
            own = [one for one in rows if one.run_id == run_id]
            with folder.open_run(RunHeader(run_id=run_id, started_at=own[0].started_at)) as opened:
                for one in own:
                    opened.append(one)
        return Panel.of(folder)

    site = tmp_path / "data"
    site.mkdir()
    first = store(runs[:34])
    level_changes(first, site)
    kept = json.loads((site / FILE_NAME).read_text())
    assert kept["runs"] == 34
    # A series that nothing shakes keeps what was found; a mark in the file shows that it was kept.
    marked = {name: [[0, 0, 0, 1.0, 1.0]] for name in kept["changes"]}
    (site / FILE_NAME).write_text(json.dumps({**kept, "changes": marked}))
    panel = store(runs[34:])
    changes = level_changes(panel, site)
    fresh = change_points_of_panel(panel.log_s)
    again = [name for name, found in changes.items() if found != marked.get(name)]
    assert 0 < len(again) < len(changes)
    for index, name in enumerate(panel.ids):
        if name in again:
            assert [one[0] for one in changes[name]] == [one.index for one in fresh[index]]
    moved = {
        name
        for name, found in zip(panel.ids, fresh, strict=True)
        if any(one.index >= DRIVER_AT for one in found)
    }
    assert len(moved) > 8
    assert moved <= set(again)
    # Another history: nothing is believed.
    (site / FILE_NAME).write_text(json.dumps({**kept, "stamp": "0", "changes": marked}))
    anew = level_changes(panel, site)
    assert [[one[0] for one in anew[name]] for name in panel.ids] == [
        [one.index for one in found] for found in fresh
    ]


def test_a_step_makes_a_series_restless_and_noise_seldom_does() -> None:
    rng = np.random.default_rng(5)
    noise = rng.normal(0, 0.005, (2000, 60))
    assert restless(noise).mean() < 0.05
    noise[:, -4:] += 0.03
    assert restless(noise).mean() > 0.95
    assert not restless(np.full((1, 60), np.nan)).any()
    assert not restless(np.zeros((3, 2))).any()


@browses
def test_levels_changes_and_marks_are_drawn_and_told(reader: Reader) -> None:
    own_id = series_id(reader.site, *STEPPED)
    page = reader.open(f"series.html#{own_id}&x=run", "history")
    texts = reader.texts("#history .annotation-text")
    assert [text for text in texts if text.startswith("▲ +7.")]
    assert [text for text in texts if text.startswith("▼ −6.")]
    assert [text for text in texts if "driver 580.1 → 590.2" in text]
    told = [" ".join(text.split()) for text in reader.texts("#changes tbody tr")]
    assert any("▼ level −6." in text and "driver 580.1 → 590.2" in text for text in told)
    assert any("environment" in text and "clocks free → locked" in text for text in told)
    # The band of a level holds nine tenths of its runs' medians.
    shapes = page.evaluate("document.getElementById('history').layout.shapes")
    bands = [one for one in shapes if one["type"] == "rect" and one.get("yref") != "paper"]
    assert len(bands) == 3
    data = read_data(reader.site, "values-all")[own_id]
    data += read_data(reader.site, "series-all")[own_id]["values"]
    medians = np.array([np.median(value[2]) for value in data[:STEP_AT]]) * 1e6
    low, high = np.quantile(medians, (0.05, 0.95))
    assert (bands[0]["y0"], bands[0]["y1"]) == pytest.approx((low, high), rel=1e-5)
    page.locator("#changes tbody a").first.click()
    page.wait_for_url(f"**/conditions.html#run={DRIVER_AT}")


@browses
def test_the_range_that_is_looked_at_is_in_the_address(reader: Reader) -> None:
    page = reader.open(f"series.html#{series_id(reader.site, *STEPPED)}&x=run", "history")
    page.get_by_role("button", name="30").click()
    assert f"&r={row(RUNS - 30).run_id}.." in page.url
    shown = "document.getElementById('history').layout.xaxis.range"
    assert page.evaluate(shown) == [RUNS - 30.5, RUNS - 0.5]
    # As a drag over the chart does.
    page.evaluate("Plotly.relayout('history', {'xaxis.range[0]': 21.6, 'xaxis.range[1]': 28.2})")
    page.wait_for_function(f"{shown}[0] === 21.5")
    assert page.evaluate(shown) == [21.5, 28.5]
    assert f"&r={row(22).run_id}..{row(28).run_id}" in page.url
    page.reload()
    reader.wait_for_chart("history")
    assert page.evaluate(shown) == [21.5, 28.5]
    page.get_by_role("button", name="All").click()
    assert "&r=" not in page.url


@browses
def test_a_series_may_be_named_in_the_address(reader: Reader) -> None:
    page = reader.open("series.html#backend=CPU_ATTN&workload=16q1s4k%20dtype%3Dfp32", "history")
    assert page.locator("#title").inner_text() == "CPU_ATTN 16q1s4k dtype=fp32"
