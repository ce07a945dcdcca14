"""attnbench.toml: found, read, refused."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from attnbench.errors import SettingsError
from attnbench.settings import Settings, find_settings_file, load_settings


def write(folder: Path, text: str) -> Path:
    path = folder / "attnbench.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_no_file_means_the_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_settings() == Settings()


def test_the_nearest_file_upwards_is_read_and_paths_start_at_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 'results = "out"\nreplicates = 5\nbudget_s = 1\n')
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner)
    assert find_settings_file() == tmp_path / "attnbench.toml"
    settings = load_settings()
    assert settings.results == tmp_path / "out"
    assert settings.replicates == 5
    assert settings.budget_s == 1.0
    assert settings.matrix_file == tmp_path / "out" / "matrix.json"


def test_the_python_of_the_build_before_starts_there_too_and_stays_a_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    venv = tmp_path / "before" / "bin"
    venv.mkdir(parents=True)
    (venv / "python").symlink_to("/usr/bin/env")
    path = write(tmp_path, 'reference = "before/bin/python"\nconfirm_points = 7\n')
    settings = load_settings(path)
    assert (settings.reference, settings.confirm_points) == (str(venv / "python"), 7)
    write(tmp_path, 'reference = "python3.11"\n')
    assert load_settings(path).reference == "python3.11"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ('reslts = "out"', ["unknown key 'reslts'", "did you mean 'results'"]),
        ("xyz = 1", ["unknown key 'xyz'", "known: "]),
        ("replicates = 0", ["replicates = 0", "a whole number above 0", "e.g. 3"]),
        ("replicates = true", ["replicates = True", "a whole number above 0"]),
        ('budget_s = "fast"', ["budget_s = 'fast'", "a number above 0"]),
        ("results = 3", ["results = 3", "a path in quotes"]),
        ("device = 9.0", ["device = 9.0", "text in quotes"]),
        ("results = @\n", ["not valid TOML", "line 1"]),
    ],
)
def test_a_wrong_file_is_one_line_with_the_mend(
    tmp_path: Path, text: str, parts: list[str]
) -> None:
    path = write(tmp_path, text)
    with pytest.raises(SettingsError) as caught:
        load_settings(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    for part in parts:
        assert part in message


def test_every_key_is_documented() -> None:
    page = (Path(__file__).parent.parent / "docs" / "settings.md").read_text(encoding="utf-8")
    for field in fields(Settings):
        assert field.metadata["help"], field.name
        assert f"`{field.name}`" in page
        assert field.metadata["help"] in page
