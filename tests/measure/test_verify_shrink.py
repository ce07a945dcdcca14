"""Shrinking finds the smallest batch of faults that are known, and the report says it."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from datetime import UTC, datetime
from math import nan
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnbench.backends.check import OutputCheck
from attnbench.backends.device import Device
from attnbench.errors import WorkloadError
from attnbench.measure.environment import read_environment
from attnbench.measure.plan import PlannedPoint
from attnbench.measure.verify import Finding, Verification
from attnbench.measure.verify_report import (
    COLUMNS,
    conclusion,
    issue_report,
    reproduce,
    verification_rows,
)
from attnbench.measure.verify_shrink import Smallest, neighbours, shrink
from attnbench.measure.verify_worker import VerifyOutcome
from attnbench.store.record import Status
from attnbench.workload import Workload

OK = VerifyOutcome(Status.OK)
CHECK = OutputCheck(ok=False, max_abs_error=0.5, rel_error=0.5, reason="error 0.5")
WRONG = VerifyOutcome(Status.INCORRECT, ("error 0.5",), (CHECK,))
CRASHED = VerifyOutcome(Status.CRASH, ("worker exited with 7",))
LARGE = "8q1s4k_2q300s3000 shape=gemma-2-9b-local lengths=uniform:0.5 prefix=512"


def shrunk(text: str, steps: int, fault: Any, outcome: VerifyOutcome = WRONG) -> Smallest:
    def ask(workload: Workload, steps: int) -> VerifyOutcome:
        return outcome if fault(workload, steps) else OK

    workload = Workload.parse(text)
    assert fault(workload, steps), "the fault must be there to begin with"
    return shrink(workload, steps, outcome, ask, budget_s=1e9)


@pytest.mark.parametrize(
    ("fault", "smallest"),
    [
        (lambda w, n: True, "q1 heads=1/1 head_size=256"),
        (lambda w, n: any(r.seq_len > 700 for r in w.requests), "q1s701 heads=1/1 head_size=256"),
        (lambda w, n: w.num_reqs >= 3, "3q1 heads=1/1 head_size=256"),
        (
            lambda w, n: w.num_reqs >= 2 and any(r.seq_len > 700 for r in w.requests),
            "q1_q1s701 heads=1/1 head_size=256",
        ),
        (lambda w, n: any(r.query_len >= 129 for r in w.requests), "q129 heads=1/1 head_size=256"),
        (lambda w, n: w.shape.sliding_window, "q1 heads=1/1 head_size=256 window=4096"),
        (
            lambda w, n: w.shape.num_heads >= 2 * w.shape.num_kv_heads,
            "q1 heads=2/1 head_size=256",
        ),
        (lambda w, n: w.shape.num_kv_heads >= 3, "q1 heads=3/3 head_size=256"),
        (lambda w, n: w.common_prefix_len, "q1s17 heads=1/1 head_size=256 prefix=16"),
        (
            lambda w, n: (
                {r.query_len for r in w.requests} >= {1} and w.num_reqs > 1 and w.num_tokens > 5
            ),
            None,
        ),
    ],
)
def test_the_smallest_batch_of_a_known_fault(fault: Any, smallest: str | None) -> None:
    found = shrunk(LARGE, 8, fault)
    assert found.is_final
    assert found.steps == 0
    assert found.outcome is WRONG
    if smallest is not None:
        assert found.workload.text == Workload.parse(smallest).text
    # Final means what it says.
    assert not any(fault(w, n) for w, n in neighbours(found.workload, found.steps))


def test_steps_are_shrunk_and_unrun_ones_are_dropped_at_once() -> None:
    workload = Workload.parse("2q1s40 heads=4/2 head_size=32")
    asked: list[tuple[str, int]] = []

    def ask(candidate: Workload, steps: int) -> VerifyOutcome:
        asked.append((candidate.text, steps))
        return WRONG if steps >= 2 else OK

    failed_in_step_3 = replace(WRONG, checks=WRONG.checks * 4)
    found = shrink(workload, 50, failed_in_step_3, ask, budget_s=1e9)
    assert (found.workload.text, found.steps) == ("q1 head_size=32 heads=1/1", 2)
    assert max(steps for _, steps in asked) == 2, "a step after the failure was run"
    assert len(asked) == len(set(asked)) == found.tries


def test_only_the_same_failure_counts_and_refusals_do_not() -> None:
    workload = Workload.parse("4q1s40 heads=4/2 head_size=32")

    def ask(candidate: Workload, steps: int) -> VerifyOutcome:
        if candidate.num_reqs == 1:
            return CRASHED
        if candidate.shape.num_heads < 4:
            return VerifyOutcome(Status.UNSUPPORTED, ("4 heads at least",))
        return WRONG

    found = shrink(workload, 0, WRONG, ask, budget_s=1e9)
    assert found.workload.text == "2q1 head_size=32 heads=4/2"


def test_time_and_tries_are_bounded_and_the_best_so_far_is_kept() -> None:
    workload = Workload.parse("64q1s4k")
    clock = iter(range(1000))
    stopped = shrink(
        workload, 0, WRONG, lambda w, n: WRONG, budget_s=4.5, now_s=lambda: float(next(clock))
    )
    assert not stopped.is_final
    assert stopped.tries == 4
    assert stopped.workload.num_reqs == 4
    few = shrink(workload, 0, WRONG, lambda w, n: WRONG, max_tries=2, budget_s=1e9)
    assert (few.tries, few.is_final, few.workload.num_reqs) == (2, False, 16)


RAISED = VerifyOutcome(Status.ERROR, ("RuntimeError: illegal memory access",))
NOT_FINITE = OutputCheck(ok=False, max_abs_error=nan, rel_error=nan, reason="not finite")


@pytest.mark.parametrize(
    ("outcome", "other"),
    [
        (RAISED, VerifyOutcome(Status.ERROR, ("ValueError: head size 32 is not supported",))),
        (CRASHED, VerifyOutcome(Status.CRASH, ("worker killed by SIGSEGV",))),
        (WRONG, VerifyOutcome(Status.INCORRECT, ("not finite",), (NOT_FINITE,))),
        (WRONG, VerifyOutcome(Status.INCORRECT, ("LSE is off by 2",), (CHECK,))),
        (WRONG, VerifyOutcome(Status.TIMEOUT, ("killed after 4 s",))),
    ],
)
def test_another_way_to_fail_is_another_bug(outcome: VerifyOutcome, other: VerifyOutcome) -> None:
    """Below four requests it fails as well, and in another way."""
    workload = Workload.parse("8q1s40 heads=4/2 head_size=32")
    found = shrink(
        workload, 0, outcome, lambda w, n: outcome if w.num_reqs >= 4 else other, budget_s=1e9
    )
    assert found.workload.text == "4q1 head_size=32 heads=1/1"
    # Only what may vary with the batch differs: the same way.
    again = replace(outcome, reasons=(f"{outcome.reasons[0]}: at another place",))
    found = shrink(workload, 0, outcome, lambda w, n: again, budget_s=1e9)
    assert found.workload.text == "q1 head_size=32 heads=1/1"


def test_ctrl_c_ends_the_search_with_what_it_found() -> None:
    workload = Workload.parse("64q1s4k")

    def ask(candidate: Workload, steps: int) -> VerifyOutcome:
        if candidate.num_reqs < 16:
            raise KeyboardInterrupt
        return WRONG

    found = shrink(workload, 0, WRONG, ask, budget_s=1e9)
    assert found.is_stopped
    assert not found.is_final
    assert found.workload.num_reqs == 16
    assert not shrink(workload, 0, WRONG, lambda w, n: WRONG, budget_s=1e9).is_stopped


@given(
    requests=st.lists(st.tuples(st.integers(1, 300), st.integers(0, 300)), min_size=1, max_size=9),
    features=st.sampled_from(
        ["", "window=7", "softcap=3 sinks=1", "shape=deepseek-v3 tp=8", "attn=encoder_decoder"]
    ),
    steps=st.integers(0, 5),
)
@settings(deadline=None, max_examples=40)
def test_neighbours_are_smaller_and_valid(
    requests: list[tuple[int, int]], features: str, steps: int
) -> None:
    spec = "_".join(f"q{q}s{q + c}" for q, c in requests)
    try:
        workload = Workload.parse(f"{spec} {features}")
    except WorkloadError:
        return
    for smaller, fewer in neighbours(workload, steps):
        assert Workload.parse(smaller.text) == smaller
        assert _size(smaller, fewer) < _size(workload, steps)


def _size(workload: Workload, steps: int) -> int:
    """Grows with everything that can be taken away."""
    shape = workload.shape
    tokens = sum(r.query_len + r.seq_len for r in workload.requests)
    heads = shape.num_heads + shape.num_kv_heads
    features = (shape.sliding_window, shape.logits_soft_cap, shape.has_sink, shape.use_alibi)
    return tokens + heads + steps + sum(map(bool, features)) + workload.common_prefix_len


def verification(*findings: Finding) -> Verification:
    cpu = Device("cpu")
    workload = findings[0].planned.workload
    return Verification(workload, 8, cpu, read_environment(cpu), findings, ())


def test_the_report_holds_everything_an_issue_needs() -> None:
    workload = Workload.parse("8q1s400 heads=8/2 head_size=64 dtype=fp16 window=64 seed=3")
    planned = PlannedPoint(workload, "TORCH_SDPA", "math")
    found = verification(
        Finding(planned, WRONG), Finding(PlannedPoint(workload, "CPU_ATTN"), OK, 0.25)
    )
    smaller = Workload.parse("q1s65 heads=1/1 head_size=64 dtype=fp16 window=64 seed=3")
    small = Smallest(smaller, 1, WRONG, 17, is_final=True)
    text = issue_report(found, {"TORCH_SDPA:math": small})
    environment = found.environment
    command = (
        "attnbench verify 'q1s65 dtype=fp16 head_size=64 heads=1/1 seed=3 window=64' "
        "--backend TORCH_SDPA:math --steps 1"
    )
    for needed in (
        "TORCH_SDPA:math fails",
        "error 0.5",
        "a bug, not rounding",
        command,
        "17 tries, nothing smaller fails",
        "`8q1s400 dtype=fp16 head_size=64 heads=8/2 seed=3 window=64`",
        "heads 1/1 of size 64",
        "window 64",
        "seed=3",
        smaller.id,
        environment.device_name,
        environment.harness_version,
        next(word for word in environment.stack if word.startswith("torch==")),
        "| CPU_ATTN | reference | OK | rounding |",
    ):
        assert needed in text, needed
    assert environment.hostname not in text, "a report is pasted in public"
    assert tuple(verification_rows(found)[0]) == COLUMNS


def test_a_report_names_nobody_and_says_where_it_was_raised() -> None:
    workload = Workload.parse("q1s40 heads=4/2 head_size=32")
    home, host = "/home/alice", read_environment(Device("cpu")).hostname
    trace = (
        f'Traceback (most recent call last):\n  File "{home}/src/attn.py", line 9, in forward\n'
        f"RuntimeError: bad thing in {home}/secret/kernel.cu:33 on {host}, "
        f"see '/data/alice smith/log'; ask alice\n"
    )
    raised = VerifyOutcome(Status.ERROR, (trace.splitlines()[-1],), trace=trace)
    failed = Finding(PlannedPoint(workload, "CPU_ATTN"), raised)
    small = Smallest(workload, 0, raised, 3, is_final=False)
    text = issue_report(verification(failed), {"CPU_ATTN": small})
    for private in ("alice", "secret", "/data", host, "smith"):
        assert private not in text, private
    assert 'File "<path>/attn.py", line 9, in forward' in text
    assert text.count("<path>/kernel.cu:33") == 4, "the reason, the trace, the smallest, the table"
    assert "`attnbench.backends.cpu_attn.CPUAttentionBackend` of attnbench " in text
    assert "attnbench verify 'q1s40 head_size=32 heads=4/2' --backend CPU_ATTN --steps 8" in text
    assert f"{datetime.now(UTC):%Y-%m-%d}" in text


def test_a_long_traceback_is_cut_at_its_beginning() -> None:
    workload = Workload.parse("q1s40 heads=4/2 head_size=32")
    trace = "\n".join(f"frame {i}" for i in range(100))
    raised = VerifyOutcome(Status.ERROR, ("E: x",), trace=trace)
    text = issue_report(verification(Finding(PlannedPoint(workload, "CPU_ATTN"), raised)), {})
    assert "frame 99" in text
    assert "frame 70" in text
    assert "frame 69" not in text


def test_a_right_backend_far_off_the_nearest_is_named() -> None:
    """fp8 may round ten times more than another backend does, or forget a scale."""
    workload = Workload.parse("q1s40 heads=4/2 head_size=32 kv=fp8_e4m3")

    def right(name: str, *errors: float) -> Finding:
        checks = tuple(
            OutputCheck(ok=True, max_abs_error=e, rel_error=e, reason="") for e in errors
        )
        return Finding(PlannedPoint(workload, name), VerifyOutcome(Status.OK, (), checks))

    near = right("CPU_ATTN", 0.002, 0.001)
    said = conclusion(verification(near, right("TORCH_SDPA", 0.001, 0.03)))
    assert "TORCH_SDPA is 15 times as far off as CPU_ATTN" in said
    assert "rounding: at most 0.11 of the tolerance" in said
    assert "as far off" not in conclusion(verification(near, right("TORCH_SDPA", 0.009)))
    # Nothing to divide by: a backend without any error.
    assert "as far off" not in conclusion(verification(near, right("TORCH_SDPA", 0.0)))


def test_a_crash_has_no_error_and_no_word_of_rounding() -> None:
    workload = Workload.parse("q1s40 heads=4/2 head_size=32")
    found = verification(Finding(PlannedPoint(workload, "CPU_ATTN"), CRASHED))
    text = issue_report(found, {})
    assert "## CPU_ATTN: CRASH" in text
    assert "worker exited with 7" in text
    assert "not rounding" not in text
    assert reproduce(workload, "CPU_ATTN", 8) in text


def test_the_command_of_a_report_is_one_a_shell_takes() -> None:
    command = reproduce(Workload.parse("q1s40 heads=4/2"), "CPU_ATTN", 2)
    words = subprocess.run(
        ["sh", "-c", f"for w in {command}; do echo $w; done"],
        capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    assert words == [
        "attnbench",
        "verify",
        "q1s40 heads=4/2",
        "--backend",
        "CPU_ATTN",
        "--steps",
        "2",
    ]
