"""What this version makes of the user's settings, one by one: known, refused, without effect.

A variable is known if `vllm.envs` lists it; a flag if the engine's argument parser adds it, which
is read from the parser's source, since importing it needs far more packages than a selector does;
a field of AttentionConfig and its value are tried.
"""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from typing import Any

from .observe import environment

Question = dict[str, Any]

_ENDED = re.compile(r"no effect|has been removed|no longer (?:used|supported)", re.IGNORECASE)
_VARIABLE = re.compile(rb"\bVLLM_[A-Z0-9_]+")
_VALUES = {"--kv-cache-dtype": ("vllm.config.cache", "CacheDType")}
"""Flags whose accepted values a type of vLLM's lists."""


class Examiner:
    """Answers questions about settings for the imported version."""

    def __init__(self) -> None:
        import vllm

        self._folder = Path(str(vllm.__file__)).parent
        self._flags: dict[str, str] | None = None
        self._named: dict[str, str] | None = None

    def examine(self, question: Question) -> dict[str, Any]:
        """`known` True, False or None (not found out, see `not_evaluated`), and what was said.

        `refused` is the version's own refusal of the value, `ended` its own words that the setting
        has no effect, `becomes` what it turns the value into, `read_by` a file that names an
        unknown variable all the same.
        """
        answer: dict[str, Any] = {"known": None, "not_evaluated": ""}
        try:
            if question["kind"] == "variable":
                self._variable(question, answer)
            else:
                self._flag(question, answer)
                if question.get("field"):
                    _field(question, answer)
        except Exception as error:  # this version differs: said, and the rest goes on
            answer["not_evaluated"] = f"{type(error).__name__}: {error}"
        return answer

    def _variable(self, question: Question, answer: dict[str, Any]) -> None:
        import vllm.envs as envs

        name = question["name"]
        known = envs.environment_variables
        answer["known"] = name in known
        if name not in known:
            answer["read_by"] = self._file_that_names(name)
        elif question["value"] is not None:
            before = environment({name: str(question["value"])})
            try:
                known[name]()
            except Exception as error:  # its own refusal of the value
                answer["refused"] = f"{type(error).__name__}: {error}"
            finally:
                environment(before)

    def _file_that_names(self, name: str) -> str:
        """A file of the package that names the variable: one may be read past `vllm.envs`."""
        if self._named is None:
            self._named = {}
            for path in sorted(self._folder.rglob("*.py")):
                for found in _VARIABLE.findall(path.read_bytes()):
                    self._named.setdefault(found.decode(), str(path.relative_to(self._folder)))
        return self._named.get(name, "")

    def _flag(self, question: Question, answer: dict[str, Any]) -> None:
        if self._flags is None:
            self._flags = flags_of((self._folder / "engine" / "arg_utils.py").read_text("utf-8"))
        name = question["name"].partition(".")[0]
        # argparse takes a flag's beginning for the flag where only one begins so.
        found = [name] if name in self._flags else []
        found = found or [flag for flag in self._flags if flag.startswith(name)]
        answer["known"] = len(found) == 1
        if len(found) == 1 and _ENDED.search(self._flags[found[0]]):
            answer["ended"] = self._flags[found[0]]
        if name in _VALUES and question["value"] is not None:
            _value_of_type(question, answer, *_VALUES[name])


def flags_of(source: str) -> dict[str, str]:
    """Every flag that the source adds to a parser, with its help text where it writes one."""
    tree = ast.parse(source)
    constants = {
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    flags: dict[str, str] = {}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        if node.func.attr != "add_argument":
            continue
        help = ""
        for keyword in node.keywords:
            if keyword.arg == "help" and isinstance(keyword.value, ast.Constant):
                help = str(keyword.value.value)
            elif keyword.arg == "help" and isinstance(keyword.value, ast.Name):
                help = str(constants.get(keyword.value.id, ""))
        for one in node.args:
            if isinstance(one, ast.Constant) and str(one.value).startswith("-"):
                flags[str(one.value)] = help
    return flags


def _field(question: Question, answer: dict[str, Any]) -> None:
    """Whether AttentionConfig has the field, and what it makes of the value."""
    from vllm.config.attention import AttentionConfig

    name = question["field"]
    answer["known"] = answer["known"] and name in inspect.signature(AttentionConfig).parameters
    if not answer["known"] or question["value"] is None:
        return
    try:
        made = getattr(AttentionConfig(**{name: question["value"]}), name)
    except (ValueError, TypeError) as error:
        answer["refused"] = f"{type(error).__name__}: {error}"
        return
    answer["becomes"] = getattr(made, "name", None if made is None else str(made))


def _value_of_type(question: Question, answer: dict[str, Any], module: str, name: str) -> None:
    import importlib
    import typing

    listed = getattr(importlib.import_module(module), name, None)
    values = typing.get_args(listed)
    if values and question["value"] not in values:
        choices = ", ".join(map(str, values))
        answer["refused"] = f"{question['value']!r} is none of {choices}"
