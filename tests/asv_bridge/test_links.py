"""From our page of a series to asv's graph of it, and back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from attnbench.asv_bridge.asv_api import WEB_PAGE_ANCHOR
from attnbench.asv_bridge.links import graphs_of
from attnbench.asv_bridge.plugin import FOLDER, add_pages
from attnbench.dashboard import Pages, render
from attnbench.errors import UsageError
from attnbench.history.runs import runs_of
from attnbench.history.verdict import judge
from tests.dashboard.browsing import Reader, browses, launched
from tests.dashboard.reading import read_data, series_id
from tests.history.fake import HOSTILE, table_of, timed

WORKLOAD = "4q1s4k dtype=fp32"


def index(**more: Any) -> dict[str, Any]:
    axes = {
        "param_names": ["workload", "backend"],
        "params": [[repr(WORKLOAD), repr("8q1s4k")], [repr("CPU_ATTN"), repr("FLASH_ATTN:fa3")]],
    }
    rollup = {"param_names": ["phase", "backend"], "params": [["'decode'"], ["'CPU_ATTN'"]]}
    return {
        "benchmarks": {
            "nightly.decode.attention.wall_hot_eager.points": axes,
            "nightly.decode.attention.graph_hot_eager.points": axes,
            "nightly.decode.attention.wall_hot_eager.rollup": rollup,
            "decode.Decode.track_attention": axes,
            **more,
        }
    }


@pytest.fixture
def html(tmp_path: Path) -> Path:
    """asv's site, as far as links go, with our pages in it."""
    table = table_of(
        [
            *timed([1e-3, 1e-3], workload=WORKLOAD),
            *timed([1e-3], workload="8q1s4k", backend="FLASH_ATTN", variant="fa3"),
        ]
    )
    pages = Pages(pages=("overview", "series"))
    render(table, runs_of(table), judge(table), tmp_path / "site", pages=pages)
    folder = tmp_path / "html"
    folder.mkdir()
    head = '<html><head><meta charset="utf-8"><link rel="icon" href="data:,"></head><body><ul>'
    (folder / "index.html").write_text(f"{head}{WEB_PAGE_ANCHOR}</li></ul></body></html>")
    (folder / "index.json").write_text(json.dumps(index()))
    return folder


def test_only_graphs_of_a_workload_and_a_backend_are_named(html: Path) -> None:
    add_pages(html.parent / "site", html)
    named = read_data(html / FOLDER, "asv")["graphs"]
    assert sorted(named) == [
        "decode.Decode.track_attention",
        "nightly.decode.attention.graph_hot_eager.points",
        "nightly.decode.attention.wall_hot_eager.points",
    ]
    assert read_data(html.parent / "site", "asv") is None


def test_another_index_is_refused(html: Path) -> None:
    for text in ("{", "[]", '{"benchmarks": {"a": {}}}', '{"benchmarks": 3}'):
        (html / "index.json").write_text(text)
        with pytest.raises(UsageError, match="not an index of asv's"):
            graphs_of(html)
    (html / "index.json").unlink()
    assert graphs_of(html) == {}


def test_hostile_names_are_no_markup(html: Path) -> None:
    axes = {"param_names": ["workload", "backend"], "params": [[repr(WORKLOAD)], ["'CPU_ATTN'"]]}
    (html / "index.json").write_text(json.dumps(index(**{HOSTILE: axes})))
    add_pages(html.parent / "site", html)
    assert "<img" not in (html / FOLDER / "data" / "asv.js").read_text()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launched() as started:
        yield started


@browses
@pytest.mark.parametrize(
    ("backend", "workload", "label"),
    [("CPU_ATTN", WORKLOAD, "CPU_ATTN"), ("FLASH_ATTN [fa3]", "8q1s4k", "FLASH_ATTN:fa3")],
)
def test_there_and_back(browser: Any, html: Path, backend: str, workload: str, label: str) -> None:
    add_pages(html.parent / "site", html)
    reader = Reader(browser, html)
    own = series_id(html / FOLDER, backend, workload)
    page = reader.open(f"{FOLDER}/series.html#{own}", "history")
    names = reader.texts("#asv a")
    assert names == [
        "nightly.decode.attention.wall_hot_eager.points",
        "decode.Decode.track_attention",
    ]
    page.locator("#asv a").first.click()
    page.wait_for_url("**/index.html#nightly.decode*")
    # As asv writes it: the quotes are of Python.
    assert f"p-backend='{label}'".replace("'", "%27") in page.url.replace("'", "%27").replace(
        "%3A", ":"
    )
    link = page.get_by_role("link", name="this series in attnbench")
    link.click()
    page.wait_for_selector("#one:not([hidden])")
    assert page.locator("#title").inner_text().endswith(workload)
    page.goto(f"file://{html}/index.html#nightly.decode.attention.wall_hot_eager.rollup")
    page.get_by_role("link", name="attnbench pages").click()
    page.wait_for_url(f"**/{FOLDER}/index.html")
    assert reader.problems == []
    reader.page.close()
