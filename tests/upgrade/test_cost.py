"""Costs of changed defaults: what is joined, how it is judged, and what is said to be missing."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from attnbench.cli.main import main
from attnbench.errors import ExitCode, UsageError
from attnbench.history.rule import Estimate, VerdictSettings
from attnbench.store import ResultsFolder
from attnbench.store.header import RunHeader
from attnbench.store.record import Measurement
from attnbench.upgrade import assess as assess_module
from attnbench.upgrade.batches import (
    BatchShare,
    UnmeasurableError,
    parse_batches,
    workload_of,
)
from attnbench.upgrade.cells import Cell, cell_of_shape
from attnbench.upgrade.compare import CellChange, ChangeKind, Step
from attnbench.upgrade.cost import Cost, CostVerdict, judge_costs, weighted_ratio
from attnbench.upgrade.cost_report import brace, cost_texts, costs_json, measure_command
from attnbench.upgrade.kernels import own_kernels
from attnbench.upgrade.probe import CellAnswer, VersionAnswer
from attnbench.upgrade.stored import StoredTimes
from attnbench.workload import Workload, get_shape
from attnbench.workload.suite import expand_workloads
from tests.history.fake import row

H200 = {"device_kind": "cuda", "device_class": "nvidia-h200", "compute_capability": "9.0"}
ON_H200: dict[str, Any] = {**H200, "timer": "event", "l2_state": "cold"}
LLAMA = cell_of_shape(get_shape("llama-3-8b"))


def answer(cell: Cell, backend: str | None, untrusted: tuple[str, ...] = (), **behind: Any) -> Any:
    return CellAnswer(
        cell=cell,
        backend=backend,
        backend_class=None,
        behind=behind,
        candidates=(),
        refused="",
        depends_on=(),
        untrusted=untrusted,
        not_evaluated=(),
        not_asked=(),
        model_override="",
    )


def change(
    before: CellAnswer,
    after: CellAnswer,
    capability: str = "9.0",
    kind: ChangeKind = ChangeKind.DEFAULT,
) -> CellChange:
    keys = dict.fromkeys([*before.behind, *after.behind])
    behind = [(key, before.behind.get(key), after.behind.get(key)) for key in keys]
    differ = tuple(one for one in behind if one[1] != one[2])
    return CellChange(capability, kind, before, after, "0.22.1", "0.33.0", ("why",), differ)


def step(*changes: CellChange) -> Step:
    first = changes[0]

    def version(name: str, answers: Sequence[CellAnswer]) -> VersionAnswer:
        cells = {one.cell.text: one for one in answers}
        return VersionAnswer(
            name, first.capability, "executed", "cuda", (), {}, {}, 0.0, cells=cells
        )

    before = version("0.22.1", [one.before for one in changes])
    after = version("0.33.0", [one.after for one in changes])
    return Step(first.capability, before, after, changes, 0, (), ())


FA_TO_TRITON = change(
    answer(LLAMA, "FLASH_ATTN", flash_attn_version=3), answer(LLAMA, "TRITON_ATTN")
)


def rows(
    backend: str,
    seconds: float,
    variant: str = "",
    workload: str = "32q1s4k",
    run: int = 0,
    replicates: int = 3,
    **more: Any,
) -> list[Measurement]:
    return [
        row(run, r, backend=backend, variant=variant, workload=workload,
            seconds=seconds * (1 + 0.002 * (r - 1)), **{**ON_H200, **more})
        for r in range(replicates)
    ]  # fmt: skip


def stored(*groups: Sequence[Measurement], published: Sequence[str] = ()) -> StoredTimes:
    return StoredTimes([asdict(one) for group in groups for one in group], published)


def judged(times: StoredTimes, *changes: CellChange, batches: Sequence[str] = ("32q1s4k",)) -> Cost:
    (cost,) = judge_costs([step(*(changes or (FA_TO_TRITON,)))], parse_batches(batches), times)
    return cost


# --- batches --------------------------------------------------------------------------------------
def test_weights_and_braces() -> None:
    shares = parse_batches(["0.7*32q1s4k", "{1,2}q1s1k seed=3", "0.3*32q1s4096"])
    assert [(one.text, one.weight) for one in shares] == [
        ("32q1s4k", 1.0), ("q1s1k seed=3", 1.0), ("2q1s1k seed=3", 1.0),
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["0*32q1s4k", "32q1s4k shape=qwen3-8b", "32q1s4k dtype=fp16"])
def test_a_batch_is_no_layer_and_weighs_something(text: str) -> None:
    with pytest.raises(UsageError, match=r"--batch.*0\.7\*32q1s4k"):
        parse_batches([text])


def share(text: str) -> BatchShare:
    return parse_batches([text])[0]


@pytest.mark.parametrize(
    ("cell", "behind", "text"),
    [
        (LLAMA, {}, "32q1s4k"),
        (LLAMA, {"preferred_block_size": 64, "kv_cache_layout": "LBHNC, LBNHC"},
         "32q1s4k block=64 layout=HND"),
        (LLAMA, {"kv_cache_layout": "LBNHC, LBHNC"}, "32q1s4k"),
        (cell_of_shape(get_shape("llama-3-70b", 4), kv_cache_dtype="fp8", block_size=32),
         {"preferred_block_size": 64}, "32q1s4k block=32 kv=fp8_e4m3 shape=llama-3-70b tp=4"),
        (Cell(head_size=64, sinks=True, sliding_window=128), {},
         "32q1s4k head_size=64 heads=32/8 sinks=1 window=128"),
        (Cell(head_size=256, softcap=True, hf_config={"attn_logit_softcapping": 30.0}), {},
         "32q1s4k head_size=256 heads=32/8 softcap=30"),
        (cell_of_shape(get_shape("deepseek-v3.2"), topk=2048),
         {"effective_kv_cache_dtype": "fp8_ds_mla"},
         "32q1s4k block=64 kv=fp8_ds_mla shape=deepseek-v3.2 topk=2048:random"),
    ],
)  # fmt: skip
def test_the_workload_of_a_cell(cell: Cell, behind: Mapping[str, Any], text: str) -> None:
    assert workload_of(cell, share("32q1s4k"), behind).text == Workload.parse(text).text


@pytest.mark.parametrize(
    "features",
    [{"dcp": 2}, {"mm_prefix": True}, {"kv_cache_dtype": "nvfp4"}, {"attn_type": "encoder"}],
)
def test_cells_that_no_workload_stands_for(features: dict[str, Any]) -> None:
    with pytest.raises(UnmeasurableError):
        workload_of(Cell(**features), share("32q1s4k"))


# --- kernels (the table of docs/flashinfer.md) ----------------------------------------------------
NATIVE: dict[str, Any] = {"flashinfer_prefill": "native", "flashinfer_decode": "native"}
XQA: dict[str, Any] = {**NATIVE, "flashinfer_decode": "XQA"}
GEN: dict[str, Any] = dict.fromkeys(NATIVE, "TRTLLM_GEN")


@pytest.mark.parametrize(
    ("capability", "behind", "workload", "variants"),
    [
        ("9.0", NATIVE, "32q1s4k", ("FA3", "FA2")),
        ("9.0", NATIVE, "32q1s4k kv=fp8", ("FA2",)),
        ("9.0", NATIVE, "q2k", ("FA3",)),
        ("9.0", XQA, "32q1s4k", ("XQA",)),
        ("9.0", XQA, "q2k", ("FA3",)),
        ("12.0", XQA, "q2k_8q1s1k", ("XQA",)),
        ("8.0", NATIVE, "q2k_8q1s1k", ("FA2",)),
        ("10.0", GEN, "q2k_8q1s1k", ("TRTLLM_GEN",)),
        ("10.0", GEN, "q2k", ("TRTLLM_GEN",)),
    ],
)
def test_flashinfers_kernels_by_step(
    capability: str, behind: dict[str, Any], workload: str, variants: tuple[str, ...]
) -> None:
    asked = answer(LLAMA, "FLASHINFER", **behind)
    assert own_kernels(asked, Workload.parse(workload), capability).variants == variants


def test_a_mix_of_kernels_that_no_variant_has() -> None:
    asked = answer(LLAMA, "FLASHINFER", **XQA)
    with pytest.raises(UnmeasurableError, match="mix of prefill and decode"):
        own_kernels(asked, Workload.parse("q2k_8q1s1k"), "9.0")


# --- what is joined -------------------------------------------------------------------------------
def test_both_sides_of_one_run_are_joined() -> None:
    cost = judged(stored(rows("FLASH_ATTN", 1e-4, "FA3"), rows("TRITON_ATTN", 1.3e-4)))
    assert cost.verdict is CostVerdict.SLOWER
    assert cost.exit_code is ExitCode.REGRESSION
    assert cost.ratio is not None
    assert cost.ratio.ratio == pytest.approx(1.3)
    assert 1.15 < cost.ratio.low < 1.3 < cost.ratio.high < 1.45
    assert "slower, +30.0 %" in cost_texts([cost])[FA_TO_TRITON.change_id]


@pytest.mark.parametrize(
    "other",
    [
        {"device_class": "nvidia-h100"},
        {"compute_capability": "10.0"},
        {"timer": "graph"},
        {"l2_state": "hot"},
        {"execution": "graph"},
        {"protocol_version": 0},
        {"variant": "FA2"},
        {"workload": "32q1s4k block=32"},
        {"workload": "32q1s4k seed=1"},
    ],
    ids=str,
)
def test_what_was_not_measured_alike_is_never_joined(other: dict[str, Any]) -> None:
    before = rows("FLASH_ATTN", 1e-4, **{"variant": "FA3", **other})
    cost = judged(stored(before, rows("TRITON_ATTN", 1.3e-4)))
    assert cost.verdict is CostVerdict.NOT_MEASURED
    assert cost.exit_code is ExitCode.UNDECIDED


def test_one_run_counts_before_newer_ones_of_one_side_each() -> None:
    together = [rows("FLASH_ATTN", 1e-4, "FA3"), rows("TRITON_ATTN", 1e-4)]
    apart = [rows("FLASH_ATTN", 1e-4, "FA3", run=1), rows("TRITON_ATTN", 2e-4, run=2)]
    assert judged(stored(*together, *apart)).verdict is CostVerdict.SAME
    cost = judged(stored(*apart))
    assert cost.verdict is CostVerdict.SLOWER
    assert any("different runs" in note for note in cost.notes)


def test_a_published_run_is_joined_with_itself_only() -> None:
    one = rows("FLASH_ATTN", 1e-4, "FA3", run=1)
    other = rows("TRITON_ATTN", 2e-4, run=2)
    assert judged(stored(one, other, published=[one[0].run_id])).ratio is None
    both = stored(one, rows("TRITON_ATTN", 2e-4, run=1), published=[one[0].run_id])
    assert judged(both).verdict is CostVerdict.SLOWER


def test_what_a_version_deploys_counts_before_our_adapters() -> None:
    ours = [rows("FLASH_ATTN", 1e-4, "FA3"), rows("TRITON_ATTN", 2e-4)]
    old = rows("VLLM:FLASH_ATTN", 1e-4, run=1, stack=("vllm==0.22.1",))
    new = rows("VLLM:TRITON_ATTN", 0.8e-4, run=2, stack=("vllm==0.33.0",))
    assert judged(stored(*ours, old, new)).verdict is CostVerdict.FASTER
    elsewhere = rows("VLLM:TRITON_ATTN", 0.8e-4, run=2, stack=("vllm==0.30.0",))
    assert judged(stored(*ours, old, elsewhere)).verdict is CostVerdict.SLOWER
    assert judged(stored(ours[0], new)).ratio is None  # theirs against ours: adapters differ


def test_made_up_times_are_no_measurement(tmp_path: Path) -> None:
    folder = ResultsFolder(tmp_path)
    assert judged(StoredTimes.read(folder)).verdict is CostVerdict.NOT_MEASURED
    measured = [*rows("FLASH_ATTN", 1e-4, "FA3", timer="fake", l2_state=""),
                *rows("TRITON_ATTN", 2e-4, timer="fake", l2_state="")]  # fmt: skip
    header = RunHeader.new(argv=(), spec="", plan=(), options={}, environment={})
    with folder.open_run(header) as run:
        for one in measured:
            run.append(replace(one, run_id=run.run_id))
        run.seal()
    assert judged(StoredTimes.read(folder)).ratio is None
    assert judged(StoredTimes.read(folder, "fake")).verdict is CostVerdict.SLOWER


# --- how it is judged -----------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("factor", "replicates", "verdict", "code"),
    [
        (0.7, 3, CostVerdict.FASTER, ExitCode.OK),
        (1.005, 3, CostVerdict.SAME, ExitCode.OK),
        (1.03, 3, CostVerdict.UNDECIDED, ExitCode.UNDECIDED),
        (2.0, 1, CostVerdict.UNDECIDED, ExitCode.UNDECIDED),
    ],
)
def test_verdicts(factor: float, replicates: int, verdict: CostVerdict, code: ExitCode) -> None:
    before = rows("FLASH_ATTN", 1e-4, "FA3", replicates=replicates)
    cost = judged(stored(before, rows("TRITON_ATTN", factor * 1e-4, replicates=replicates)))
    assert (cost.verdict, cost.exit_code) == (verdict, code)


@pytest.mark.parametrize(
    ("weights", "verdict"), [((9, 1), CostVerdict.SLOWER), ((1, 9), CostVerdict.FASTER)]
)
def test_the_mix_decides(weights: tuple[int, int], verdict: CostVerdict) -> None:
    times = stored(
        rows("FLASH_ATTN", 1e-4, "FA3"), rows("TRITON_ATTN", 2e-4),
        rows("FLASH_ATTN", 2e-4, "FA3", workload="q2k"),
        rows("TRITON_ATTN", 1e-4, workload="q2k"),
    )  # fmt: skip
    cost = judged(times, batches=(f"{weights[0]}*32q1s4k", f"{weights[1]}*q2k"))
    before = weights[0] * 1e-4 + weights[1] * 2e-4
    after = weights[0] * 2e-4 + weights[1] * 1e-4
    assert cost.ratio is not None
    assert cost.ratio.ratio == pytest.approx(after / before)
    assert cost.verdict is verdict


def test_a_models_layers_are_weighed_by_their_number() -> None:
    names = ("gpt-oss-20b", "gpt-oss-20b-local", "gemma-3-27b", "gemma-3-27b-local")
    cells = [cell_of_shape(get_shape(name)) for name in names]
    layers = [get_shape(name).num_layers for name in names]
    assert layers[2] != layers[3]
    changes = [
        change(answer(one, "FLASH_ATTN", flash_attn_version=3), answer(one, "TRITON_ATTN"))
        for one in cells
    ]
    factors = (1.0, 1.0, 4.0, 0.5)
    times = stored(
        *(
            group
            for name, factor in zip(names, factors, strict=True)
            for group in (
                rows("FLASH_ATTN", 1e-4, "FA3", workload=f"32q1s4k shape={name}"),
                rows("TRITON_ATTN", factor * 1e-4, workload=f"32q1s4k shape={name}"),
            )
        )
    )
    costs = judge_costs([step(*changes)], parse_batches(["32q1s4k"]), times)
    assert len(costs) == 2  # a model each
    assert costs[0].ratio is not None
    assert costs[1].ratio is not None
    assert costs[0].ratio.ratio == pytest.approx(1.0)
    expected = (layers[2] * 4.0 + layers[3] * 0.5) / (layers[2] + layers[3])
    assert costs[1].ratio.ratio == pytest.approx(expected)


def test_limits_of_a_mix_are_weighted_sums() -> None:
    found = weighted_ratio([Estimate(2.0, 1.5, 3.0), Estimate(1.0, 0.9, 1.1)], [3.0, 1.0])
    assert (found.ratio, found.low, found.high) == pytest.approx((1.75, 1.35, 2.525))
    one_sided = [Estimate(2.0, 2.0, 2.0, enough=False), Estimate(1.0, 0.9, 1.1)]
    assert not weighted_ratio(one_sided, [1.0, 1.0]).enough


def test_doubt_about_the_change_is_never_a_regression() -> None:
    times = stored(rows("FLASH_ATTN", 1e-4, "FA3"), rows("TRITON_ATTN", 2e-4))
    doubtful = replace(FA_TO_TRITON, after=answer(LLAMA, "TRITON_ATTN", ("no torch",)))
    cost = judged(times, doubtful)
    assert (cost.verdict, cost.exit_code) == (CostVerdict.SLOWER, ExitCode.UNDECIDED)


def test_lost_support_is_a_regression_and_a_gain_is_not_judged() -> None:
    lost = change(answer(LLAMA, "FLASH_ATTN", flash_attn_version=3), answer(LLAMA, None),
                  kind=ChangeKind.LOST)  # fmt: skip
    assert judged(stored(), lost).exit_code is ExitCode.REGRESSION
    gained = change(answer(LLAMA, None), answer(LLAMA, "TRITON_ATTN"), kind=ChangeKind.GAINED)
    assert judge_costs([step(gained)], parse_batches(["32q1s4k"]), stored()) == []


def test_behind_a_name_only_other_kernels_are_judged() -> None:
    graphs = change(
        answer(LLAMA, "FLASH_ATTN", flash_attn_version=3, cudagraph_support="NEVER"),
        answer(LLAMA, "FLASH_ATTN", flash_attn_version=3, cudagraph_support="ALWAYS"),
        kind=ChangeKind.BEHIND,
    )
    assert judge_costs([step(graphs)], parse_batches(["32q1s4k"]), stored()) == []
    latent = cell_of_shape(get_shape("deepseek-v3"))
    layout = change(
        answer(latent, "FLASHINFER_MLA", kv_cache_layout="HND"),
        answer(latent, "FLASHINFER_MLA"),
        kind=ChangeKind.BEHIND,
    )
    assert judge_costs([step(layout)], parse_batches(["32q1s4k"]), stored()) == []
    version = change(
        answer(LLAMA, "FLASH_ATTN", flash_attn_version=2),
        answer(LLAMA, "FLASH_ATTN", flash_attn_version=3),
        kind=ChangeKind.BEHIND,
    )
    times = stored(rows("FLASH_ATTN", 1e-4, "FA2"), rows("FLASH_ATTN", 0.6e-4, "FA3"))
    assert judged(times, version).verdict is CostVerdict.FASTER
    trtllm = change(
        answer(LLAMA, "FLASHINFER", **NATIVE),
        answer(LLAMA, "FLASHINFER", **XQA),
        kind=ChangeKind.BEHIND,
    )
    # Both sides prefill by the same kernels.
    assert judged(stored(), trtllm, batches=("q2k",)).verdict is CostVerdict.SAME
    assert judged(stored(), trtllm).verdict is CostVerdict.NOT_MEASURED


def test_a_failed_try_is_told() -> None:
    failed = [row(backend="FLASH_ATTN", variant="FA3", workload="32q1s4k", status="INCORRECT",
                  seconds=None, **ON_H200)]  # fmt: skip
    cost = judged(stored(failed, rows("TRITON_ATTN", 2e-4)))
    assert "FLASH_ATTN:FA3 ended as INCORRECT" in cost.why


# --- what is missing ------------------------------------------------------------------------------
def test_the_command_measures_what_is_missing() -> None:
    cost = judged(
        stored(rows("FLASH_ATTN", 1e-4, "FA3"), rows("TRITON_ATTN", 2e-4)),
        batches=("32q1s4k", "q2k", "8q1s1k"),
    )
    command = measure_command(cost, FA_TO_TRITON)
    assert command == (
        "attnbench run '{q2k,8q1s1k}' --backend FLASH_ATTN:FA3 --backend TRITON_ATTN --replicates 3"
    )
    (told,) = costs_json([cost])[FA_TO_TRITON.change_id]
    assert told["measure"] == command
    assert [one["ratio"] is None for one in told["batches"]] == [False, True, True]


def test_one_text_stands_for_all() -> None:
    texts = ["32q1s4k shape=qwen3-8b", "q2k block=64 layout=HND shape=qwen3-8b"]
    text = brace(texts)
    assert text is not None
    assert {one.text for one in expand_workloads([text])} >= set(texts)
    assert brace(["q2k", "q2k lengths=geometric"]) is None


# --- the verb -------------------------------------------------------------------------------------
CPU_CHANGE = change(
    answer(Cell(head_size=32, num_heads=4, num_kv_heads=2), "CPU_ATTN"),
    answer(Cell(head_size=32, num_heads=4, num_kv_heads=2), "TORCH_SDPA"),
    capability="cpu",
)


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """`attnbench upgrade` with a probe that has answered already; gives the exit code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(assess_module, "assess", lambda *_, **__: [step(CPU_CHANGE)])

    def call(*words: str) -> int:
        arguments = ["upgrade", "--from", "vllm==0.22.1", "--to", "vllm==0.33.0", *words]
        monkeypatch.setattr(sys, "argv", ["attnbench", *arguments])
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        return int(str(stop.value.code or 0))

    return call


