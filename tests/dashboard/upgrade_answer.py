"""A made-up answer of `attnbench upgrade --format json`, with something of everything."""

from __future__ import annotations

from typing import Any

from tests.history.fake import HOSTILE

FACTS = {"flashinfer-cubin": True, "tokenspeed_mla": False}


def side(backend: str | None, *candidates: tuple[str, str], **changes: Any) -> dict[str, Any]:
    """One side of a changed cell; a candidate is a name and why it was passed over."""
    listed = [
        {
            "backend": name,
            "priority": place,
            "reasons": [reason] if reason else [],
            "environmental": False,
            "absent": [],
        }
        for place, (name, reason) in enumerate(candidates)
    ]
    return {
        "backend": backend,
        "class": f"vllm.{backend}" if backend else None,
        "behind": {"kv_cache_layout": "NHD"},
        "valid": [name for name, reason in candidates if not reason],
        "candidates": listed,
        "refused": "" if backend else "ValueError: no valid backend",
        "depends_on": [],
        "trusted": True,
        "untrusted": [],
        "not_evaluated": [],
        "not_asked": [],
        "model_override": "",
    } | changes


def cost(verdict: str, ratio: float | None, **changes: Any) -> dict[str, Any]:
    batch = {
        "batch": "32q1s4k",
        "weight": 1.0,
        "same_kernels": False,
        "ratio": ratio,
        "low": ratio and ratio - 0.02,
        "high": ratio and ratio + 0.02,
        "before": {"backend": "ALPHA", "seconds": 1e-4} if ratio else None,
        "after": {"backend": "BETA", "seconds": 1e-4 * ratio} if ratio else None,
        "why": "" if ratio else "nobody measured BETA",
    }
    return {
        "verdict": verdict,
        "why": "",
        "certain": True,
        "ratio": ratio,
        "low": ratio and ratio - 0.02,
        "high": ratio and ratio + 0.02,
        "device_class": "nvidia-h200",
        "timer": "event",
        "l2_state": "cold",
        "execution": "eager",
        "batches": [batch],
        "notes": ["one stack"],
        "measure": None if ratio else "attnbench run 32q1s4k --backend BETA",
    } | changes


def change(cell_id: str, kind: str, before: Any, after: Any, **changes: Any) -> dict[str, Any]:
    return {
        "cell_id": cell_id,
        "kind": kind,
        "reasons": ["ALPHA was dropped"],
        "behind": [],
        "before": before,
        "after": after,
        "cost": None,
    } | changes


def group(kind: str, headline: str, *cells: str, **changes: Any) -> dict[str, Any]:
    return {
        "kind": kind,
        "headline": headline,
        "before": "ALPHA",
        "after": None,
        "why": ["ALPHA was dropped", "since 0.30.0"],
        "trusted": True,
        "cells": list(cells),
    } | changes


def step(capability: str, old: str, new: str, *, judged: bool = True) -> dict[str, Any]:
    """Five changed cells: lost, two with another default, hostile, and one not grouped."""

    def version(name: str) -> dict[str, Any]:
        return {
            "version": name,
            "how": "executed",
            "platform": "cuda",
            "assumed": FACTS,
            "requires": {"torch": "==2.11.0"},
            "not_trusted": int(name == "0.30.0"),
        }

    alpha, beta = ("ALPHA", ""), ("BETA", "")
    refused = ("ALPHA", "head_size not supported")
    lost, plain, big, bad, blocks = (
        f"{capability} {text}"
        for text in (
            "head_size=64 kv=nvfp4",
            "head_size=128",
            "head_size=256",
            f"{HOSTILE} head_size=128",
            "head_size=32",
        )
    )
    doubt = {"trusted": False, "untrusted": ["ALPHA: flashy is not installed"]}
    return {
        "capability": capability,
        "from": version(old),
        "to": version(new),
        "cells": 20,
        "unchanged": 14,
        "pins": [{"package": "torch", "before": "==2.11.0", "after": "==2.13.0"}],
        "groups": [
            group("lost", "ALPHA → no backend", lost),
            group("default", "ALPHA → BETA", plain, big, after="BETA"),
            group("behind", f"ALPHA: {HOSTILE}", bad, why=[HOSTILE], trusted=False),
        ],
        "changes": [
            change(lost, "lost", side("ALPHA", alpha), side(None, refused)),
            change(
                plain,
                "default",
                side("ALPHA", alpha, beta),
                side("BETA", refused, beta, depends_on=["flashinfer-cubin; otherwise GAMMA"]),
                cost=[cost("slower", 1.18)] if judged else None,
            ),
            change(
                big,
                "default",
                side("ALPHA", alpha, beta),
                side(
                    "BETA",
                    refused,
                    beta,
                    **doubt,
                    not_evaluated=["flashinfer_decode: no such function"],
                ),
                cost=[cost("not measured", None)] if judged else None,
            ),
            change(
                bad,
                "behind",
                side("ALPHA", alpha, model_override=HOSTILE),
                side("ALPHA", ("ALPHA", HOSTILE), not_asked=["sliding_window"]),
                reasons=[HOSTILE],
                behind=[{"what": "flashinfer_decode", "before": None, "after": "XQA"}],
            ),
            change(
                blocks,
                "behind",
                side("ALPHA", alpha),
                side("ALPHA", alpha),
                behind=[{"what": "kernel_block_sizes", "before": "16", "after": "16, 32"}],
            ),
        ],
        "undecided": [{"cell": f"odd {HOSTILE}", "why": ["selection: a new field"]}],
    }


def answer(*, judged: bool = True) -> dict[str, Any]:
    """Two devices; on 9.0 two steps, of which only the first is judged."""
    return {
        "schema_version": 1,
        "steps": [
            step("7.5", "0.22.1", "0.30.0", judged=False),
            step("9.0", "0.22.1", "0.30.0", judged=judged),
            step("9.0", "0.30.0", "0.33.0", judged=False),
        ],
        "settings": [
            {
                "setting": f"VLLM_X={HOSTILE}",
                "where": "server.env",
                "version": "0.33.0",
                "capability": "9.0",
                "status": "dead",
                "why": "nobody reads it",
                "instead": "--attention-backend BETA",
            }
        ],
    }
