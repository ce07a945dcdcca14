"""Choosing from small stores, against numbers worked out by hand."""

from __future__ import annotations

import json
import math
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from attnbench.choose.rank import Outcome, Standing
from attnbench.choose.report import measure_command, sentences, to_json
from attnbench.choose.stored import Measured, device_class_of
from attnbench.errors import ExitCode, UsageError
from attnbench.workload import Workload
from tests.choose.fake import (
    FA3,
    FLASHINFER,
    FLEX,
    H200,
    LAYERS,
    TRITON,
    chosen,
    names,
    timed,
    tries,
)
from tests.history.fake import START


# --- ranks ----------------------------------------------------------------------------------------
def test_the_mix_its_phases_and_their_winners() -> None:
    advice = chosen(
        timed(FA3, 1e-4), timed(FLASHINFER, 0.8e-4), timed(TRITON, 1.5e-4), timed(FLEX, 3e-4),
        timed(FA3, 5e-4, "q2k"), timed(FLASHINFER, 7e-4, "q2k"),
        timed(TRITON, 8e-4, "q2k"), timed(FLEX, 9e-4, "q2k"),
        batches=("3*32q1s4k", "q2k"),
    )  # fmt: skip
    whole, prefill, decode = advice.rankings
    assert (whole.scope, prefill.scope, decode.scope) == ("whole", "prefill", "decode")
    assert names(advice) == ["FLASH_ATTN:FA3", "FLASHINFER:FA3", "TRITON_ATTN", "FLEX_ATTENTION"]
    # By hand: a mean step of 32 layers is (3 decode + 1 prefill) / 4.
    assert whole.lines[0].seconds == pytest.approx(LAYERS * (3 * 1e-4 + 5e-4) / 4)
    assert whole.lines[1].seconds == pytest.approx(LAYERS * (3 * 0.8e-4 + 7e-4) / 4)
    assert whole.margin is not None
    assert whole.margin.ratio == pytest.approx((3 * 0.8 + 7) / (3 * 1 + 5))
    assert 1.1 < whole.margin.low < whole.margin.ratio < whole.margin.high < 1.25
    assert decode.winner is not None
    assert decode.winner.name == "FLASHINFER:FA3"
    assert prefill.winner is not None
    assert prefill.winner.name == "FLASH_ATTN:FA3"
    assert (whole.verdict, advice.exit_code) == (Outcome.DECIDED, ExitCode.OK)
    assert any("one backend for all phases" in line for line in sentences(advice))


def test_the_weights_decide() -> None:
    rows = (
        timed(FA3, 1e-4), timed(FLASHINFER, 0.8e-4), timed(TRITON, 9e-4), timed(FLEX, 9e-4),
        timed(FA3, 5e-4, "q2k"), timed(FLASHINFER, 7e-4, "q2k"),
        timed(TRITON, 9e-4, "q2k"), timed(FLEX, 9e-4, "q2k"),
    )  # fmt: skip
    # Even at 10 decodes a prefill: 10 * 0.8 + 7 = 10 * 1 + 5.
    assert names(chosen(*rows, batches=("5*32q1s4k", "q2k")))[0] == "FLASH_ATTN:FA3"
    assert names(chosen(*rows, batches=("20*32q1s4k", "q2k")))[0] == "FLASHINFER:FA3"


def test_kinds_of_layers_count_by_their_number() -> None:
    full, local = "32q1s4k shape=gemma-3-27b", "32q1s4k shape=gemma-3-27b-local"
    rows = (
        timed(FA3, 1e-4, full), timed(TRITON, 4e-4, full), timed(FLASHINFER, 9e-4, full),
        timed(FA3, 1e-4, local), timed(TRITON, 0.5e-4, local), timed(FLASHINFER, 9e-4, local),
        timed(FLEX, 9e-4, full), timed(FLEX, 9e-4, local),
    )  # fmt: skip
    advice = chosen(*rows, model="gemma-3-27b", version="0.30.0")
    layers = {part.kind: part.layers for part in advice.parts}
    assert layers[0] != layers[1]
    triton = next(line for line in advice.whole.lines if line.name == "TRITON_ATTN")
    assert triton.seconds == pytest.approx(layers[0] * 4e-4 + layers[1] * 0.5e-4)
    winners = {name: one.winner and one.winner.name for name, one in advice.per_kind.items()}
    assert winners == {"full_attention": "FLASH_ATTN:FA3", "sliding_window": "TRITON_ATTN"}
    assert advice.flags_per_kind is not None
    config = json.loads(advice.flags_per_kind.words[1])
    assert config["backend_per_kind"] == {
        "full_attention": "FLASH_ATTN",
        "sliding_window": "TRITON_ATTN",
    }
    old = chosen(*rows, model="gemma-3-27b", version="0.22.1").flags_per_kind
    assert old is not None
    assert old.words == ()
    assert "0.30.0" in old.why


