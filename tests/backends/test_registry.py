"""Names, owners, entry points, missing libraries."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from attnbench.backends import registry
from attnbench.backends.declared.families import families
from attnbench.backends.device import Device
from attnbench.backends.registry import (
    backend_entry,
    backend_names,
    backend_status,
    get_backend_class,
    register_backend,
    runnable_backend_names,
    unregister_backend,
)
from attnbench.errors import BackendUnavailableError, UnknownBackendError, UsageError
from tests.backends import fakes
from tests.backends.fakes import AcceptsAll

ACCEPTS_ALL = "tests.backends.fakes.AcceptsAll"
RUNNABLE = (
    "TORCH_SDPA",
    "TRITON_ATTN",
    "FLEX_ATTENTION",
    "CPU_ATTN",
    "FLASH_ATTN",
    "FLASHINFER",
    "FLASH_ATTN_MLA",
    "FLASHMLA",
    "FLASHMLA_SPARSE",
    "FLASHINFER_MLA",
    "CUTLASS_MLA",
    "TRITON_MLA",
    "TORCH_MLA",
    "ROCM_AITER_FA",
    "ROCM_AITER_UNIFIED_ATTN",
    "ROCM_AITER_MLA",
    "ROCM_AITER_TRITON_MLA",
)


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    before = dict(registry._registered)
    yield
    for name in set(registry._registered) - set(before):
        unregister_backend(name)


def test_built_in_names_in_order_and_every_path_resolves() -> None:
    assert runnable_backend_names() == RUNNABLE
    assert backend_names()[: len(RUNNABLE)] == RUNNABLE
    for name in RUNNABLE:
        assert get_backend_class(name).get_name() == name


def test_listing_names_imports_no_backend() -> None:
    code = (
        "import sys\n"
        "from attnbench.backends.registry import backend_names\n"
        "assert backend_names()\n"
        "found = [m for m in sys.modules if m.startswith('attnbench.backends.') and\n"
        "         m.rpartition('.')[2] in ('torch_sdpa', 'flex_attention', 'triton_attn')]\n"
        "assert not found, found\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_an_unknown_name_lists_the_valid_ones_and_the_closest() -> None:
    with pytest.raises(UnknownBackendError, match="did you mean TORCH_SDPA") as caught:
        get_backend_class("TORCH_SPDA")
    for name in backend_names():
        assert name in str(caught.value)
    with pytest.raises(UnknownBackendError, match="did you mean TRITON_ATTN"):
        get_backend_class("triton-attn")
    with pytest.raises(UnknownBackendError) as far:
        get_backend_class("ZZZ")
    assert "did you mean" not in str(far.value)


def test_register_by_call_and_by_decorator() -> None:
    register_backend("BY_CALL", ACCEPTS_ALL)
    assert get_backend_class("BY_CALL") is AcceptsAll
    assert backend_status("BY_CALL") is None
    assert "BY_CALL" in runnable_backend_names()
    assert register_backend("BY_DECORATOR")(AcceptsAll) is AcceptsAll
    assert get_backend_class("BY_DECORATOR") is AcceptsAll


def test_a_duplicate_names_both_owners_and_override_replaces() -> None:
    with pytest.raises(UsageError, match="registered twice") as caught:
        register_backend("TORCH_SDPA", ACCEPTS_ALL)
    message = str(caught.value)
    assert "attnbench.backends.torch_sdpa.TorchSDPABackend" in message
    assert ACCEPTS_ALL in message
    assert "override=True" in message
    original = get_backend_class("TORCH_SDPA")
    register_backend("TORCH_SDPA", ACCEPTS_ALL, override=True)
    assert get_backend_class("TORCH_SDPA") is AcceptsAll
    unregister_backend("TORCH_SDPA")
    assert get_backend_class("TORCH_SDPA") is original


def test_registering_the_same_path_again_is_no_duplicate() -> None:
    register_backend("TWICE", ACCEPTS_ALL)
    register_backend("TWICE", ACCEPTS_ALL)
    assert get_backend_class("TWICE") is AcceptsAll


def test_what_cannot_be_imported_again_is_refused_at_once() -> None:
    class Local(AcceptsAll):
        pass

    with pytest.raises(UsageError, match="local to a function"):
        register_backend("LOCAL")(Local)
    with pytest.raises(UsageError, match=r"package\.module\.Class"):
        register_backend("NO_PATH", "JustAName")
    with pytest.raises(UnknownBackendError, match="nothing to take back"):
        unregister_backend("TORCH_SDPA")


def test_a_missing_library_is_a_reason_with_the_install_command() -> None:
    register_backend("NO_MODULE", "no_such_package.backend.Cls", install="pip install no-such")
    with pytest.raises(BackendUnavailableError, match="pip install no-such"):
        get_backend_class("NO_MODULE")
    status = backend_status("NO_MODULE")
    assert status is not None
    assert "no_such_package" in status
    assert "pip install no-such" in status
    register_backend("NO_LIBRARY", "tests.backends.fakes.NeedsLibrary")
    late = backend_status("NO_LIBRARY")
    assert late is not None
    assert "no_such_attention" in late
    assert "pip install no-such-attention" in late


def test_a_path_that_leads_elsewhere_says_so() -> None:
    register_backend("NO_CLASS", "tests.backends.fakes.Nothing")
    with pytest.raises(BackendUnavailableError, match="AttributeError"):
        get_backend_class("NO_CLASS")
    register_backend("NOT_A_BACKEND", "pathlib.Path")
    with pytest.raises(BackendUnavailableError, match="is no AttentionBackend"):
        get_backend_class("NOT_A_BACKEND")


def test_status_for_a_device_asks_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    register_backend("PICKY", "tests.backends.fakes.AcceptsAll")
    monkeypatch.setattr(
        fakes.AcceptsAll,
        "unavailable_reason",
        classmethod(lambda cls, device: f"not on {device} today"),
        raising=False,
    )
    assert backend_status("PICKY") is None
    assert backend_status("PICKY", Device("cpu")) == "not on cpu today"


def test_declared_families_are_listed_and_refuse_to_run() -> None:
    declared = [name for name in backend_names() if backend_entry(name).selection_only]
    named_here = set(families()) - set(RUNNABLE)
    assert set(declared) == named_here
    for name in declared:
        cls = get_backend_class(name)
        assert cls is families()[name]
        assert cls.get_name() == name
        status = backend_status(name)
        assert status is not None
        assert status.startswith("selection only: ")
        assert name in status
        for attempt in (cls.get_impl_cls, cls.get_builder_cls):
            with pytest.raises(BackendUnavailableError, match="no code to run it"):
                attempt()
        with pytest.raises(BackendUnavailableError, match="no code to run it"):
            cls.get_kv_cache_shape(1, 16, 1, 128)


def _install(folder: Path, package: str, group: str, lines: str) -> None:
    info = folder / f"{package.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{lines}\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on sys.path where packages can be installed."""
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    monkeypatch.undo()
    registry.reload_entry_points()


