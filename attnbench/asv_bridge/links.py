"""Links between asv's site and our pages: which of asv's graphs shows a series, and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attnbench.dashboard.script import data_script
from attnbench.errors import UsageError

#: The data file of our pages that names asv's graphs; without asv beside them it says null.
DATA_NAME = "asv"

#: Of every page of asv: leads from the graph that is looked at to the series it shows.
SCRIPT_NAME = "asv-link.js"


def graphs_of(html_dir: Path) -> dict[str, dict[str, list[str]]]:
    """The graphs of asv's site that have a workload and a backend: name -> axis -> asv's values.

    Raises UsageError when asv's index is not as expected.
    """
    path = html_dir / "index.json"
    try:
        benchmarks = json.loads(path.read_text(encoding="utf-8"))["benchmarks"]
        graphs = {str(name): _axes(one) for name, one in benchmarks.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{path}: not an index of asv's ({error}); run attnbench asv publish"
        ) from error
    return {
        name: axes
        for name, axes in sorted(graphs.items())
        if {"workload", "backend"} <= axes.keys()
    }


def write_links(html_dir: Path, pages: Path) -> None:
    """Tell our pages in `pages`, a folder of asv's site, which graphs are beside them."""
    if not (pages / "data").is_dir():
        return
    graphs = graphs_of(html_dir)
    text = data_script(DATA_NAME, {"graphs": graphs} if graphs else None)
    (pages / "data" / f"{DATA_NAME}.js").write_text(text, encoding="ascii")


def _axes(benchmark: Mapping[str, Any]) -> dict[str, list[str]]:
    names, params = benchmark["param_names"], benchmark["params"]
    return {str(name): [str(v) for v in values] for name, values in zip(names, params, strict=True)}
