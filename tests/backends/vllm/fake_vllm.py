"""vLLM as it looks from outside, computing with plain torch on the CPU.

Every function that is called and every class that is made has the recorded signature
(`signatures.json`) of its version: another argument, or a field that version lacks, is a TypeError
or an AttributeError. What real vLLM asserts on the way is asserted (the current configuration, the
layer's registration, contexts' lengths on the host).
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import field, make_dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

RECORDED: dict[str, Any] = json.loads((Path(__file__).parent / "signatures.json").read_text())
VERSIONS = tuple(RECORDED)
FP8 = torch.float8_e4m3fn


def has_cache_shapes(version: str) -> bool:
    """Whether this version's backends state the shape of their cache."""
    return "AttentionBackend.get_kv_cache_shape" in RECORDED[version]["functions"]


def _default(text: str | None) -> Any:
    try:
        return eval(text or "None", {"__builtins__": {}})
    except Exception:
        return text  # a name of vLLM's: "AttentionType.DECODER"


def signature_of(version: str, name: str) -> inspect.Signature:
    """The recorded signature, `self` or `cls` left out."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = []
    for parameter, text in RECORDED[version]["functions"][name]:
        if parameter in ("self", "cls"):
            continue
        if parameter.startswith("**"):
            parameters.append(inspect.Parameter(parameter[2:], inspect.Parameter.VAR_KEYWORD))
            continue
        default = inspect.Parameter.empty if text is None else _default(text)
        parameters.append(inspect.Parameter(parameter, kind, default=default))
    return inspect.Signature(parameters)


class State:
    """The globals of one fake vLLM, and the calls it got."""

    def __init__(self, version: str) -> None:
        self.version = version
        self.config: Any = None
        self.layout: str | None = None
        self.workspace: Any = None
        self.platform = "cuda"
        self.reasons: list[str] = []
        self.calls: list[tuple[str, SimpleNamespace]] = []
        self.modules: dict[str, ModuleType] = {}

    def bind(self, name: str, *args: Any, **kwargs: Any) -> SimpleNamespace:
        """The arguments of a call, by the recorded signature. Raises TypeError."""
        bound = signature_of(self.version, name).bind(*args, **kwargs)
        bound.apply_defaults()
        arguments = SimpleNamespace(**bound.arguments)
        self.calls.append((name, arguments))
        return arguments

    def names(self, prefix: str = "") -> list[str]:
        return [name for name, _ in self.calls if name.startswith(prefix)]

    def current(self) -> Any:
        assert self.config is not None, "Current vLLM config is not set."
        return self.config

    def fields(self, *classes: str) -> dict[str, str | None]:
        return {n: text for c in classes for n, text in RECORDED[self.version]["classes"][c]}


def with_signature(state: State, name: str, body: Any) -> Any:
    """A function of the recorded signature that hands its bound arguments to `body`."""

    def function(*args: Any, **kwargs: Any) -> Any:
        return body(state.bind(name, *args, **kwargs))

    function.__signature__ = signature_of(state.version, name)  # type: ignore[attr-defined]
    return function


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


def _specs(state: State) -> SimpleNamespace:
    """Spec dataclasses with the recorded fields, frozen, and what of theirs is computed."""

    def made(name: str, *bases: str) -> type[Any]:
        columns: list[Any] = []
        for column, text in state.fields(*bases, name).items():
            default = None if column == "kv_quant_mode" else _default(text)
            if text is None:
                columns.append((column, Any))
            elif text.startswith("field("):
                columns.append((column, Any, field(default=None)))
            else:
                columns.append((column, Any, field(default=default)))
        # Keyword-only, as vLLM's are: fields without a default may follow others.
        return make_dataclass(name, columns, frozen=True, kw_only=True, bases=(_SpecNumbers,))

    base = ("KVCacheSpec", "AttentionSpec")
    return SimpleNamespace(
        FullAttentionSpec=made("FullAttentionSpec", *base),
        SlidingWindowSpec=made("SlidingWindowSpec", *base),
        MLAAttentionSpec=made("MLAAttentionSpec", *base, "FullAttentionSpec"),
        get_kv_quant_mode=with_signature(
            state,
            "get_kv_quant_mode",
            lambda a: SimpleNamespace(
                name="FP8_PER_TENSOR" if a.kv_cache_dtype.startswith("fp8") else "NONE"
            ),
        ),
    )


class _SpecNumbers:
    """What a spec of 0.30+ computes from its fields."""

    @property
    def num_heads(self) -> int:
        own: Any = self
        return int(own.num_head_slots or own.num_kv_heads)

    def get_num_kernel_states(self, kernel_block_size: int) -> int:
        return kernel_block_size

    @property
    def state_content_size_bytes(self) -> int:
        own: Any = self
        if own.state_content_bytes is not None:
            return int(own.state_content_bytes)
        values = own.head_size if own.head_size_v is None else own.head_size_v
        return int((own.head_size + values) * own.dtype.itemsize)


def cache_torch_dtype(name: str, model_dtype: torch.dtype) -> torch.dtype:
    if name == "auto":
        return model_dtype
    return {"float16": torch.float16, "bfloat16": torch.bfloat16}.get(name, torch.uint8)


class Layer:
    """What `Attention` and `MLAAttention` share."""

    def __init__(self, state: State, arguments: SimpleNamespace) -> None:
        config = state.current()
        a = arguments
        assert torch.get_default_dtype() == config.model_config.dtype, "set_default_torch_dtype"
        assert a.cache_config is config.cache_config
        registered = config.compilation_config.static_forward_context
        assert a.prefix not in registered, f"Duplicate layer name: {a.prefix}"
        registered[a.prefix] = self
        self.state = state
        self.kv_cache_dtype = a.cache_config.cache_dtype
        self.query_quant: Any = None
        for scale in ("_q_scale", "_k_scale", "_v_scale", "_prob_scale"):
            setattr(self, scale, torch.tensor(1.0, dtype=torch.float32))
            setattr(self, f"{scale}_float", 1.0)
        if not has_cache_shapes(state.version):
            self._k_scale_cpu = torch.tensor(1.0)
            self._v_scale_cpu = torch.tensor(1.0)

    def quantise(self, rows: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, Any]:
        assert rows.dim() == 2
        return (rows.float() / scale).to(FP8), scale


def _attention(state: State, specs: SimpleNamespace) -> type[Any]:
    class Attention(Layer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            a = state.bind("Attention.__init__", *args, **kwargs)
            super().__init__(state, a)
            self.attn_type = "decoder" if "." in a.attn_type else a.attn_type
            self.window = a.per_layer_sliding_window
            self.num_kv_heads, self.head_size = a.num_kv_heads, a.head_size
            more = dict(a.__dict__.get("extra_impl_args", {}))
            self.impl = a.attn_backend.get_impl_cls()(
                *(a.num_heads, a.head_size, a.scale, a.num_kv_heads, a.alibi_slopes),
                *(self.window, self.kv_cache_dtype, a.logits_soft_cap, self.attn_type, None),
                **more,
            )
            if self.impl.supports_quant_query_input and self.kv_cache_dtype.startswith("fp8"):
                self.query_quant = self.quantise

        def get_kv_cache_spec(self, *args: Any, **kwargs: Any) -> Any:
            config = state.bind("Attention.get_kv_cache_spec", *args, **kwargs).vllm_config
            assert self.attn_type == "decoder"
            facts: dict[str, Any] = {
                "block_size": config.cache_config.block_size,
                "num_kv_heads": self.num_kv_heads,
                "head_size": self.head_size,
                "dtype": cache_torch_dtype(self.kv_cache_dtype, config.model_config.dtype),
            }
            if self.window is not None:
                # A window's block is vLLM's own choice from 0.30 on.
                facts["block_size"] = 1
                return specs.SlidingWindowSpec(**facts, sliding_window=self.window)
            return specs.FullAttentionSpec(**facts)

    return Attention


def _mla_attention(state: State, specs: SimpleNamespace) -> type[Any]:
    class MLAAttention(Layer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            a = state.bind("MLAAttention.__init__", *args, **kwargs)
            super().__init__(state, a)
            assert a.attn_backend.is_mla()
            self.head_size = a.kv_lora_rank + a.qk_rope_head_dim
            self.impl = a.attn_backend.get_impl_cls()(
                num_heads=a.num_heads,
                head_size=self.head_size,
                scale=a.scale,
                num_kv_heads=1,
                alibi_slopes=None,
                sliding_window=None,
                kv_cache_dtype=self.kv_cache_dtype,
                logits_soft_cap=None,
                attn_type="decoder",
                kv_sharing_target_layer_name=None,
                q_lora_rank=a.q_lora_rank,
                kv_lora_rank=a.kv_lora_rank,
                qk_nope_head_dim=a.qk_nope_head_dim,
                qk_rope_head_dim=a.qk_rope_head_dim,
                qk_head_dim=a.qk_nope_head_dim + a.qk_rope_head_dim,
                v_head_dim=a.v_head_dim,
                kv_b_proj=a.kv_b_proj,
            )
            self.q_pad_num_heads = self.impl.pad

        def _decode_concat_quant_fp8_op(self, nope: Any, rope: Any, scale: Any) -> torch.Tensor:
            joined: torch.Tensor = torch.cat([nope, rope], -1).float() / scale
            return joined.to(FP8)

        def get_kv_cache_spec(self, *args: Any, **kwargs: Any) -> Any:
            config = state.bind("MLAAttention.get_kv_cache_spec", *args, **kwargs).vllm_config
            dtype = cache_torch_dtype(self.kv_cache_dtype, config.model_config.dtype)
            return specs.MLAAttentionSpec(
                block_size=config.cache_config.block_size,
                num_kv_heads=1,
                head_size=self.head_size,
                dtype=dtype,
                cache_dtype_str=self.kv_cache_dtype,
            )

    return MLAAttention


def _common(state: State) -> type[Any]:
    columns: list[Any] = []
    for name, text in state.fields("CommonAttentionMetadata").items():
        more = () if text is None else (field(default=_default(text)),)
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
    from tests.backends.vllm.fake_backends import make_backends

    state = State(version)
    specs = _specs(state)

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
            "Attention": _attention(state, specs),
            "MLAAttention": _mla_attention(state, specs),
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


def layouts_of(version: str) -> Any:
    """`KVCacheLayout` of a version of 0.30+."""
    rows = RECORDED[version]["classes"]["KVCacheLayout"]
    members = {name: eval(text) for name, text in rows}
    return SimpleNamespace(
        **{
            name: SimpleNamespace(
                name=name, layer_view_order=tuple(dim - 1 for dim in order if dim != 0)
            )
            for name, order in members.items()
        }
    )


def _write_files(root: Path, version: str) -> None:
    """The two files that are read without importing anything, and a package that is imported."""
    package = root / "vllm"
    registry = package / "v1" / "attention" / "backends" / "registry.py"
    registry.parent.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "_version.py").write_text(f"__version__ = version = {version!r}\n")
    rows = "\n".join(f"    {name} = {text}" for name, text in RECORDED[version]["backends"].items())
    registry.write_text(f"class AttentionBackendEnum:\n{rows}\n")
