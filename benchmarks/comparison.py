"""Which backend is best: docs/comparison.md, from the runs in results/published/.

    python benchmarks/comparison.py [--published FOLDER] [--out FILE]

Reads published runs only, so that the same repository gives the same page on every machine.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

from attnbench.history.best import best_backends
from attnbench.history.best_page import comparison_page
from attnbench.history.runs import runs_of
from attnbench.history.series_rows import series_of
from attnbench.history.verdict import NEEDED_COLUMNS
from attnbench.store import ResultsFolder

ROOT = Path(__file__).resolve().parents[1]
COMMAND = "python benchmarks/comparison.py"

#: Device classes the page is for, and what is typed on such a machine.
AWAITED = {
    "nvidia-h200": """\
attnbench run --suite decode --suite mixed --suite mla --suite prefill --preset full \\
    --timer graph --l2 cold --l2 hot --replicates 3
attnbench results export results/published/h200.parquet --public --run last
python benchmarks/comparison.py""",
}


def page(published: Path) -> str:
    """The whole page, as Markdown."""
    with TemporaryDirectory() as folder:
        # A folder without runs of its own: those would count before the published ones.
        (Path(folder) / "published").symlink_to(published.resolve())
        table = ResultsFolder(folder).table(NEEDED_COLUMNS)
    return comparison_page(best_backends(series_of(table)), runs_of(table), COMMAND, AWAITED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--published", type=Path, default=ROOT / "results" / "published")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "comparison.md")
    arguments = parser.parse_args()
    arguments.out.write_text(page(arguments.published), encoding="utf-8")
    print(arguments.out)


if __name__ == "__main__":
    main()
