"""What must be in place before an asv command: environment variables, the grid, the history."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from attnbench.asv_bridge import asv_api
from attnbench.asv_bridge.grid import GRID_VARIABLE
from attnbench.asv_bridge.outer import link_environments, pin_runner
from attnbench.errors import ExitCode, InfrastructureError, ResultsFolderError, UsageError
from attnbench.settings import Settings, find_settings_file, load_settings

_prepared = False


def prepare(command: str, config: asv_api.AsvConfig) -> None:
    """Make this process ready for asv's subcommand `command`; a second call does nothing.

    Always: the outer site-packages for install_command, and a machine file. Before a command that
    runs the suites: the grid. Before `publish`: the history of the results folder, as asv results.

    Raises: UsageError for a wrong preset or suite, InfrastructureError when planning fails.
    """
    global _prepared
    if _prepared:
        return
    link_environments(config.env_dir)
    pin_runner(config.env_dir.parent)
    if written := asv_api.remember_machine():
        print(f"attnbench: asv did not know this machine; wrote {written}", file=sys.stderr)
    os.environ.pop(GRID_VARIABLE, None)
    if command in asv_api.DISCOVERING:
        os.environ[GRID_VARIABLE] = str(_make_grid(config))
    elif command == "publish":
        _export_history(config)
    _prepared = True


def find_config(given: str | None) -> asv_api.AsvConfig:
    """The configuration asv will read: the file `given` after `--config`, or the one in here.

    Raises UsageError.
    """
    if given is not None:
        if not Path(given).is_file():
            raise UsageError(f"--config {given}: no such file; name an asv.conf.json")
        return asv_api.load_config(Path(given))
    for name in asv_api.CONFIG_NAMES:
        if Path(name).is_file():
            return asv_api.load_config(Path(name))
    raise UsageError(
        f"no asv.conf.json in {Path.cwd()}; go to the folder that has it, or give --config FILE"
    )


def check_repository(config: asv_api.AsvConfig) -> None:
    """Raises UsageError when `repo` is no folder, no git repository, or has no commit."""
    folder = config.folder / config.repo
    if ":" in config.repo and not folder.is_dir():
        return  # a URL: asv clones it
    if not folder.is_dir():
        raise UsageError(
            f"{folder}: no such folder; name a clone of the project as `repo` of "
            f"{config.path.name}, or make the stacks' repository: attnbench manifest write"
        )
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "--verify", "HEAD"],
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError as error:
        raise UsageError(
            f"asv needs git, which cannot be started ({error}); install git"
        ) from error
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise UsageError(
            f"{folder.resolve()}: not a git repository with a commit "
            f"({said[-1] if said else 'git failed'}); run asv in a clone of the project"
        )


def settings_of(config: asv_api.AsvConfig) -> Settings:
    """The settings that hold in asv's working directory."""
    return load_settings(find_settings_file(config.folder))


def _make_grid(config: asv_api.AsvConfig) -> Path:
    out = config.env_dir.parent / "grid.json"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "attnbench.asv_bridge.plan_grid"),
            *("--suites", str(config.benchmark_dir)),
            *("--results", str(config.env_dir.parent / "measurements")),
            *("--out", str(out)),
        ],
        cwd=config.folder,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"planning ended with {done.returncode}"]
        kind = UsageError if done.returncode == ExitCode.USAGE else InfrastructureError
        raise kind(said[-1])
    return out


def _export_history(config: asv_api.AsvConfig) -> None:
    from attnbench.asv_bridge.exporter import COLUMNS, export_to_asv
    from attnbench.history.manifest import is_manifest, stacks_of
    from attnbench.store import ResultsFolder

    folder = config.folder / settings_of(config).results
    repository = config.folder / config.repo
    stacks = stacks_of(repository) if is_manifest(repository) else None
    try:
        table = ResultsFolder(folder).table(COLUMNS)
    except ResultsFolderError:
        return  # nothing measured yet: asv publishes what it has itself
    outcome = export_to_asv(table, None, config.results_dir, stacks)
    print(
        f"attnbench: {outcome.series} series of {outcome.commits} "
        f"{'commits' if stacks is None else 'stacks'} from {folder}",
        file=sys.stderr,
    )
    for run_id, why in sorted(outcome.left_out.items()):
        print(f"attnbench: run {run_id} is left out: {why}", file=sys.stderr)
