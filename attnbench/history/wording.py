"""A series, a ratio, a commit in the words that summaries, tables and pages share."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from attnbench.history.rule import Estimate
from attnbench.history.series import RunValue
from attnbench.history.series_verdict import SeriesVerdict


def repro_command(identity: Mapping[str, Any]) -> str:
    """The command that measures one point again, ready to paste."""
    words = []
    options = {"shape": "", "dtype": str(identity["dtype"])}
    for word in str(identity["workload"]).split():
        key, equals, value = word.partition("=")
        if equals and key in options:
            options[key] = value
        else:
            words.append(word)
    shape = options["shape"] or str(identity["shape"] or "")
    backend = str(identity["backend"])
    if identity["variant"]:
        backend += f":{identity['variant']}"
    command = ["attnbench", "run", " ".join(words)]
    if shape:
        command += ["--shape", shape]
    command += ["--backend", backend, "--dtype", options["dtype"]]
    return shlex.join(command)


def percent(ratio: float) -> str:
    """`+18.4 %` of 1.184; `x3.2` from twice as slow on, where a percentage reads badly."""
    if ratio >= 2:
        return f"x{ratio:.3g}"
    return f"{(ratio - 1) * 100:+.1f} %"


def interval_text(found: Estimate) -> str:
    """`+18.4 % [+15.9, +21.0]`."""
    if not found.enough:
        return percent(found.ratio)
    low, high = ((x - 1) * 100 for x in (found.low, found.high))
    return f"{percent(found.ratio)} [{low:+.1f}, {min(high, 9999.9):+.1f}]"


def duration_text(seconds: float) -> str:
    """`6 min 12 s`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def short_commit(commit: str) -> str:
    """Seven digits of a commit, keeping what says that the tree was not clean."""
    name, plus, mark = commit.partition("+")
    return name[:7] + plus + mark


def level_text(value: RunValue) -> str:
    """Where a level began: the commit if known, else the day."""
    return short_commit(value.commit) or f"{value.started_at:%Y-%m-%d}"


def since_text(value: RunValue) -> str:
    """The same with the day: a commit may be that of many nights."""
    day = f"{value.started_at:%Y-%m-%d}"
    return f"{short_commit(value.commit)}, {day}" if value.commit else day


def one_line(text: str) -> str:
    """`text` without anything that moves a cursor or breaks a line."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split(" ")).strip()


def point_text(verdict: SeriesVerdict) -> str:
    """`CPU_ATTN decode 16q1s4k llama-3-8b fp32`: the parts a person looks for first."""
    identity = verdict.series.identity
    backend = str(identity["backend"])
    if identity["variant"]:
        backend += f"[{identity['variant']}]"
    shape = identity["shape"] or f"{identity['num_heads']}/{identity['num_kv_heads']} heads"
    known = {
        str(identity["batch_spec"]),
        f"shape={identity['shape']}",
        f"dtype={identity['dtype']}",
    }
    rest = [w for w in str(identity["workload"]).split() if w not in known]
    metric = verdict.series.key.metric
    words = [backend, identity["phase"], identity["batch_spec"], shape, identity["dtype"], *rest]
    if metric != "attention":
        words.append(metric)
    return " ".join(str(word) for word in words)


def status_reasons(value: RunValue) -> tuple[str, ...]:
    """Why a run of a point ended as it did; of a wrong output at least how wrong."""
    if not value.reasons and value.max_abs_error is not None:
        return (f"max error {value.max_abs_error:.3g}",)
    return value.reasons