def test_a_package_adds_a_backend_by_entry_point(site: Path) -> None:
    _install(site, "vendor-attn", "attnbench.backends", f"VENDOR = {_point(ACCEPTS_ALL)}")
    assert "VENDOR" not in backend_names()
    registry.reload_entry_points()
    assert "VENDOR" in runnable_backend_names()
    assert get_backend_class("VENDOR") is AcceptsAll
    assert backend_entry("VENDOR").owner == "package vendor-attn"


def test_a_broken_package_is_listed_with_the_package_to_mend(site: Path) -> None:
    _install(site, "vendor-attn", "attnbench.backends", "VENDOR = no_such_vendor:Backend")
    registry.reload_entry_points()
    assert "VENDOR" in backend_names()
    status = backend_status("VENDOR")
    assert status is not None
    assert "no_such_vendor" in status
    assert "pip install -U vendor-attn" in status


def test_two_owners_of_one_name_are_both_named(site: Path) -> None:
    _install(site, "vendor-a", "attnbench.backends", f"VENDOR = {_point(ACCEPTS_ALL)}")
    _install(site, "vendor-b", "attnbench.backends", f"VENDOR = {_point(ACCEPTS_ALL)}")
    registry.reload_entry_points()
    with pytest.raises(UsageError, match="registered twice") as caught:
        backend_names()
    assert "vendor-a" in str(caught.value)
    assert "vendor-b" in str(caught.value)


def _point(path: str) -> str:
    module, _, name = path.rpartition(".")
    return f"{module}:{name}"
