"""Who may not be chosen, however fast: the wrong, dead or unstable, and what cannot run there."""

from __future__ import annotations

from dataclasses import replace

import pytest

from attnbench.backends.device import Device
from attnbench.choose.report import measure_command, sentences
from attnbench.choose.tries import Choice
from attnbench.choose.valid import Default, refusal
from attnbench.errors import ExitCode
from attnbench.store.record import Measurement
from attnbench.workload import Workload
from tests.choose.fake import (
    FA3,
    FLASHINFER,
    FLEX,
    LAYERS,
    TRITON,
    chosen,
    ended,
    names,
    reasons,
    timed,
)


@pytest.mark.parametrize(
    ("status", "word"),
    [
        ("INCORRECT", "wrong result"),
        ("CRASH", "crashed"),
        ("TIMEOUT", "timed out"),
        ("NOISY", "unstable"),
        ("OOM", "out of memory"),
    ],
)
def test_what_fails_is_excluded_with_the_reason(status: str, word: str) -> None:
    advice = chosen(
        timed(FA3, 2e-4), timed(TRITON, 3e-4), timed(FLEX, 9e-4),
        timed(FLASHINFER, 1e-4), ended(FLASHINFER, status, run=1),
    )  # fmt: skip
    assert names(advice) == ["FLASH_ATTN:FA3", "TRITON_ATTN", "FLEX_ATTENTION"]
    assert word in reasons(advice)["FLASHINFER:FA3"]
    assert status in reasons(advice)["FLASHINFER:FA3"]
    assert advice.exit_code is ExitCode.OK  # a reason is an answer; nothing is missing


def test_a_wrong_result_bars_everywhere_a_crash_where_it_was() -> None:
    def by(status: str) -> dict[str, list[str]]:
        advice = chosen(
            timed(FA3, 2e-4), timed(FLASHINFER, 1e-4), ended(FLASHINFER, status, "q2k"),
            timed(FA3, 2e-4, "q2k"), batches=("32q1s4k", "q2k"),
        )  # fmt: skip
        return {one.scope: [line.name for line in one.lines] for one in advice.rankings}

    both = ["FLASHINFER:FA3", "FLASH_ATTN:FA3"]
    assert by("CRASH") == {"whole": both[1:], "prefill": both[1:], "decode": both}
    assert by("INCORRECT") == {"whole": both[1:], "prefill": both[1:], "decode": both[1:]}


def test_what_was_mended_is_chosen_from_again() -> None:
    rows = (ended(FLASHINFER, "INCORRECT"), timed(FLASHINFER, 1e-4, run=1), timed(FA3, 2e-4, run=1))
    assert names(chosen(*rows))[0] == "FLASHINFER:FA3"


def test_a_wrong_result_counts_whatever_timed_it() -> None:
    wrong = ended(FLASHINFER, "INCORRECT", run=1, timer="graph", execution="graph")
    advice = chosen(timed(FA3, 2e-4), timed(FLASHINFER, 1e-4), wrong)
    assert names(advice) == ["FLASH_ATTN:FA3"]


def test_the_predicates_exclude_what_was_measured_all_the_same() -> None:
    advice = chosen(timed(FA3, 2e-4), timed(("FLASH_ATTN", "FA4"), 1e-4, compute_capability="9.0"),
                    timed(("TORCH_MLA", ""), 1e-5))  # fmt: skip
    assert "TORCH_MLA" in reasons(advice)
    assert "TORCH_MLA" not in names(advice)


def test_a_throttled_point_is_measured_again() -> None:
    advice = chosen(timed(FA3, 2e-4), timed(TRITON, 3e-4), timed(FLEX, 9e-4),
                    timed(FLASHINFER, 1e-4), ended(FLASHINFER, "THROTTLED", run=1))  # fmt: skip
    assert "FLASHINFER:FA3" not in names(advice)
    assert "FLASHINFER:FA3" not in reasons(advice)
    assert [choice.text for choice, _ in advice.missing] == ["FLASHINFER:FA3"]


def with_status(rows: list[Measurement], **at: int) -> list[Measurement]:
    """`NOISY=1`: the first row is NOISY. A throttled row has no samples, and is slow if it had."""
    for status, count in at.items():
        for place in range(count):
            samples = () if status == "THROTTLED" else rows[place].samples
            rows[place] = replace(rows[place], status=status, samples=samples)
    return rows


