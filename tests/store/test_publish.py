"""What is published tells nobody's name, and is otherwise what was measured."""

from __future__ import annotations

import base64
import json
import shutil
import string
import zlib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnbench.errors import DataError, SchemaError, UsageError
from attnbench.store import ResultsFolder, RunHeader, publish
from attnbench.store.anonymous import GPU, HOST
from attnbench.store.ceilings import Ceilings
from attnbench.store.schema import SCHEMA
from tests.store.rows import make_header, make_row, numbers, store_run

HOSTNAME = "Node7Xq9.corp.example.com"
UUID = "GPU-1b2c3d4e-aaaa-bbbb-cccc-0123456789ab"
USER = "annabelle"
RATES = Ceilings(copy_bytes_per_s=1e12, matmul_flops_per_s={"bf16": 5e14})
#: What must be nowhere, each in the form somebody would search for.
SECRETS = ("node7xq9", "corp.example", UUID[4:].lower(), "/home/", USER, "/data/", "s3cr3t")
REASONS = (
    f"cannot open '/home/{USER}/my models/a b.bin': No such file",
    f'File "/home/{USER}/venv/lib/python3.11/site-packages/torch/x.py", line 12, in f',
    f"in /data/{USER}'s/x.py:12: error, and in ~{USER}/y, (see /data/z).",
    f"{USER}@node7Xq9: nvcc -I/data/include -o=/data/out failed on {UUID}",
    f"NVML lost {UUID[4:]} of NODE7XQ9.corp.example.com, 3 tokens/s of 32/8 heads",
    f"pip: https://{USER}:s3cr3t@pypi.org/simple is not there",
)
HEADER_WORDS: dict[str, Any] = {
    "argv": (
        "run",
        "8q1s4k",
        f"--results=/home/{USER}/my results",
        f"/data/{USER}/x y",
        "--budget",
    ),
    "ceilings": RATES,
    "options": {"timer": "graph", "l2_states": ["cold"]},
}
PRIVATE = {
    "hostname": HOSTNAME,
    "device_uuid": UUID,
    "reasons": REASONS,
    "commit_subject": f"Faster on node7Xq9, says {USER}",
}
CHANGED = ("hostname", "device_uuid", "reasons", "commit_subject")


@pytest.fixture
def folder(tmp_path: Path) -> ResultsFolder:
    """Two runs of a machine with a name; one is compacted."""
    folder = ResultsFolder(tmp_path / "results")
    for day in (20, 21):
        with folder.open_run(make_header(day, **HEADER_WORDS)) as run:
            run.append(make_row(run.run_id, 0, **PRIVATE, conditions_before={"load_1m": 0.5}))
            run.append(make_row(run.run_id, 1, hostname="", max_abs_error=float("nan")))
        if day == 20:
            folder.compact()
    return folder


def everything_in(path: Path) -> str:
    """All a reader of the file could find: its bytes, its columns, its metadata unpacked."""
    metadata = pq.read_metadata(path).metadata
    headers = zlib.decompress(base64.b64decode(metadata[b"attnbench.run_headers"])).decode()
    statistics = str(pq.read_metadata(path).to_dict())
    rows = json.dumps(pq.read_table(path).to_pylist(), default=str)
    raw = path.read_bytes().decode("latin-1")
    return "\n".join((raw, headers, statistics, rows, str(metadata))).lower()


def sorted_rows(table: pa.Table) -> list[dict[str, Any]]:
    order = [("run_id", "ascending"), ("num_reqs", "ascending")]
    rows: list[dict[str, Any]] = table.sort_by(order).to_pylist()
    return rows


def test_no_name_is_anywhere_in_the_file(folder: ResultsFolder, tmp_path: Path) -> None:
    done = folder.publish(tmp_path / "p.parquet")
    found = everything_in(done.path)
    assert [secret for secret in SECRETS if secret in found] == []
    # The same search finds them where they have not been taken out: it can find them.
    own = next((folder.path / "runs").glob("*.parquet"))
    assert [secret for secret in SECRETS if secret not in everything_in(own)] == []
    assert (done.num_runs, done.num_rows, done.is_too_big) == (2, 4, False)
    assert done.num_bytes == done.path.stat().st_size


