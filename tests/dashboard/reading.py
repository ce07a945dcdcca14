"""Reads a data file the way a script tag would."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_data(site: Path, name: str) -> Any:
    """The value that `data/NAME.js` assigns."""
    text = (site / "data" / f"{name}.js").read_text()
    return json.loads(text[text.index("]=") + 2 : -2])


def index_rows(site: Path) -> list[dict[str, Any]]:
    """The index as one dict per series."""
    index = read_data(site, "index")
    return [
        {
            name: column[i] if isinstance(column, list) else column["words"][column["at"][i]]
            for name, column in index["columns"].items()
        }
        for i in range(index["count"])
    ]


def series_id(site: Path, backend: str, workload: str) -> str:
    """Id of the `attention` series of a backend and workload."""
    (found,) = [
        r["id"] for r in index_rows(site) if r["backend"] == backend and r["workload"] == workload
    ]
    return str(found)