# --- ties -----------------------------------------------------------------------------------------
def test_within_the_floor_is_a_tie_and_the_default_is_kept() -> None:
    rows = (timed(FLASHINFER, 1e-4), timed(FA3, 1.01e-4), timed(TRITON, 2e-4), timed(FLEX, 9e-4))
    advice = chosen(*rows)
    assert advice.whole.verdict is Outcome.TIE
    assert [line.name for line in advice.whole.tied] == ["FLASHINFER:FA3", "FLASH_ATTN:FA3"]
    assert advice.exit_code is ExitCode.OK
    assert advice.regret.is_tied
    assert any("keep it" in line for line in sentences(advice))


def test_ties_are_followed_from_one_to_the_next() -> None:
    # 3 % apart each: within noise; the ends are 9 % apart, which is clear.
    rows = (timed(FA3, 1e-4), timed(FLASHINFER, 1.03e-4), timed(TRITON, 1.06e-4),
            timed(FLEX, 1.09e-4))  # fmt: skip
    lines = chosen(*rows).whole.lines
    assert [line.standing for line in lines] == [
        Standing.WINNER,
        Standing.TIED,
        Standing.LINKED,
        Standing.LINKED,
    ]
    assert lines[3].through in ("FLASHINFER:FA3", "TRITON_ATTN")


def test_one_process_each_settles_nothing() -> None:
    advice = chosen(timed(FA3, [1e-4]), timed(FLASHINFER, [2e-4]), timed(TRITON, [3e-4]),
                    timed(FLEX, [4e-4]))  # fmt: skip
    assert advice.whole.verdict is Outcome.OPEN
    assert advice.exit_code is ExitCode.UNDECIDED
    command = measure_command(advice)
    assert command is not None
    assert "--backend FLASHINFER:FA3" in command
    assert command.endswith("--replicates 3")


# --- never across ---------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "other",
    [
        {"device_class": "nvidia-h100"},
        {"timer": "graph"},
        {"l2_state": "hot"},
        {"execution": "graph"},
        {"protocol_version": 0},
        {"driver_version": "570.0"},
        {"stack": ("torch==2.12.0",)},
    ],
    ids=str,
)
def test_what_was_not_measured_alike_is_never_compared(other: dict[str, Any]) -> None:
    mine = (timed(FA3, 2e-4, run=1), timed(TRITON, 3e-4, run=1), timed(FLEX, 4e-4, run=1))
    advice = chosen(*mine, timed(FLASHINFER, 1e-4, **other))
    assert "FLASHINFER:FA3" not in names(advice)
    assert [choice.text for choice, _ in advice.missing] == ["FLASHINFER:FA3"]
    assert advice.exit_code is ExitCode.UNDECIDED


def test_published_runs_stand_beside_themselves_only() -> None:
    one, other = timed(FA3, 2e-4, run=1), timed(FLASHINFER, 1e-4, run=2)
    published = [one[0].run_id, other[0].run_id]
    assert names(chosen(one, other, published=published)) == ["FLASHINFER:FA3"]
    assert names(chosen(one, other, published=published[1:])) == ["FLASH_ATTN:FA3"]


def test_the_run_that_has_them_all_counts_before_a_newer_one_of_one() -> None:
    together = (timed(FA3, 2e-4), timed(FLASHINFER, 1e-4))
    advice = chosen(*together, timed(FLASHINFER, 4e-4, run=3))
    assert names(advice)[0] == "FLASHINFER:FA3"
    alone = chosen(timed(FA3, 2e-4), timed(FLASHINFER, 1e-4, run=3))
    assert any("another run" in note for note in alone.notes)


def test_several_stored_devices_must_be_named() -> None:
    rows = tries(*(timed(FA3, 1e-4, device_class=f"nvidia-h{number}") for number in (100, 200)))
    with pytest.raises(UsageError, match="nvidia-h100, nvidia-h200"):
        device_class_of(rows, "sm90", "9.0")
    assert device_class_of(rows, "nvidia-h100", "") == "nvidia-h100"
    assert device_class_of(rows, "sm100", "10.0") == ""


# --- what is missing, scope, regret ---------------------------------------------------------------
def test_nothing_stored_says_the_one_command() -> None:
    advice = chosen()
    assert advice.whole.verdict is Outcome.NOT_MEASURED
    assert advice.exit_code is ExitCode.UNDECIDED
    command = measure_command(advice) or ""
    assert command.startswith("attnbench run 32q1s4k --backend ")
    for name in ("FLASH_ATTN:FA3", "FLASHINFER:FA3", "TRITON_ATTN", "FLEX_ATTENTION"):
        assert f"--backend {name}" in command


