"""`attnbench init`: a project of one's own, ready for its first night."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from attnbench.cli.output import note


def init(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Where: the root of a repository, or a new one.")
    ] = Path("."),
) -> None:
    """Write settings, suites, pages and a GitHub Actions workflow; nothing is overwritten."""
    from attnbench.scaffold import write_project

    written = write_project(folder)
    for path in written:
        print(os.path.relpath(path))
    if not (folder / ".git").exists():
        note(
            f"{folder} is not the root of a git repository: GitHub reads workflows only there "
            "(git init, or move .github)"
        )
    enter = "" if folder == Path(".") else f"cd {folder} && "
    note(f"try it without a GPU's clock: {enter}attnbench nightly --preset smoke --timer fake")
