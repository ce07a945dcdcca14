"""Verification: right backends differ by rounding, and a wrong one is named and costs no other."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from attnbench.backends.batch import batch_order, make_batch
from attnbench.backends.decode_steps import DecodeSteps
from attnbench.backends.device import Device
from attnbench.backends.reference import reference_attention
from attnbench.backends.registry import get_backend_class
from attnbench.errors import InfrastructureError
from attnbench.measure.plan import PlannedPoint
from attnbench.measure.record_runs import record
from attnbench.measure.verify import Verification, Verifier, plan_verification
from attnbench.measure.verify_report import conclusion, verification_rows
from attnbench.measure.worker import WorkerProcess
from attnbench.selection import capabilities
from attnbench.store.record import Status
from attnbench.workload import Workload
from tests.measure.conftest import installed
from tests.measure.verify_backends import NAMES

CPU = Device("cpu")
SMALL = Workload.parse("3q1s40_q5s17 heads=4/2 head_size=32 dtype=fp16")
MLA = Workload.parse("q70_2q1s40 heads=4/1 mla=64+32:32+48 dtype=fp32")


@pytest.fixture
def suspects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    source = (Path(__file__).parent / "verify_backends.py").read_text(encoding="utf-8")
    multiprocessing.set_forkserver_preload(
        ["attnbench.measure.verify_worker", "attnbench.backends.cpu_attn"]
    )
    yield from installed("suspects", source, NAMES, tmp_path / "site", monkeypatch)


def verified(
    workload: Workload, *backends: str, steps: int = 3, timeout_s: float = 60.0
) -> Verification:
    plan = [PlannedPoint(workload, *name.split(":")) for name in backends]
    with Verifier(CPU, timeout_s, "forkserver") as verifier:
        return verifier.verify(plan, steps)


def statuses(found: Verification) -> dict[str, str]:
    return {finding.name: str(finding.outcome.status) for finding in found.findings}


@pytest.mark.usefixtures("suspects")
def test_right_backends_differ_by_rounding_only() -> None:
    found = verified(SMALL, "RIGHT", "CPU_ATTN", "TORCH_SDPA", "TORCH_SDPA:math")
    assert set(statuses(found).values()) == {"OK"}
    for finding in found.findings:
        assert finding.difference == "rounding"
        assert len(finding.outcome.checks) == 4
        for error in (finding.call_error, finding.step_error):
            assert error is not None
            assert 0 < error < found.tolerance
        # Fed by itself in another precision: further off than one step, and still related.
        assert finding.drift is not None
        assert max(c.rel_error for c in finding.outcome.checks) <= 2 * finding.drift < 0.1
    pairs = {(p.first.name, p.second.name): p for p in found.pairs}
    assert len(pairs) == 6
    assert pairs["RIGHT", "CPU_ATTN"].difference == "equal"
    assert pairs["RIGHT", "CPU_ATTN"].call == pairs["RIGHT", "CPU_ATTN"].drift == 0
    other = pairs["RIGHT", "TORCH_SDPA:math"]
    assert other.difference == "rounding"
    assert 0 < other.call <= 2 * found.tolerance
    assert "all differences are rounding" in conclusion(found)
    assert not found.failed


@pytest.mark.usefixtures("suspects")
def test_each_wrong_backend_is_named_and_costs_no_other_anything() -> None:
    names = ["SPOILING", "DYING", "RAISING", "HANGING", "FORGETFUL", "NAN_LATER", "RIGHT"]
    found = verified(SMALL, *names, timeout_s=5.0)
    assert statuses(found) == {
        "SPOILING": "INCORRECT",
        "DYING": "CRASH",
        "RAISING": "ERROR",
        "HANGING": "TIMEOUT",
        "FORGETFUL": "INCORRECT",
        "NAN_LATER": "INCORRECT",
        "RIGHT": "OK",
    }
    reasons = {f.name: " ".join(f.outcome.reasons) for f in found.findings}
    assert reasons["SPOILING"].startswith("error ")
    assert "request 2, query token 0, head 1" in reasons["SPOILING"]
    assert reasons["DYING"] == "worker exited with 7"
    assert reasons["HANGING"] == "killed after 5 s of running (timeout_s)"
    assert "no kernel image" in reasons["RAISING"]
    # Right in the call, wrong in the first step that needs what it did not write.
    assert reasons["FORGETFUL"].startswith("step 1: ")
    assert reasons["NAN_LATER"].startswith("step 2: not finite")
    differences = {f.name: f.difference for f in found.findings}
    assert differences["SPOILING"] == differences["FORGETFUL"] == "bug"
    assert differences["DYING"] == "", "there is nothing to compare"
    # Of a chain that ended early, no drift is told: it would be less than the others'.
    assert {f.name: f.drift is None for f in found.findings}["NAN_LATER"]
    steps = {f.name: len(f.outcome.checks) for f in found.findings}
    assert (steps["SPOILING"], steps["FORGETFUL"], steps["NAN_LATER"]) == (1, 2, 3)
    for pair in found.pairs:
        assert pair.difference == "bug"
        assert "RIGHT" not in pair.wrong
    rows = verification_rows(found)
    named = [
        row["reasons"] for row in rows if (row["backend"], row["against"]) == ("SPOILING", "RIGHT")
    ]
    assert named == [["SPOILING is wrong"]]
    assert conclusion(found).startswith("7 run; wrong: SPOILING (INCORRECT), DYING (CRASH)")


@pytest.mark.usefixtures("suspects")
def test_steps_go_on_into_blocks_that_hold_nothing_yet() -> None:
    """The second generated token is the first of a new block, whose other slots are no data."""
    workload = Workload.parse("2q1s15 heads=4/2 head_size=32 dtype=fp16 block=16")
    found = verified(workload, "RIGHT", "TORCH_SDPA", "FORGETFUL", steps=3)
    assert statuses(found) == {"RIGHT": "OK", "TORCH_SDPA": "OK", "FORGETFUL": "INCORRECT"}
    late = verified(Workload.parse(workload.text.replace("s15", "s16")), "FORGETFUL", steps=1)
    (check,) = late.findings[0].outcome.checks[1:]
    # What lies in a slot nobody wrote is far outside the data, and finite as in an engine.
    assert check.rel_error > 10


@pytest.mark.usefixtures("suspects")
def test_an_error_says_where_it_was_raised() -> None:
    (found,) = verified(SMALL, "RAISING", steps=0).findings
    assert "in refuse_to_work" in found.outcome.trace
    assert found.outcome.trace.rstrip().endswith("RuntimeError: no kernel image is available")


def test_a_device_that_does_not_work_is_no_run_to_resume(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: WorkerProcess, limit_s: float, doing: str) -> str:
        return "the device is lost"

    monkeypatch.setattr(WorkerProcess, "receive", refuse)
    with pytest.raises(InfrastructureError, match=r"device is lost.*then verify again"):
        verified(SMALL, "CPU_ATTN", steps=0)


@pytest.mark.usefixtures("suspects")
def test_a_fault_that_only_steps_show_is_not_seen_without_them() -> None:
    assert statuses(verified(SMALL, "FORGETFUL", steps=0)) == {"FORGETFUL": "OK"}


def test_drift_is_from_a_reference_that_fed_itself(tmp_path: Path) -> None:
    """The chain of the reference by hand, and a backend's drift from it."""
    with Verifier(CPU, 60.0, "forkserver") as verifier:
        kept = {name: tmp_path / f"{name or 'reference'}.pt" for name in ("", "CPU_ATTN")}
        for name, path in kept.items():
            assert verifier.ask(PlannedPoint(SMALL, name), 2, path).status == Status.OK
        found = verifier.verify([PlannedPoint(SMALL, "CPU_ATTN")], 2)
    with torch.no_grad():
        steps = DecodeSteps(make_batch(SMALL), 2)
        chain = [reference_attention(steps.first).output]
        for _ in range(2):
            chain.append(reference_attention(steps.feed(chain[-1])).output)
    reference, outputs = (torch.load(path, weights_only=True) for path in kept.values())
    for by_hand, stored in zip(chain, reference, strict=True):
        assert torch.allclose(by_hand, stored, rtol=1e-12, atol=1e-12)
    drifts = []
    for right, mine in zip(chain[1:], outputs[1:], strict=True):
        error, size = (mine.double() - right).norm(dim=-1), right.norm(dim=-1)
        floor = 0.1 * right.square().sum(-1).mean().sqrt()
        drifts.append(float((error / size.clamp_min(floor)).max()))
    assert found.findings[0].drift == pytest.approx(max(drifts), rel=1e-9)


