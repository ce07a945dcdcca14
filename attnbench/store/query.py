"""SQL over the stored rows, by DuckDB, in a database that lives as long as the query."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pyarrow as pa

from attnbench.errors import UsageError
from attnbench.store.layout import Segment

#: What makes DuckDB take a path for a pattern.
_GLOB = re.compile(r"[*?\[]")

_MEND = "columns: `attnbench results query 'DESCRIBE results'`"


def run_query(
    sql: str, segments: Sequence[Segment], remains: pa.Table, published: pa.Table
) -> pa.Table:
    """The result of one SELECT over a view `results`: sealed files, read lazily, and `remains`.

    A second view, `published`, says of which runs the rows are published ones, and in which file.

    The SQL can read these files and nothing else, and write nothing: no other file, network or
    setting. Raises UsageError with DuckDB's first line for SQL it refuses, CorruptDataError if it
    was a file that made it fail.
    """
    import duckdb

    with duckdb.connect(":memory:") as connection:
        connection.execute("SET TimeZone = 'UTC'")
        connection.execute("SET python_enable_replacements = false")
        connection.register("attnbench_remains", remains)
        connection.register("published", published)
        sources = ["SELECT * FROM attnbench_remains"]
        paths = []
        for number, segment in enumerate(segments):
            path = str(segment.file.path.resolve())
            if not segment.file.is_current or _GLOB.search(path):
                # An older version lacks columns (the next compaction adds them); a path with
                # DuckDB's wildcards would be read as a pattern.
                name = f"attnbench_read_{number}"
                connection.register(name, segment.file.read(where=segment.visible()))
                sources.append(f"SELECT * FROM {name}")
                continue
            paths.append(path)
            hidden = ", ".join(_quoted(run_id) for run_id in sorted(segment.hidden))
            condition = f" WHERE run_id NOT IN ({hidden})" if hidden else ""
            sources.append(f"SELECT * FROM read_parquet({_quoted(path)}){condition}")
        allowed = ", ".join(_quoted(path) for path in paths)
        connection.execute(f"SET allowed_paths = [{allowed}]")
        connection.execute("SET enable_external_access = false")
        connection.execute("SET lock_configuration = true")
        try:
            connection.execute(f"CREATE VIEW results AS {' UNION ALL BY NAME '.join(sources)}")
            result = connection.sql(parse_select(sql))
            table: pa.Table = result.to_arrow_table()
        except duckdb.Error as error:
            if not isinstance(error, (duckdb.ProgrammingError, duckdb.PermissionException)):
                # It may be the data and not the SQL: that is told by the data.
                for segment in segments:
                    segment.file.verify()
            raise UsageError(f"SQL {sql.strip()!r}: {_first_line(error)}; {_MEND}") from error
        return table


def parse_select(sql: str) -> str:
    """The one SELECT (or EXPLAIN) that `sql` is. Raises UsageError for anything else."""
    import duckdb

    try:
        statements = duckdb.extract_statements(sql)
    except duckdb.Error as error:
        raise UsageError(f"SQL {sql.strip()!r}: {_first_line(error)}; {_MEND}") from error
    allowed = (duckdb.StatementType.SELECT, duckdb.StatementType.EXPLAIN)
    if len(statements) != 1 or statements[0].type not in allowed:
        raise UsageError(
            f"SQL {sql.strip()!r}: results are only read; write one SELECT, "
            "e.g. SELECT backend, count(*) FROM results GROUP BY backend"
        )
    return str(statements[0].query)


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
