"""What the selector answers for one case, candidate by candidate."""

from __future__ import annotations

import re
import sys
from contextlib import suppress
from typing import Any

from .behind import behind_the_name
from .engine import Case, UnknownField, call, set_current, torch_dtype, vllm_config
from .facts import Facts
from .models import apply_model_rules
from .observe import Lookups, Observer, caches_of, environment

ENVIRONMENTAL = re.compile(
    r"^(ImportError|OSError|ModuleNotFoundError)|not installed|not found|failed to import|"
    r"could not be imported|cannot import|is not available|unavailable|requires the .* package|"
    r"Failed to connect|No module named",
    re.IGNORECASE,
)
"""Reasons that speak of the environment and not of the case."""

PREDICATE = re.compile(r"not supported\b[^.]*$")
"""The fixed wording of a capability predicate: the same on every host."""


class Evaluator:
    """Evaluates cases one after the other in one process, for one device."""

    def __init__(self, observer: Observer, facts: Facts) -> None:
        self._observer = observer
        self._facts = facts
        self._caches: tuple[Any, ...] = ()
        self._num_modules = 0

    def evaluate(self, case: Case) -> dict[str, Any]:
        """The answer for one case; what this version did not let us ask is in `not_evaluated`."""
        answer: dict[str, Any] = {"case_id": case["case_id"], "not_evaluated": [], "dropped": []}
        before = environment({"VLLM_BATCH_INVARIANT": "1" if case.get("batch_invariant") else "0"})
        try:
            self._clear_caches()
            try:
                config = vllm_config(case)
            except (ValueError, TypeError) as error:
                answer["refused"] = _text(error)
                return answer
            set_current(config)
            apply_model_rules(case, config, answer)
            question: dict[str, Any] = {}
            with self._observer.watch() as lookups:
                backend = self._select(case, question, answer)
            answer["connections"] = list(lookups.connections)
            answer["candidates"] = self._candidates(question, answer)
            if backend is not None:
                answer["behind"], missing = behind_the_name(
                    backend, answer["backend"], case, config
                )
                answer["not_evaluated"] += missing
            answer["depends_on"] = self._depends_on(case, config, answer)
        except UnknownField as error:
            answer["not_evaluated"].append(f"selection: {error}")
        finally:
            environment(before)
        return answer

    def _select(self, case: Case, question: dict[str, Any], answer: dict[str, Any]) -> Any:
        """The class the selector gives, None where it refuses; the names go into `answer`."""
        from vllm.v1.attention.selector import get_attn_backend

        wanted = {
            "head_size": case["head_size"],
            "dtype": torch_dtype(case["dtype"]),
            "kv_cache_dtype": case["kv_cache_dtype"],
            "use_mla": bool(case.get("mla")),
            "has_sink": bool(case.get("sinks")),
            "use_sparse": bool(case.get("topk")),
            "use_mm_prefix": bool(answer.get("mm_prefix", case.get("mm_prefix"))),
            "use_per_head_quant_scales": bool(case.get("per_head_scales")),
            "attn_type": case.get("attn_type", "decoder"),
            "num_heads": case["num_heads"],
            "has_sliding_window": bool(case.get("sliding_window")),
        }
        answer["dropped"] += _not_asked(case)
        answer["backend"] = answer["backend_class"] = None
        with _watched_platform(question):
            try:
                backend = call(get_attn_backend, wanted, answer["dropped"])
            except (ValueError, AssertionError, NotImplementedError, ImportError) as error:
                answer["refused"] = _text(error)
                return None
        answer["backend_class"] = _path(backend)
        answer["backend"] = registered_name(backend)
        return backend

    def _candidates(self, question: dict[str, Any], answer: dict[str, Any]) -> list[dict[str, Any]]:
        """Every backend of the platform's list in its order, with its reasons and lookups."""
        from vllm.platforms import current_platform

        # `hasattr` of a platform logs what it lacks; its class does not.
        if question.get("config") is None or not hasattr(
            type(current_platform), "get_valid_backends"
        ):
            return []  # a platform with one backend only
        capability = current_platform.get_device_capability()
        valid, invalid = call(
            current_platform.get_valid_backends,
            {
                "device_capability": capability,
                "attn_selector_config": question["config"],
                "num_heads": question["num_heads"],
            },
            answer["dropped"],
        )
        rows: list[tuple[int, Any, list[str]]] = []
        rows += [(priority, backend, []) for backend, priority in map(_candidate, valid)]
        rows += [(priority, backend, reasons) for backend, (priority, reasons) in invalid.items()]
        candidates = []
        for priority, backend, reasons in sorted(rows, key=lambda row: row[0]):
            texts = [str(reason) for reason in reasons]
            lookups = Lookups()
            if not all(PREDICATE.search(text) for text in texts):
                lookups = self._lookups_of(backend, question["config"], capability)
            candidates.append(
                {
                    "backend": backend.name,
                    "priority": priority,
                    "reasons": texts,
                    "environmental": bool(texts)
                    and all(_is_environmental(text, lookups) for text in texts),
                    "absent": list(lookups.absent),
                }
            )
        return candidates

    def _lookups_of(self, backend: Any, selector_config: Any, capability: Any) -> Lookups:
        """What validating this one candidate asks of the environment, caches empty."""
        self._clear_caches()
        # An import that fails is already one of its reasons.
        with self._observer.watch() as lookups, suppress(ImportError, OSError):
            backend.get_class().validate_configuration(
                device_capability=capability, **selector_config._asdict()
            )
        return lookups

    def _depends_on(self, case: Case, config: Any, answer: dict[str, Any]) -> list[dict[str, Any]]:
        """The assumed facts that this answer hangs on, each with what it is otherwise."""
        found = []
        for name, holds in self._facts.assumed.items():
            other: dict[str, Any] = {"dropped": []}
            if "mm_prefix" in answer:  # the model's own rule says it, not the case
                other["mm_prefix"] = answer["mm_prefix"]
            with self._facts.turned_round(name):
                self._clear_caches()
                backend = self._select(case, {}, other)
                behind: dict[str, Any] = {}
                if backend is not None:
                    behind, _ = behind_the_name(backend, other["backend"], case, config)
            differs = {
                key: value
                for key, value in behind.items()
                if value != answer.get("behind", {}).get(key)
            }
            if other["backend"] != answer["backend"]:
                found.append({"fact": name, "assumed": holds, "otherwise": other["backend"]})
            elif differs:
                found.append({"fact": name, "assumed": holds, "otherwise_behind": differs})
        self._clear_caches()
        return found

    def _clear_caches(self) -> None:
        # Turning a fact round takes modules out and in again: only growth brings new caches.
        if len(sys.modules) > self._num_modules:
            self._num_modules = len(sys.modules)
            self._caches = caches_of()
        for cached in self._caches:
            cached.cache_clear()


