"""vLLM as it looks from outside, computing with plain torch on the CPU.

Every function that is called and every class that is made has the recorded signature
(`signatures.json`) of its version: another argument, or a field that version lacks, is a TypeError
or an AttributeError. What real vLLM asserts on the way is asserted (the current configuration, the
layer's registration, contexts' lengths on the host).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import field, make_dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tests.backends.vllm.fake_backends import make_backends
from tests.backends.vllm.fake_layers import make_attention, make_mla_attention, make_specs
from tests.backends.vllm.fake_state import (
    FP8,
    RECORDED,
    State,
    default_of,
    has_cache_shapes,
    with_signature,
)


class Config:
    """A configuration class: it takes only the recorded fields."""

    names: frozenset[str]

    def __init__(self, names: dict[str, str | None], **values: Any) -> None:
        object.__setattr__(self, "names", frozenset(names))
        for name, value in values.items():
            setattr(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self.names:
            raise AttributeError(f"no field {name!r}")
        object.__setattr__(self, name, value)


def _vllm_config(state: State) -> Any:
    return Config(
        state.fields("VllmConfig"),
        model_config=None,
        cache_config=Config(state.fields("CacheConfig"), cache_dtype="auto", block_size=None),
        scheduler_config=Config(
            state.fields("SchedulerConfig"), max_num_seqs=128, max_num_batched_tokens=2048
        ),
        compilation_config=Config(
            state.fields("CompilationConfig"),
            cudagraph_capture_sizes=[],
            max_cudagraph_capture_size=0,
            static_forward_context={},
        ),
        parallel_config="parallel",
    )


def _common(state: State) -> type[Any]:
    columns: list[Any] = []
    for name, text in state.fields("CommonAttentionMetadata").items():
        more = () if text is None else (field(default=default_of(text)),)
        columns.append((name, Any, *more))
    return make_dataclass("CommonAttentionMetadata", columns)


def _platform(state: State) -> Any:
    found: Any = SimpleNamespace(
        get_device_capability=lambda: None,
        fp8_dtype=lambda: FP8,
    )
    for kind in ("cuda", "rocm", "cpu", "xpu"):
        assert f"Platform.is_{kind}" in RECORDED[state.version]["functions"]
        setattr(found, f"is_{kind}", lambda kind=kind: state.platform == kind)
    return found


def _workspace(state: State) -> dict[str, Any]:
    def init(a: SimpleNamespace) -> None:
        assert state.workspace is None, "reinitialised"
        state.workspace = a.device

    return {
        "init_workspace_manager": with_signature(state, "init_workspace_manager", init),
        "is_workspace_manager_initialized": lambda: state.workspace is not None,
    }


def install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: str, root: str = "site"
) -> State:
    """Make a fake vLLM of a recorded version importable."""
    state = State(version)
    specs = make_specs(state)

    @contextmanager
    def set_current(*args: Any, **kwargs: Any) -> Iterator[None]:
        before = state.config
        state.config = state.bind("set_current_vllm_config", *args, **kwargs).vllm_config
        try:
            yield
        finally:
            state.config = before

    def set_layout(a: SimpleNamespace) -> None:
        state.layout = a.cache_layout

    capability = RECORDED[version]["classes"]["DeviceCapability"]
    base, backends = make_backends(state)
    contents: dict[str, dict[str, Any]] = {
        "config": {
            "VllmConfig": lambda: _vllm_config(state),
            "set_current_vllm_config": set_current,
        },
        "model_executor.layers.attention": {
            "Attention": make_attention(state, specs),
            "MLAAttention": make_mla_attention(state, specs),
        },
        "v1.attention.backend": {
            "AttentionBackend": base,
            "CommonAttentionMetadata": _common(state),
        },
        "v1.attention.backends.registry": {"AttentionBackendEnum": _enum(state, backends)},
        "v1.attention.backends.utils": {},
        "v1.worker.workspace": _workspace(state),
        "v1.kv_cache_interface": vars(specs),
        "platforms": {"current_platform": _platform(state)},
        "platforms.interface": {
            "DeviceCapability": make_dataclass("DeviceCapability", [n for n, _ in capability])
        },
    }
    if has_cache_shapes(version):
        utils = contents["v1.attention.backends.utils"]
        utils["set_kv_cache_layout"] = with_signature(state, "set_kv_cache_layout", set_layout)
    for name, members in contents.items():
        module = ModuleType(f"vllm.{name}")
        module.__dict__.update(members)
        state.modules[module.__name__] = module
    _write_files(tmp_path / root, version)
    monkeypatch.syspath_prepend(tmp_path / root)
    for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
        monkeypatch.delitem(sys.modules, name)
    for name, module in state.modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    # The package itself is real, so that importing it shows.
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    return state


def _enum(state: State, backends: dict[str, type[Any]]) -> Any:
    class Found:
        def __class_getitem__(cls, name: str) -> Any:
            if name not in RECORDED[state.version]["backends"]:
                raise KeyError(name)

            def get_class() -> type[Any]:
                if name not in backends:
                    raise ModuleNotFoundError(f"No module named {name.lower()!r}")
                return backends[name]

            return SimpleNamespace(get_class=get_class)

    return Found


def _write_files(root: Path, version: str) -> None:
    """The two files that are read without importing anything, and a package that is imported."""
    package = root / "vllm"
    registry = package / "v1" / "attention" / "backends" / "registry.py"
    registry.parent.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "_version.py").write_text(f"__version__ = version = {version!r}\n")
    rows = "\n".join(f"    {name} = {text}" for name, text in RECORDED[version]["backends"].items())
    registry.write_text(f"class AttentionBackendEnum:\n{rows}\n")
