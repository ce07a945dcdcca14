"""`attnbench asv`: asv with attnbench's plug-in loaded."""

from __future__ import annotations

import typer

from attnbench.cli.output import note


def asv(ctx: typer.Context) -> None:
    """Run asv with attnbench's suites: run, continuous, compare, publish, preview ...

    Everything after `asv` is asv's own; its exit status is passed on. `attnbench asv --help` is
    asv's help. ATTNBENCH_PRESET chooses the preset `run` and `continuous` measure (default: smoke).
    """
    from attnbench.asv_bridge.command import asv_command

    arguments = ctx.args or ["--help"]
    if arguments[0] in ("-h", "--help"):
        note(
            "asv with attnbench's suites: attnbench asv run, continuous BASE HEAD, compare A B, "
            "publish,\npreview. ATTNBENCH_PRESET=smoke, nightly or full: what is run. docs/asv.md\n"
        )
    raise typer.Exit(asv_command(arguments))
