"""Suites: the shipped ones, loading, and what a broken file is answered."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from attnbench.errors import UsageError, WorkloadError
from attnbench.workload import Suite, Workload, load_suites
from attnbench.workload.cost import attention_bytes, attention_flops
from attnbench.workload.suite import PRESETS

SHIPPED = Path(__file__).parents[2] / "suites"


@pytest.fixture(scope="module")
def shipped() -> dict[str, Suite]:
    return load_suites(SHIPPED)


def _all(suites: Iterable[Suite], preset: str) -> list[Workload]:
    return [workload for suite in suites for workload in suite.workloads(preset)]


def test_a_suite_expands_and_counts_each_once() -> None:
    suite = Suite("s", "", smoke=["{1,2}q1s4k", "2q1s4096"], full=["q{1k..4k*2}"])
    assert [w.text for w in suite.workloads("smoke")] == ["q1s4k", "2q1s4k"]
    assert suite.workloads("nightly") == ()
    assert [w.text for w in suite.workloads("full")] == ["q1k", "q2k", "q4k"]
    assert suite.backends == ()
    assert pickle.loads(pickle.dumps(suite)) == suite


def test_an_unknown_preset_says_which_there_are() -> None:
    with pytest.raises(UsageError, match=r"'nigthly'; did you mean nightly\?"):
        Suite("s", "").workloads("nigthly")


def test_a_wrong_text_names_suite_and_preset() -> None:
    with pytest.raises(WorkloadError, match=r"suite 's', nightly: .*unexpected 'x'"):
        Suite("s", "", nightly=["8q1x4k"])
    with pytest.raises(WorkloadError, match=r"smoke is one text; write a list, smoke=\['q1'\]"):
        Suite("s", "", smoke="q1")


def test_the_four_suites_are_shipped(shipped: dict[str, Suite]) -> None:
    assert list(shipped) == ["decode", "mixed", "mla", "prefill"]
    for suite in shipped.values():
        assert suite.description
        assert suite.backends == ()
    assert all(w.shape.is_mla for p in PRESETS for w in shipped["mla"].workloads(p))
    for name in ("decode", "mixed", "prefill"):
        assert not any(w.shape.is_mla for p in PRESETS for w in shipped[name].workloads(p))
    assert {w.phase for p in PRESETS for w in shipped["decode"].workloads(p)} == {"decode"}


def test_presets_have_the_sizes_they_promise(shipped: dict[str, Suite]) -> None:
    for suite in shipped.values():
        assert 4 <= len(suite.workloads("smoke")) <= 6
    assert 35 <= len(_all(shipped.values(), "nightly")) <= 48
    assert 200 <= len(_all(shipped.values(), "full")) <= 1000
    # asv allows at most 1,000 combinations of a benchmark: room for a dozen backends at night.
    assert all(len(s.workloads("nightly")) * 12 <= 1000 for s in shipped.values())
    # Measured: below about 50 ms with two threads on backends that gather pages, a few for smoke.
    for workload in _all(shipped.values(), "nightly"):
        assert attention_flops(workload) <= 2.5e9, workload.text
        assert attention_bytes(workload) <= 0.04e9, workload.text
    for workload in _all(shipped.values(), "smoke"):
        assert attention_flops(workload) <= 0.1e9, workload.text
        assert attention_bytes(workload) <= 0.01e9, workload.text
    # The KV cache of a full point fits a device of 24 GB, its float64 reference one request.
    for workload in _all(shipped.values(), "full"):
        assert attention_bytes(workload) <= 10e9, workload.text


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_sweep_what_the_suites_promise(shipped: dict[str, Suite], preset: str) -> None:
    found = _all(shipped.values(), preset)
    plain = [w for w in found if not w.shape.is_mla]
    assert {64, 96, 128, 256} <= {w.shape.head_size for w in plain}
    assert {"fp32", "bf16"} <= {w.dtype for w in found}
    assert len({w.block_size for w in found}) >= 2
    assert {"decode", "prefill", "mixed"} <= {w.phase for w in found}
    assert len({w.shape.num_heads for w in found if w.shape.is_mla}) >= 2
    for feature in ("sliding_window", "logits_soft_cap", "has_sink"):
        assert any(getattr(w.shape, feature) for w in plain), feature
    assert any(w.common_prefix_len for w in found)
    assert any(w.lengths for w in found)
    if preset != "smoke":
        assert any(w.shape.use_alibi for w in found)
        assert any(w.kv_cache_dtype.startswith("fp8") for w in found)


def _write(folder: Path, name: str, body: str) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"from attnbench.workload import Suite\n{body}\n")
    return path


def test_files_are_loaded_by_name(tmp_path: Path) -> None:
    _write(
        tmp_path,
        "b.py",
        "from dataclasses import dataclass\n"
        "@dataclass\nclass Helper:\n    x: 'int' = 1\n"
        "SUITE = Suite('second', '', smoke=['q1s4k'])",
    )
    _write(tmp_path, "a.py", "SUITE = Suite('first', '', smoke=['q2k'], backends=['TORCH_SDPA'])")
    _write(tmp_path, "_helper.py", "raise RuntimeError('not a suite')")
    (tmp_path / "notes.txt").write_text("no suite")
    suites = load_suites(tmp_path)
    assert list(suites) == ["first", "second"]
    assert suites["first"].backends == ("TORCH_SDPA",)


# body of bad.py, what the message must contain beside its path
BROKEN = [
    ("", ["sets no SUITE", "SUITE = Suite("]),
    ("SUITE = ['q1']", ["sets SUITE to a list", "write SUITE = Suite("]),
    ("SUITE = Suit('s', '')", ["bad.py line 2", "NameError", "mend the file"]),
    ("SUITE = Suite('s', ''", ["bad.py line 2", "SyntaxError", "mend the file"]),
    ("\nimport nowhere", ["bad.py line 3", "ModuleNotFoundError", "nowhere"]),
    ("SUITE = Suite('s', '', nightly=['8q1x4k'])", ["line 2", "suite 's', nightly", "unexpected"]),
    ("SUITE = Suite('s', '', nightly=['{1,q1'])", ["line 2", "never closed"]),
    ("SUITE = Suite('s', '', nigthly=['q1'])", ["line 2", "TypeError", "nigthly"]),
    ("raise ValueError('two\\nlines')", ["ValueError: two;"]),
]


@pytest.mark.parametrize(("body", "parts"), BROKEN)
def test_a_broken_file_is_one_line(tmp_path: Path, body: str, parts: list[str]) -> None:
    path = _write(tmp_path, "bad.py", body)
    with pytest.raises(UsageError) as caught:
        load_suites(tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    for part in [str(path), *parts]:
        assert part in message


def test_two_files_with_one_name(tmp_path: Path) -> None:
    _write(tmp_path, "a.py", "SUITE = Suite('s', '')")
    _write(tmp_path, "b.py", "SUITE = Suite('s', '')")
    with pytest.raises(UsageError, match=r"b\.py: the suite name 's' is taken by .*a\.py; rename"):
        load_suites(tmp_path)


def test_a_folder_without_suites(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has no suite files; write .*decode\.py: SUITE = Suite"):
        load_suites(tmp_path)
    with pytest.raises(UsageError, match=r"nowhere is not a folder.*`attnbench init`"):
        load_suites(tmp_path / "nowhere")


def test_the_room_needs_no_torch() -> None:
    code = (
        "import sys; from pathlib import Path; import attnbench.workload.cost; "
        f"from attnbench.workload import load_suites; load_suites(Path({str(SHIPPED)!r})); "
        "heavy = {'torch', 'triton', 'numpy', 'scipy', 'pandas', 'pyarrow'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