def test_few_noisy_processes_bar_nobody_and_many_do() -> None:
    others = (timed(FLASHINFER, 2e-4), timed(TRITON, 3e-4), timed(FLEX, 4e-4))
    quarter = chosen(with_status(timed(FA3, [9e-4, 1e-4, 1.001e-4, 1.002e-4]), NOISY=1), *others)
    assert names(quarter)[0] == "FLASH_ATTN:FA3"
    # Its median counts, though it did not settle: left out, it would flatter.
    assert quarter.whole.lines[0].seconds == pytest.approx(LAYERS * (1.001e-4 + 1.002e-4) / 2)
    third = chosen(with_status(timed(FA3, [1e-4] * 3), NOISY=1), *others)
    assert names(third)[0] == "FLASHINFER:FA3"
    assert reasons(third)["FLASH_ATTN:FA3"].startswith("unstable")
    assert reasons(third)["FLASH_ATTN:FA3"].endswith("1 of 3 processes")
    assert "1 of 3 processes" in third.regret.why  # it is the default, and has no ratio
    # Over a mix its processes on all batches count: two of six, one of six.
    mix = [
        (timed(who, level, "q2k"), timed(who, level))
        for who, level in ((FLASHINFER, 2e-4), (TRITON, 3e-4), (FLEX, 4e-4))
    ]
    rest = [group for pair in mix for group in pair]
    for noisy, first in ((1, "FLASH_ATTN:FA3"), (2, "FLASHINFER:FA3")):
        its = with_status(timed(FA3, 1e-4, "q2k"), NOISY=noisy)
        advice = chosen(its, timed(FA3, 1e-4), *rest, batches=("32q1s4k", "q2k"))
        assert names(advice)[0] == first, noisy


def test_a_throttled_process_is_left_out_where_another_was_timed() -> None:
    others = (timed(FLASHINFER, 2e-4), timed(TRITON, 3e-4), timed(FLEX, 4e-4))
    advice = chosen(with_status(timed(FA3, 1e-4), THROTTLED=1), *others)
    assert names(advice)[0] == "FLASH_ATTN:FA3"
    assert (advice.missing, reasons(advice)) == ((), {})
    every = chosen(with_status(timed(FA3, 1e-4), THROTTLED=3), *others)
    assert "FLASH_ATTN:FA3" not in names(every)
    assert [choice.text for choice, _ in every.missing] == ["FLASH_ATTN:FA3"]


@pytest.mark.parametrize("status", ["INCORRECT", "CRASH"])
def test_one_wrong_or_dead_process_bars_at_once(status: str) -> None:
    rows = timed(FA3, [1e-4] * 9)
    rows[4] = replace(rows[4], status=status, samples=())
    advice = chosen(rows, timed(FLASHINFER, 2e-4), timed(TRITON, 3e-4), timed(FLEX, 4e-4))
    assert names(advice)[0] == "FLASHINFER:FA3"
    assert status in reasons(advice)["FLASH_ATTN:FA3"]


def test_where_nothing_settled_it_is_measured_again() -> None:
    advice = chosen(*(ended(who, "NOISY") for who in (FA3, TRITON, FLEX, FLASHINFER)))
    assert advice.exit_code is ExitCode.UNDECIDED
    assert "--backend FLASH_ATTN:FA3" in (measure_command(advice) or "")


def test_adapters_and_kernels_of_another_device_are_not_chosen_from() -> None:
    advice = chosen(timed(FA3, 2e-4), timed(("VLLM:FLASH_ATTN", ""), 1e-4),
                    timed(("FLASHINFER", "TRTLLM_GEN"), 1e-4))  # fmt: skip
    assert names(advice) == ["FLASH_ATTN:FA3"]
    assert set(reasons(advice)) == {"FLASHINFER:TRTLLM_GEN"}
    assert not any("VLLM" in name for name in advice.by_name)


def test_a_default_that_is_wrong_is_not_kept() -> None:
    advice = chosen(timed(FLASHINFER, 1e-4), timed(TRITON, 3e-4), timed(FLEX, 4e-4),
                    ended(FA3, "INCORRECT"))  # fmt: skip
    assert advice.regret.ratio is None
    assert "wrong result" in advice.regret.why


def test_a_default_that_is_excluded_is_never_kept_however_fast() -> None:
    default = Default("vLLM 9", "TORCH_MLA", {"32q1s4k": ("",)})
    fast = timed(("TORCH_MLA", ""), 1e-5)
    advice = chosen(timed(FA3, 1e-4), timed(FLASHINFER, 2e-4), fast, defaults=[default])
    assert not advice.regret.is_valid
    assert not advice.regret.is_tied
    assert any("must not be served" in line for line in sentences(advice))


def test_the_interpreter_is_no_backend_of_a_cpu() -> None:
    layer = Workload.parse("8q1s1k dtype=fp32")
    assert "interpreter" in refusal(Choice("TRITON_ATTN"), layer, Device("cpu"))
