"""The page of choices: what it is made of, and what it does in a browser."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from attnbench.cli.main import app
from attnbench.dashboard import Answers, Pages, render
from attnbench.history.runs import runs_of
from attnbench.history.verdict import judge
from attnbench.store import ResultsFolder
from tests.dashboard.browsing import OpenSite, Reader, browses, exported, in_browser
from tests.dashboard.choices_store import CONTEXTS, REQUESTS, RUNS, SLOW_RUN
from tests.dashboard.reading import read_data
from tests.dashboard.test_site import Links
from tests.history.fake import HOSTILE, history, table_of


def test_the_pages_hold_what_is_stored_and_saved(choices_folder: Path, choices_site: Path) -> None:
    choices = read_data(choices_site, "choices")
    decode = next(one for one in choices["maps"] if one["phase"] == "decode")
    cells = {(one["requests"], one["tokens"]): one for one in decode["cells"]}
    assert {(r, 1024 * k) for r in REQUESTS for k in CONTEXTS} <= set(cells)
    # FlashInfer wins where 1.2 / requests is above 0.15, that is below 8, and there is work to do.
    assert cells[4, 65536]["winner"] == "FLASHINFER:FA3"
    assert cells[16, 65536]["winner"] == "FLASH_ATTN:FA3"
    (regret,) = choices["regret"]
    assert len(regret["runs"]) == RUNS + 1
    means = [sum(one["ratio"] for one in run["batches"]) for run in regret["runs"][:RUNS]]
    assert max(means) == means[SLOW_RUN]
    assert [one["name"] for one in choices["advice"]] == ["decode", "old"]
    answers = read_data(choices_site, "traffic")["answers"]
    saved = json.loads((choices_folder / "results" / "answers" / "day.json").read_text())
    assert [one["name"] for one in answers] == ["day", "day-attention"]
    assert answers[0]["made_up"]
    for told, kept in zip(answers[0]["backends"], saved["backends"], strict=True):
        assert told["numbers"]["itl_p99_ms"][0] == pytest.approx(kept["itl_p99_ms"]["value"])
        assert told["curves"]["ttft_ms"] == pytest.approx(kept["curves"]["ttft_ms"])
        assert [one["load"] for one in told["loads"]] == [0.5, 1, 2, 4]


def test_every_link_leads_to_a_file_and_nothing_is_loaded_from_elsewhere(
    choices_site: Path,
) -> None:
    for page in ("traffic", "choices", "index"):
        for link in Links((choices_site / f"{page}.html").read_text()).links:
            assert "//" not in link
            assert link == "data:," or (choices_site / link.partition("#")[0]).is_file()
    for file in [*choices_site.glob("*.html"), *choices_site.glob("data/*.js")]:
        assert "<img" not in file.read_text()


def test_without_anything_to_show_there_is_no_page_and_no_link(tmp_path: Path) -> None:
    table = table_of(history(runs=1))
    runs = runs_of(table)
    told: dict[str, Any] = {"maps": [{"cells": []}], "regret": []}
    answers = Answers(traffic=({"name": "x"},))
    render(table, runs, judge(table), tmp_path, choices=told, answers=answers)
    assert (tmp_path / "choices.html").exists()
    assert (tmp_path / "traffic.html").exists()
    # What an earlier rendering left goes; somebody's own file of another folder would not.
    (tmp_path / "data" / "mine.js").write_text("kept")
    render(table, runs, judge(table), tmp_path, choices={"maps": [], "regret": []})
    names = {file.name for file in [*tmp_path.glob("*.html"), *tmp_path.glob("data/*.js")]}
    assert not names & {"choices.html", "traffic.html", "choices.js", "traffic.js"}
    assert "mine.js" in names
    for file in tmp_path.glob("*.html"):
        assert "traffic" not in file.read_text()
        assert "choices" not in file.read_text()
    pages = Pages(pages=("overview",))
    render(table, runs, judge(table), tmp_path, pages=pages, choices=told, answers=answers)
    assert {file.name for file in tmp_path.glob("*.html")} >= {"index.html"}
    assert not (tmp_path / "choices.html").exists()


def test_measured_times_are_not_mixed_with_made_up_ones(tmp_path: Path) -> None:
    from tests.choose.fake import FA3, FLASHINFER, timed
    from tests.dashboard.choices_store import fill

    fill(tmp_path / "r", [timed(FA3, 1e-4), timed(FLASHINFER, 2e-4)])
    made_up = [
        timed(who, seconds, text, 1, timer="fake")
        for text in ("32q1s4k", "q1s1k", "q1s2k")
        for who, seconds in ((FA3, 3e-6), (FLASHINFER, 1e-6))
    ]
    fill(tmp_path / "r", made_up)
    words = ["dashboard", "--results", str(tmp_path / "r"), "--site", str(tmp_path / "site")]
    assert CliRunner().invoke(app, words, catch_exceptions=False).exit_code == 0
    choices = read_data(tmp_path / "site", "choices")
    assert [one["made_up"] for one in choices["maps"]] == [False]
    assert choices["maps"][0]["cells"][0]["winner"] == "FLASH_ATTN:FA3"
    assert [len(one["runs"]) for one in choices["regret"]] == [1]


class TestChoices:
    pytestmark = in_browser

    def test_the_map_says_winner_and_margin_in_words_and_patterns(
        self, choices_reader: Reader
    ) -> None:
        page = choices_reader.open("choices.html", "regret")
        assert choices_reader.texts("#map thead th") == ["Requests", "1k", "4k", "16k", "64k"]
        cell = page.locator("[data-cell='4x65536']")
        assert cell.inner_text().split("\n")[0] == "FLASHINFER:FA3"
        assert "%" in cell.inner_text()
        assert page.locator("#made-up").is_visible()
        mark = "getComputedStyle(document.querySelector('#map-frame'), '::after').content"
        assert "MADE UP" in page.evaluate(mark)
        page.get_by_role("button", name="prefill").click()
        tie = page.locator("[data-cell='1x2048']")
        assert "= tie of 2" in tie.inner_text()
        assert "repeating-linear-gradient" in tie.evaluate(
            "e => getComputedStyle(e).backgroundImage"
        )
        assert "slice=prefill-0" in page.url

    def test_lengths_of_one_batch_size_are_shown_on_demand(self, choices_reader: Reader) -> None:
        page = choices_reader.open("choices.html", "regret")
        assert "are not shown" in page.locator("#map-note").inner_text()
        page.check("#every")
        assert len(choices_reader.texts("#map thead th")) > 5
        page.reload()
        assert page.locator("#every").is_checked()

    def test_a_cell_opens_and_leads_to_its_series(self, choices_reader: Reader) -> None:
        page = choices_reader.open("choices.html", "regret")
        page.locator("[data-cell='1x1024']").click()
        assert "cell=1x1024" in page.url
        text = page.locator("#cell").inner_text()
        assert "FLEX_ATTENTION: INCORRECT" in text
        assert HOSTILE in text
        page.reload()
        page.locator("#cell").get_by_role("link", name="FLASHINFER:FA3").click()
        choices_reader.wait_for_chart("history")
        assert page.locator("#title").inner_text() == "FLASHINFER[FA3] q1s1k"

    def test_regret_over_commits_and_stacks(self, choices_reader: Reader) -> None:
        page = choices_reader.open("choices.html", "regret")
        assert len(choices_reader.texts("#regret .xtick text")) == RUNS + 1
        assert "FLASH_ATTN unasked" in page.locator("#regret-note").inner_text()
        names = choices_reader.texts("#regret .legendtext")
        assert names == ["mean of 19 batches", "mean of 21 batches", "worst batch"]
        page.get_by_role("button", name="Stacks").click()
        page.wait_for_function("document.querySelectorAll('#regret .xtick').length === 2")
        assert "vllm 0.22.1" in choices_reader.texts("#regret .xtick text")[0]
        page.locator("#regret-table button").first.click()
        assert page.locator("#batch").input_value().startswith("q1s64k")
        assert len(choices_reader.texts("#regret-table tbody tr")) == RUNS
        page.reload()
        choices_reader.wait_for_chart("regret")
        assert page.locator("#axis button[aria-pressed=true]").inner_text() == "Stacks"
        page.locator("#regret-table tbody a").first.click()
        page.wait_for_url(f"**/conditions.html#run={RUNS - 1}")

    def test_saved_advice_and_what_expired(self, choices_reader: Reader) -> None:
        page = choices_reader.open("choices.html", "regret")
        rows = choices_reader.texts("#advice tbody tr")
        assert len(rows) == 2
        assert "FLASHINFER:FA3" in rows[0]
        assert "--attention-backend FLASHINFER" in rows[0]
        assert "expired" in rows[1]
        assert "expired" not in rows[0]
        assert page.locator("img").count() == 0

    def test_tables_are_exported(self, choices_reader: Reader, choices_site: Path) -> None:
        page = choices_reader.open("choices.html", "regret")
        choices = read_data(choices_site, "choices")
        decode = next(one for one in choices["maps"] if one["phase"] == "decode")
        rows = exported(page, "#export-map")
        lines = [line for cell in decode["cells"] for line in cell["lines"]]
        assert [float(row["seconds"]) for row in rows] == [line["seconds"] for line in lines]
        assert {row["layer"] for row in rows} == {"llama-3-8b bf16"}
        crossings = exported(page, "#export-crossovers")
        assert [int(row["low"]) for row in crossings] == [o["low"] for o in decode["crossovers"]]
        batches = [b for run in choices["regret"][0]["runs"] for b in run["batches"]]
        regret = exported(page, "#export-regret")
        assert sorted(float(row["ratio"]) for row in regret) == sorted(b["ratio"] for b in batches)
        assert len(exported(page, "#export-advice")) == 2
        page.locator("[data-cell='1x1024']").click()
        refused = exported(page, "#export-excluded")
        assert [(int(row["requests"]), row["backend"], row["why"]) for row in refused] == [
            (cell["requests"], one["backend"], one["why"])
            for cell in decode["cells"]
            for one in cell["excluded"]
        ]
        assert any(HOSTILE in row["why"] for row in refused)

    def test_strange_addresses_do_nothing(self, choices_reader: Reader) -> None:
        page = choices_reader.open(
            "choices.html#where=x&slice=y&cell=z&batch=q&axis=constructor&%ff"
        )
        assert page.locator("[data-cell]").count() == 16
        assert page.locator("#cell").is_hidden()


@browses
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_needs_no_sideways_scrolling(
    opened: OpenSite, choices_site: Path, scheme: str
) -> None:
    choices_reader = opened(
        choices_site, viewport={"width": 360, "height": 740}, color_scheme=scheme
    )
    for address, chart in (("traffic.html", "loads"), ("choices.html#cell=4x16384", "regret")):
        page = choices_reader.open(address, chart)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        contrast = page.evaluate(CONTRAST)
        assert contrast >= 4.5, address


#: The least contrast of text on a cell of the map, by WCAG's formula; 21 where there is no map.
CONTRAST = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const light = (text) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = text; canvas.fillRect(0, 0, 1, 1);
    const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map((v) => v / 255)
      .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  return Math.min(21, ...[...document.querySelectorAll(".heat button")].map((node) => {
    const style = getComputedStyle(node);
    const [a, b] = [light(style.color), light(style.backgroundColor)].sort((x, y) => y - x);
    return (a + 0.05) / (b + 0.05);
  }));
}"""


