"""The maths of benchmarks/kernel_speed.py, and that its written table of limits is of this code."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

from attnbench.backends.triton_aot import OK, AotRow, aot_device, compile_report
from attnbench.backends.triton_launch import is_interpreted
from attnbench.measure.peaks import Peak
from attnbench.workload import Workload

ROOT = Path(__file__).resolve().parents[3]
PAGE = ROOT / "docs" / "triton-limits.md"


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "benchmarks" / "kernel_speed.py"))


def row(**values: Any) -> AotRow:
    given = {"registers": 118, "num_warps": 4, "shared_bytes": 39424, "kernel": "k", **values}
    return AotRow(case="c", target="sm90", number_format="bf16", status=OK, **given)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        # 118 -> 120 registers x 128 threads: 4 programs; (39,424 + 1,024) bytes: 5.
        ({}, (4, "registers")),
        ({"registers": 40, "shared_bytes": 72704}, (3, "shared memory")),
        ({"registers": 32, "shared_bytes": 0, "num_warps": 8}, (8, "registers")),
        ({"registers": 16, "shared_bytes": 0, "num_warps": 8}, (8, "warps")),
        ({"registers": 16, "shared_bytes": 0, "num_warps": 1}, (32, "programs")),
        ({"registers": 255, "num_warps": 8}, (1, "registers")),
    ],
)
def test_programs_that_fit_a_multiprocessor(
    script: dict[str, Any], values: dict[str, int], expected: tuple[int, str]
) -> None:
    assert script["programs_per_sm"](row(**values)) == expected


def test_the_roofline_is_the_larger_of_bytes_and_products(script: dict[str, Any]) -> None:
    decode = Workload.parse("q1s1k heads=8/2 head_size=64")
    flops = 4 * 8 * 64 * 1024
    moved = 2 * 8 * 64 * 2 + 1024 * 2 * 2 * 64 * 2
    roofline = script["roofline"]
    assert roofline(decode, Peak(1e9, 1e15)) == (moved / 1e9, "memory", flops / moved)
    assert roofline(decode, Peak(1e15, 1e9)) == (flops / 1e9, "products", flops / moved)


def measured(script: dict[str, Any]) -> Any:
    return script["Measured"](
        medians={
            ("a", "cold"): {"OURS": 10.0, "A": 5.0, "B:x": 8.0, "B:y": 4.0, "P": 20.0},
            ("b", "cold"): {"OURS": 10.0, "A": 10.0, "P": 9.0},
            ("c", "cold"): {"A": 1.0},
            ("a", "hot"): {"OURS": 10.0, "P": 1.0},
        },
        reasons={("c", "cold"): {"OURS": "FAILED: why"}},
    )


def test_ratios_are_to_the_best_of_the_others_and_the_peer_stands_apart(
    script: dict[str, Any],
) -> None:
    lines = list(script["tables"](measured(script), "OURS", ["A", "B"], 0.6, "P"))
    assert "| a | 10.00 | 5.00 | 4.00 | 20.00 | 0.40 |" in lines
    assert "| b | 10.00 | 10.00 | – | 9.00 | 1.00 |" in lines
    assert "| c | – | 1.00 | – | – | – |" in lines
    # sqrt(0.4 x 1.0) = 0.632
    mean = "Geometric mean 0.63 over 2 points (target 0.60: reached), worst 0.40 at a."
    assert mean in lines
    assert "- A: geometric mean 0.71, worst 0.50, over 2 points" in lines
    assert "- B: geometric mean 0.40, worst 0.40, over 1 points" in lines
    assert "Slower than P: b." in lines
    hot = lines[lines.index("L2 hot, µs:") :]
    assert "No point has both OURS and one of A, B: no ratio." in hot
    assert "Slower than P: a." in hot


def test_a_missed_target_is_said(script: dict[str, Any]) -> None:
    lines = list(script["tables"](measured(script), "OURS", ["A", "B"], 0.64))
    assert any("(target 0.64: MISSED)" in line for line in lines)
    assert not any("P" in line for line in lines if line.startswith("|"))


def test_what_has_no_figure_is_said_with_its_reason(script: dict[str, Any]) -> None:
    found = script["Measured"](
        medians={("q1s1k", "cold"): {"A": 1.0}},
        reasons={
            ("q1s1k", "cold"): {"B:x": "UNSUPPORTED: absent"},
            ("q1s2k", "cold"): {"A": "FAILED: why", "B:x": "UNSUPPORTED: absent"},
        },
    )
    workloads = [Workload.parse(text) for text in ("q1s1k", "q1s2k")]
    assert list(script["not_measured"](found, workloads, ["A", "B", "C"])) == [
        "- A not measured at q1s2k: FAILED: why",
        "- B not measured at all points: UNSUPPORTED: absent",
        "- C not measured at all points: no row was stored",
    ]


def test_points_cover_what_the_targets_are_set_over(script: dict[str, Any]) -> None:
    cases = [Workload.parse(case.workload) for case in script["limit_cases"](script["PARTS"])]
    decode = [w for w in cases if not w.shape.is_mla and w.requests[0].query_len == 1]
    assert {w.block_size for w in decode} == {16, 64}
    assert {len(w.requests) for w in decode} >= {1, 4, 16, 64, 128, 256}
    assert {w.requests[0].seq_len for w in decode} >= {1024, 32768}
    prefill = [w for w in cases if not w.shape.is_mla and w.requests[0].query_len > 1]
    assert {w.requests[0].query_len for w in prefill} >= {2048, 16384}
    assert {w.shape.num_heads for w in cases if w.shape.is_mla} == {16, 128}


def test_the_written_limits_are_of_these_tiles_and_points(script: dict[str, Any]) -> None:
    """All columns but the compiler's, which take minutes: those, of one point, below."""
    page = PAGE.read_text(encoding="utf-8")
    cases = script["limit_cases"](script["PARTS"])
    assert page.count("\n| ") == len(cases) + 1
    for case in cases:
        launch = case.launches(aot_device("sm90"), "bf16")[0]
        arguments, programs = launch.arguments, launch.grid[0] * launch.grid[1] * launch.grid[2]
        tile = f"{arguments['BLOCK_M']}x{arguments['TILE_N']}"
        start = f"| {case.name} | {tile}, {launch.num_warps}w, {launch.num_stages}s | {programs} |"
        lines = [line for line in page.splitlines() if line.startswith(start)]
        assert len(lines) == 1, f"{start}: run python benchmarks/kernel_speed.py --limits"
        seconds, bound, intensity = script["roofline"](
            Workload.parse(case.workload), script["PEAKS"][script["LIMITS_DEVICE"]]
        )
        assert lines[0].endswith(f"| {intensity:.1f} | {bound} | {seconds * 1e6:.1f} |")


@pytest.mark.slow
@pytest.mark.skipif(is_interpreted(), reason="TRITON_INTERPRET=1 excludes compiling")
def test_the_written_limits_are_what_the_compiler_says_now(script: dict[str, Any]) -> None:
    page = PAGE.read_text(encoding="utf-8").splitlines()
    case = script["limit_cases"](["decode"], [16])[0]
    compiled = compile_report(["sm90"], ["bf16"], cases=[case], workers=1)[0]
    peak = script["PEAKS"][script["LIMITS_DEVICE"]]
    line = script["limits_of"](Workload.parse(case.workload), compiled, peak)
    assert line in page, "run python benchmarks/kernel_speed.py --limits > docs/triton-limits.md"
