"""Pages written from arrays say what the objects say, and again only where something changed."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnbench.dashboard import Pages, render
from attnbench.dashboard.json_text import column_text, value_texts
from attnbench.dashboard.script import to_json
from attnbench.dashboard.series_files import value_data
from attnbench.history.panel import Panel
from attnbench.history.series_rows import series_of
from attnbench.history.verdict import judge
from attnbench.store import ResultsFolder
from attnbench.store.record import Measurement
from tests.dashboard.reading import read_data
from tests.history.fake import HOSTILE, row, table_of
from tests.history.test_panel import store

BACKENDS = ("CPU_ATTN", "TORCH_SDPA", "FLEX_ATTENTION")
RUNS = 36  # the chunk whose turn it is at the next run is there


@lru_cache
def look_alike() -> str:
    """A text with what stands before each series' values in a file."""
    rows = [
        row(0, backend=backend, workload=f"{n}q1s1k dtype=fp32")
        for backend in BACKENDS
        for n in range(1, 21)
    ]
    return "".join(f'],"{series.id}":[' for series in series_of(table_of(rows)))


def rows_of(runs: int, points: int = 20) -> list[Measurement]:
    """Three backends by `points` workloads, one refused without a timer every third night, and
    each every ninth."""
    rows = []
    for run in range(runs):
        for backend in BACKENDS:
            for n in range(1, points + 1):
                more: dict[str, Any] = {"backend": backend, "workload": f"{n}q1s1k dtype=fp32"}
                level = 1e-3 * n * (1 + 0.003 * math.sin(7 * run + n))
                if backend == "CPU_ATTN" and n == 1 and run % 3 == 1:
                    lost: dict[str, Any] = {
                        "status": "UNSUPPORTED",
                        "timer": "",
                        "reasons": (HOSTILE,),
                    }
                    rows.append(row(run, **more, **lost))
                    continue
                if (run + n) % 9 == 0:
                    reasons = (look_alike(),)
                    rows.append(row(run, **more, status="UNSUPPORTED", reasons=reasons))
                    continue
                rows += [row(run, r, seconds=level * (1 + 0.001 * r), **more) for r in range(2)]
    return rows


def shown(site: Path) -> dict[str, list[Any]]:
    """Series id -> its values, as the page puts them together."""
    found = {}
    for path in sorted(site.glob("data/series-*.js")):
        name = path.stem.partition("-")[2]
        for series, entry in read_data(site, path.stem).items():
            older = read_data(site, f"values-{name}")[series] if entry["older"] else []
            found[series] = [*older, *entry["values"]]
    return found


def close(found: Any, expected: Any) -> bool:
    """Numbers have seven digits on the pages, or are those of single precision.

    Half a unit of the seventh digit is 5e-7 of a number that begins with 1; single precision 6e-8.
    """
    if isinstance(expected, dict):
        same = found.keys() == expected.keys()
        return same and all(close(found[name], expected[name]) for name in expected)
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(close, found, expected))
    if isinstance(expected, float):
        return math.isclose(found, expected, rel_tol=5.6e-7, abs_tol=1e-6)
    return bool(found == expected)


def write(folder: ResultsFolder, site: Path) -> None:
    panel = Panel.of(folder)
    render(panel, panel.runs, judge(panel), site, pages=Pages(runs=4))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> ResultsFolder:
    folder = ResultsFolder(tmp_path_factory.mktemp("results") / "results")
    from attnbench.store import RunHeader
    from attnbench.store.schema import rows_to_table
    from attnbench.store.sealed import write_sealed

    rows = rows_of(RUNS)
    store(folder, rows[:1])
    (folder.path / "runs" / f"{rows[0].run_id}.parquet").unlink()
    for run_id in dict.fromkeys(one.run_id for one in rows):
        own = [one for one in rows if one.run_id == run_id]
        header = RunHeader(run_id=run_id, started_at=own[0].started_at)
        path = folder.path / "runs" / f"{run_id}.parquet"
        write_sealed(path, [rows_to_table(own)], [header])
    return folder


def contents(site: Path) -> dict[str, tuple[int, bytes]]:
    files = [path for path in (site / "data").iterdir() if path.suffix == ".js"]
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def test_the_files_together_hold_every_value(results: ResultsFolder, tmp_path: Path) -> None:
    write(results, tmp_path)
    found = shown(tmp_path)
    expected = series_of(table_of(rows_of(RUNS)))
    assert set(found) == {series.id for series in expected}
    for series in expected:
        values = [value_data(value, run) for run, value in enumerate(series.values)]
        assert close(found[series.id], values)
    assert all(len(values) == RUNS for values in found.values())
    older = len(list(tmp_path.glob("data/values-*.js")))
    assert older == len(list(tmp_path.glob("data/series-*.js"))) > 10