def test_regret_by_hand() -> None:
    advice = chosen(timed(FLASHINFER, 1e-4), timed(FA3, 1.5e-4), timed(TRITON, 3e-4),
                    timed(FLEX, 4e-4))  # fmt: skip
    assert advice.regret.name == "FLASH_ATTN"
    assert advice.regret.ratio is not None
    assert advice.regret.ratio.ratio == pytest.approx(1.5)
    # The rule by hand: t(0.99, 8 d.f.) = 3.3554, s^2 = (4 * 0.01^2 + 2 * 2 mad^2) / 8, floor 2 %.
    mad = 1.4826 * math.log(1.001)
    half = 3.35539 * math.sqrt((4e-4 + 4 * mad**2) / 8 * 2 / 3) + math.log(1.02)
    assert advice.regret.ratio.low == pytest.approx(1.5 * math.exp(-half), rel=1e-3)
    assert advice.regret.ratio.high == pytest.approx(1.5 * math.exp(half), rel=1e-3)
    assert not advice.regret.is_tied


def test_scope_and_expiry_go_by_the_oldest_time_used() -> None:
    old, new = timed(FA3, 2e-4, run=0), timed(FLASHINFER, 1e-4, run=5)
    scope = chosen(old, new, choice_days=10).scope
    assert scope is not None
    assert scope.expires_at == START + timedelta(days=10)
    assert scope.versions == ("torch==2.13.0",)
    assert scope.how.driver_version == "580.1"


def test_json_is_json() -> None:
    advice = chosen(timed(FLASHINFER, 1e-4), timed(FA3, [1.5e-4]))
    answer = json.loads(json.dumps(to_json(advice), allow_nan=False))
    assert answer["rankings"][0]["winner"] == "FLASHINFER:FA3"
    assert answer["rankings"][0]["lines"][1]["over_winner"]["low"] is None


def test_another_block_size_is_another_choice() -> None:
    advice = chosen(timed(FA3, 2e-4), timed(FLASHINFER, 1e-4, "32q1s4k block=32"))
    assert names(advice) == ["FLASHINFER:FA3 block=32", "FLASH_ATTN:FA3"]
    assert advice.flags is not None
    assert advice.flags.words[-2:] == ("--block-size", "32")


def test_crossovers_are_in_the_advice(tmp_path: Path) -> None:
    rows = []
    for batch, (fa3, infer) in {8: (1e-4, 2e-4), 32: (4e-4, 2e-4)}.items():
        rows += timed(FA3, fa3, f"{batch}q1s4k") + timed(FLASHINFER, infer, f"{batch}q1s4k")
    advice = chosen(rows, batches=("32q1s4k",))
    (found,) = advice.crossovers["full_attention"]
    # log(tA/tB) is -log 2 at 8 and +log 2 at 32: zero halfway in the logarithm, at 16.
    assert (found.low, found.high, found.below, found.above) == (
        8, 32, "FLASH_ATTN:FA3", "FLASHINFER:FA3",
    )  # fmt: skip
    assert found.at == pytest.approx(16)
    assert found.fixed == {"query": 1, "context": 4095}


def test_a_default_that_cannot_be_told_from_the_winner_is_no_tie() -> None:
    advice = chosen(timed(FLASHINFER, 1e-4), timed(FA3, [1.5e-4]))
    assert advice.regret.ratio is not None
    assert not advice.regret.is_tied


def test_a_link_goes_by_ties_and_not_by_what_is_open() -> None:
    wide = [0.5e-4, 1.05e-4, 2e-4]
    lines = chosen(timed(FA3, 1e-4), timed(FLASHINFER, wide), timed(TRITON, 1.5e-4)).whole.lines
    assert {line.name: line.standing for line in lines} == {
        "FLASH_ATTN:FA3": Standing.WINNER,
        "FLASHINFER:FA3": Standing.OPEN,
        "TRITON_ATTN": Standing.SLOWER,
    }


def test_a_named_block_size_is_the_only_one_looked_at() -> None:
    rows = tries(timed(FA3, 2e-4), timed(FLASHINFER, 1e-4, "32q1s4k block=32"))
    asked = Workload.parse("32q1s4k")
    sizes = {
        block: {
            one.block_size for one in Measured(rows, H200, [asked], (), block).point(asked).timed
        }
        for block in (0, 16, 32)
    }
    assert sizes == {0: {16, 32}, 16: {16}, 32: {32}}
