"""The gate's own record (`history.self_record.gate_record`) as the page tells it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from attnbench.history.panel import NOT_PLANNED, Panel
from attnbench.history.runs import RunSummary
from attnbench.history.wording import short_commit

_RATES = ("picked", "confirmed", "undecided", "not_confirmed_yet")

#: Newest nights whose second looks are shown.
_NIGHTS = 30


def gate_context(
    record: Mapping[str, Any], panel: Panel, runs: Sequence[RunSummary]
) -> dict[str, Any]:
    """Values of the page's template."""
    false_alarms, power = record["false_alarms"], record["power"]
    return {
        "headline": _headline(record),
        "as_of": record.get("as_of", ""),
        "by_timer": [
            {
                "timer": row["timer"],
                "standing": row["standing"],
                **{name: rate_text(row[name]) for name in _RATES},
            }
            for row in false_alarms["by_timer"]
        ],
        "support": rate_text(false_alarms["support"]),
        "alarming": rate_text(false_alarms["alarming"]),
        "nights": false_alarms["nights"],
        "left_out": false_alarms["left_out"],
        "listed": _nights_listed(false_alarms["listed"], runs),
        "power": [
            {
                "timer": row["timer"],
                "step": f"+{row['step'] * 100:g} %",
                "trials": row["trials"],
                "picked": rate_text(row["picked"]),
                "confirmed": [rate_text(one) for one in row["confirmed"]],
            }
            for row in power["by_timer"]
        ],
        "followed": max((len(row["confirmed"]) for row in power["by_timer"]), default=0),
        "power_nights": power["nights"],
        "beside": power["beside"],
        "rehearsed": [
            {
                "timer": row["timer"],
                "factor": f"×{row['factor']:g}",
                "runs": row["runs"],
                **{name: rate_text(row[name]) for name in ("confirmed", "undecided")},
            }
            for row in record["rehearsed"]
        ],
        "looks": _second_looks(panel, runs),
    }


def rate_text(rate: Mapping[str, Any]) -> str:
    """`3 of 1,200 = 0.25 % [0.05, 0.73]`, the last two the limits in percent."""
    if not rate["of"]:
        return "none seen yet"
    share, low, high = (_percent(rate[name]) for name in ("rate", "low", "high"))
    return f"{rate['count']:,} of {rate['of']:,} = {share} % [{low}, {high}]"


def _percent(share: float) -> str:
    percent = share * 100
    # A limit of 0.003 % must not read as none.
    return f"{percent:.2g}" if 0 < percent < 1 else f"{percent:.1f}".removesuffix(".0")


def _headline(record: Mapping[str, Any]) -> str:
    alarming = record["false_alarms"]["alarming"]
    if not alarming["of"]:
        return "No night has measured the same build twice yet, so false alarms cannot be counted."
    nights = "night" if alarming["of"] == 1 else "nights"
    return (
        f"False alarms on {alarming['count']} of {alarming['of']} {nights} on which nothing had "
        f"changed; at most {_percent(alarming['high'])} % of such nights, at 95 % confidence."
    )


def _nights_listed(
    listed: Sequence[Mapping[str, Any]], runs: Sequence[RunSummary]
) -> list[dict[str, Any]]:
    numbers = {run.run_id: number for number, run in enumerate(runs)}
    return [
        {
            "number": numbers[night["run_id"]],
            "at": f"{runs[numbers[night['run_id']]].started_at:%Y-%m-%d %H:%M}",
            "device": night["device_class"],
            "commit": short_commit(night["commit"]),
            "series": night["series"],
            "alarms": night["alarms"],
        }
        for night in listed
        if night["run_id"] in numbers
    ]


def _second_looks(panel: Panel, runs: Sequence[RunSummary]) -> list[dict[str, Any]]:
    """How much of each of the newest nights was measured again, newest first."""
    rows = []
    for number in reversed(range(max(0, len(runs) - _NIGHTS), len(runs))):
        if panel.is_published[number]:
            continue
        run = runs[number]
        rows.append(
            {
                "number": number,
                "at": f"{run.started_at:%Y-%m-%d %H:%M}",
                "device": run.device_class,
                "commit": short_commit(run.commit),
                "series": int(np.count_nonzero(panel.status[:, number] != NOT_PLANNED)),
                "again": int(np.count_nonzero(panel.num_confirmations[:, number])),
            }
        )
    return rows
