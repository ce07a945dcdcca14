"""What the pages show beside the series: who wins where, and saved answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypedDict

from attnbench.cli.output import note

if TYPE_CHECKING:
    from attnbench.dashboard import Answers
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
    from attnbench.choose.stored import read_rows
    from attnbench.dashboard import read_answers

    rows = read_rows(folder) or read_rows(folder, timer="fake")
    answers = read_answers(settings.answers)
    for problem in answers.problems:
        note(problem)
    return {"choices": choices_of(rows, folder.published_runs(), runs), "answers": answers}
