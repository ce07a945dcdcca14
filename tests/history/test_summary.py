"""The summary, word for word."""

from __future__ import annotations

import itertools
import shlex
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnbench.history.rule import Estimate
from attnbench.history.runs import runs_of
from attnbench.history.summary import causes_of, summary_markdown, summary_text
from attnbench.history.summary_fit import Room, Section, fitted
from attnbench.history.verdict import judge
from attnbench.history.wording import (
    duration_text,
    interval_text,
    percent,
    repro_command,
    short_commit,
)
from attnbench.store.record import Measurement, stack_id
from tests.history.fake import DEVICE, NEW_STACK, OLD_STACK, history, row, table_of, timed

GOLDEN = """\
attnbench nightly · 2026-11-20 · cpu-xeon-2c · 0bc0ffe (3 commits since the last run)
verdict   REGRESSION: 1 confirmed, 1 support change, incomplete     exit 1
measured  21 points: 19 OK, 1 INCORRECT, 1 UNSUPPORTED  6 min 12 s
slower    CPU_ATTN decode 16q1s4k llama-3-8b fp32   +27.8 % [+25.6, +30.7]   since \
0ac0ffe, 2026-11-19
          again: attnbench run 16q1s4k --shape llama-3-8b --backend CPU_ATTN --dtype fp32
changed   FLEX_ATTENTION decode 4q1s4k phi-3-mini fp32: OK -> INCORRECT (max error 0.31)
failed    FLEX_ATTENTION decode 4q1s4k phi-3-mini fp32 INCORRECT: max error 0.31
pages     dashboards/site/index.html"""


def text_of(rows: list[object], **options: object) -> str:
    return summary_text(judge(table_of(rows)), **options)  # type: ignore[arg-type]


def test_golden_summary() -> None:
    judgement = judge(table_of(history()))
    facts = {"pages": "dashboards/site/index.html", "duration_s": 372.2, "commits_since": 3}
    text = summary_text(judgement, **facts)  # type: ignore[arg-type]
    assert text == GOLDEN
    assert len(text.splitlines()) <= 10


def test_colours_only_when_asked() -> None:
    judgement = judge(table_of(history()))
    colored = summary_text(judgement, color=True)
    assert "\x1b[1;31mverdict   \x1b[0m" in colored
    assert "\x1b" not in summary_text(judgement)


def test_first_run_says_that_there_is_no_baseline() -> None:
    text = text_of([*timed([1e-3])])
    assert "(first run)" in text
    assert "verdict   UNCHANGED: nothing to compare with yet     exit 0" in text
    assert "new       1 of 1 points have no baseline yet: this run is their first" in text


def test_undecided_says_what_to_do() -> None:
    noisy = text_of([*timed([1e-3, 1.5e-3, 0.7e-3, 1.3e-3, 0.8e-3, 1.6e-3])])
    assert "undecided CPU_ATTN decode 4q1s4k llama-3-8b fp32" in noisy
    assert "too noisy to tell; run again on a quiet machine" in noisy
    assert "exit 3" in noisy
    few = text_of([*timed([1e-3, 1e-3], replicates=1)])
    assert "run again with --replicates 3" in few


def test_failures_missing_and_invalid_have_their_reasons() -> None:
    rows = [
        row(0),
        row(0, backend="TORCH_SDPA", timer="event"),
        row(1, status="CRASH", reasons=("worker killed by SIGKILL (out of memory?)",)),
        row(1, backend="TORCH_SDPA", timer="graph"),
    ]
    text = summary_text(judge(table_of(rows), planned=["0123456789abcdef"]))
    assert "failed    CPU_ATTN decode 4q1s4k llama-3-8b fp32 CRASH: worker killed by SIG" in text
    assert "missing   1 planned points have no row; go on: attnbench nightly --resume last" in text
    assert (
        "invalid   TORCH_SDPA decode 4q1s4k llama-3-8b fp32: timer was event and is graph" in text
    )
    assert "incomplete" in text


def test_a_wrong_output_is_named_first_on_the_first_night_and_on_every_other() -> None:
    rows = [
        row(night, backend=backend, status=status, reasons=(), max_abs_error=0.25)
        for night in range(3)
        for backend, status in (
            ("A", "ERROR"),
            ("B", "CRASH"),
            ("C", "OOM"),
            ("D", "TIMEOUT"),
            ("E", "INCORRECT"),
        )
    ]
    for nights in (1, 3):
        text = text_of([*rows[: 5 * nights]])
        assert "failed    E decode 4q1s4k llama-3-8b fp32 INCORRECT: max error 0.25" in text
        assert "and 2 more: attnbench history" in text
        assert "incomplete     exit 4" in text


