"""Made-up times of three backends on an H200 over commits and stacks, and answers about them.

Also a script: `python -m tests.dashboard.choices_store FOLDER` fills FOLDER/results.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

from attnbench.cli.main import main
from attnbench.store import ResultsFolder
from attnbench.store.header import RunHeader
from attnbench.store.record import Measurement, stack_id
from attnbench.workload import load_suites
from tests.choose.fake import FA3, FLASHINFER, FLEX, TRITON, ended, timed
from tests.history.fake import HOSTILE

REQUESTS = (1, 4, 16, 64)
CONTEXTS = (1, 4, 16, 64)
"""Of decodes, in 1024 tokens."""
RUNS = 4
SLOW_RUN = 2
"""In which the default was slower."""
STACKS = (
    ("python==3.12.1", "torch==2.13.0", "vllm==0.22.1"),
    ("python==3.12.1", "torch==2.13.0", "vllm==0.30.0"),
)
WORDS = ("day.csv", "--representatives", "24", "--timer", "fake", "--format", "json")


def seconds_of(who: tuple[str, str], requests: int, tokens: float) -> float:
    """FlashInfer is fast where requests are few and long, FA3 where they are many."""
    work = 2e-8 * requests * tokens
    if who == FA3:
        return 8e-6 + work * (1 + 1.2 / requests)
    if who == FLASHINFER:
        return 12e-6 + work * 1.15
    return 10e-6 + work * 1.6


def on_stack(stack: tuple[str, ...]) -> dict[str, Any]:
    return {"stack": stack, "stack_id": stack_id(stack), "timer": "fake"}


def grid(run: int) -> Iterator[list[Measurement]]:
    """One night: decodes over batch and context, and three prompts."""
    more = on_stack(STACKS[run >= RUNS // 2])
    for requests in REQUESTS:
        for context in CONTEXTS:
            text = f"{requests}q1s{context}k"
            for who in (FA3, FLASHINFER, TRITON):
                level = seconds_of(who, requests, context * 1024.0)
                if who == FA3 and run == SLOW_RUN:
                    level *= 1.3
                each = [level * (1 + 2e-4 * i) for i in range(3)]
                yield timed(who, each, text, run, **more)
        yield ended(FLEX, "INCORRECT", f"{requests}q1s1k", run, **more,
                    reasons=(HOSTILE,))  # fmt: skip
    for prompt in (1, 2, 4):
        for who in (FA3, FLASHINFER, TRITON):
            level = 3e-5 * prompt**2 * {FA3: 1.0, FLASHINFER: 1.001, TRITON: 1.7}[who]
            each = [level * (1 + 1e-4 * i) for i in range(3)]
            yield timed(who, each, f"q{prompt}k", run, **more)


def fill(folder: Path, groups: Sequence[Sequence[Measurement]]) -> None:
    """One run with these rows."""
    rows = [one for group in groups for one in group]
    header = RunHeader.new(argv=(), spec="", plan=(), options={}, environment={})
    header = replace(header, run_id=rows[0].run_id, started_at=rows[0].started_at)
    with ResultsFolder(folder).open_run(header) as run:
        for one in rows:
            run.append(replace(one, run_id=run.run_id))
        run.seal()


def said(*words: str) -> str:
    """What `attnbench WORDS` prints."""
    out = StringIO()
    with redirect_stdout(out), suppress(SystemExit):
        main(list(words))
    return out.getvalue()


def trace_rows(folder: Path) -> list[list[Measurement]]:
    """Times of every batch of a made-up trace, which is left in `folder` as day.csv."""
    lines = [f"{i * 0.11:.2f},{100 + 37 * (i * 7 % 100)},{5 + i % 13}" for i in range(300)]
    path = folder / "day.csv"
    path.write_text("\n".join(["arrival_s,input_tokens,output_tokens", *lines]), encoding="utf-8")
    (folder / "suites").mkdir()
    suite = folder / "suites" / "day.py"
    said("traffic", str(path), "--representatives", "24", "--out", str(suite))
    found = []
    for one in load_suites(folder / "suites")["day"].workloads("full"):
        tokens = sum(request.seq_len for request in one.requests)
        new = sum(request.query_len for request in one.requests)
        for number, who in enumerate((FA3, FLASHINFER, TRITON)):
            level = 4e-6 + 2e-9 * tokens * (1 + 0.5 * number) + 1e-9 * math.sqrt(new) * new
            each = [level * (1 + 0.02 * i) for i in range(3)]
            found.append(timed(who, each, one.text, RUNS, **on_stack(STACKS[1])))
    found.append(ended(FLEX, "CRASH", one.text, RUNS, **on_stack(STACKS[1])))
    return found


def fill_all(folder: Path) -> Path:
    """Results with everything the two pages show."""
    results = folder / "results"
    for run in range(RUNS):
        fill(results, list(grid(run)))
    fill(results, trace_rows(folder))
    answers = results / "answers"
    answers.mkdir()
    where = ("--results", str(results))
    words = (str(folder / WORDS[0]), *WORDS[1:], *where)
    loads = ("--load", "0.5", "--load", "2", "--load", "4")
    (answers / "day.json").write_text(said("itl", *words, *loads))
    (answers / "day-attention.json").write_text(said("itl", *words, "--rest", "none"))
    asked = (
        "--model",
        "llama-3-8b",
        "--device",
        "nvidia-h200",
        "--batch",
        "4q1s16k",
        "--timer",
        "fake",
    )
    (answers / "decode.json").write_text(said("choose", *asked, *where, "--format", "json"))
    (answers / "broken.json").write_text('{"kind": "itl"')
    return results


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True)
    print(json.dumps({"results": str(fill_all(target))}))