def test_backends_that_order_requests_otherwise_are_compared_request_by_request() -> None:
    found = verified(MLA, "TORCH_MLA", "TRITON_MLA", steps=2)
    assert statuses(found) == {"TORCH_MLA": "OK", "TRITON_MLA": "OK"}
    assert found.pairs[0].call < 2 * found.tolerance
    for finding in found.findings:
        planned = get_backend_class(finding.planned.backend).get_builder_cls()
        order = batch_order(MLA.requests, planned.reorder_batch_threshold)
        assert order == [1, 2, 0], "the long request goes behind the short ones"
        assert finding.drift is not None
        assert finding.drift < 100 * found.tolerance


def test_refused_backends_are_listed_and_encoders_have_no_steps() -> None:
    workload = Workload.parse("2q9 heads=4/2 head_size=32 attn=encoder_only softcap=20")
    found = verified(workload, "CPU_ATTN", "TORCH_SDPA", steps=4)
    assert found.steps == 0
    assert statuses(found) == {"CPU_ATTN": "OK", "TORCH_SDPA": "UNSUPPORTED"}
    assert "logits soft cap not supported" in found.findings[1].outcome.reasons
    assert [f.name for f in found.ran] == ["CPU_ATTN"]
    assert found.findings[0].drift is None
    assert not found.pairs