def test_long_lists_are_cut() -> None:
    words = [f"{n}q1s1k dtype=fp32" for n in range(2, 17)]
    rows = [r for w in words for r in timed([1e-3] * 6 + [2e-3], workload=w)]
    rows += [row(6, 100 + r, workload=w, seconds=2e-3) for w in words for r in range(10)]
    # Every other point stays as it was: with most of them slower they would be one alarm.
    rows += [r for w in words for r in timed([1e-3] * 7, workload=w.replace("q1s1k", "q1s2k"))]
    rows += [r for w in words for r in timed([1e-3] * 7, workload=w.replace("q1s1k", "q1s4k"))]
    text = text_of([*rows])
    assert "and 12 more: attnbench history" in text
    assert text.count("again: ") == 3


def test_a_kernel_that_broke_everywhere_is_told_once() -> None:
    words = [f"{n}q1s1k dtype=fp32" for n in range(2, 17)]
    rows = [r for w in words for r in timed([1e-3] * 6 + [2e-3], workload=w)]
    rows += [row(6, 100 + r, workload=w, seconds=2e-3) for w in words for r in range(10)]
    rows += timed([1e-3] * 7, workload="2q1k dtype=fp32")
    rows += timed([1e-3] * 7, backend="TORCH_SDPA", workload="2q1k dtype=fp32")
    text = text_of([*rows])
    assert "slower    CPU_ATTN: 15 of 16 series   x2 in the middle   since 06c0ffe" in text
    assert "worst: CPU_ATTN decode 10q1s1k llama-3-8b fp32   x2 [+100.0, +100.0]" in text
    assert text.count("again: ") == 1


def test_what_changed_with_it_and_how_to_find_out_which() -> None:
    rows = [
        replace(r, stack=NEW_STACK if r.run_id >= row(6).run_id else OLD_STACK)
        for r in timed([*[1e-3] * 6, 2e-3])
    ]
    rows += [replace(row(6, 100 + r, seconds=2e-3), stack=NEW_STACK) for r in range(10)]
    rows = [replace(r, stack_id=stack_id(r.stack)) for r in rows]
    table = table_of(rows)
    judgement = judge(table)
    causes = causes_of(judgement, runs_of(table))
    text = summary_text(judgement, causes=causes)
    assert "with: commits 05c0ffe..06c0ffe and + gxx 12.2.0, torch 2.12.0 -> 2.13.0" in text
    (line,) = [line for line in text.splitlines() if "find: " in line]
    assert line.strip().startswith("find: attnbench bisect")
    assert "find: `attnbench bisect" in summary_markdown(judgement, causes=causes)
    assert causes_of(judge(table_of(timed([1e-3] * 6))), []) == {}


def test_support_lost_by_many_is_told_once() -> None:
    words = [f"{n}q1s1k dtype=fp32" for n in range(2, 8)]
    rows = [r for w in words for r in timed([1e-3] * 6, workload=w)]
    rows += [row(6, workload=w, status="UNSUPPORTED", reasons=("no fp32",)) for w in words]
    text = text_of([*rows])
    assert "changed   CPU_ATTN: 6 of 6 series   now UNSUPPORTED   since 06c0ffe" in text
    assert "OK -> UNSUPPORTED (no fp32)" in text
    assert text.count("no fp32") == 1


def test_a_changed_stack_is_named() -> None:
    text = text_of([*timed([1e-3] * 8)])
    assert "stack     + gxx 12.2.0, torch 2.12.0 -> 2.13.0, triton 3.6.0 -> 3.7.1" in text


def test_names_cannot_move_the_cursor_or_make_markup() -> None:
    reason = "evil \x1b[2J\nverdict OK | `x` <img src=x> [a](http://b) *b*"
    rows = [row(0), row(1, status="UNSUPPORTED", reasons=(reason,))]
    text = text_of([*rows])
    assert "\x1b" not in text
    assert sum(line.startswith("verdict") for line in text.splitlines()) == 1
    markdown = summary_markdown(judge(table_of(rows)))
    assert "<img" not in markdown
    assert r"\| \`x\` &lt;img src=x&gt; \[a\](http://b) \*b\*" in markdown


