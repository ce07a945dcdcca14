"""What all parts of the fake vLLM share: recorded signatures, and the globals of one version."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

RECORDED: dict[str, Any] = json.loads((Path(__file__).parent / "signatures.json").read_text())
VERSIONS = tuple(RECORDED)
FP8 = torch.float8_e4m3fn


def has_cache_shapes(version: str) -> bool:
    """Whether this version's backends state the shape of their cache."""
    return "AttentionBackend.get_kv_cache_shape" in RECORDED[version]["functions"]


def default_of(text: str | None) -> Any:
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
        default = inspect.Parameter.empty if text is None else default_of(text)
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

    def names_in_registry(self) -> frozenset[str]:
        return frozenset(RECORDED[self.version]["backends"])

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
