"""The comparison of backends as a page of the documentation, from nothing but stored rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

from attnbench.history.best import Best, Contender
from attnbench.history.runs import RunSummary
from attnbench.history.wording import interval_text, short_commit

_INTRODUCTION = """\
# Which backend is best

Best backend of each workload, metric `attention` (one layer's call), by phase, batch and context,
from the runs published in `results/published/`. Generated: after publishing another run, type

```
{command}
```

Backends of one row were timed in one run, with one timer, L2 state and execution mode. *Context* is
what lies in the KV cache before the longest query. *Margin* is how much longer the next one takes,
with its 99 % interval from the processes that measured it ([verdict.md](verdict.md)); without an
interval there were too few. It is **bold** where it is beyond the timer's noise; *noisy* marks a
time that did not settle, which is never bold. *No time* lists backends that refused or failed, with
their status; their reasons are on the backends page and in `attnbench results query`.
`attnbench history --by backend` prints the same of your own runs.
"""

_HEAD = (
    "| phase | batch | query | context | workload | best | µs | next | margin | others, µs "
    "| no time |\n"
    "|---|--:|--:|--:|---|---|--:|---|---|---|---|"
)


def comparison_page(
    bests: Sequence[Best],
    runs: Sequence[RunSummary],
    command: str,
    awaited: Mapping[str, str],
) -> str:
    """Markdown: a table for each device class, timer, L2 state and execution mode.

    `runs` are those of the rows; `command` writes the page; `awaited` is device class -> command
    that measures it, listed as not run yet while no run of that class is there.
    """
    known = {run.run_id: run for run in runs}
    parts = [_INTRODUCTION.format(command=command)]
    for how, group in groupby(bests, key=lambda best: best.how):
        listed = list(group)
        parts.append(f"## {how.text}\n")
        parts.extend(
            _run_line(known[run_id]) for run_id in sorted({best.run_id for best in listed})
        )
        parts.append("\n".join([_HEAD, *(_line(best) for best in listed)]) + "\n")
    missing = {name: how for name, how in awaited.items() if name not in _classes(bests)}
    if missing:
        parts.append("## Not run yet\n")
        parts.append("Nothing above says anything about these devices.\n")
        parts.extend(
            f"- `{name}`:\n\n  ```\n{_indented(how)}\n  ```\n" for name, how in missing.items()
        )
    return "\n".join(parts)


def _classes(bests: Sequence[Best]) -> set[str]:
    return {best.how.device_class for best in bests}


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())


def _run_line(run: RunSummary) -> str:
    packages = ", ".join(entry.replace("==", " ") for entry in run.stack)
    driver = f", driver {run.driver_version}" if run.driver_version else ""
    return (
        f"Run `{run.run_id}` on {run.device_name}: suites {', '.join(run.suites) or 'none'}, "
        f"commit `{short_commit(run.commit) or 'unknown'}`, {packages}{driver}.\n"
    )


def _line(best: Best) -> str:
    following = best.contenders[1] if len(best.contenders) > 1 else None
    margin = interval_text(best.margin) if best.margin else ""
    cells = (
        best.phase,
        str(best.batch),
        str(best.query_len),
        str(best.seq_len - best.query_len),
        f"`{best.workload}`",
        best.winner.backend + _mark(best.winner),
        f"{best.winner.seconds * 1e6:.1f}",
        following.backend + _mark(following) if following else "",
        f"**{margin}**" if best.is_clear else margin,
        ", ".join(f"{c.backend}{_mark(c)} {c.seconds * 1e6:.1f}" for c in best.contenders[2:]),
        ", ".join(f"{name} {status}" for name, status in best.untimed),
    )
    return "| " + " | ".join(cells) + " |"


def _mark(contender: Contender) -> str:
    return " *noisy*" if contender.status == "NOISY" else ""
