"""Runs in one file that anybody may see, and that every results folder reads beside its own.

Kept out: `hostname` and `device_uuid` become hashes with a salt that stays in the results folder
(`anonymous.py` says why); absolute paths, names of accounts, hosts and GPUs go from `reasons`, the
commit's message and the header's command line. Every other column is as it was stored. If any of
it is left in another column, nothing is written.

The file is a sealed file like any other, so it has the run headers with their ceilings, the schema
version, page checksums and both digests. The same rows give the same bytes, compacted or not.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from attnbench.errors import DataError, UsageError
from attnbench.store import disk
from attnbench.store.anonymous import GPU, HOST, Anonymizer, names_here, users_in
from attnbench.store.header import RunHeader
from attnbench.store.layout import Layout, run_id_of
from attnbench.store.schema import ROW_KEY, SCHEMA
from attnbench.store.sealed import write_sealed

#: A repository keeps every version of a file for ever.
MAX_BYTES = 5_000_000

_SALT_BYTES = 32

#: Columns written by people or by libraries, where a name may stand within a sentence.
_SENTENCES = ("reasons", "commit_subject")

#: Columns somebody chose the words of: a name of theirs must not be left there.
_CHOSEN = frozenset({"suite", "container_digest"})


@dataclass(frozen=True, slots=True)
class PublishedFile:
    """A file that was written to be seen."""

    path: Path
    num_runs: int
    num_rows: int
    num_bytes: int

    @property
    def is_too_big(self) -> bool:
        return self.num_bytes > MAX_BYTES


def publish(layout: Layout, path: Path, run_ids: Sequence[str] = ()) -> PublishedFile:
    """Write the folder's own runs (`run_ids`; none: all) to `path`.

    The caller holds the folder's lock exclusively: readers must not meet a file that changes.
    Raises UsageError for a run that is not there or a name that does not end in .parquet, DataError
    if a name would be left in the file, ResultsFolderError or InfrastructureError if it cannot be
    written.
    """
    if path.suffix != ".parquet":
        raise UsageError(f"{path}: what is published is one Parquet file; end it in .parquet")
    table, headers = _own(layout, run_ids)
    anonymizer = _anonymizer(layout, table, headers)
    table = _public_rows(table, anonymizer)
    headers = [
        replace(header, argv=tuple(anonymizer.argument(word) for word in header.argv))
        for header in headers
    ]
    for where, text in _leaks(table, headers, anonymizer):
        raise DataError(
            f"{where} holds a path or a name, {text!r}, and would be published as it is; nothing "
            "was written: publish other runs with --run, or rename it and measure again"
        )
    if path.parent.name == layout.published.name:  # of this folder or of another
        disk.make_folder(path.parent)
    write_sealed(path, [table], headers)
    return PublishedFile(path, len(headers), table.num_rows, path.stat().st_size)


def chosen_runs(run_ids: Sequence[str], known: Collection[str], root: Path) -> list[str]:
    """`run_ids`, each once, `last` read as the newest. Raises UsageError for one not known."""
    newest = max(known, default="")
    chosen = {newest if run_id == "last" else run_id for run_id in run_ids}
    for run_id in sorted(chosen):
        if run_id not in known:
            raise UsageError(
                f"--run {run_id or 'last'}: no such run in {root}; the newest is {newest or 'none'}"
            )
    return sorted(chosen)


def betrayed_columns(table: pa.Table) -> tuple[str, ...]:
    """Columns of published rows whose names are not hashes: somebody copied a private file."""
    return tuple(
        name
        for name, form in (("hostname", HOST), ("device_uuid", GPU))
        if any(value and not form.fullmatch(value) for value in table[name].unique().to_pylist())
    )


def _own(layout: Layout, run_ids: Sequence[str]) -> tuple[pa.Table, list[RunHeader]]:
    """Rows and headers of runs of this folder, in an order that depends on nothing else."""
    segments = layout.segments()
    rests = list(layout.remains(segments))
    headers = {
        header.run_id: header
        for segment in segments
        for header in segment.file.headers()
        if header.run_id not in segment.hidden
    }
    for contents, _ in rests:
        run_id = run_id_of(contents.path)
        headers.setdefault(run_id, contents.header or RunHeader.salvaged(run_id))
    wanted = sorted(chosen_runs(run_ids, headers, layout.root) or headers)
    if not wanted:
        raise UsageError(f"{layout.root}: no run of its own to publish; measure one: attnbench run")
    chosen = pc.field("run_id").isin(wanted)
    tables = [segment.file.read(SCHEMA.names, segment.visible(chosen)) for segment in segments]
    tables += [rest.filter(chosen) for _, rest in rests]
    table = pa.concat_tables([SCHEMA.empty_table(), *tables])
    table = table.sort_by([(name, "ascending") for name in ROW_KEY]).combine_chunks()
    return table, [headers[run_id] for run_id in wanted]


def _anonymizer(layout: Layout, table: pa.Table, headers: Sequence[RunHeader]) -> Anonymizer:
    hosts, users, homes = names_here()
    sentences = [text for name in _SENTENCES for text in _texts(table[name])]
    words = [word for header in headers for word in header.argv]
    return Anonymizer(
        _salt(layout),
        hosts=hosts.union(_texts(table["hostname"])),
        users=users | users_in([*sentences, *words]),
        homes=homes,
        gpus=_texts(table["device_uuid"]),
    )


def _salt(layout: Layout) -> bytes:
    """The folder's own salt, made the first time. Raises DataError for a damaged one."""
    path = layout.publish_salt
    with disk.writing(path):
        if not path.exists():
            temporary = path.with_name(f"{path.name}.tmp")
            disk.remove_file(temporary)
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                disk.write_all(descriptor, secrets.token_hex(_SALT_BYTES).encode())
            finally:
                os.close(descriptor)
            disk.replace_file(temporary, path)
        text = path.read_bytes()
    try:
        salt = bytes.fromhex(text.decode())
    except ValueError:
        salt = b""
    if len(salt) != _SALT_BYTES:
        raise DataError(
            f"{path}: not {_SALT_BYTES} bytes as hex digits; remove it (machines then get other "
            "names in what is published from now on)"
        )
    return salt