def test_everything_else_is_as_it_was(folder: ResultsFolder, tmp_path: Path) -> None:
    folder.publish(tmp_path / "p.parquet")
    rest = [name for name in SCHEMA.names if name not in CHANGED]
    public = pq.read_table(tmp_path / "p.parquet")
    assert public.schema.equals(SCHEMA)
    # As text, since a NaN is not itself.
    assert str(sorted_rows(public.select(rest))) == str(sorted_rows(folder.table(rest)))
    rows = sorted_rows(public)
    assert {r["hostname"] for r in rows[::2]} == {rows[0]["hostname"]}
    assert HOST.fullmatch(rows[0]["hostname"])
    assert GPU.fullmatch(rows[0]["device_uuid"])
    assert (rows[1]["hostname"], rows[1]["device_uuid"], rows[1]["reasons"]) == ("", "", [])
    assert rows[0]["reasons"] == [
        "cannot open '<path>': No such file",
        'File "<path>", line 12, in f',
        "in <path>: error, and in <path>, (see <path>).",
        f"<user>@<host>: nvcc -I<path> -o=<path> failed on {rows[0]['device_uuid']}",
        f"NVML lost {rows[0]['device_uuid']} of <host>, 3 tokens/s of 32/8 heads",
        "pip: https://<user>@pypi.org/simple is not there",
    ]


def test_headers_keep_what_a_reader_needs(folder: ResultsFolder, tmp_path: Path) -> None:
    other = ResultsFolder(tmp_path / "other")
    (other.path / "published").mkdir(parents=True)
    folder.publish(other.path / "published" / "p.parquet")
    own, read = folder.header("last"), other.header(folder.header("last").run_id)
    assert read.argv == ("run", "8q1s4k", "--results=<path>", "<path>", "--budget")
    assert (read.plan, read.options, read.spec) == (own.plan, own.options, own.spec)
    assert read.ceilings == RATES
    assert set(other.ceilings()) == {run.run_id for run in other.runs()}


def test_the_same_runs_are_the_same_bytes(folder: ResultsFolder, tmp_path: Path) -> None:
    first = folder.publish(tmp_path / "1.parquet").path.read_bytes()
    assert folder.publish(tmp_path / "2.parquet").path.read_bytes() == first
    folder.compact()
    (folder.path / "published").mkdir()
    folder.publish(folder.path / "published" / "p.parquet")
    assert folder.publish(tmp_path / "3.parquet").path.read_bytes() == first


def test_the_order_of_the_files_is_not_told(tmp_path: Path) -> None:
    written = []
    for days in ((20, 21), (21, 20)):
        folder = ResultsFolder(tmp_path / str(days[0]))
        for day in days:
            store_run(folder, make_header(day), 2)
            folder.compact()
            store_run(folder, make_header(day, number=1), 1)
        (folder.path / ".publish-salt").write_text("0" * 64)
        written.append(folder.publish(tmp_path / f"{days[0]}.parquet").path.read_bytes())
    assert written[0] == written[1]


def test_each_folder_has_its_own_names(folder: ResultsFolder, tmp_path: Path) -> None:
    salt = folder.path / ".publish-salt"
    folder.publish(tmp_path / "1.parquet")
    assert salt.stat().st_mode & 0o777 == 0o600
    assert salt.read_text() not in everything_in(tmp_path / "1.parquet")
    twin = ResultsFolder(tmp_path / "twin")
    shutil.copytree(folder.path, twin.path, ignore=shutil.ignore_patterns(".publish-salt"))
    twin.publish(tmp_path / "2.parquet")
    hosts = [
        set(pq.read_table(tmp_path / name)["hostname"].to_pylist()) - {""}
        for name in ("1.parquet", "2.parquet")
    ]
    assert len(hosts[0]) == len(hosts[1]) == 1
    assert hosts[0].isdisjoint(hosts[1])
    salt.write_text("short")
    with pytest.raises(DataError, match=r"\.publish-salt: not 32 bytes.*remove it"):
        folder.publish(tmp_path / "1.parquet")


