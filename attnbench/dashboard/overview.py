"""What the overview says before any script has run."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from attnbench.history.rule import Reason, Verdict
from attnbench.history.runs import RunSummary
from attnbench.history.series_verdict import SeriesVerdict
from attnbench.history.summary import (
    duration_text,
    headline,
    interval_text,
    level_text,
    point_text,
    repro_command,
    short_commit,
    undecided_advice,
    verdict_counts,
)
from attnbench.history.verdict import Judgement

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
    runs: Sequence[RunSummary],
    run_index: Mapping[str, int],
    published: Collection[str] = (),
) -> dict[str, Any]:
    """Values of the overview's template."""
    run = judgement.run
    verdict = judgement.verdict
    return {
        "headline": headline(judgement).removeprefix("attnbench nightly · "),
        "verdict": str(verdict),
        "sign": _SIGNS[verdict],
        "sentence": _sentence(judgement),
        "counts": _sentence_case(verdict_counts(judgement)),
        "exit_code": int(judgement.exit_code),
        "incomplete": judgement.incomplete,
        "run": _run_row(run, run_index, published),
        "environment": judgement.environment.text if judgement.environment else "",
        "sections": [section for section in _sections(judgement) if section["total"]],
        "missing": len(judgement.missing),
        "dropped": list(judgement.dropped[:_LISTED]),
        "num_dropped": len(judgement.dropped),
        "new": len(judgement.because(Reason.NO_BASELINE)),
        "num_judged": len(judgement.verdicts),
        "runs": [_run_row(one, run_index, published) for one in reversed(runs[-_RUNS:])],
        "num_runs": len(runs),
    }


def _sentence(judgement: Judgement) -> str:
    is_new = all(v.reasons[0] is Reason.NO_BASELINE for v in judgement.verdicts)
    sentence = _FIRST if is_new else _SENTENCES[judgement.verdict]
    if judgement.shard:
        sentence += f" Shard {judgement.shard} of the plan only; see the runs below."
    return sentence


def _sentence_case(text: str) -> str:
    return text[:1].upper() + text[1:]


def _sections(judgement: Judgement) -> list[dict[str, Any]]:
    slower = judgement.because(Reason.CONFIRMED, Reason.SLOWER_THAN_FLOOR)
    lost = judgement.because(Reason.STATUS_CHANGED)
    failed = [v for v in judgement.failures if v not in lost]
    back = judgement.because(Reason.STATUS_RECOVERED)
    return [
        _section("slower", "Slower", slower, _timed_entry),
        _section("lost", "Support lost", lost, _status_entry),
        _section("undecided", "Undecided", judgement.of(Verdict.UNDECIDED), _undecided_entry),
        _section("invalid", "Not comparable", judgement.of(Verdict.INVALID), _note_entry),
        _section("failed", "Failed", failed, _status_entry),
        _section("faster", "Faster", judgement.because(Reason.FASTER_THAN_FLOOR), _timed_entry),
        _section("back", "Works again", back, _status_entry),
    ]


def _section(
    kind: str, title: str, verdicts: Sequence[SeriesVerdict], entry: Any
) -> dict[str, Any]:
    return {
        "kind": kind,
        "title": title,
        "total": len(verdicts),
        "entries": [entry(verdict) for verdict in verdicts[:_LISTED]],
    }


def _entry(verdict: SeriesVerdict, change: str, detail: str) -> dict[str, Any]:
    since = verdict.since
    return {
        "id": verdict.series.id,
        "point": point_text(verdict),
        "change": change,
        "detail": detail,
        "since": level_text(since) if since else "",
        "since_at": f"{since.started_at:%Y-%m-%d}" if since else "",
        "again": repro_command(verdict.series.identity),
    }


def _timed_entry(verdict: SeriesVerdict) -> dict[str, Any]:
    assert verdict.estimate is not None
    detail = ", ".join(str(reason).replace("_", " ") for reason in verdict.reasons)
    return _entry(verdict, interval_text(verdict.estimate), detail)


def _status_entry(verdict: SeriesVerdict) -> dict[str, Any]:
    before = verdict.status_before
    now = verdict.subject.status
    change = f"{before} → {now}" if before and before is not now else str(now)
    return _entry(verdict, change, "; ".join(verdict.subject.reasons))


def _undecided_entry(verdict: SeriesVerdict) -> dict[str, Any]:
    change = interval_text(verdict.estimate) if verdict.estimate else ""
    return _entry(verdict, change, undecided_advice(verdict))


def _note_entry(verdict: SeriesVerdict) -> dict[str, Any]:
    return _entry(verdict, "", verdict.note)


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