def test_a_night_more_rewrites_few_of_the_older_values(
    results: ResultsFolder, tmp_path: Path
) -> None:
    site = tmp_path / "site"
    write(results, site)
    first = contents(site)
    write(results, site)
    again = contents(site)
    assert {name for name in first if first[name][0] != again[name][0]} == {
        name for name in first if not name.startswith(("values-", "run-", "times-"))
    }
    extra = [one for one in rows_of(RUNS + 1) if one.run_id == row(RUNS).run_id]
    store(results, extra)
    write(results, site)
    later = contents(site)
    changed = {name for name in again if name in later and again[name][0] != later[name][0]}
    turn = f"values-{-(RUNS + 1) % 16:x}.js"
    assert {name for name in changed if name.startswith("values-")} == {turn} & again.keys()
    assert not [name for name in changed if name.startswith("run-")]
    assert f"run-{RUNS}.js" in later
    assert f"run-{RUNS - 4}.js" not in later
    # What was left as it is, is what a rendering from nothing writes.
    write(results, tmp_path / "fresh")
    fresh = contents(tmp_path / "fresh")
    assert {name: text for name, (_, text) in later.items()} == {
        name: text for name, (_, text) in fresh.items()
    }
    (results.path / "runs" / f"{extra[0].run_id}.parquet").unlink()


def test_older_values_of_few_series_are_kept_too(tmp_path: Path) -> None:
    table = table_of(rows_of(RUNS, points=2))
    folder = ResultsFolder(tmp_path / "results")
    store(folder, rows_of(RUNS, points=2))
    write(folder, tmp_path / "site")
    first = contents(tmp_path / "site")
    assert [name for name in first if name.startswith("values-")] == ["values-all.js"]
    write(folder, tmp_path / "site")
    again = contents(tmp_path / "site")
    assert again["values-all.js"] == first["values-all.js"]
    assert len(shown(tmp_path / "site")) == len(series_of(table))


def test_a_rendering_that_was_killed_is_not_believed(
    results: ResultsFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(results, tmp_path)
    whole = contents(tmp_path)
    (tmp_path / "data" / "values-0.js").write_text("half")
    with monkeypatch.context() as full:
        written = Path.write_text

        def fail(path: Path, *args: Any, **options: Any) -> int:
            if path.name == "values-0.js":
                raise KeyboardInterrupt
            return written(path, *args, **options)

        full.setattr(Path, "write_text", fail)
        with pytest.raises(KeyboardInterrupt):
            write(results, tmp_path)
    write(results, tmp_path)
    assert {n: t for n, (_, t) in contents(tmp_path).items()} == {
        n: t for n, (_, t) in whole.items()
    }


texts = st.one_of(st.text(max_size=8), st.sampled_from([HOSTILE, "<b>&", "\u2028", 'a"b\\']))
NUMBERS = st.one_of(st.floats(-1e30, 1e30), st.sampled_from([math.nan, math.inf, -0.0, 1e-9]))
COLUMNS: list[tuple[Any, pa.DataType]] = [
    (texts, pa.string()),
    (st.integers(-(2**62), 2**62), pa.int64()),
    (st.booleans(), pa.bool_()),
    (NUMBERS, pa.float64()),
    (st.lists(texts, max_size=3), pa.list_(pa.string())),
    (st.lists(NUMBERS, max_size=3), pa.list_(pa.float64())),
    (st.dictionaries(texts, NUMBERS, max_size=3), pa.map_(pa.string(), pa.float64())),
    (
        st.integers(0, 10**9).map(lambda s: datetime(2020, 1, 1, tzinfo=UTC) + timedelta(0, s, 7)),
        pa.timestamp("us", tz="UTC"),
    ),
]


@settings(deadline=None, max_examples=60)
@given(st.data(), st.sampled_from(COLUMNS))
def test_texts_of_columns_are_those_of_values(data: st.DataObject, column: Any) -> None:
    strategy, kind = column
    values = data.draw(st.lists(st.one_of(st.none(), strategy), max_size=6))
    stored = [list(v.items()) if isinstance(v, dict) else v for v in values]
    found = value_texts(pa.array(stored, kind)).to_pylist()
    for text, value in zip(found, values, strict=True):
        assert text.isascii()
        assert not set(text) & set("<>&")
        assert close(json.loads(text), json.loads(to_json(value)))
    assert json.loads(column_text(pa.array(stored, kind))) == [json.loads(text) for text in found]


def test_a_long_column_names_its_distinct_values_once() -> None:
    column = pa.array(["OK", "NOISY"] * 600)
    found = json.loads(column_text(column))
    assert [found["words"][at] for at in found["at"]] == column.to_pylist()
    assert len(column_text(column)) < 5000