def test_asked_for_none_every_variant_of_every_backend_is_planned() -> None:
    plan = plan_verification(SMALL, [], CPU)
    names = {f"{p.backend}:{p.variant}" for p in plan}
    assert {"TORCH_SDPA:", "TORCH_SDPA:flash", "TORCH_SDPA:math", "CPU_ATTN:"} <= names
    assert not any(p.backend.endswith("MLA") for p in plan)
    asked = plan_verification(SMALL, ["torch_sdpa:math"], CPU)
    assert [(p.backend, p.variant) for p in asked] == [("TORCH_SDPA", "math")]


@pytest.mark.usefixtures("suspects")
def test_capabilities_that_were_run_are_recorded_as_they_went(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted = {"window": f"{SMALL.text} window=9", "many": SMALL.text, "wide": "q9 head_size=4096"}
    monkeypatch.setattr(capabilities, "ATTENTION", wanted)
    with Verifier(CPU, 60.0, "forkserver") as verifier:
        runs = list(record(verifier, ["SPOILING", "TRITON_ATTN"]))
    assert [(run.backend, run.capability, run.status, run.interpreted) for run in runs] == [
        ("SPOILING", "window", "INCORRECT", ""),
        ("SPOILING", "many", "INCORRECT", ""),
        ("SPOILING", "wide", "INCORRECT", ""),
        ("TRITON_ATTN", "window", "OK", "interpreted"),
        ("TRITON_ATTN", "many", "OK", "interpreted"),
    ]
    for run in runs:
        assert run.workload == Workload.parse(wanted[run.capability]).text
        assert run.device == "cpu"
        assert f"torch {torch.__version__}" in run.versions