def test_markdown_has_the_same_lines() -> None:
    judgement = judge(table_of(history()))
    markdown = summary_markdown(judgement, pages="site/index.html")
    assert markdown.startswith(f"### attnbench nightly · 2026-11-20 · {DEVICE} · ")
    assert "`attnbench run 16q1s4k --shape llama-3-8b --backend CPU_ATTN --dtype fp32`" in markdown
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(GOLDEN.splitlines()) - 1


@pytest.mark.parametrize(
    ("workload", "variant", "expected"),
    [
        (
            "8q1s4k dtype=fp32 shape=phi-3-mini softcap=30 block=32",
            "",
            "attnbench run '8q1s4k block=32 softcap=30' --shape phi-3-mini --backend CPU_ATTN",
        ),
        ("8q1s4k", "fa3", "attnbench run 8q1s4k --shape llama-3-8b --backend CPU_ATTN:fa3"),
    ],
)
def test_repro_command(workload: str, variant: str, expected: str) -> None:
    measured = row(workload=workload, variant=variant)
    identity = {name: getattr(measured, name) for name in measured.__dataclass_fields__}
    assert repro_command(identity).startswith(expected)


def test_repro_command_measures_the_same_point() -> None:
    from attnbench.workload import Workload

    for text in (
        "8q1s4k",
        "2q1k_4q1s8k block=32 dtype=fp16 shape=llama-3-70b tp=4",
        "4q1s4k heads=8/2 head_size=64 dtype=fp32 window=128",
    ):
        measured = row(workload=text)
        identity = {name: getattr(measured, name) for name in measured.__dataclass_fields__}
        words = shlex.split(repro_command(identity))
        parts = words[2].split()
        options = dict(zip(words[3::2], words[4::2], strict=True))
        parts += [f"{k.removeprefix('--')}={v}" for k, v in options.items() if k != "--backend"]
        assert Workload.parse(" ".join(parts)).id == Workload.parse(text).id


def test_small_texts() -> None:
    assert percent(1.184) == "+18.4 %"
    assert percent(0.9) == "-10.0 %"
    assert percent(3.214) == "x3.21"
    assert interval_text(Estimate(1.184, 1.159, 1.21)) == "+18.4 % [+15.9, +21.0]"
    assert interval_text(Estimate(1.5, 1.5, 1.5, enough=False)) == "+50.0 %"
    assert [duration_text(s) for s in (3.21, 59, 372, 7260)] == [
        "3.2 s",
        "59 s",
        "6 min 12 s",
        "2 h 1 min",
    ]
    assert short_commit("0123456789+dirty") == "0123456+dirty"


SECTIONS = st.lists(
    st.builds(
        lambda entries, style: (entries, style),
        st.lists(st.lists(st.just("text"), min_size=1, max_size=5), min_size=1, max_size=8),
        st.sampled_from(["red", ""]),
    ),
    max_size=14,
)


@settings(deadline=None)
@given(SECTIONS, st.integers(1, 12))
def test_any_sections_fit_and_nothing_is_left_unsaid(
    drawn: list[tuple[list[list[str]], str]], most: int
) -> None:
    sections = [Section(f"s{i}", entries, style) for i, (entries, style) in enumerate(drawn)]
    lines = fitted(sections, most)
    assert len(lines) <= most
    shown = [line.label for line in lines if line.label not in ("", "more")]
    assert shown == [section.label for section in sections[: len(shown)]]
    left = [f"{len(s.entries)} {s.label}" for s in sections[len(shown) :]]
    more = [line.text for line in lines if line.label == "more"]
    assert more == ([", ".join(left) + ": attnbench history"] if left else [])
    # The most important is never told shorter than another one of its size.
    told = [lines.index(line) for line in lines if line.label] + [len(lines)]
    lengths = [b - a for a, b in itertools.pairwise(told)][: len(shown)]
    for (one, this), (other, that) in itertools.combinations(zip(drawn, lengths, strict=False), 2):
        assert this >= that or one[0] != other[0]


@settings(deadline=None)
@given(SECTIONS, st.integers(1, 12))
def test_no_line_is_left_empty_that_would_say_more(
    drawn: list[tuple[list[list[str]], str]], most: int
) -> None:
    sections = [Section(f"s{i}", entries, style) for i, (entries, style) in enumerate(drawn)]
    lines = fitted(sections, most)
    told = {line.label: i for i, line in enumerate(lines) if line.label}
    ends = [*list(told.values())[1:], len(lines)]
    for section, end in zip(sections, ends, strict=False):
        if section.label in told:
            long = end - told[section.label]
            longer = [n for room in Room if (n := len(section.lines(room))) > long]
            assert len(lines) + min(longer, default=most) - long > most or not longer


