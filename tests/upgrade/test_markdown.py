"""The Markdown of an upgrade: what it merges, shortens and escapes, and the verb that writes it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from attnbench.cli.main import main
from attnbench.upgrade import assess as assess_module
from attnbench.upgrade.cells import Cell
from attnbench.upgrade.compare import Step, compare
from attnbench.upgrade.markdown import markdown
from attnbench.upgrade.probe import FACTS, Candidate, CellAnswer, VersionAnswer

CELLS = tuple(Cell(head_size=size) for size in (32, 64, 96, 128, 192, 256))


def answer(cell: Cell, *candidates: tuple[str, str], **changes: Any) -> CellAnswer:
    listed = tuple(
        Candidate(name, place, (why,) if why else (), False, ())
        for place, (name, why) in enumerate(candidates)
    )
    backend = next((one.backend for one in listed if not one.reasons), None)
    values: dict[str, Any] = {
        "cell": cell,
        "backend": backend,
        "backend_class": None,
        "behind": {},
        "candidates": listed,
        "refused": "" if backend else "ValueError: nothing",
        "depends_on": (),
        "untrusted": (),
        "not_evaluated": (),
        "not_asked": (),
        "model_override": "",
    }
    return CellAnswer(**(values | changes))


def version(name: str, capability: str, answers: Sequence[CellAnswer]) -> VersionAnswer:
    cells = {one.cell.text: one for one in answers}
    return VersionAnswer(
        name, capability, "executed", "cuda", ("A", "B"), {}, FACTS, 0.0, cells=cells
    )


def step(capability: str, why: str = "dropped", changed: int = len(CELLS)) -> Step:
    """The first `changed` cells go from A to B, A's reason being `why`."""
    before = [answer(cell, ("A", ""), ("B", "")) for cell in CELLS]
    after = [answer(cell, ("A", why), ("B", "")) for cell in CELLS[:changed]] + before[changed:]
    return compare(version("1.0", capability, before), version("2.0", capability, after))


def rows(text: str, title: str) -> list[list[str]]:
    section = text.partition(f"### {title}\n")[2].partition("\n#")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [[one.strip() for one in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_devices_that_change_alike_share_a_row() -> None:
    text = markdown([step("8.0"), step("8.9"), step("9.0", "too new")], {}, "title")
    both, other = rows(text, "Another default")
    assert both[0] == "8.0, 8.9"
    assert both[4].startswith("A was dropped on 8.0, 8.9: dropped since 2.0")
    assert other[0] == "9.0"
    assert other[4].startswith("A was dropped on 9.0: too new since 2.0")


def test_other_cells_or_costs_do_not_share_a_row() -> None:
    steps = [step("8.0"), step("8.9", changed=2)]
    assert [row[0] for row in rows(markdown(steps, {}, "t"), "Another default")] == ["8.0", "8.9"]
    steps = [step("8.0"), step("8.9")]
    costs = {one.change_id: "slower" for one in steps[0].changes}
    found = rows(markdown(steps, costs, "t"), "Another default")
    assert [(row[0], row[5]) for row in found] == [("8.0", "slower"), ("8.9", "")]


def test_long_lists_are_cut_and_the_larger_change_stands_first() -> None:
    text = markdown([step("8.0", changed=1), step("9.0")], {}, "t")
    first, second = rows(text, "Another default")
    assert first[2:4] == [
        "6",
        "`head_size=32`; `head_size=64`; `head_size=96`; `head_size=128`; and 2 more",
    ]
    assert second[2:4] == ["1", "`head_size=32`"]


def test_unchanged_devices_are_one_line() -> None:
    text = markdown([step("8.0", changed=0), step("9.0", changed=0), step("10.0")], {}, "t")
    assert "Nothing changes on 8.0, 9.0 (6 cells)." in text
    assert "| 8.0 |" not in text
    assert "| 10.0 | 0 | 6 | 0 | 0 | 0 | 0 |" in text


def test_bars_breaks_and_markup_stay_inside_their_cell() -> None:
    hostile = "a | b\n<img src=x> *c* `d` \\"
    text = markdown([step("9.0", hostile, changed=1)], {}, "t")
    (row,) = rows(text, "Another default")
    assert len(row) == 5
    assert r"a \| b \<img src=x> \*c\* \`d\` \\" in row[4]
    odd = Cell(model="x`|y")
    before, after = answer(odd, ("A", "")), answer(odd, ("B", ""))
    changed = compare(version("1.0", "9.0", [before]), version("2.0", "9.0", [after]))
    (row,) = rows(markdown([changed], {}, "t"), "Another default")
    assert row[3] == r"`x'\|y head_size=128`"


def test_it_says_what_it_rests_on() -> None:
    doubtful = answer(CELLS[0], ("A", ""), untrusted=("C is not installed",))
    unknown = answer(CELLS[1], ("A", ""), not_evaluated=("selection: a new field",))
    known = [answer(cell, ("A", "")) for cell in CELLS[:2]]
    one = compare(version("1.0", "9.0", known), version("2.0", "9.0", [doubtful, unknown]))
    text = markdown([one], {}, "t", "attnbench upgrade --from x")
    assert "Written by `attnbench upgrade --from x`." in text
    assert "4 answers (executed); 1 of them are not certain" in text
    assert "flashinfer-cubin yes" in text
    assert "- `head_size=64` on 1 device: selection: a new field" in text


@pytest.fixture
def answered(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(assess_module, "assess", lambda *_args, **_named: [step("9.0")])
    return ["upgrade", "--from", "vllm==1.0", "--to", "vllm==2.0", "-c", "9.0"]


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    return int(stopped.value.code or 0)


def test_the_verb_writes_markdown_and_a_page(
    answered: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "upgrade.html"
    assert run(*answered, "--html", str(page), "--format", "markdown") == 0
    said = capsys.readouterr()
    assert said.out.startswith("# vLLM 1.0 → 2.0: attention backends\n")
    assert f"page: {page}" in said.err
    assert "A → B" in page.read_text(encoding="utf-8")


def test_a_page_that_cannot_be_written_is_said_before_anything_is_asked(
    answered: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*answered, "--html", str(tmp_path / "none" / "x.html")) == 2
    assert "there is no folder" in capsys.readouterr().err
    dependency = ["upgrade", "--from", "triton==3.1", "--to", "triton==3.2"]
    assert run(*dependency, "--html", str(tmp_path / "x.html")) == 2
    assert "--html is of two versions of vLLM" in capsys.readouterr().err