def test_without_a_batch_nothing_is_judged(verb: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert verb("-c", "cpu") == 0
    assert "no --batch was given" in capsys.readouterr().err


def test_measure_needs_the_device(verb: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert verb("-c", "8.9", "--batch", "3q1s40", "--measure") == 2
    said = capsys.readouterr().err
    assert "compute capability 8.9" in said
    assert "attnbench upgrade --from vllm==0.22.1 --to vllm==0.33.0 -c 8.9 --batch 3q1s40" in said


def test_missing_points_are_measured_then_joined(
    verb: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from attnbench.selection import current_device

    if current_device().kind != "cpu":
        pytest.skip("this machine's device is a GPU")
    asked = ("-c", "cpu", "--batch", "3q1s40 ", "--timer", "fake", "--results", "kept")
    assert verb(*asked) == ExitCode.UNDECIDED
    command = "attnbench run '3q1s40 head_size=32 heads=4/2' --backend CPU_ATTN"
    assert f"to measure: {command} --backend TORCH_SDPA" in capsys.readouterr().err
    code = verb(*asked, "--measure", "--replicates", "2", "-f", "json")
    printed = json.loads(capsys.readouterr().out)
    (cost,) = printed["steps"][0]["changes"][0]["cost"]
    runs = {one["run_id"] for part in cost["batches"] for one in (part["before"], part["after"])}
    assert len(runs) == 1  # both sides in one sweep
    assert all(len(part["before"]["replicates"]) == 2 for part in cost["batches"])
    settings = VerdictSettings().noise("fake")
    slower = cost["ratio"] > settings.limit and cost["low"] > 1
    assert code == (ExitCode.REGRESSION if slower else ExitCode.OK)
    assert (cost["verdict"] == "slower") == slower
    assert verb(*asked) == code  # stored: nothing is measured again


def test_installed_versions_are_measured_as_deployed(
    verb: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from attnbench.selection import current_device
    from attnbench.upgrade import alternate

    if current_device().kind != "cpu":
        pytest.skip("this machine's device is a GPU")
    asked = []
    monkeypatch.setattr(alternate, "measure_by_turns", lambda *given: asked.append(given))
    arguments = ["upgrade", "--from-python", sys.executable, "--to-python", sys.executable]
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "-c", "cpu", "--batch", "3q1s40", "--measure", "--results", "r"])
    assert stop.value.code == ExitCode.UNDECIDED  # the stand-in has stored nothing
    (sides, plans, options, results, _) = asked[0]
    assert [str(side.python) for side in sides] == [sys.executable] * 2
    assert [[one.backends for one in plan] for plan in plans] == [
        [("VLLM:CPU_ATTN",)],
        [("VLLM:TORCH_SDPA",)],
    ]
    assert plans[0][0].workloads == ("3q1s40 head_size=32 heads=4/2",)
    assert (options.replicates, results) == (3, Path("r"))
