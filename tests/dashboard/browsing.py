"""A real browser that opens the pages from disk, and says what went wrong in them."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = Path("/usr/bin/chromium")

_NO_CHROMIUM = "no /usr/bin/chromium: apt install chromium"

#: For `pytestmark` of a module or class.
in_browser = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=_NO_CHROMIUM),
]


def browses(test: Callable[..., None]) -> Callable[..., None]:
    """Marks one test of a module."""
    for mark in in_browser:
        test = mark(test)
    return test


@contextmanager
def launched() -> Iterator[Any]:
    """A browser; one in a thread at a time."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(
            executable_path=str(CHROMIUM), args=["--no-sandbox", "--disable-gpu"]
        )
        yield started
        started.close()


class Reader:
    """A page, with everything that went wrong in it."""

    def __init__(self, browser: Any, site: Path, **options: Any) -> None:
        self.page = browser.new_page(**options)
        self.site = site
        self.problems: list[str] = []
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("dialog", lambda dialog: self.problems.append(f"dialog {dialog.message}"))
        self.page.on("requestfailed", self._failed)
        self.page.on(
            "console",
            lambda m: self.problems.append(m.text) if m.type in ("error", "warning") else None,
        )

    def _failed(self, request: Any) -> None:
        # Going to another page ends what was still loading: nobody misses it.
        if request.failure != "net::ERR_ABORTED":
            self.problems.append(f"failed {request.url}: {request.failure}")

    def open(self, address: str, chart: str = "") -> Any:
        self.page.goto(f"file://{self.site}/{address}")
        if chart:
            self.wait_for_chart(chart)
        return self.page

    def wait_for_chart(self, chart: str) -> None:
        """Charts are drawn when they come near: go there first."""
        self.page.locator(f"#{chart}").scroll_into_view_if_needed(timeout=60_000)
        self.page.wait_for_selector(f"#{chart}[data-drawn]", timeout=60_000)

    def texts(self, selector: str) -> list[str]:
        return [text.strip() for text in self.page.locator(selector).all_text_contents()]


def exported(page: Any, button: str) -> list[dict[str, str]]:
    """The rows of the CSV that a button saves."""
    with page.expect_download() as download:
        page.click(button)
    return list(csv.DictReader(io.StringIO(download.value.path().read_text(encoding="utf-8"))))


OpenSite = Callable[..., Reader]
"""The fixture `opened`: gives a reader of a site, with options of a browser's page."""
