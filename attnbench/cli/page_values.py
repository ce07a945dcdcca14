"""What the pages show beside the series: who wins where, saved answers, the night watch."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from attnbench.cli.output import note

if TYPE_CHECKING:
    from attnbench.dashboard import Answers
    from attnbench.dashboard.watch import Watch
    from attnbench.history.acknowledge import Acknowledgement
    from attnbench.history.panel import Panel
    from attnbench.settings import Settings
    from attnbench.store import ResultsFolder


class PageValues(TypedDict):
    """Arguments of `attnbench.dashboard.render`."""

    choices: dict[str, Any]
    answers: Answers


#: Of so many points at most, newest runs first, the pages say who wins: seconds, not minutes.
_MOST_POINTS = 30_000


def page_values(folder: ResultsFolder, panel: Panel, settings: Settings, runs: int) -> PageValues:
    """Read both; made-up times stand in only where there are no others.

    Args:
        runs: how many of the newest runs have the default's regret told.
    """
    from attnbench.choose.maps import choices_of
    from attnbench.choose.tries import read_tries
    from attnbench.dashboard import read_answers

    newest = _newest_runs(panel)
    tries = read_tries(folder, runs=newest) or read_tries(folder, timer="fake", runs=newest)
    answers = read_answers(settings.answers)
    for problem in answers.problems:
        note(problem)
    choices = choices_of(tries, folder.published_runs(), runs)
    if len(newest) < panel.num_runs:
        for one in choices["maps"]:
            one["notes"].append(f"of the newest {len(newest)} runs")
    return {"choices": choices, "answers": answers}


def _newest_runs(panel: Panel) -> list[str]:
    """As many of the newest runs as have `_MOST_POINTS` together, the newest one in any case."""
    found: list[str] = []
    points = 0
    for run in reversed(panel.runs):
        points += run.num_points
        if found and points > _MOST_POINTS:
            break
        found.append(run.run_id)
    return found


def watch_of(
    folder: ResultsFolder, panel: Panel, accepted: tuple[Acknowledgement, ...] = ()
) -> Watch:
    """The gate's own record, clocks of the runs, and the clone of the working directory."""
    from attnbench.dashboard.watch import Watch
    from attnbench.history.attribution import locked_clocks

    runs = zip(panel.runs, panel.is_published, strict=True)
    own = [run.run_id for run, is_theirs in runs if not is_theirs]
    return Watch(
        record=_gate_record(folder, panel, own),
        clocks=locked_clocks(folder, own),
        repository=Path.cwd(),
        accepted=accepted,
    )


#: A record of more series-nights than this takes seconds: it is counted again once in so many runs.
_SMALL = 100_000
_RUNS_BETWEEN = 7


def _gate_record(folder: ResultsFolder, panel: Panel, own: list[str]) -> dict[str, Any]:
    """`gate_record` with `as_of`, the newest run it counts; kept in `gate.json` of the results."""
    from attnbench.dashboard.pages import write_text_atomically
    from attnbench.history.self_record import gate_record, rehearsals_of, shards_of

    path = folder.path / "gate.json"
    if panel.num_series * panel.num_runs > _SMALL:
        try:
            kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if kept["as_of"] in own[-_RUNS_BETWEEN:]:
                return kept
        except (OSError, ValueError, KeyError, TypeError):
            pass  # not there, or not ours: counted again
    headers = folder.headers()
    record = gate_record(
        panel, rehearsals=rehearsals_of(headers, own), shards=shards_of(headers, own)
    )
    record["as_of"] = own[-1] if own else ""
    # Results that may only be read have pages too.
    with contextlib.suppress(OSError):
        write_text_atomically(path, json.dumps(record))
    return record