def _public_rows(table: pa.Table, anonymizer: Anonymizer) -> pa.Table:
    changes = {
        "hostname": anonymizer.host,
        "device_uuid": anonymizer.gpu,
        **dict.fromkeys(_SENTENCES, anonymizer.text),
    }
    for name, change in changes.items():
        field = SCHEMA.field(name)
        values: list[Any] = table[name].to_pylist()
        is_list = pa.types.is_list(field.type)
        changed = [[change(text) for text in v] if is_list else change(v) for v in values]
        table = table.set_column(SCHEMA.get_field_index(name), field, pa.array(changed, field.type))
    return table


def _leaks(
    table: pa.Table, headers: Sequence[RunHeader], anonymizer: Anonymizer
) -> Iterator[tuple[str, str]]:
    """(where, text) of everything that still identifies somebody."""
    for field in SCHEMA:
        if field.name in ("hostname", "device_uuid"):
            continue
        for text in _texts(table[field.name]):
            if anonymizer.betrays(text, named=field.name in _CHOSEN):
                yield f"column {field.name}", text
    for header in headers:
        known = header.to_json()
        for name in ("argv", "spec", "options", "environment", "plan"):
            for text in _strings(known[name]):
                if anonymizer.betrays(text, named=False):
                    yield f"the {name} of run {header.run_id}", text


def _texts(column: pa.ChunkedArray) -> set[str]:
    """The different texts of a column of texts, of lists of them or of maps by text; else none."""
    kind = column.type
    if pa.types.is_map(kind):
        keys = [key for value in column.to_pylist() for key, _ in value or ()]
        return set(keys)
    if pa.types.is_list(kind) and pa.types.is_string(kind.value_type):
        column = pc.list_flatten(column)
    elif not pa.types.is_string(kind):
        return set()
    return {text for text in pc.unique(column).to_pylist() if text}


def _strings(value: Any) -> Iterator[str]:
    """All texts within a value of JSON."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from (key, *_strings(item))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item)
