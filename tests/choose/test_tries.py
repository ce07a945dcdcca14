"""Tries against the rows they are made of, one by one."""

from __future__ import annotations

import math
import random
import statistics
from pathlib import Path

import pytest

from attnbench.choose.tries import BATCH, COLUMNS, LAYER, Choice, How, read_tries, tries_of
from attnbench.store import ResultsFolder
from attnbench.store.record import Measurement
from tests.choose.fake import FA3, TRITON, ended, timed
from tests.history.fake import HOSTILE, table_of


def rows() -> list[Measurement]:
    """Two runs, three batches, several ways; replicates of a point are not together."""
    found = [
        *timed(FA3, [1e-4, 3e-4, 2e-4, 4e-4], "q1s1k"),
        *timed(FA3, 1e-4, "q1s1k", 1, stack=("torch==1", "b\nc==2")),
        *timed(FA3, 1e-4, "q1s1k", 1, timer="wall"),
        *timed(FA3, 1e-4, "q1s1k window=64"),
        *timed(FA3, 1e-4, "q1s1k block=32"),
        *timed(TRITON, 5e-4, "q1s1k dtype=fp16", driver_version="590.1"),
        *timed(TRITON, 5e-4, "2q1s1k lengths=geometric seed=3"),
        *ended(TRITON, "INCORRECT", "q1s1k", 1, reasons=(HOSTILE, "twice")),
        *ended(FA3, "NOISY", "4q1s1k"),
    ]
    random.Random(1).shuffle(found)
    return found


def test_every_row_is_in_its_try() -> None:
    wanted: dict[object, list[Measurement]] = {}
    for one in rows():
        how = How(one.device_class, one.timer, one.l2_state, one.execution, one.driver_version)
        choice = Choice(one.backend, one.variant, one.block_size, one.kv_cache_layout)
        layer = tuple(getattr(one, name) for name in LAYER)
        batch = tuple(getattr(one, name) for name in BATCH)
        wanted.setdefault((layer, batch, choice, how, one.run_id), []).append(one)
    found = tries_of(table_of(rows()).select(COLUMNS))
    assert len(found) == len(wanted)
    for tried, (key, mine) in zip(found, wanted.items(), strict=True):
        what = tried.what
        assert (what.layer, what.batch, what.choice, what.how, tried.run_id) == key
        assert (what.workload, what.device_kind) == (mine[0].workload, mine[0].device_kind)
        assert tried.statuses == tuple(one.status for one in mine)
        assert tried.reasons == tuple(tuple(one.reasons) for one in mine)
        assert tried.stack == tuple(mine[0].stack)
        assert tried.started_at == mine[0].started_at
        for seconds, one in zip(tried.seconds, mine, strict=True):
            if one.samples:
                assert seconds == pytest.approx(statistics.median(one.samples), rel=1e-15)
            else:
                assert math.isnan(seconds)
    same: dict[object, object] = {}
    for tried in found:
        what = tried.what
        its = (what.layer, what.batch, what.choice, what.how)
        assert same.setdefault(its, what) is what


def test_nothing_is_no_tries(tmp_path: Path) -> None:
    assert tries_of(table_of(rows()[:0]).select(COLUMNS)) == []
    assert read_tries(ResultsFolder(tmp_path / "none")) == []
