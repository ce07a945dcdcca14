"""A server's settings as people keep them: variables, command lines, scripts, YAML.

Read as text, nothing is run. Only settings that bear on attention are kept: a port is no news.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from attnbench.errors import UsageError

MAX_BYTES = 1 << 20


class SettingKind(StrEnum):
    """How a setting reaches the engine."""

    VARIABLE = "variable"
    FLAG = "flag"


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting, in the engine's words.

    `name` is the variable, or the flag in its long form (`--attention-config.backend`). A flag
    without a value has `value` True, and a value the text does not tell (`$BACKEND`) is None.
    """

    kind: SettingKind
    name: str
    value: Any = dataclasses.field(hash=False)
    where: str

    @property
    def field(self) -> str:
        """The field of the engine's AttentionConfig that a flag sets, "" for others."""
        if self.name == "--attention-backend":
            return "backend"
        flag, _, key = self.name.partition(".")
        return key if flag == CONFIG_FLAG else ""

    @property
    def text(self) -> str:
        """As it is typed."""
        if self.kind is SettingKind.VARIABLE:
            return f"{self.name}={'?' if self.value is None else self.value}"
        if self.value is True and not self.field:
            return self.name
        equals = "=" if self.field and self.name != "--attention-backend" else " "
        return f"{self.name}{equals}{'?' if self.value is None else spelled(self.value)}"


def spelled(value: Any) -> str:
    """A value as a command line takes it: JSON, bare where it is a word."""
    return value if isinstance(value, str) else json.dumps(value)


CONFIG_FLAG = "--attention-config"
CUBIN_VARIABLE = "VLLM_HAS_FLASHINFER_CUBIN"
_BATCH_INVARIANT = "VLLM_BATCH_INVARIANT"
_SHORT = {
    "-ac": CONFIG_FLAG,
    "-tp": "--tensor-parallel-size",
    "-dcp": "--decode-context-parallel-size",
    "-pcp": "--prefill-context-parallel-size",
}
_VARIABLES = re.compile(
    r"ATTN|ATTENTION|MLA|FLASH_?INFER|TRTLLM|KV_?CACHE|BATCH_INVARIANT|CUDNN|XFORMERS|CASCADE|"
    r"SPARSE_INDEXER|USE_AITER$|AITER_MHA|MFMA_PAGE"
)
_OTHER_PARTS = re.compile(r"MOE|ALLREDUCE|SAMPLER|GEMM|CONV_STATE|ALL2ALL|KVCACHE_SPACE|_LINEAR")
_FLAGS = frozenset(
    {
        "--block-size",
        "--dtype",
        "--disable-sliding-window",
        "--tensor-parallel-size",
        "--decode-context-parallel-size",
        "--prefill-context-parallel-size",
    }
)
_FLAG = re.compile(r"attention|attn|kv-cache-dtype|calculate-kv-scales|mla|flashinfer|cascade")
_ASSIGNMENT = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)=(.*)", re.DOTALL)
_REFERENCE = re.compile(r"\$(?:\{(\w+)(?:(:?-)([^}]*))?\}|(\w+))")
_YAML_LINE = re.compile(r"[A-Za-z][\w.-]*:(\s|$)")
_FLAG_NAME = re.compile(r"-[a-z]+(\..+)?|--[A-Za-z].*")


def read_settings(text: str) -> tuple[Setting, ...]:
    """The attention settings of a file (variables, shell script, YAML) or of one command line.

    Raises:
        UsageError: neither a file that can be read nor a command line or `NAME=value`.
    """
    stripped = text.strip()
    path = Path(stripped).expanduser()
    if stripped and "\n" not in stripped and len(stripped) < 4096 and path.is_file():
        content = _content(path)
        if path.suffix in (".yaml", ".yml") or _is_yaml(content):
            return tuple(_of_yaml(content, str(path)))
        return tuple(_Script(str(path), path.parent).read(content))
    if stripped.startswith("-") or re.search(r"\bvllm\b", stripped) or _ASSIGNMENT.match(stripped):
        return tuple(_Script("command line", Path()).read(stripped))
    raise UsageError(
        f"--settings {text!r} is no file and no command line; name a file of variables, a shell "
        "script or a YAML, or quote the command: 'vllm serve MODEL --attention-backend ...'"
    )


