"""`attnbench`: one verb, one function. Heavy rooms are imported by the verb that needs them."""

from __future__ import annotations

import inspect
import os
import signal
import sys
import tempfile
import traceback
from typing import Annotated, Any

import typer
import typer.core

import attnbench
from attnbench.cli import (
    acknowledge,
    asv,
    bisect,
    choose,
    dashboard,
    doctor,
    gate,
    history,
    init,
    itl,
    manifest,
    nightly,
    results,
    run,
    selection,
    traffic,
    upgrade,
    verify,
)
from attnbench.errors import AttnBenchError, ExitCode

#: Verbs that take --resume.
_RESUMED = frozenset({"run", "nightly"})


class _Stopped(BaseException):
    """Carries what ended a verb past typer, which would turn all of it into exit 1."""

    def __init__(self, cause: BaseException, verb: str) -> None:
        self.cause = cause
        self.verb = verb


class _Verbs(typer.core.TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()  # a reader that went away is found here, not at exit
        except (KeyboardInterrupt, BrokenPipeError, EOFError) as error:
            raise _Stopped(error, ctx.invoked_subcommand or "") from error
        return result


app = typer.Typer(
    name="attnbench",
    cls=_Verbs,
    help="Which attention kernel do I run, how fast is it, and what will an upgrade do to it?",
    epilog=(
        "Exit codes: 0 no regression, 1 regression confirmed, 2 usage or data error, 3 undecided, "
        "4 incomplete or infrastructure failure."
    ),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(attnbench.__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    return None


app.command()(init.init)
app.command()(nightly.nightly)
app.command()(run.run)
app.command()(verify.verify)
app.command()(doctor.doctor)
app.command()(selection.backends)
app.command()(selection.explain)
app.command()(selection.matrix)
app.command()(upgrade.upgrade)
app.command()(traffic.traffic)
app.command()(itl.itl)
app.command()(choose.choose)
app.command()(history.compare)
app.command()(history.history)
app.command()(acknowledge.acknowledge)
app.command()(gate.gate)
app.command()(bisect.bisect)
app.command()(dashboard.dashboard)
app.add_typer(results.results_app, name="results")
app.add_typer(manifest.manifest_app, name="manifest")
app.command(
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "help_option_names": [],
    }
)(asv.asv)

for _command in app.registered_commands:
    # Typer keeps the line breaks of a docstring, but for its first paragraph's.
    paragraphs = inspect.cleandoc(getattr(_command.callback, "__doc__", "") or "").split("\n\n")
    _command.help = "\n\n".join(paragraph.replace("\n", " ") for paragraph in paragraphs)


def main(arguments: list[str] | None = None) -> None:
    """Entry point. Errors raised on purpose are one line; a bug is a report file and exit 4."""
    for stop in (signal.SIGTERM, signal.SIGHUP):
        # How CI, systemd and a closed terminal stop a night: as Ctrl-C does. Not under nohup.
        if signal.getsignal(stop) == signal.SIG_DFL:
            signal.signal(stop, signal.default_int_handler)
    try:
        app(args=arguments, standalone_mode=True)
    except AttnBenchError as error:
        print(f"attnbench: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except _Stopped as stopped:
        if isinstance(stopped.cause, BrokenPipeError):
            # The reader of stdout went away (`| head`): not our error, and nobody listens.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(ExitCode.OK)
        kept = "; what was measured is stored, --resume last goes on"
        print(f"attnbench: stopped{kept if stopped.verb in _RESUMED else ''}", file=sys.stderr)
        sys.exit(ExitCode.INCOMPLETE)
    # A traceback must never become exit 1, which means "regression".
    except Exception:
        _report_bug(traceback.format_exc())
        sys.exit(ExitCode.INCOMPLETE)


def _report_bug(trace: str) -> None:
    text = f"attnbench {attnbench.__version__}\n{sys.argv}\n\n{trace}"
    cause = trace.strip().splitlines()[-1]
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="attnbench-report-", suffix=".txt", delete=False, encoding="utf-8"
        ) as report:
            report.write(text)
        where = f"the report is {report.name}"
    except OSError as error:
        print(text, file=sys.stderr)
        where = f"the report is above ({error.strerror} in {tempfile.gettempdir()})"
    print(f"attnbench: unexpected {cause}; this is a bug, {where}", file=sys.stderr)


if __name__ == "__main__":
    main()
