"""The latent-attention libraries as they look from outside, computing with plain torch on the CPU.

Signatures are the recorded ones (`signatures.json` here and of FLASH_ATTN): a parameter they lack
is a TypeError. What they compute and what they refuse is in `fake_kernels.py`.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from tests.backends.flash_attn import fake_library as flash_attn
from tests.backends.flash_attn.fake_library import Call
from tests.backends.mla.fake_kernels import BODIES, fa3_schedule, upstream_kvcache, vllm_varlen

RECORDED: dict[str, Any] = json.loads((Path(__file__).parent / "signatures.json").read_text())
_DEFAULTS: dict[str, Any] = {"torch": torch, "None": None}
_KINDS = inspect.Parameter


def signature_of(record: str, name: str) -> inspect.Signature:
    """The recorded signature of a function."""
    parameters = []
    for parameter, text in RECORDED[record]["functions"][name]:
        kind: Any = _KINDS.POSITIONAL_OR_KEYWORD
        if parameter.startswith("*"):
            kind = _KINDS.VAR_KEYWORD if parameter.startswith("**") else _KINDS.VAR_POSITIONAL
        default = _KINDS.empty if text is None else eval(text, _DEFAULTS)
        parameters.append(inspect.Parameter(parameter.lstrip("*"), kind, default=default))
    return inspect.Signature(parameters)


def with_signature(
    signature: inspect.Signature, name: str, body: Callable[..., Any], calls: list[Call]
) -> Callable[..., Any]:
    def function(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        given = frozenset(bound.arguments) - {"self"}
        bound.apply_defaults()
        arguments = SimpleNamespace(**bound.arguments)
        calls.append(Call(name, given, arguments))
        return body(arguments)

    function.__name__ = name
    function.__signature__ = signature  # type: ignore[attr-defined]
    return function


def operator(record: str, name: str, body: Callable[..., Any], calls: list[Call]) -> Any:
    """An operator of the recorded arguments, by position only."""
    names = RECORDED[record]["ops"][name]
    signature = inspect.Signature([inspect.Parameter(n, _KINDS.POSITIONAL_ONLY) for n in names])
    return with_signature(signature, name, body, calls)


def importable(patch: pytest.MonkeyPatch, name: str) -> ModuleType:
    """An empty module of this name, and the packages it is in."""
    parts = name.split(".")
    for depth in range(1, len(parts)):
        package = ".".join(parts[:depth])
        if package not in sys.modules:
            made = ModuleType(package)
            made.__path__ = []
            patch.setitem(sys.modules, package, made)
    module = ModuleType(name)
    patch.setitem(sys.modules, name, module)
    return module


def install(patch: pytest.MonkeyPatch, record: str) -> list[Call]:
    """Make one recorded library importable. Returns its calls, filled as they come."""
    calls: list[Call] = []
    facts = RECORDED[record]
    module = importable(patch, facts["module"]) if facts["module"] else ModuleType("nothing")
    for path in facts["functions"]:
        if path not in BODIES:
            continue
        function = with_signature(signature_of(record, path), path, BODIES[path], calls)
        name, _, method = path.partition(".")
        if not method:
            setattr(module, name, function)
            continue
        if not hasattr(module, name):
            setattr(module, name, type(name, (), {}))
        setattr(getattr(module, name), method, function)
    if ops := facts.get("ops"):
        importable(patch, ops["module"])
        names = [name for name in ops if name in BODIES]
        made = {name: operator(record, name, BODIES[name], calls) for name in names}
        patch.setattr(torch.ops, ops["namespace"], SimpleNamespace(**made), raising=False)
    return calls


def install_flash_attn(patch: pytest.MonkeyPatch, record: str = "vllm-0.22.1") -> list[Call]:
    """A FlashAttention library with the absorbed form, and prefill of other value widths."""
    flash_attn.install(patch, record)
    module = sys.modules[flash_attn.RECORDED[record]["module"]]
    bodies = {"get_scheduler_metadata": fa3_schedule}
    if record.startswith("vllm"):
        bodies["flash_attn_varlen_func"] = vllm_varlen
    else:
        bodies["flash_attn_with_kvcache"] = upstream_kvcache
    calls: list[Call] = []
    for name, body in bodies.items():
        setattr(module, name, flash_attn.with_signature(record, name, body, calls))
    return calls