def _content(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UsageError(f"{path} is larger than {MAX_BYTES >> 20} MiB: no file of settings")
        raw = path.read_bytes()
        if b"\0" in raw:
            raise UsageError(f"{path} is binary; name a text file of settings")
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text; name a text file of settings") from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error


def _is_yaml(content: str) -> bool:
    lines = [one.strip() for one in content.splitlines()]
    first = next((one for one in lines if one and not one.startswith("#")), "")
    return first == "---" or bool(_YAML_LINE.match(first))


def _of_yaml(content: str, where: str) -> Iterator[Setting]:
    import yaml  # type: ignore[import-untyped]

    try:
        loaded = yaml.safe_load(content)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"{where} is not readable YAML: {reason}") from error
    if not isinstance(loaded, Mapping):
        raise UsageError(f"{where} holds no `name: value` lines, which vllm serve --config takes")
    for key, value in loaded.items():
        name = _long(str(key) if str(key).startswith("-") else f"--{key}")
        if value is False or value is None:
            # vLLM leaves such a flag out of its command line.
            continue
        yield from _flag(name, value, where)


@dataclass
class _Script:
    """Reads commands line by line; assignments of the file stand in for `$NAME`."""

    where: str
    folder: Path
    _assigned: dict[str, str | None] = dataclasses.field(default_factory=dict)

    def read(self, content: str) -> Iterator[Setting]:
        for number, line in _logical_lines(content):
            try:
                words = _words(line)
            except ValueError as error:
                raise UsageError(
                    f"{self.where}, line {number}: {error} in {line.strip()[:80]!r}; close the "
                    "quotes"
                ) from error
            for command in _commands(words):
                yield from self._command(command, f"{self.where}:{number}")

    def _command(self, words: Sequence[str], where: str) -> Iterator[Setting]:
        position = 0
        flags_only = bool(words) and words[0].startswith("-")
        starts_server = flags_only or any("vllm" in word for word in words)
        if words and words[0] in ("export", "ENV", "env", "set", "declare", "-"):
            position = 1
        while position < len(words):
            word = words[position]
            if word in ("-e", "--env") and position + 1 < len(words):
                position += 1  # docker's: the next word is an assignment
                continue
            match = _ASSIGNMENT.fullmatch(word)
            if match:
                value = self._expanded(match[2])
                self._assigned[match[1]] = value
                if is_variable(match[1]):
                    yield Setting(SettingKind.VARIABLE, match[1], value, where)
            elif _FLAG_NAME.fullmatch(word):
                flag, position = self._flag_at(words, position)
                if starts_server:
                    yield from self._flags(*flag, where)
            position += 1

    def _flag_at(self, words: Sequence[str], position: int) -> tuple[tuple[str, Any], int]:
        """The flag at `position` with its value, and the position of its last word."""
        name, equals, value = words[position].partition("=")
        if equals:
            return (_long(name), self._expanded(value)), position
        following = words[position + 1] if position + 1 < len(words) else "-"
        if following.startswith("-") and not re.fullmatch(r"-\d+(\.\d+)?", following):
            return (_long(name), True), position
        return (_long(name), self._expanded(following)), position + 1

    def _flags(self, name: str, value: Any, where: str) -> Iterator[Setting]:
        if name == "--config" and isinstance(value, str):
            path = self.folder / Path(value).expanduser()
            if not path.is_file():
                raise UsageError(
                    f"{where}: --config {value} does not exist; name the YAML with --settings"
                )
            yield from _of_yaml(_content(path), str(path))
            return
        yield from _flag(name, value, where)

    def _expanded(self, text: str) -> str | None:
        """`text` with the file's own variables put in; None where one is not known."""
        unknown = False

        def put(match: re.Match[str]) -> str:
            nonlocal unknown
            value = self._assigned.get(match[1] or match[4])
            if value is None and match[2]:
                value = match[3]
            unknown = unknown or value is None
            return value or ""

        expanded = _REFERENCE.sub(put, text)
        return None if unknown or "$(" in text or "`" in text else expanded


def _words(line: str) -> list[str]:
    """A line's words as a shell splits them, without its comment.

    Raises:
        ValueError: quotes that do not close.
    """
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|()<>")
    lexer.whitespace_split = True
    lexer.commenters = ""  # shlex ends a word at a # inside it, a shell does not
    try:
        words = list(lexer)
    except ValueError:
        before, hash, _ = line.partition(" #")  # an apostrophe in a comment is no quote
        if not hash:
            raise
        return _words(before)
    comment = next((n for n, word in enumerate(words) if word.startswith("#")), len(words))
    return words[:comment]


