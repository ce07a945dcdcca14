"""The probe against a small vLLM of each API shape, in real processes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from attnbench.errors import DataError, InfrastructureError, UsageError
from attnbench.upgrade import probe as probe_module
from attnbench.upgrade.cells import Cell, MLADims
from attnbench.upgrade.compare import ChangeKind, compare
from attnbench.upgrade.probe import (
    FACTS,
    VersionAnswer,
    parse_capability,
    parse_facts,
    probe,
    probe_all,
)
from attnbench.upgrade.probe_env import PreparedVersion
from tests.upgrade import fake_vllm

PLAIN = Cell()
BIG = Cell(head_size=256)
SINKS = Cell(sinks=True)
SPARSE = Cell(head_size=576, mla=MLADims(), num_kv_heads=1, topk=2048)
WINDOW = Cell(sliding_window=512)
PREFIX = Cell(mm_prefix=True)
UNKNOWN_KV = Cell(kv_cache_dtype="nope")
CELLS = (PLAIN, BIG, SINKS, WINDOW, PREFIX, UNKNOWN_KV)


def prepared(folder: Path, shape: fake_vllm.Shape, *packages: str) -> PreparedVersion:
    folder.mkdir(exist_ok=True)
    paths = [fake_vllm.write(folder, shape)]
    paths += [fake_vllm.write_package(folder / "extra", name) for name in packages]
    return PreparedVersion(
        python=Path(sys.executable),
        paths=tuple(paths),
        label=f"fake {shape}",
        vllm_version=fake_vllm.VERSIONS[shape],
        requires=(),
        how="a test's",
    )


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> VersionAnswer:
    version = prepared(tmp_path_factory.mktemp("old"), "old", "flashy")
    return probe(version, "9.0", CELLS)


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> VersionAnswer:
    version = prepared(tmp_path_factory.mktemp("new"), "new", "flashy")
    return probe(version, "9.0", CELLS)


def test_each_api_shape_is_answered_from_its_own_code(
    old: VersionAnswer, new: VersionAnswer
) -> None:
    assert {text: answer.backend for text, answer in old.cells.items()} == {
        PLAIN.text: "ALPHA",
        BIG.text: "BETA",
        SINKS.text: "BETA",
        WINDOW.text: "ALPHA",
        PREFIX.text: "BETA",
        UNKNOWN_KV.text: None,
    }
    assert {text: answer.backend for text, answer in new.cells.items()} == {
        PLAIN.text: "BETA",
        BIG.text: "BETA",
        SINKS.text: "BETA",
        WINDOW.text: "BETA",
        PREFIX.text: "BETA",
        UNKNOWN_KV.text: None,
    }
    assert old.version == "0.22.9"
    assert new.requires == {"torch": "==2.14.0"}
    assert all(answer.trusted for answer in (*old.cells.values(), *new.cells.values()))


def test_candidates_come_in_the_platforms_order_with_every_reason(old: VersionAnswer) -> None:
    candidates = old.cells[BIG.text].candidates
    assert [one.backend for one in candidates] == ["ALPHA", "BETA", "GAMMA"]
    assert [one.reasons for one in candidates] == [("head_size not supported",), (), ()]


def test_what_is_behind_the_name_is_told_in_each_versions_way(
    old: VersionAnswer, new: VersionAnswer
) -> None:
    assert old.cells[PLAIN.text].behind["kv_cache_layout"] == "HND"
    assert new.cells[PLAIN.text].behind["kv_cache_layout"] == "LBHNC, BLHNC"
    assert old.cells[PLAIN.text].behind["kernel_block_sizes"] == "MultipleOf(16)"
    assert old.cells[PLAIN.text].behind["cudagraph_support"] == "NEVER"
    assert new.cells[PLAIN.text].behind["cudagraph_support"] == "ALWAYS"


def test_an_unknown_kv_dtype_is_refused_in_the_versions_own_words(old: VersionAnswer) -> None:
    assert "Invalid kv_cache_dtype: nope" in old.cells[UNKNOWN_KV.text].refused


def test_a_feature_the_selector_has_no_field_for_is_said(
    old: VersionAnswer, new: VersionAnswer
) -> None:
    assert "sliding_window" in old.cells[WINDOW.text].not_asked
    assert new.cells[WINDOW.text].not_asked == ()
    assert old.cells[PLAIN.text].not_asked == ()


def test_an_assumed_fact_is_tried_the_other_way(old: VersionAnswer) -> None:
    assert old.cells[SINKS.text].depends_on == ("flashinfer-cubin; otherwise GAMMA",)
    assert old.cells[PLAIN.text].depends_on == ()


def test_the_other_way_is_asked_about_the_same_layer(old: VersionAnswer) -> None:
    assert old.cells[PREFIX.text].backend == "BETA"
    assert old.cells[PREFIX.text].depends_on == ()


def test_a_fact_can_be_turned_round_and_never_waits_for_a_network(tmp_path: Path) -> None:
    version = prepared(tmp_path, "old", "flashy")
    facts = parse_facts(["flashinfer-cubin=no"])
    answer = probe(version, "9.0", [SINKS], facts)
    assert answer.cells[SINKS.text].backend == "GAMMA"
    assert answer.cells[SINKS.text].depends_on == ("no flashinfer-cubin; otherwise BETA",)
    assert answer.duration_s < 60


@pytest.mark.parametrize("shape", ["old", "new"])
def test_a_missing_package_makes_the_cell_untrusted(tmp_path: Path, shape: fake_vllm.Shape) -> None:
    answer = probe(prepared(tmp_path, shape), "9.0", [PLAIN, BIG])
    big = answer.cells[BIG.text]
    assert big.backend == "GAMMA"
    assert not big.trusted
    assert "BETA" in big.untrusted[0]
    assert "flashy" in big.untrusted[0]
    # The old order asks ALPHA first: what BETA lacks cannot matter there.
    assert answer.cells[PLAIN.text].trusted == (shape == "old")


def test_an_environmental_reason_in_new_words_is_known_by_what_was_looked_for(
    tmp_path: Path,
) -> None:
    answer = probe(prepared(tmp_path, "new", "flashy"), "9.0", [SPARSE])
    sparse = answer.cells[SPARSE.text]
    assert sparse.backend == "GAMMA"
    assert "module cleverdsl" in sparse.untrusted[0]


def test_what_the_probe_cannot_evaluate_is_named_and_never_guessed(tmp_path: Path) -> None:
    answer = probe(prepared(tmp_path, "future", "flashy"), "9.0", [PLAIN])
    plain = answer.cells[PLAIN.text]
    assert plain.backend is None
    assert "cache_config.quantum_state" in plain.not_evaluated[0]
    assert not plain.trusted


def test_the_compute_capability_is_the_one_asked_for(tmp_path: Path) -> None:
    version = prepared(tmp_path, "old", "flashy")
    turing, cpu = probe_all([(version, "7.5"), (version, "cpu")], [PLAIN, SPARSE])
    assert turing.cells[PLAIN.text].backend == "BETA"
    assert turing.cells[PLAIN.text].candidates[0].reasons == ("compute capability not supported",)
    assert cpu.cells[PLAIN.text].backend == "GAMMA"
    assert "not supported on CPU" in cpu.cells[SPARSE.text].refused


def test_an_upgrade_says_what_changed_and_why(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    versions = [
        prepared(tmp_path / "a", "old", "flashy"),
        prepared(tmp_path / "b", "new", "flashy"),
    ]
    asked = [(version, one) for one in ("7.5", "9.0") for version in versions]
    answers = probe_all(asked, [PLAIN, SPARSE])
    turing, hopper = compare(*answers[:2]), compare(*answers[2:])
    plain = next(one for one in turing.changes if one.before.cell == PLAIN)
    assert plain.kind is ChangeKind.DEFAULT
    assert plain.reasons[0] == (
        "BETA was dropped on 7.5: compute capability not supported since 0.30.9"
    )
    assert plain.reasons[1] == "GAMMA was valid in 0.22.9 too, after BETA"
    plain = next(one for one in hopper.changes if one.before.cell == PLAIN)
    assert plain.reasons[0] == "ALPHA is still valid on 9.0; BETA is tried before it"
    assert hopper.pins == (("torch", "==2.11.0", "==2.14.0"),)


def test_the_layouts_of_two_api_shapes_are_one_language(
    old: VersionAnswer, new: VersionAnswer
) -> None:
    step = compare(old, new)
    big = next(one for one in step.changes if one.before.cell == BIG)
    assert big.kind is ChangeKind.BEHIND
    assert big.behind == (("cudagraph_support", "NEVER", "ALWAYS"),)


def test_a_vllm_that_does_not_import_says_what_it_needs(tmp_path: Path) -> None:
    version = prepared(tmp_path, "old")
    init = tmp_path / "vllm" / "__init__.py"
    init.write_text("import sparkles\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"needs the package 'sparkles'.*--probe-requirement"):
        probe(version, "9.0", [PLAIN])


def test_a_vllm_without_the_selectors_entry_point_is_named(tmp_path: Path) -> None:
    version = prepared(tmp_path, "old")
    selector = tmp_path / "vllm" / "v1" / "attention" / "selector.py"
    selector.write_text("class AttentionSelectorConfig: pass\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"no vllm\.v1\.attention\.selector\.get_attn_backend"):
        probe(version, "9.0", [PLAIN])


def test_a_process_that_dies_is_the_machines_failure(tmp_path: Path) -> None:
    version = prepared(tmp_path, "old")
    (tmp_path / "vllm" / "__init__.py").write_text(
        "import os, sys\nprint('out of luck', file=sys.stderr, flush=True)\nos._exit(9)\n",
        encoding="utf-8",
    )
    with pytest.raises(InfrastructureError, match="exit code 9: out of luck"):
        probe(version, "9.0", [PLAIN])


def test_a_process_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = prepared(tmp_path, "old")
    (tmp_path / "vllm" / "__init__.py").write_text("import time\ntime.sleep(60)\n", "utf-8")
    monkeypatch.setattr(probe_module, "TIMEOUT_S", 5.0)
    with pytest.raises(InfrastructureError, match="did not end in 5 s"):
        probe(version, "9.0", [PLAIN])


@pytest.mark.parametrize(
    ("text", "capability"),
    [("9.0", "9.0"), ("sm_90", "9.0"), ("SM90", "9.0"), ("100", "10.0"), ("CPU", "cpu")],
)
def test_capabilities_are_read_as_people_write_them(text: str, capability: str) -> None:
    assert parse_capability(text) == capability


@pytest.mark.parametrize("text", ["", "9", "4.2", "h100", "-1", "9.0.0"])
def test_an_unknown_capability_names_the_known_ones(text: str) -> None:
    with pytest.raises(UsageError, match=r"write one of 7\.5, 8\.0"):
        parse_capability(text)


@pytest.mark.parametrize("word", ["cubins=yes", "nvcc", "nvcc=maybe", ""])
def test_an_unknown_assumption_names_the_known_ones(word: str) -> None:
    with pytest.raises(UsageError, match=r"flashinfer-cubin=yes\|no"):
        parse_facts([word])
    assert parse_facts(["nvcc=no"]) == {**FACTS, "nvcc": False}
