"""Which facts of the environment an answer was made from.

A missing package does not crash vLLM's selector, it changes the answer. So what vLLM looked for
and did not find while one candidate is validated is written down: modules, packages, programs,
connections. An answer that a better candidate lost for such a reason is not to be trusted.
"""

from __future__ import annotations

import builtins
import gc
import importlib.metadata
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

OWN = "vllm"


class Lookups:
    """What one block looked for and did not find, and the hosts it tried to reach."""

    absent: tuple[str, ...] = ()
    connections: tuple[str, ...] = ()


class Observer:
    """Notes failed lookups of the environment while `watch()` is open.

    `connections` is the list the cut-off network notes its attempts in.
    """

    def __init__(self, connections: list[str]) -> None:
        self._connections = connections
        self._absent: set[str] | None = None

    def install(self) -> None:
        """Wrap the ways to ask: import, find_spec, which, version."""
        original = builtins.__import__

        def imported(name: str, *args: Any, **named: Any) -> Any:
            try:
                return original(name, *args, **named)
            except (ImportError, OSError) as error:
                self._note("module", getattr(error, "name", None) or name)
                raise

        builtins.__import__ = imported
        importlib.util.find_spec = self._wrap(importlib.util.find_spec, "module")
        shutil.which = self._wrap(shutil.which, "program")
        importlib.metadata.version = self._wrap(importlib.metadata.version, "package")

    def _note(self, what: str, name: object) -> None:
        text = str(name)
        own_module = what == "module" and text.partition(".")[0] == OWN
        if self._absent is not None and not own_module:
            self._absent.add(f"{what} {text}")

    def _wrap(self, original: Callable[..., Any], what: str) -> Callable[..., Any]:
        def ask(name: Any, *args: Any, **named: Any) -> Any:
            try:
                answer = original(name, *args, **named)
            except Exception:
                self._note(what, name)
                raise
            if answer is None:
                self._note(what, name)
            return answer

        return ask

    @contextmanager
    def watch(self) -> Iterator[Lookups]:
        """Gather what is looked for in vain inside the block."""
        absent: set[str] = set()
        first = len(self._connections)
        lookups = Lookups()
        self._absent = absent
        try:
            yield lookups
        finally:
            self._absent = None
            lookups.absent = tuple(sorted(absent))
            lookups.connections = tuple(sorted(set(self._connections[first:])))


def caches_of(package: str = OWN) -> tuple[Any, ...]:
    """Every `functools.cache` and `lru_cache` of the package's loaded modules.

    The selector's answers are cached, and the caches do not know that the question changed.
    """
    return tuple(
        value
        for value in gc.get_objects()
        if type(value).__name__ == "_lru_cache_wrapper"
        and (getattr(value, "__module__", None) or "").partition(".")[0] == package
    )


def environment(changes: dict[str, str | None]) -> dict[str, str | None]:
    """Set these variables (None removes one); the value before of each comes back."""
    before = {name: os.environ.get(name) for name in changes}
    for name, value in changes.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    return before