def test_published_rows_stand_beside_own_ones_and_count_once(
    folder: ResultsFolder, tmp_path: Path
) -> None:
    place = folder.path / "published" / "all.parquet"
    folder.publish(place)
    assert folder.table().num_rows == 4
    assert folder.query("SELECT count(*) AS n FROM results").to_pylist() == [{"n": 4}]
    assert folder.published_runs() == frozenset()
    assert folder.check().num_rows == 4
    assert folder.check().is_ok

    reader = ResultsFolder(tmp_path / "reader")
    store_run(reader, make_header(22), 3)
    killed = reader.open_run(make_header(23))
    killed.append(make_row(killed.run_id, 0))
    killed.close()
    (reader.path / "published").mkdir()
    shutil.copy(place, reader.path / "published" / "theirs.parquet")
    theirs = frozenset(make_header(day).run_id for day in (20, 21))
    assert numbers(reader.table()) == [0, 0, 0, 0, 1, 1, 1, 2]
    assert reader.published_runs() == theirs
    assert {run.run_id for run in reader.runs() if run.is_published} == theirs
    assert reader.query("SELECT * FROM published ORDER BY run_id").to_pylist() == [
        {"run_id": run_id, "file": "theirs.parquet"} for run_id in sorted(theirs)
    ]
    report = reader.check()
    assert report.is_ok, report.problems
    assert (report.num_files, report.num_rows) == (3, 8)
    # A run in a file of its own and in two published ones, too.
    store_run(reader, make_header(20), 1)
    shutil.copy(place, reader.path / "published" / "twice.parquet")
    assert numbers(reader.table()) == [0, 0, 0, 0, 1, 1, 2]
    assert [p.path.name for p in reader.check().problems] == ["twice.parquet"] * 2
    assert reader.check().num_rows == 7


def test_a_killed_run_counts_once_as_well(tmp_path: Path) -> None:
    folder = ResultsFolder(tmp_path / "results")
    run = folder.open_run(make_header())
    for number in range(2):
        run.append(make_row(run.run_id, number))
    run.close()
    folder.publish(folder.path / "published" / "p.parquet")
    assert numbers(folder.table()) == [0, 1]
    assert folder.check().num_rows == 2
    assert folder.published_runs() == frozenset()


def test_published_files_are_only_read(folder: ResultsFolder, tmp_path: Path) -> None:
    reader = ResultsFolder(tmp_path / "reader")
    store_run(reader, make_header(22), 1)
    (reader.path / "published").mkdir()
    place = reader.path / "published" / "p.parquet"
    folder.publish(place)
    before = place.read_bytes()
    assert reader.header("last").run_id == make_header(22).run_id
    with pytest.raises(UsageError, match=r"--resume .*: a published run, which is only read"):
        reader.open_run(make_header(21), resume=True)
    reader.compact()
    reader.seal_orphans()
    assert place.read_bytes() == before
    assert [path.name for path in (reader.path / "months").iterdir()] == ["2026-11.parquet"]
    assert pq.read_metadata(reader.path / "months" / "2026-11.parquet").num_rows == 1
    # What others published is not published again as one's own.
    assert reader.publish(tmp_path / "own.parquet").num_rows == 1


def test_a_bad_published_file_is_named(folder: ResultsFolder, tmp_path: Path) -> None:
    place = folder.path / "published" / "p.parquet"
    folder.publish(place)
    good = place.read_bytes()
    rows = folder.table()
    place.write_bytes(good[:2000] + bytes([good[2000] ^ 1]) + good[2001:])
    assert [p.path for p in folder.check().problems] == [place]
    pq.write_table(rows, place)
    (problem,) = folder.check().problems
    assert "not a results file of attnbench" in problem.text
    with pytest.raises(SchemaError):
        folder.table()
    private = folder.path / "runs" / f"{make_header(21).run_id}.parquet"
    shutil.copy(private, place)
    (problem,) = folder.check().problems
    assert problem.text.startswith("tells the device_uuid and hostname of a machine; remove it")


def test_which_runs(folder: ResultsFolder, tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    assert folder.publish(path, ["last", make_header(21).run_id]).num_runs == 1
    assert set(pq.read_table(path)["run_id"].to_pylist()) == {make_header(21).run_id}
    with pytest.raises(UsageError, match=r"--run 20200101T.*: no such run .*newest is 20261121T"):
        folder.publish(path, ["20200101T000000Z-abcdef"])
    with pytest.raises(UsageError, match=r"p\.csv: .*end it in \.parquet"):
        folder.publish(tmp_path / "p.csv")
    empty = ResultsFolder(tmp_path / "empty")
    empty.path.mkdir()
    with pytest.raises(UsageError, match="no run of its own to publish"):
        empty.publish(path)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("suite", f"nights of {USER}"),
        ("suite", "on Node7Xq9"),
        ("container_digest", "/data/images/x.sif"),
        ("kernel_names", (f"kernel of {UUID}",)),
        ("stack", ("torch @ file:///data/torch",)),
    ],
)
def test_a_name_in_another_column_stops_it(
    folder: ResultsFolder, tmp_path: Path, column: str, value: Any
) -> None:
    with folder.open_run(make_header(22)) as run:
        run.append(make_row(run.run_id, 0, **{**PRIVATE, column: value}))
    with pytest.raises(DataError, match=f"column {column} holds a path or a name, .*--run"):
        folder.publish(tmp_path / "p.parquet")
    assert list(tmp_path.glob("*p.parquet*")) == []
    assert folder.publish(tmp_path / "p.parquet", [make_header(21).run_id]).num_rows == 2


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("spec", {"suites": ["/data/suites"]}),
        ("options", {"lock": {"folder": "/var/lock/x"}}),
        ("environment", {"driver": f"of {UUID}"}),
        ("plan", ({"workload": "8q1s4k", "backend": "~/my/backend"},)),
    ],
)
def test_a_name_in_a_header_stops_it(tmp_path: Path, part: str, value: Any) -> None:
    folder = ResultsFolder(tmp_path / "results")
    store_run(folder, make_header(**{part: value}), 1)
    with pytest.raises(DataError, match=f"the {part} of run .* holds a path or a name"):
        folder.publish(tmp_path / "p.parquet")