class _watched_platform:
    """Keeps the selector's question on its way to the platform."""

    def __init__(self, question: dict[str, Any]) -> None:
        self._question = question

    def __enter__(self) -> None:
        from vllm.platforms import current_platform

        self._class = type(current_platform)
        self._own = self._class.__dict__.get("get_attn_backend_cls")
        original = self._class.get_attn_backend_cls
        question = self._question

        def watched(selected: Any, *args: Any, **named: Any) -> Any:
            config = named.get("attn_selector_config", args[0] if args else None)
            question.update(config=config, num_heads=named.get("num_heads"))
            return original(selected, *args, **named)

        self._class.get_attn_backend_cls = staticmethod(watched)

    def __exit__(self, *_error: object) -> None:
        if self._own is None:
            del self._class.get_attn_backend_cls
        else:
            self._class.get_attn_backend_cls = self._own


def _not_asked(case: Case) -> list[str]:
    """Features of the case that this version's selector has no field for."""
    from vllm.v1.attention.selector import AttentionSelectorConfig

    fields = {
        "sliding_window": "has_sliding_window",
        "dcp": "use_dcp",
        "pcp": "use_pcp",
        "batch_invariant": "use_batch_invariant",
    }
    asked = AttentionSelectorConfig._fields
    return [
        feature
        for feature, field in fields.items()
        if case.get(feature) not in (None, False, 0, 1) and field not in asked
    ]


def _is_environmental(reason: str, lookups: Lookups) -> bool:
    if ENVIRONMENTAL.search(reason):
        return True
    return bool(lookups.absent) and not PREDICATE.search(reason)


def _candidate(entry: Any) -> tuple[Any, int]:
    """`(backend, priority)` of a pair (0.2x) or a `_BackendCandidate` (0.30 and later)."""
    if hasattr(entry, "backend"):
        return entry.backend, int(entry.priority)
    backend, priority = entry
    return backend, int(priority)


def _path(backend: Any) -> str:
    return f"{backend.__module__}.{backend.__qualname__}"


def registered_name(backend: Any) -> str:
    """The registry's name: a class's own `get_name()` is not always it."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    for member in AttentionBackendEnum:
        try:
            if member.get_path() == _path(backend):
                return str(member.name)
        except ValueError:
            continue  # CUSTOM and NO_ATTENTION have no class
    return str(backend.get_name())


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".strip()[:2000]
