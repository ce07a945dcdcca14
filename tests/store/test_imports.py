"""What importing the store loads, in a fresh process each."""

from __future__ import annotations

import subprocess
import sys

import pytest

import attnbench.store


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*(name.partition('.')[0] for name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_store_never_loads_torch() -> None:
    names = ", ".join(attnbench.store.__all__)
    loaded = loaded_by(f"from attnbench.store import {names}")
    assert "pyarrow" in loaded
    assert not loaded & {"torch", "triton", "duckdb", "scipy"}


def test_the_record_and_the_verbs_load_nothing_heavy() -> None:
    loaded = loaded_by("import attnbench.store.record, attnbench.cli.results")
    assert not loaded & {"torch", "triton", "pandas", "duckdb", "scipy", "pyarrow"}


def test_every_public_name_is_there() -> None:
    assert {name for name in attnbench.store.__all__ if hasattr(attnbench.store, name)} == set(
        attnbench.store.__all__
    )
    with pytest.raises(AttributeError, match="no attribute 'Foo'"):
        _ = attnbench.store.Foo