def test_what_a_gpu_writes_is_no_name(tmp_path: Path) -> None:
    folder = ResultsFolder(tmp_path / "results")
    facts: dict[str, Any] = {
        "driver_version": "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.124.06  "
        "Release Build  (dvs-builder@U22-I3-B17-02-5)  Wed Feb 26 01:44:51 UTC 2025",
        "kernel_names": (
            "void cutlass::device_kernel<flash::FlashAttnFwdSm90<cute::C<1> > > >(T1::Params)",
            "_fwd_kernel_stage1",
            "void at::native::(anonymous namespace)::operator/(int)",
        ),
        "device_uuid": UUID[4:],
        "container_digest": "registry.example/team/bench@sha256:" + "0123456789abcdef" * 4,
        "stack": ("flash-attn==2.8.3+cu129torch2.11", "torch==2.11.0+cu129"),
    }
    with folder.open_run(make_header()) as run:
        run.append(make_row(run.run_id, 0, **facts))
    folder.publish(tmp_path / "p.parquet")
    (public,) = pq.read_table(tmp_path / "p.parquet").to_pylist()
    for name in ("driver_version", "container_digest"):
        assert public[name] == facts[name]
    for name in ("kernel_names", "stack"):
        assert tuple(public[name]) == facts[name]
    assert GPU.fullmatch(public["device_uuid"])


def test_too_big_is_told(
    folder: ResultsFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("attnbench.store.publish.MAX_BYTES", 1000)
    assert folder.publish(tmp_path / "p.parquet").is_too_big


WORD = st.text(string.ascii_lowercase, min_size=8, max_size=12)


@settings(deadline=None, max_examples=50)
@given(
    samples=st.lists(st.floats(1e-9, 1e3), min_size=1, max_size=5),
    clocks=st.lists(st.floats(0, 3e9, width=32), max_size=3),
    conditions=st.dictionaries(WORD, st.floats(allow_nan=False), max_size=3),
    microsecond=st.integers(0, 999_999),
)
def test_values_survive_whatever_they_are(
    tmp_path_factory: pytest.TempPathFactory,
    samples: list[float],
    clocks: list[float],
    conditions: dict[str, float],
    microsecond: int,
) -> None:
    folder = ResultsFolder(tmp_path_factory.mktemp("any") / "results")
    started = datetime(2026, 11, 21, 1, 55, 0, microsecond, tzinfo=UTC)
    with folder.open_run(make_header()) as run:
        run.append(
            make_row(
                run.run_id,
                0,
                samples=tuple(samples),
                sm_clock_hz=tuple(clocks),
                conditions_after=conditions,
                started_at=started,
                hostname=HOSTNAME,
            )
        )
    folder.publish(folder.path.parent / "p.parquet")
    (public,) = pq.read_table(folder.path.parent / "p.parquet").to_pylist()
    (own,) = folder.table().to_pylist()
    assert {k: v for k, v in public.items() if k != "hostname"} == {
        k: v for k, v in own.items() if k != "hostname"
    }


def test_a_header_that_was_lost_is_no_obstacle(tmp_path: Path) -> None:
    folder = ResultsFolder(tmp_path / "results")
    run = folder.open_run(make_header())
    run.append(make_row(run.run_id, 0, **PRIVATE))
    run.close()
    done = folder.publish(tmp_path / "p.parquet")
    assert (done.num_runs, done.num_rows) == (1, 1)
    assert isinstance(folder.header("last"), RunHeader)
    assert HOSTNAME.lower() not in everything_in(done.path)
    assert publish.betrayed_columns(folder.table()) == ("hostname", "device_uuid")