def _logical_lines(content: str) -> Iterator[tuple[int, str]]:
    """Lines with their number, those that end in a backslash joined."""
    held, first = "", 0
    for number, line in enumerate(content.splitlines(), 1):
        first = first or number
        if line.endswith("\\"):
            held += line[:-1] + " "
            continue
        if (held + line).strip() and not (held + line).lstrip().startswith("#"):
            yield first, held + line
        held, first = "", 0
    if held.strip():
        yield first, held


def _commands(words: Sequence[str]) -> Iterator[list[str]]:
    command: list[str] = []
    for word in words:
        if word and set(word) <= set(";&|()<>"):
            yield command
            command = []
        else:
            command.append(word)
    yield command


def is_variable(name: str) -> bool:
    """Whether it is a variable of vLLM's that bears on attention."""
    if not name.startswith("VLLM_"):
        return False
    return bool(_VARIABLES.search(name)) and not _OTHER_PARTS.search(name)


def _long(name: str) -> str:
    """The flag's long form; before the first dot vLLM takes `_` for `-`."""
    flag, dot, key = name.partition(".")
    flag = _SHORT.get(flag, flag)
    return flag.replace("_", "-") + dot + key


def _flag(name: str, value: Any, where: str) -> Iterator[Setting]:
    """The settings one flag makes: a `--attention-config` object is taken apart."""
    flag, _, key = name.partition(".")
    if flag == CONFIG_FLAG and not key:
        loaded = _json(value)
        if isinstance(loaded, Mapping):
            for one, of_one in loaded.items():
                yield Setting(SettingKind.FLAG, f"{CONFIG_FLAG}.{one}", of_one, where)
            return
        if value is not None:
            raise UsageError(f"{where}: {CONFIG_FLAG} takes a JSON object, not {value!r}")
    if flag == CONFIG_FLAG:
        yield Setting(SettingKind.FLAG, name, _json(value), where)
    elif flag in _FLAGS or _FLAG.search(flag):
        yield Setting(SettingKind.FLAG, name, value if value is None else _plain(value), where)


def _json(value: Any) -> Any:
    """What vLLM makes of the text behind a dotted flag: JSON, else the text itself."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _plain(value: Any) -> Any:
    return value if value is True else str(value)


@dataclass(frozen=True, slots=True)
class ServedWith:
    """What the flags say about a served model's layers."""

    tp: int = 1
    dcp: int = 1
    pcp: int = 1
    kv_cache_dtype: str = "auto"
    block_size: int | None = None


def served_with(settings: Sequence[Setting]) -> ServedWith:
    """The layer's sizes and types as the last flag of each kind gives them.

    Raises:
        UsageError: a size that is no positive number.
    """
    given = {one.name: one for one in settings if one.value not in (None, True)}

    def size(flag: str) -> int | None:
        setting = given.get(flag)
        if setting is None:
            return None
        if not str(setting.value).isdecimal() or int(setting.value) < 1:
            raise UsageError(f"{setting.where}: {setting.text} is no size; write a positive number")
        return int(setting.value)

    kv_cache_dtype = given.get("--kv-cache-dtype")
    return ServedWith(
        tp=size("--tensor-parallel-size") or 1,
        dcp=size("--decode-context-parallel-size") or 1,
        pcp=size("--prefill-context-parallel-size") or 1,
        kv_cache_dtype=str(kv_cache_dtype.value) if kv_cache_dtype else "auto",
        block_size=size("--block-size"),
    )


def case_changes(settings: Sequence[Setting]) -> dict[str, Any]:
    """What the settings change in every question: AttentionConfig's fields, batch invariance."""
    changes: dict[str, Any] = {}
    fields = {one.field: one.value for one in settings if one.field and one.value is not None}
    if fields:
        changes["attention_config"] = fields
    invariant = [one.value for one in settings if one.name == _BATCH_INVARIANT]
    if invariant and invariant[-1] is not None:
        changes["batch_invariant"] = invariant[-1] not in ("", "0")
    return changes


def variables_asked(settings: Sequence[Setting]) -> dict[str, str]:
    """The server's variables that hold while an engine is asked.

    Without the two that are said in another way: batch invariance is of each question, and whether
    FlashInfer's kernels are there is one of the stated assumptions.
    """
    return {
        one.name: str(one.value)
        for one in settings
        if one.kind is SettingKind.VARIABLE
        and one.value is not None
        and one.name not in (_BATCH_INVARIANT, CUBIN_VARIABLE)
    }