def test_a_results_folder_needs_no_answers(tmp_path: Path) -> None:
    table = table_of(history(runs=1))
    with ResultsFolder(tmp_path / "r").open_run(_header(table)) as run:
        for one in history(runs=1):
            run.append(one)
    words = ["dashboard", "--results", str(tmp_path / "r"), "--site", str(tmp_path / "site")]
    outcome = CliRunner().invoke(app, words, catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.stderr
    assert not (tmp_path / "site" / "traffic.html").exists()
    assert (tmp_path / "site" / "choices.html").exists()  # three backends of a CPU were timed
    assert not any(one["made_up"] for one in read_data(tmp_path / "site", "choices")["maps"])


def _header(table: Any) -> Any:
    from attnbench.store.header import RunHeader

    (run,) = runs_of(table)
    return RunHeader(run_id=run.run_id, started_at=run.started_at)


@browses
def test_times_of_another_timer_or_gpu_are_another_line(opened: OpenSite, tmp_path: Path) -> None:
    from tests.choose.fake import FA3, FLASHINFER, timed
    from tests.dashboard.choices_store import fill

    ways = [
        {"timer": "event", "device_name": "NVIDIA H200"},
        {"timer": "event", "device_name": "NVIDIA H200"},
        {"timer": "cupti_span", "device_name": "NVIDIA H200"},
        {"timer": "cupti_span", "device_name": "NVIDIA H200 NVL"},
    ]
    for run, way in enumerate(ways):
        rows = [
            timed(who, seconds, f"{requests}q1s4k", run, **way)
            for requests in (4, 8)
            for who, seconds in ((FA3, 2e-4), (FLASHINFER, 1e-4))
        ]
        fill(tmp_path / "r", rows)
    words = ["dashboard", "--results", str(tmp_path / "r"), "--site", str(tmp_path / "site")]
    assert CliRunner().invoke(app, words, catch_exceptions=False).exit_code == 0
    choices_reader = opened(tmp_path / "site")
    page = choices_reader.open("choices.html", "regret")
    traces = page.evaluate(
        "document.getElementById('regret').data.filter((one) => one.name.startsWith('mean'))"
        ".map((one) => [one.name, one.customdata])"
    )
    assert [runs for _, runs in traces] == [[0, 1], [2], [3]]
    assert [name.partition(", ")[2] for name, _ in traces] == [
        "timer event, NVIDIA H200",
        "timer cupti_span, NVIDIA H200",
        "timer cupti_span, NVIDIA H200 NVL",
    ]
    page.get_by_role("button", name="Stacks").click()
    page.wait_for_function("document.querySelectorAll('#regret .xtick').length === 3")
    lines = exported(page, "#export-regret")
    assert {line["device_name"] for line in lines} == {"NVIDIA H200", "NVIDIA H200 NVL"}


@browses
def test_a_table_has_one_button_that_exports_it(opened: OpenSite, choices_site: Path) -> None:
    for name in ("choices", "traffic"):
        page = opened(choices_site).open(f"{name}.html")
        page.wait_for_timeout(300)
        assert page.locator("p.csv button").count() == 0, name