def test_the_gravest_keep_their_names_when_details_do_not_fit() -> None:
    three = [["A", "with", "again"], ["B", "with", "again"], ["C", "with"]]
    slower = Section("slower", [*three, ["D"]])
    others = Section("waiting", [["x"], ["y"]])
    found = [(line.label, line.text) for line in fitted([slower, others], 7)]
    assert found == [
        ("slower", "A"),
        ("", "with"),
        ("", "again"),
        ("", "B"),
        ("", "C"),
        ("", "and 1 more: attnbench history"),
        ("waiting", "x   and 1 more: attnbench history"),
    ]


def test_the_gravest_says_what_to_type_before_others_are_told() -> None:
    slower = Section("slower", [["A", "with", "again"]])
    others = [Section(f"s{i}", [["x"]]) for i in range(6)]
    assert [(line.label, line.text) for line in fitted([slower, *others], 5)] == [
        ("slower", "A"),
        ("", "with"),
        ("", "again"),
        ("s0", "x"),
        ("more", "1 s1, 1 s2, 1 s3, 1 s4, 1 s5: attnbench history"),
    ]


def test_what_does_not_fit_is_counted_by_points() -> None:
    rows = timed([1e-3] * 8, workload="64q1s1k dtype=fp32")
    nights = {"slower": 1, "lost": 1, "crash": 1, "invalid": 1, "waiting": 5, "new": 7}
    for number, (kind, count) in enumerate(nights.items()):
        for batch in range(count):
            rows += night_of(kind, f"{1 + batch}q1s{1 + number}k dtype=fp32")
    judgement = judge(table_of(rows), planned=["0123456789abcdef"])
    lines = summary_text(judgement, pages="site/index.html", reference="none: gone").splitlines()
    assert len(lines) == 10
    (more,) = [line for line in lines if line.startswith("more")]
    waiting = len(judgement.flagged_points())
    assert waiting >= 5
    for told in (f" {waiting} waiting", " 7 new"):
        assert told in more, more


KINDS = ("slower", "faster", "lost", "works", "crash", "new", "noisy", "waiting", "invalid")


@settings(deadline=None, max_examples=30)
@given(st.dictionaries(st.sampled_from(KINDS), st.integers(0, 5)), st.booleans())
def test_a_night_has_ten_lines_at_most(kinds: dict[str, int], has_pages: bool) -> None:
    rows = timed([1e-3] * 8, workload="64q1s1k dtype=fp32")
    for number, (kind, count) in enumerate(kinds.items()):
        for batch in range(count):
            rows += night_of(kind, f"{1 + batch}q1s{1 + number}k dtype=fp32")
    judgement = judge(table_of(rows), planned=["0123456789abcdef"])
    facts = {"pages": "site/index.html", "reference": "none: gone"} if has_pages else {}
    lines = summary_text(judgement, **facts).splitlines()  # type: ignore[arg-type]
    assert len(lines) <= 10
    assert lines[1].startswith("verdict")
    if kinds.get("slower"):
        assert lines[3].startswith("slower")
    if has_pages:
        assert lines[-1] == "pages     site/index.html"


def night_of(kind: str, workload: str) -> list[Measurement]:
    """A series of eight nights that ends as `kind` says."""
    quiet = timed([1e-3] * 7, workload=workload)
    if kind in ("slower", "waiting"):
        rows = [*quiet, *timed([2e-3], 7, workload=workload)]
        again = range(10 if kind == "slower" else 0)
        return rows + [row(7, 100 + r, workload=workload, seconds=2e-3) for r in again]
    if kind == "faster":
        return [*quiet, *timed([0.5e-3], 7, workload=workload)]
    if kind in ("lost", "crash"):
        status = "UNSUPPORTED" if kind == "lost" else "CRASH"
        return [*quiet, row(7, workload=workload, status=status, reasons=("no fp32",))]
    if kind == "works":
        refused = [row(n, workload=workload, status="UNSUPPORTED") for n in range(7)]
        return [*refused, *timed([1e-3], 7, workload=workload)]
    if kind == "invalid":
        return [*quiet, *timed([1e-3], 7, workload=workload, timer="event")]
    if kind == "noisy":
        levels = [1e-3, 1.9e-3, 0.5e-3, 1.8e-3, 0.6e-3, 1.7e-3, 0.7e-3, 1.6e-3]
        return timed(levels, workload=workload)
    return timed([1e-3], 7, workload=workload)
