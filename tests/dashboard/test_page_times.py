"""The benchmark of the pages measures what a reader waits for, and tells what went wrong."""

from __future__ import annotations

import runpy
import shutil
from pathlib import Path
from typing import Any

from tests.dashboard.browsing import in_browser

pytestmark = in_browser

opened = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "page_times.py"))["opened"]


def test_times_of_a_page_are_in_order_and_its_files_counted(browser: Any, site: Path) -> None:
    one = opened(browser, site, "index")
    assert one.chart_s is not None
    assert 0 < one.first_paint_s <= one.readable_s < one.chart_s
    assert one.has_plotly
    files = ["index.html", "data/index.js", "assets/style.css"]
    files += [f"assets/{name}.js" for name in ("common", "tables", "charts", "overview")]
    assert one.loaded_bytes == sum((site / name).stat().st_size for name in files)
    assert one.errors == []
    assert opened(browser, site, "matrix").chart_s is None


def test_an_error_of_a_page_is_told(browser: Any, site: Path, tmp_path: Path) -> None:
    shutil.copytree(site, tmp_path / "site")
    script = tmp_path / "site" / "assets" / "matrix.js"
    script.write_text(script.read_text(encoding="utf-8") + "\nnothing.like.it();\n")
    one = opened(browser, tmp_path / "site", "matrix")
    assert one.errors == ["nothing is not defined"]
    assert one.readable_s > 0
