"""How asv's environments see torch."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from pathlib import Path

import pytest
import torch

from attnbench.asv_bridge.outer import (
    OUTER_VARIABLE,
    PTH_NAME,
    link_environments,
    outer_site_packages,
    pin_runner,
)


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    # The functions change the process's environment: let pytest put it back.
    for name in (OUTER_VARIABLE, "PATH"):
        monkeypatch.setenv(name, os.environ.get(name, ""))


def test_torch_is_found_behind_it() -> None:
    folders = outer_site_packages().splitlines()
    assert any((Path(folder) / "torch" / "__init__.py").is_file() for folder in folders)
    assert str(Path(torch.__file__).parents[1]) in folders
    assert len(folders) == len(set(folders))


def test_existing_environments_follow_this_python(tmp_path: Path) -> None:
    site = tmp_path / "env" / "abc" / "lib" / "python3.11" / "site-packages"
    site.mkdir(parents=True)
    (site / PTH_NAME).write_text("/another/virtualenv/site-packages\n")
    link_environments(tmp_path / "env")
    assert (site / PTH_NAME).read_text() == outer_site_packages() == os.environ[OUTER_VARIABLE]


def test_this_python_is_first_on_the_path(tmp_path: Path) -> None:
    link_environments(tmp_path)
    link_environments(tmp_path)
    words = os.environ["PATH"].split(os.pathsep)
    assert words[0] == str(Path(sys.executable).parent)
    assert words[1] != words[0]


def test_the_runner_is_the_one_asv_has_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_CONSTRAINT", "x")
    monkeypatch.delenv("PIP_CONSTRAINT")
    pin_runner(tmp_path / "new")
    text = Path(os.environ["PIP_CONSTRAINT"]).read_text()
    assert text == f"asv_runner=={importlib.metadata.version('asv_runner')}\n"


def test_a_constraint_of_the_user_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_CONSTRAINT", "/mine.txt")
    pin_runner(tmp_path)
    assert os.environ["PIP_CONSTRAINT"] == "/mine.txt"
    assert list(tmp_path.iterdir()) == []
