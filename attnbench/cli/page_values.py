"""What the pages show beside the series: who wins where, saved answers, the night watch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from attnbench.cli.output import note

if TYPE_CHECKING:
    from attnbench.dashboard import Answers
    from attnbench.dashboard.watch import Watch
    from attnbench.history.panel import Panel
    from attnbench.settings import Settings
    from attnbench.store import ResultsFolder


class PageValues(TypedDict):
    """Arguments of `attnbench.dashboard.render`."""

    choices: dict[str, Any]
    answers: Answers


def page_values(folder: ResultsFolder, settings: Settings, runs: int) -> PageValues:
    """Read both; made-up times stand in only where there are no others.

    Args:
        runs: how many of the newest runs have the default's regret told.
    """
    from attnbench.choose.maps import choices_of
    from attnbench.choose.tries import read_tries
    from attnbench.dashboard import read_answers

    tries = read_tries(folder) or read_tries(folder, timer="fake")
    answers = read_answers(settings.answers)
    for problem in answers.problems:
        note(problem)
    return {"choices": choices_of(tries, folder.published_runs(), runs), "answers": answers}


def watch_of(folder: ResultsFolder, panel: Panel) -> Watch:
    """The gate's own record, clocks of the runs, and the clone of the working directory."""
    from attnbench.dashboard.watch import Watch
    from attnbench.history.attribution import locked_clocks
    from attnbench.history.self_record import gate_record, rehearsals_of

    own = [
        run.run_id for run, theirs in zip(panel.runs, panel.is_published, strict=True) if not theirs
    ]
    return Watch(
        record=gate_record(panel, rehearsals=rehearsals_of(folder, own)),
        clocks=locked_clocks(folder, own),
        repository=Path.cwd(),
    )
