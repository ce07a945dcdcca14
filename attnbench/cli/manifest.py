"""`attnbench manifest`: measured stacks as commits of a git repository."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from attnbench.cli.output import Format, FormatOption, ResultsOption, emit, note
from attnbench.errors import AttnBenchError, UsageError

if TYPE_CHECKING:
    from attnbench.history.runs import RunSummary
    from attnbench.settings import Settings

manifest_app = typer.Typer(
    help="The manifest repository: one commit per measured stack.", no_args_is_help=True
)


def _path(text: str) -> Path:
    if not text:
        raise UsageError("--repository '': name a folder, or leave it out")
    return Path(text)


RepositoryOption = Annotated[
    Path | None,
    typer.Option(help="Manifest repository. Default: settings.", parser=_path, metavar="FOLDER"),
]

LOG_COLUMNS = ("commit", "stack", "device", "first_measured", "changed")


@manifest_app.command()
def write(repository: RepositoryOption = None, results: ResultsOption = None) -> None:
    """Give every stack in the results folder its commit. Writing again changes nothing."""
    from attnbench.history.panel import Panel
    from attnbench.settings import load_settings
    from attnbench.store import ResultsFolder

    folder = ResultsFolder(results if results is not None else load_settings().results)
    note(_write(_repository(repository), Panel.of(folder).runs))


@manifest_app.command()
def log(
    device: Annotated[str, typer.Option(help="Only stacks of this device class.")] = "",
    repository: RepositoryOption = None,
    format: FormatOption = Format.TABLE,
) -> None:
    """List the stacks, oldest first, and what changed since the one before on the same device."""
    from attnbench.history.manifest import stacks_of
    from attnbench.history.stacks import change_text, changed_versions, stack_before

    path = _repository(repository)
    stacks = stacks_of(path)
    chosen = [stack for stack in stacks if device in ("", stack.device_class)]
    if not chosen:
        known = ", ".join(sorted({stack.device_class for stack in stacks})) or "none"
        note(f"{path}: no stacks to list; devices in it: {known}")
    rows = []
    for stack in chosen:
        before = stack_before(stacks, stack)
        rows.append(
            {
                "commit": stack.commit[:10],
                "stack": stack.key,
                "device": stack.device_class,
                "first_measured": f"{stack.first_measured:%Y-%m-%d %H:%M}",
                "changed": change_text(changed_versions(before.versions, stack.versions))
                if before
                else "first stack",
            }
        )
    emit(rows, format, LOG_COLUMNS)


@manifest_app.command()
def show(
    stack: Annotated[str, typer.Argument(help="A commit or a stack of `log`, or a prefix.")],
    repository: RepositoryOption = None,
    format: FormatOption = Format.TABLE,
) -> None:
    """List everything one stack has: packages, driver, CUDA and container."""
    from attnbench.history.manifest import find_stack, stacks_of

    found = find_stack(stacks_of(_repository(repository)), stack)
    note(
        f"{found.commit[:10]} {found.key} on {found.device_class}, "
        f"first measured {found.first_measured:%Y-%m-%d %H:%M} UTC"
    )
    rows = [{"name": name, "version": text} for name, text in sorted(found.versions.items())]
    emit(rows, format, ("name", "version"))


def record_stacks(settings: Settings, runs: Sequence[RunSummary]) -> None:
    """After a night: commit stacks that are new, where the settings name a manifest repository.

    What goes wrong is said and no more: the night's verdict does not hang on it, and the next
    night, or `attnbench manifest write`, writes what is missing.
    """
    if not settings.manifest:
        return
    try:
        note(_write(Path(settings.manifest), runs))
    except AttnBenchError as error:
        note(f"the manifest repository was not written: {error}")


def _write(path: Path, runs: Sequence[RunSummary]) -> str:
    from attnbench.history.manifest import write_manifest
    from attnbench.history.stacks import stacks_of_runs

    written = write_manifest(path, stacks_of_runs(runs))
    moved = (
        f"; {written.moved} that were there have new hashes, for a stack was measured earlier "
        "than was known"
        if written.moved
        else ""
    )
    unknown = sum(not run.stack_id for run in runs)
    without = f"; {unknown} runs do not know their stack" if unknown else ""
    count = f"{len(written.stacks)} stack{'' if len(written.stacks) == 1 else 's'}"
    return f"{path}: {count}, {written.added} of them new{moved}{without}"


def _repository(given: Path | None) -> Path:
    from attnbench.settings import load_settings

    if given is not None:
        return given
    if path := load_settings().manifest:
        return Path(path)
    raise UsageError(
        'no manifest repository is named; write manifest = "stacks" into attnbench.toml, or give '
        "--repository FOLDER"
    )
