"""How long pages take in a browser, opened from disk.

    python benchmarks/page_times.py SITE [--repeat N] [--page NAME ...]

SITE is a folder that `attnbench dashboard` wrote. Every page is opened in headless Chromium, each
time in a browser that has kept nothing, and the least of N times is printed with what it loaded.
*Readable*: the page's own text or its first table's rows are on the screen. *Chart*: the first
chart is drawn, for somebody who goes there as soon as the page is readable. An exit code of 1 says
that a page told an error.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

CHROMIUM = Path("/usr/bin/chromium")
PLOTLY = "plotly.min.js"

#: What is there when a page can be read; its first chart, where it has one.
READABLE = {
    "index": "#series-table tbody tr",
    "series": "#values tbody tr",
    "compare": "#points tbody tr",
    "backends": "#sides-table tbody tr",
    "choices": "#map tbody tr",
    "traffic": "#numbers tbody tr",
    "matrix": "#grid tbody tr, main > p:not(.quiet)",
    "support": "#now tbody tr",
    "conditions": "#rows tbody tr",
    "gate": "main tbody tr",
}
CHARTS = {
    "index": "changes",
    "series": "history",
    "compare": "ratios",
    "backends": "sides",
    "choices": "regret",
    "traffic": "curves",
    "conditions": "during",
    "gate": "power",
}

#: Looks once a frame. What a frame finds is on the screen when the next one begins.
WATCH = """(() => {
  const told = window.pageTimes = { readable: null, chart: null };
  const [rows, chart] = %s;
  const seen = (node) => node && node.checkVisibility() && node.textContent.trim() !== "";
  let isFound = false;
  const look = () => {
    if (isFound) {
      told.readable = performance.now();
      if (!chart) return;
      const node = document.getElementById(chart);
      node.scrollIntoView();
      return requestAnimationFrame(function wait() {
        if (!node.checkVisibility() || node.dataset.drawn) told.chart = performance.now();
        else requestAnimationFrame(wait);
      });
    }
    isFound = [...document.querySelectorAll(rows)].some(seen);
    requestAnimationFrame(look);
  };
  requestAnimationFrame(look);
})()"""
FIRST_PAINT = "() => performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? null"


@dataclass(slots=True)
class PageTimes:
    """One opening of a page; times in seconds since its address was asked for."""

    loaded_bytes: int
    has_plotly: bool
    num_nodes: int
    first_paint_s: float
    readable_s: float
    chart_s: float | None
    errors: list[str]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("site", type=Path, help="a folder that `attnbench dashboard` wrote")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--page", action="append", choices=READABLE, help="default: all there are")
    options = parser.parse_args(arguments)
    site = options.site.resolve()
    names = options.page or [name for name in READABLE if (site / f"{name}.html").exists()]
    if not names:
        raise SystemExit(f"{site}: no pages; write them with attnbench dashboard --site {site}")
    print("| page | MB | elements | first paint | readable | chart |")
    print("|---|---:|---:|---:|---:|---:|")
    errors: list[str] = []
    for name in names:
        with browser() as started:
            tries = [opened(started, site, name) for _ in range(options.repeat)]
        print(line(name, tries), flush=True)
        errors += [f"{name}: {error}" for one in tries for error in one.errors]
    print("\n".join(dict.fromkeys(errors)) or "\nNo page told an error.")
    raise SystemExit(1 if errors else 0)


def line(name: str, tries: Sequence[PageTimes]) -> str:
    """A row of the table: the least of each time."""
    one = tries[-1]
    charts = [each.chart_s for each in tries if each.chart_s is not None]
    cells = [
        f"`{name}.html`",
        f"{one.loaded_bytes / 1e6:.2f}{' + plotly.js' if one.has_plotly else ''}",
        f"{one.num_nodes:,}",
        f"{min(each.first_paint_s for each in tries):.2f}",
        f"{min(each.readable_s for each in tries):.2f}",
        f"{min(charts):.2f}" if charts else "",
    ]
    return f"| {' | '.join(cells)} |"


@contextmanager
def browser() -> Iterator[Any]:
    """Chromium, as the tests of the pages start it."""
    from playwright.sync_api import sync_playwright

    if not CHROMIUM.exists():
        raise SystemExit(f"no {CHROMIUM}: apt install chromium")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(
            executable_path=str(CHROMIUM), args=["--no-sandbox", "--disable-gpu"]
        )
        yield started
        started.close()


def opened(started: Any, site: Path, name: str) -> PageTimes:
    """Open a page once."""
    context = started.new_context(viewport={"width": 1280, "height": 800})
    page = context.new_page()
    errors: list[str] = []
    loaded: dict[Path, int] = {}
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("requestfailed", lambda request: errors.append(f"failed {request.url}"))
    page.on(
        "console",
        lambda said: errors.append(said.text) if said.type in ("error", "warning") else None,
    )
    page.on("request", lambda request: loaded.update(size_of(request.url)))
    chart = CHARTS.get(name)
    page.add_init_script(WATCH % json.dumps([READABLE[name], chart]))
    page.goto(f"file://{site}/{address(site, name)}", wait_until="commit")
    page.wait_for_function("window.pageTimes?.readable", timeout=120_000)
    if chart:
        page.wait_for_function("window.pageTimes.chart", timeout=120_000)
    # Those that are late count too.
    page.wait_for_load_state("load")
    first_paint = page.wait_for_function(FIRST_PAINT).json_value()
    times = page.evaluate("window.pageTimes")
    is_drawn = chart and page.evaluate(
        "(id) => Boolean(document.getElementById(id).dataset.drawn)", chart
    )
    found = PageTimes(
        loaded_bytes=sum(size for file, size in loaded.items() if file.name != PLOTLY),
        has_plotly=any(file.name == PLOTLY for file in loaded),
        num_nodes=int(page.evaluate("document.querySelectorAll('*').length")),
        first_paint_s=first_paint / 1e3,
        # The first picture can be later than the frame that was to show it.
        readable_s=max(times["readable"], first_paint) / 1e3,
        chart_s=times["chart"] / 1e3 if is_drawn else None,
        errors=errors,
    )
    context.close()
    return found


def size_of(url: str) -> dict[Path, int]:
    """The size of a file that a page asked for."""
    path = Path(unquote(urlsplit(url).path))
    return {path: path.stat().st_size} if url.startswith("file:") and path.exists() else {}


def address(site: Path, name: str) -> str:
    """A page; of the pages of series, that of the first one in the list."""
    if name != "series":
        return f"{name}.html"
    text = (site / "data" / "index.js").read_text(encoding="utf-8")
    columns = json.loads(text[text.index("]=") + 2 : -2])["columns"]
    ids = columns["id"]
    first = ids[0] if isinstance(ids, list) else ids["words"][ids["at"][0]]
    return f"{name}.html#{first}"


if __name__ == "__main__":
    main()
