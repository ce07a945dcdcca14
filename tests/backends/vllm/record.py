"""Records what the bridge relies on from vLLM's sources, by their syntax trees: names and defaults.

    python -m tests.backends.vllm.record UNPACKED_WHEEL [UNPACKED_WHEEL...]

writes `signatures.json`. Nothing of vLLM is imported or copied.
"""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
_BACKEND = "v1/attention/backend.py"
_BACKENDS = "v1/attention/backends"
_LAYERS = "model_executor/layers/attention"

#: Functions that are called or overridden: file -> qualified names; those a version lacks are left
#: out of its record.
FUNCTIONS: dict[str, tuple[str, ...]] = {
    _BACKEND: (
        "AttentionBackend.validate_configuration",
        "AttentionBackend.get_kv_cache_shape",
        "AttentionBackend.get_kv_cache_stride_order",
        "AttentionBackend.get_required_kv_cache_layout",
        "AttentionBackend.get_supported_kernel_block_sizes",
        "AttentionBackend.customize_spec",
        "AttentionBackend.supported_kv_cache_layouts",
        "AttentionMetadataBuilder.__init__",
        "AttentionMetadataBuilder.get_cudagraph_support",
        "AttentionMetadataBuilder.build",
        "AttentionMetadataBuilder.build_for_cudagraph_capture",
        "AttentionMetadataBuilder.use_cascade_attention",
        "AttentionImplBase.process_weights_after_loading",
        "AttentionImpl.__init__",
        "AttentionImpl.forward",
        "MLAAttentionImpl.__init__",
        "MLAAttentionImpl.forward_mha",
        "MLAAttentionImpl.forward_mqa",
        "MLAAttentionImpl.do_kv_cache_update",
    ),
    f"{_BACKENDS}/triton_attn.py": (
        "TritonAttentionMetadataBuilder.__init__",
        "TritonAttentionMetadataBuilder.build",
        "TritonAttentionImpl.__init__",
        "TritonAttentionImpl.forward",
        "TritonAttentionImpl.do_kv_cache_update",
    ),
    f"{_BACKENDS}/utils.py": ("set_kv_cache_layout",),
    f"{_BACKENDS}/registry.py": ("AttentionBackendEnum.get_class",),
    f"{_LAYERS}/attention.py": ("Attention.__init__", "Attention.get_kv_cache_spec"),
    f"{_LAYERS}/mla_attention.py": ("MLAAttention.__init__", "MLAAttention.get_kv_cache_spec"),
    "config/vllm.py": ("set_current_vllm_config",),
    "v1/worker/workspace.py": ("init_workspace_manager", "is_workspace_manager_initialized"),
    "v1/kv_cache_interface.py": ("get_kv_quant_mode", "KVCacheSpec.get_num_kernel_states"),
    "platforms/interface.py": (
        *("Platform.is_cuda", "Platform.is_rocm", "Platform.is_cpu", "Platform.is_xpu"),
        *("Platform.get_device_capability", "Platform.fp8_dtype"),
    ),
}

#: Classes whose fields are set or read, base classes' fields first.
CLASSES: dict[str, tuple[str, ...]] = {
    _BACKEND: ("CommonAttentionMetadata",),
    "v1/kv_cache_interface.py": (
        *("KVCacheSpec", "AttentionSpec", "FullAttentionSpec", "SlidingWindowSpec"),
        *("MLAAttentionSpec", "EncoderOnlyAttentionSpec", "CrossAttentionSpec"),
    ),
    "config/cache.py": ("CacheConfig",),
    "config/scheduler.py": ("SchedulerConfig",),
    "config/compilation.py": ("CompilationConfig",),
    "config/vllm.py": ("VllmConfig",),
    "v1/kv_cache_layout.py": ("KVCacheLayout",),
    "platforms/interface.py": ("DeviceCapability",),
}


def read(root: Path) -> dict[str, Any]:
    """The record of one unpacked wheel."""
    package = root / "vllm"
    trees = {
        name: ast.parse((package / name).read_text(encoding="utf-8"))
        for name in dict.fromkeys([*FUNCTIONS, *CLASSES])
        if (package / name).is_file()
    }
    functions: dict[str, Any] = {}
    for name, wanted in FUNCTIONS.items():
        for qualified in wanted:
            if (found := _find(trees[name], qualified)) is not None:
                functions[qualified] = _parameters(found)
    classes = {
        qualified: _fields(node)
        for name, wanted in CLASSES.items()
        if name in trees
        for qualified in wanted
        if (node := _class(trees[name], qualified)) is not None
    }
    registry = _class(trees[f"{_BACKENDS}/registry.py"], "AttentionBackendEnum")
    assert registry is not None
    return {
        "functions": functions,
        "classes": classes,
        "backends": {row[0]: row[1] for row in _fields(registry)},
    }


def _class(tree: ast.Module, name: str) -> ast.ClassDef | None:
    return next((n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name), None)


def _find(tree: ast.Module, qualified: str) -> ast.FunctionDef | None:
    owner, _, name = qualified.rpartition(".")
    body: list[ast.stmt] = tree.body
    if owner:
        node = _class(tree, owner)
        body = node.body if node is not None else []
    return next((n for n in body if isinstance(n, ast.FunctionDef) and n.name == name), None)


def _parameters(node: ast.FunctionDef) -> list[list[str | None]]:
    """[name, default] of each parameter; `*` and `**` ones with their stars."""
    a = node.args
    assert not a.posonlyargs
    missing: list[ast.expr | None] = [None] * (len(a.args) - len(a.defaults))
    rows = [
        [arg.arg, None if default is None else ast.unparse(default)]
        for arg, default in zip(a.args, [*missing, *a.defaults], strict=True)
    ]
    if a.vararg is not None:
        rows.append([f"*{a.vararg.arg}", None])
    elif a.kwonlyargs:
        rows.append(["*", None])
    rows += [
        [arg.arg, None if default is None else ast.unparse(default)]
        for arg, default in zip(a.kwonlyargs, a.kw_defaults, strict=True)
    ]
    if a.kwarg is not None:
        rows.append([f"**{a.kwarg.arg}", None])
    return rows


def _fields(node: ast.ClassDef) -> list[list[str | None]]:
    """[name, default] of each annotated field and each member of an enumeration."""
    rows: list[list[str | None]] = []
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            value = statement.value
            rows.append([statement.target.id, None if value is None else ast.unparse(value)])
        elif isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            rows.append([statement.targets[0].id, ast.unparse(statement.value)])
    return rows


def _one_line_each(records: dict[str, dict[str, Any]]) -> str:
    """As JSON, a function, class or list of backends a line."""
    versions = []
    for version, record in records.items():
        parts = [f'  "source": {json.dumps(record["source"])}']
        for part in ("functions", "classes"):
            rows = [f"   {json.dumps(k)}: {json.dumps(v)}" for k, v in record[part].items()]
            parts.append(f'  "{part}": {{\n' + ",\n".join(rows) + "\n  }")
        parts.append(f'  "backends": {json.dumps(record["backends"])}')
        versions.append(f' "{version}": {{\n' + ",\n".join(parts) + "\n }")
    return "{\n" + ",\n".join(versions) + "\n}\n"


def main(roots: list[str]) -> None:
    from attnbench.backends.vllm_bridge_install import _read_version

    records = {}
    for root in map(Path, roots):
        version = _read_version(root / "vllm" / "_version.py")
        records[version] = {"source": f"the vllm {version} wheel", **read(root)}
    (HERE / "signatures.json").write_text(_one_line_each(records), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
