"""`VLLM:NAME` in the registry, the plan and the command line; vLLM is imported only when asked."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from attnbench.backends.device import Device, cuda_device
from attnbench.backends.registry import (
    backend_entry,
    backend_names,
    backend_status,
    get_backend_class,
    runnable_backend_names,
    split_request,
)
from attnbench.backends.vllm_bridge_engine import load_vllm
from attnbench.backends.vllm_bridge_install import find_vllm
from attnbench.errors import BackendUnavailableError, UnknownBackendError, UsageError
from attnbench.measure.plan import plan_workloads, resolve_backend
from attnbench.measure.point import refusals
from attnbench.selection import config_of, consider, find_request
from attnbench.workload import Workload
from tests.backends.vllm.conftest import Install
from tests.backends.vllm.fake_state import RECORDED, VERSIONS

SM90 = cuda_device(9, 0)
DECODE = Workload.parse("8q1s4k")
MISSING = "vLLM is not installed; pip install vllm==0.22.1"


@pytest.fixture
def absent(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    """No vLLM, whatever this environment has."""
    monkeypatch.setattr("attnbench.backends.vllm_bridge_install.find_spec", lambda name: None)


@pytest.mark.usefixtures("absent")
def test_without_vllm_it_is_listed_with_the_command_that_brings_it() -> None:
    assert "VLLM" in backend_names()
    assert backend_status("VLLM") == MISSING
    assert backend_status("VLLM:TRITON_ATTN", SM90) == MISSING
    (point,) = plan_workloads([DECODE], ["VLLM:TRITON_ATTN"], SM90)
    assert refusals(point, SM90) == [MISSING], "said once"
    candidate = consider(config_of(DECODE), SM90, "VLLM:TRITON_ATTN").candidates[0]
    assert candidate.reasons == (MISSING,)
    with pytest.raises(BackendUnavailableError, match="not installed"):
        load_vllm()


def test_a_folder_of_kernels_alone_is_no_vllm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, install: Install
) -> None:
    (tmp_path / "site" / "vllm" / "vllm_flash_attn").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    assert find_vllm() is None


@pytest.mark.parametrize("version", VERSIONS)
def test_names_are_those_of_the_installed_registry(install: Install, version: str) -> None:
    install(version)
    found = find_vllm()
    assert found is not None
    assert found.version == version
    assert "TRITON_ATTN" in found.backend_names
    assert "TORCH_SDPA" not in found.backend_names, "a tag without a class"
    assert "CUSTOM" not in found.backend_names
    placeholders = {n for n, text in RECORDED[version]["backends"].items() if "." not in text}
    assert set(found.backend_names) == set(RECORDED[version]["backends"]) - placeholders
    assert get_backend_class("VLLM").get_variants(SM90) == found.backend_names


def test_nothing_imports_vllm_unless_it_was_asked_for(install: Install) -> None:
    install("0.22.1")
    assert "VLLM" not in runnable_backend_names()
    points = plan_workloads([DECODE], [], SM90)
    assert points
    assert not any(point.backend.startswith("VLLM") for point in points)
    consider(config_of(DECODE), SM90)
    (asked,) = plan_workloads([DECODE], ["vllm:triton_attn"], SM90)
    assert (asked.backend, asked.variant) == ("VLLM:TRITON_ATTN", "")
    assert backend_status("VLLM") is None
    assert load_vllm.cache_info().currsize == 0
    assert refusals(asked, SM90) == []
    assert load_vllm.cache_info().currsize == 1


def test_the_command_line_lists_it_without_importing_it(tmp_path: Path) -> None:
    """In a process of its own, over a vLLM that says when it is imported."""
    package = tmp_path / "vllm"
    (package / "v1" / "attention" / "backends").mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('vLLM was imported')\n")
    (package / "_version.py").write_text("__version__ = '0.22.1'\n")
    (package / "v1" / "attention" / "backends" / "registry.py").write_text(
        "class AttentionBackendEnum:\n    TRITON_ATTN = 'a.b.C'\n    OTHER = 'a.b.D'\n"
    )
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from attnbench.cli.main import main\nsys.argv = ['attnbench', *sys.argv[1:]]\nmain()"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, "backends", "--device", "cpu", "--format", "json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    row = next(r for r in json.loads(run.stdout) if r["backend"] == "VLLM")
    assert row["status"] == "on request"
    assert row["variants"] == "TRITON_ATTN, OTHER"
    assert "--backend VLLM:NAME" in row["why"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("TRITON_ATTN", ("TRITON_ATTN", "")),
        ("FLASH_ATTN:FA3", ("FLASH_ATTN", "FA3")),
        ("VLLM", ("VLLM", "")),
        ("VLLM:FLASH_ATTN", ("VLLM:FLASH_ATTN", "")),
        ("vllm:flash_attn", ("vllm:flash_attn", "")),
        ("VLLM:FLASH_ATTN:FA3", ("VLLM:FLASH_ATTN", "FA3")),
        ("NOBODY:x", ("NOBODY", "x")),
    ],
)
def test_how_a_request_is_read(text: str, expected: tuple[str, str]) -> None:
    assert split_request(text) == expected


def test_what_is_asked_for_wrongly(install: Install) -> None:
    install("0.22.1")
    with pytest.raises(
        UsageError, match=r"stands for many backends; ask for VLLM:NAME, e.g. VLLM:"
    ):
        resolve_backend("VLLM", SM90)
    with pytest.raises(UnknownBackendError, match="did you mean VLLM:TRITON_ATTN"):
        resolve_backend("VLLM:TRITON_ATN", SM90)
    with pytest.raises(UsageError, match="has no variant 'FA3'; it has: none"):
        resolve_backend("VLLM:FLASH_ATTN:FA3", SM90)
    with pytest.raises(UnknownBackendError, match="unknown backend 'TRITON_ATTN:x'"):
        backend_entry("TRITON_ATTN:x")
    assert find_request("vllm:triton_attn", "", {}).name == "VLLM:TRITON_ATTN"
    (reason,) = get_backend_class("VLLM").validate_configuration(config_of(DECODE), SM90)
    assert "ask for VLLM:NAME, e.g. VLLM:FLASH_ATTN" in reason


def test_a_backend_whose_library_is_not_here(install: Install) -> None:
    install("0.22.1")
    (point,) = plan_workloads([DECODE], ["VLLM:TURBOQUANT"], SM90)
    (reason,) = refusals(point, SM90)
    assert "VLLM:TURBOQUANT cannot be imported from vLLM 0.22.1" in reason
    assert "No module named 'turboquant'" in reason


def test_a_vllm_of_another_device(install: Install) -> None:
    state = install("0.22.1")
    state.platform = ""
    (point,) = plan_workloads([DECODE], ["VLLM:TRITON_ATTN"], SM90)
    assert refusals(point, SM90) == [
        "vLLM 0.22.1 was built for or found no device here, not cuda; install vLLM for cuda"
    ]
    assert get_backend_class("VLLM:TRITON_ATTN").validate_configuration(
        config_of(DECODE), Device("tpu")
    ) == ["device tpu not supported"]


def test_a_vllm_that_does_not_import(install: Install) -> None:
    state = install("0.22.1")
    del state.modules["vllm.config"].VllmConfig
    with pytest.raises(BackendUnavailableError, match=r"cannot be imported \(AttributeError"):
        load_vllm()


def test_a_vllm_whose_cache_api_is_neither(install: Install) -> None:
    state = install("0.22.1")
    base = state.modules["vllm.v1.attention.backend"].AttentionBackend
    del base.get_kv_cache_shape
    with pytest.raises(BackendUnavailableError, match="neither get_kv_cache_shape nor"):
        load_vllm()
