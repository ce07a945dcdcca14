"""What the overview says before any script has run."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from attnbench.dashboard.alarm_entries import (
    absent_entries,
    entry,
    group_entries,
    is_slower,
    known_entries,
    leading,
    open_groups,
    refused_entries,
    status_entry,
    timed_entry,
)
from attnbench.dashboard.watch import Watch
from attnbench.history.alarms import Alarms, alarms_of
from attnbench.history.groups import AlarmGroup
from attnbench.history.panel import Panel
from attnbench.history.rule import Reason, Verdict
from attnbench.history.runs import RunSummary
from attnbench.history.series_verdict import SeriesVerdict
from attnbench.history.summary import headline, undecided_advice, verdict_counts
from attnbench.history.verdict import Judgement
from attnbench.history.wording import duration_text, interval_text, short_commit

#: Entries of one kind on the overview; every series is in the searchable list below them.
_LISTED = 50

#: Newest runs in the overview's table; all of them are on the conditions page.
_RUNS = 30

#: A word and a sign, so that colour is never the only thing that tells verdicts apart.
_SIGNS = {
    Verdict.REGRESSION: "▲",
    Verdict.IMPROVEMENT: "▼",
    Verdict.UNCHANGED: "=",
    Verdict.UNDECIDED: "?",
    Verdict.INVALID: "×",
}

_SENTENCES = {
    Verdict.REGRESSION: "Something got slower or stopped working.",
    Verdict.IMPROVEMENT: "Nothing got slower; something got faster.",
    Verdict.UNCHANGED: "Nothing got slower beyond the noise.",
    Verdict.UNDECIDED: "Something may have got slower; this run cannot tell.",
    Verdict.INVALID: "Something could not be compared with earlier runs.",
}
_FIRST = "The next run is judged by this one."


def overview_context(
    judgement: Judgement,
    panel: Panel,
    runs: Sequence[RunSummary],
    run_index: Mapping[str, int],
    published: Collection[str],
    watch: Watch,
    late: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Values of the overview's template; `late` is `late_levels.late_section`."""
    run = judgement.run
    verdict = judgement.verdict
    # What is silent is told even where nobody asked about acknowledgements.
    alarms = judgement.alarms or alarms_of(judgement, panel)
    absent = absent_entries(alarms, {one.run_id: one for one in runs})
    known = known_entries(alarms)
    refused = refused_entries(alarms)
    sections, lead = _sections(judgement, panel, alarms, watch)
    return {
        "headline": headline(judgement).removeprefix("attnbench nightly · "),
        "verdict": str(verdict),
        "sign": _SIGNS[verdict],
        "sentence": _sentence(judgement, late["total"] if late else 0),
        "counts": _sentence_case(verdict_counts(judgement)),
        "exit_code": int(judgement.exit_code),
        "incomplete": judgement.incomplete,
        "run": _run_row(run, run_index, published),
        "environment": judgement.environment.text if judgement.environment else "",
        "lead": lead,
        "sections": [one for one in (*sections, late) if one and one["total"]],
        "missing": len(judgement.missing),
        "absent": absent[:_LISTED],
        "num_absent": len(absent),
        "known": known[:_LISTED],
        "num_known": len(known),
        "refused": refused[:_LISTED],
        "warnings": list(alarms.warnings[:_LISTED]),
        "dropped": list(judgement.dropped[:_LISTED]),
        "num_dropped": len(judgement.dropped),
        "new": len(judgement.because(Reason.NO_BASELINE)),
        "num_judged": len(judgement.verdicts),
        "runs": [_run_row(one, run_index, published) for one in reversed(runs[-_RUNS:])],
        "num_runs": len(runs),
    }


def told_series(judgement: Judgement) -> set[str]:
    """Ids of the series that the page says something of in any case."""
    quiet = (Verdict.UNCHANGED, Verdict.IMPROVEMENT)
    return {v.series.id for v in judgement.verdicts if v.verdict not in quiet}


def _sentence(judgement: Judgement, num_late: int) -> str:
    is_new = all(v.reasons[0] is Reason.NO_BASELINE for v in judgement.verdicts)
    sentence = _FIRST if is_new else _SENTENCES[judgement.verdict]
    if judgement.shard:
        sentence += f" Shard {judgement.shard} of the plan only; see the runs below."
    if num_late:
        sentence += f" Slower for some time: {num_late}, below."
    return sentence


def _sentence_case(text: str) -> str:
    return text[:1].upper() + text[1:]


def _sections(
    judgement: Judgement, panel: Panel, alarms: Alarms, watch: Watch
) -> tuple[list[dict[str, Any]], list[Mapping[str, Any]]]:
    """The lists of the page, what must be known first; and what its head says of them."""
    groups = open_groups(judgement, alarms)
    slower, lost = ([g for g in groups if is_slower(g) is kind] for kind in (True, False))
    told = {
        kind: group_entries(own[:_LISTED], panel, watch.clocks, watch.repository)
        for kind, own in (("slower", slower), ("lost", lost))
    }
    in_lost = {v.series.key for v in judgement.because(Reason.STATUS_CHANGED)}
    failed = [
        v for v in judgement.failures if v.series.key not in in_lost and not alarms.is_known(v)
    ]
    undecided = [v for v in judgement.of(Verdict.UNDECIDED) if not alarms.is_known(v)]
    back = judgement.because(Reason.STATUS_RECOVERED)
    faster = judgement.because(Reason.FASTER_THAN_FLOOR)
    return [
        _group_section("lost", "Support lost", lost, told["lost"]),
        _group_section("slower", "Slower", slower, told["slower"]),
        _section("undecided", "Undecided", undecided, _undecided_entry),
        _section("invalid", "Not comparable", judgement.of(Verdict.INVALID), _note_entry),
        _section("failed", "Failed", failed, status_entry),
        _section("faster", "Faster", faster, timed_entry),
        _section("back", "Works again", back, status_entry),
    ], leading([*told["lost"], *told["slower"]])


def _group_section(
    kind: str, title: str, groups: Sequence[AlarmGroup], entries: list[dict[str, Any]]
) -> dict[str, Any]:
    points = sum(len(group.members) for group in groups)
    return {
        "kind": kind,
        "title": title,
        "total": len(groups),
        "points": points if points > len(groups) else 0,
        "entries": entries,
    }


def _section(
    kind: str, title: str, verdicts: Sequence[SeriesVerdict], entry_of: Any
) -> dict[str, Any]:
    return {
        "kind": kind,
        "title": title,
        "total": len(verdicts),
        "points": 0,
        "entries": [entry_of(verdict) for verdict in verdicts[:_LISTED]],
    }


def _undecided_entry(verdict: SeriesVerdict) -> dict[str, Any]:
    change = interval_text(verdict.estimate) if verdict.estimate else ""
    return entry(verdict, change, undecided_advice(verdict))


def _note_entry(verdict: SeriesVerdict) -> dict[str, Any]:
    return entry(verdict, "", verdict.note)


def _run_row(
    run: RunSummary, run_index: Mapping[str, int], published: Collection[str]
) -> dict[str, Any]:
    return {
        "id": run.run_id,
        "number": run_index[run.run_id],
        "at": f"{run.started_at:%Y-%m-%d %H:%M} UTC",
        "commit": short_commit(run.commit),
        "subject": run.commit_subject,
        "stack": run.stack_id[:7],
        "device": run.device_class,
        "published": run.run_id in published,
        "suites": ", ".join(run.suites),
        "points": run.num_points,
        "statuses": ", ".join(f"{n} {s}" for s, n in sorted(run.points.items())),
        "duration": duration_text(run.duration_s),
    }
