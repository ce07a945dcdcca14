"""Flags, against vLLM's own words for them (`vllm/config/attention.py` of 0.22.1 and 0.30.0)."""

from __future__ import annotations

import json

import pytest

from attnbench.choose.flags import by_phase, kind_of, quoted, realise
from attnbench.choose.tries import Choice
from attnbench.workload import Workload

FULL = "full_attention"


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        (Choice("TRITON_ATTN"), "--attention-backend TRITON_ATTN"),
        (
            Choice("FLASH_ATTN", "FA2"),
            "--attention-backend FLASH_ATTN --attention-config.flash_attn_version=2",
        ),
        (
            Choice("FLASHINFER", "TRTLLM_GEN", 16, "HND"),
            (
                "VLLM_KV_CACHE_LAYOUT=HND --attention-backend FLASHINFER "
                "--attention-config.use_trtllm_attention=true"
            ),
        ),
        (
            Choice("FLASHINFER", "FA2", 32),
            (
                "--attention-backend FLASHINFER --attention-config.use_trtllm_attention=false "
                "--block-size 32"
            ),
        ),
        (Choice("FLASHMLA", "", 64), "--attention-backend FLASHMLA --block-size 64"),
    ],
)
def test_one_backend(choice: Choice, words: str) -> None:
    assert quoted(realise({FULL: choice}, "0.22.1").words) == words


def test_what_vllm_does_not_have() -> None:
    told = realise({FULL: Choice("TORCH_SDPA")}, "0.30.0")
    assert told.words == ()
    assert "no backend TORCH_SDPA" in told.why
    assert "own build" in realise({FULL: Choice("FLASH_ATTN", "FA3_UPSTREAM")}, "0.22.1").why


@pytest.mark.parametrize(
    ("version", "can"),
    [("0.22.1", False), ("0.29.9", False), ("0.30.0", True), ("0.33.0", True), ("1.0", True)],
)
def test_per_kind_from_030_on(version: str, can: bool) -> None:
    both = {FULL: Choice("FLASH_ATTN", "FA3"), "sliding_window": Choice("TRITON_ATTN")}
    told = realise(both, version)
    assert bool(told.words) == can
    if can:
        assert told.words[0] == "--attention-config"
        assert json.loads(told.words[1]) == {
            "backend_per_kind": {FULL: "FLASH_ATTN", "sliding_window": "TRITON_ATTN"},
            "flash_attn_version": 3,
        }


def test_settings_there_is_one_of_for_all_kinds() -> None:
    both = {
        FULL: Choice("FLASH_ATTN", "FA3", 16),
        "sliding_window": Choice("FLASH_ATTN", "FA2", 32),
    }
    why = realise(both, "0.30.0").why
    assert "flash_attn_version" in why
    assert "--block-size" in why


@pytest.mark.parametrize(
    ("features", "kind"),
    [
        ("", "full_attention"),
        ("window=1024", "sliding_window"),
        ("shape=deepseek-v3", "mla_attention"),
        ("attn=encoder_only", "encoder_only_attention"),
    ],
)
def test_the_kinds_are_vllms(features: str, kind: str) -> None:
    text = "4q512" if "attn" in features else "4q1s1k"
    assert kind_of(Workload.parse(f"{text} {features}".strip())) == kind


def test_phases_that_differ() -> None:
    assert by_phase("0.30.0", {"decode": "A", "prefill": "A"}) == ""
    assert "separate prefill and decode" in by_phase("0.30.0", {"decode": "A", "prefill": "B"})


def test_two_variants_of_one_backend_need_no_flag_per_kind() -> None:
    both = {FULL: Choice("FLASH_ATTN", "FA3"), "sliding_window": Choice("FLASH_ATTN", "FA2")}
    told = realise(both, "0.22.1")
    assert told.words[:2] == ("--attention-backend", "FLASH_ATTN")
    assert "flash_attn_version is one for all kinds" in told.why
