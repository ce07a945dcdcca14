"""`dashboards/default.toml` and `matrix.json`: what they may say, and what is refused."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from attnbench.dashboard import Pages, load_pages, read_matrix, write_matrix
from attnbench.errors import (
    CorruptDataError,
    InfrastructureError,
    ResultsFolderError,
    SettingsError,
)


def test_defaults_without_a_file(tmp_path: Path) -> None:
    assert load_pages(folder=tmp_path) == Pages()


def test_the_file_of_this_repository_says_the_defaults() -> None:
    assert load_pages(folder=Path(__file__).parents[2] / "dashboards") == Pages()


def test_pages_are_put_in_order_and_the_overview_stays(tmp_path: Path) -> None:
    file = tmp_path / "default.toml"
    file.write_text('title = "night"\npages = ["matrix", "series"]\nruns = 5\n')
    assert load_pages(folder=tmp_path) == Pages("night", ("overview", "series", "matrix"), 5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('pagse = ["series"]', "unknown key 'pagse'; did you mean 'pages'"),
        ('pages = ["serie"]', "unknown page 'serie'; did you mean 'series'"),
        ("pages = 3", "pages is not a list"),
        ("title = 3", "title = 3 is not text"),
        ("runs = 0", "runs = 0 is not a whole number above 0"),
        ("runs = true", "runs = True is not a whole number above 0"),
        ("pages = [", "not valid TOML"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "pages.toml"
    file.write_text(text)
    with pytest.raises(SettingsError, match=message.replace("[", r"\[")):
        load_pages(file)


def test_a_named_file_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot be read"):
        load_pages(tmp_path / "none.toml")


def test_matrix_file(tmp_path: Path) -> None:
    file = tmp_path / "matrix.json"
    assert read_matrix(file) is None
    file.write_text('[{"device": "sm90"}]')
    assert read_matrix(file) == [{"device": "sm90"}]
    for text in ("{", '{"device": 1}', "[1]"):
        file.write_text(text)
        with pytest.raises(CorruptDataError, match="attnbench matrix --format json"):
            read_matrix(file)


def test_the_matrix_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "matrix.json"
    write_matrix(file, [{"device": "sm90", "block_size": None}])
    assert read_matrix(file) == [{"device": "sm90", "block_size": None}]

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InfrastructureError, match="free some space"):
        write_matrix(file, [])
    assert read_matrix(file) == [{"device": "sm90", "block_size": None}]
    assert [f.name for f in tmp_path.iterdir()] == ["matrix.json"]
    with pytest.raises(ResultsFolderError, match="--results"):
        write_matrix(tmp_path / "none" / "matrix.json", [])
