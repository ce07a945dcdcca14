"""The files of a rendered site: complete, safe, small, and readable without a browser."""

from __future__ import annotations

import errno
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from attnbench.dashboard import Pages, render
from attnbench.dashboard.series_files import chunk_digits
from attnbench.errors import DataError, ExitCode, InfrastructureError
from attnbench.history.runs import runs_of
from attnbench.history.verdict import judge
from attnbench.store.ceilings import Ceilings
from tests.dashboard.reading import index_rows, read_data, series_id
from tests.history.fake import HOSTILE, SLOW, history, row, table_of


class Links(HTMLParser):
    """Every href and src of a page, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.text = ""
        self.tags: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [value for name, value in attrs if name in ("href", "src") and value]

    def handle_data(self, data: str) -> None:
        self.text += data


PAGES = ("index", "series", "backends", "matrix", "conditions")


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_local_file_or_a_known_series(site: Path, page: str) -> None:
    known = {r["id"] for r in index_rows(site)}
    for link in Links((site / f"{page}.html").read_text()).links:
        file, _, hash_part = link.partition("#")
        if link == "data:,":
            continue
        assert "//" not in link
        assert (site / file).is_file()
        if file == "series.html" and hash_part:
            assert hash_part in known


def test_overview_says_everything_before_a_script_runs(site: Path) -> None:
    page = Links((site / "index.html").read_text())
    text = re.sub(r"\s+", " ", page.text)
    assert "REGRESSION" in text
    assert "CPU_ATTN decode 16q1s4k llama-3-8b fp32" in text
    assert "+27.8 % [+25.6, +30.7]" in text
    assert "0ac0ffe" in text
    assert "OK → INCORRECT" in text
    assert "attnbench run 16q1s4k --shape llama-3-8b --backend CPU_ATTN --dtype fp32" in text
    assert HOSTILE in text
    assert "img" not in page.tags


def test_hostile_names_are_nowhere_as_markup(site: Path) -> None:
    for file in [*site.glob("*.html"), *site.glob("data/*.js")]:
        assert "<img" not in file.read_text()
        assert "<b>reason" not in file.read_text()


def test_every_series_has_its_data(site: Path) -> None:
    digits = read_data(site, "index")["chunk_digits"]
    for one in index_rows(site):
        chunk = read_data(site, f"series-{one['id'][:digits] or 'all'}")
        assert len(chunk[one["id"]]["values"]) == 12


def test_series_data_holds_the_stored_numbers(site: Path) -> None:
    slow = read_data(site, "series-all")[series_id(site, *SLOW)]
    run, status, replicates, confirmations, *_ = slow["values"][-1]
    assert (run, status, len(replicates), len(confirmations)) == (11, "OK", 3, 10)
    assert slow["verdict"]["verdict"] == "REGRESSION"
    assert slow["verdict"]["since"] == 10
    assert slow["key"]["timer"] == "wall"


def test_the_roofline_is_that_of_each_values_own_run(tmp_path: Path) -> None:
    table = table_of(history(runs=3))
    runs = runs_of(table)
    rates = {"fp32": 1e12, "bf16": 2e12}
    ceilings = {runs[-1].run_id: Ceilings(read_bytes_per_s=1e10, matmul_flops_per_s=rates)}
    render(table, runs, judge(table), tmp_path, ceilings=ceilings)
    rows = read_data(tmp_path, "backends")
    known = [one for one in rows if one["attainable_s"] is not None]
    assert known
    for one in known:
        rate = rates[one["group"].split()[1]]
        assert one["run"] == len(runs) - 1
        assert one["attainable_s"] == max(one["bytes_moved"] / 1e10, one["flops"] / rate)
    render(table, runs, judge(table), tmp_path)
    assert {one["attainable_s"] for one in read_data(tmp_path, "backends")} == {None}


def test_every_run_has_its_conditions(site: Path) -> None:
    runs = read_data(site, "runs")["runs"]
    assert [run["change"] != "" for run in runs] == [i == 7 for i in range(12)]
    for number in range(12):
        details = read_data(site, f"run-{number}")
        assert details["before"][0]["load_1m"] == 0.4
        assert len(details["status"]) == len(details["noise"])


def test_only_the_wanted_pages_are_written(tmp_path: Path) -> None:
    table = table_of(history(runs=3))
    pages = Pages("small", ("overview", "matrix"), 2)
    render(table, runs_of(table), judge(table), tmp_path, pages=pages)
    assert {f.name for f in tmp_path.glob("*.html")} == {"index.html", "matrix.html"}
    assert {f.stem for f in tmp_path.glob("data/*.js")} == {"index", "runs", "matrix"}
    overview = (tmp_path / "index.html").read_text()
    assert "series.html" not in overview
    assert "<title>Overview · small</title>" in overview
    assert "No matrix is stored yet" in (tmp_path / "matrix.html").read_text()


def test_rendering_again_replaces_our_files_and_no_others(tmp_path: Path) -> None:
    table = table_of(history(runs=5))
    render(table, runs_of(table), judge(table), tmp_path)
    (tmp_path / "data" / "mine.js").write_text("kept")
    (tmp_path / "notes.txt").write_text("kept")
    fewer = table_of(history(runs=2))
    render(fewer, runs_of(fewer), judge(fewer), tmp_path)
    names = {f.name for f in (tmp_path / "data").iterdir()}
    assert "run-1.js" in names
    assert "run-4.js" not in names
    assert "mine.js" in names
    assert (tmp_path / "notes.txt").exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    table = table_of(history(runs=1))
    with pytest.raises(DataError, match="give another --site"):
        render(table, runs_of(table), judge(table), tmp_path / "file" / "site")


def test_a_full_disk_is_the_machines_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    table = table_of(history(runs=1))
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(InfrastructureError, match="free some space there") as caught:
        render(table, runs_of(table), judge(table), tmp_path)
    assert caught.value.exit_code is ExitCode.INCOMPLETE


def test_the_summary_lies_beside_the_index(tmp_path: Path) -> None:
    table = table_of(history(runs=1))
    render(table, runs_of(table), judge(table), tmp_path, summary="### night · ok\n")
    assert (tmp_path / "summary.md").read_text(encoding="utf-8") == "### night · ok\n"
    assert not list(tmp_path.glob(".*"))


def test_overview_lists_a_first_nights_wrong_output(tmp_path: Path) -> None:
    table = table_of([row(0, status="INCORRECT", reasons=("max error 0.3 in request 2",))])
    render(table, runs_of(table), judge(table), tmp_path)
    text = Links((tmp_path / "index.html").read_text()).text
    assert "max error 0.3 in request 2" in text
    assert "exit code 4" in text


def test_overview_of_three_thousand_series_is_below_one_megabyte(tmp_path: Path) -> None:
    rows = [
        row(run, backend=backend, workload=f"{n}q1s{k}k dtype=fp32")
        for run in range(2)
        for backend in ("CPU_ATTN", "TORCH_SDPA", "FLEX_ATTENTION")
        for n in range(1, 101)
        for k in range(1, 11)
    ]
    table = table_of(rows)
    pages = Pages(pages=("overview", "series"))
    render(table, runs_of(table), judge(table), tmp_path, pages=pages)
    loaded = ["index.html", "data/index.js", "assets/style.css"]
    loaded += [f"assets/{name}.js" for name in ("common", "charts", "overview")]
    assert sum((tmp_path / name).stat().st_size for name in loaded) < 1_000_000
    assert max(f.stat().st_size for f in tmp_path.glob("data/series-*.js")) < 200_000


def test_chunks_grow_in_number_not_in_size() -> None:
    assert [chunk_digits(n) for n in (1, 40, 41, 640, 641, 100_000)] == [0, 0, 1, 1, 2, 3]
