from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

from attnbench.upgrade import remote_file
from attnbench.upgrade.tell import Advance, Unit
from tests.upgrade.package_server import PackageServer, package_server


class Heard:
    """Keeps what was told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.advanced: dict[str, int] = {}
        self.totals: dict[str, int] = {}

    def note(self, message: str) -> None:
        self.notes.append(message)

    def progress(self, label: str, total: int, unit: Unit) -> nullcontext[Advance]:
        self.totals[label] = total

        def advance(more: int) -> None:
            self.advanced[label] = self.advanced.get(label, 0) + more

        return nullcontext(advance)


@pytest.fixture
def tell() -> Heard:
    return Heard()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[PackageServer]:
    """An index on this machine that pip, and so attnbench, is set to; nothing else is asked."""
    for name in [one for one in os.environ if one.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(remote_file, "PAUSES_S", (0.01, 0.01, 0.01))
    with package_server() as running:
        monkeypatch.setenv("PIP_INDEX_URL", running.url)
        yield running


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "network" in config.option.markexpr:
        return
    skip = pytest.mark.skip(reason="downloads about 200 MB; run with `pytest -m network`")
    for item in items:
        if item.get_closest_marker("network"):
            item.add_marker(skip)
