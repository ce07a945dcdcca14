"""What a vLLM server's log says about attention, read line by line.

The texts are those of vLLM 0.22.1, 0.30.0 and 0.33.0, plain, coloured or JSON, behind whatever a
container or a journal writes before them.
"""

from __future__ import annotations

import gzip
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from attnbench.errors import CorruptDataError, DataError, UsageError

_MAX_LINE = 1 << 15
_MAX_KEPT = 64
"""Different texts kept of a kind: a log repeats itself, a hostile one does not."""


@dataclass(frozen=True, slots=True)
class Taken:
    """A backend the server took. `potential` are those the log lists beside it, best first."""

    backend: str
    explicit: bool
    potential: tuple[str, ...]
    line: int


@dataclass(frozen=True, slots=True)
class Question:
    """What the selector was asked for one kind of layer, in its own words, and who refused why."""

    fields: Mapping[str, str]
    refused: Mapping[str, str]


@dataclass
class ServerLog:
    """What was found; "" and empty: the log does not say. Of several starts, the last."""

    name: str
    lines: int = 0
    starts: int = 0
    version: str = ""
    model: str = ""
    dtype: str = ""
    kv_cache_dtype: str = ""
    tensor_parallel_size: int = 1
    decode_context_parallel_size: int = 1
    block_size: int | None = None
    requested: str = ""
    platform: str = ""
    capability: str = ""
    device_name: str = ""
    taken: list[Taken] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)
    behind: dict[str, list[str]] = field(default_factory=dict)
    refusals: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    unknown_variables: list[str] = field(default_factory=list)


def read_server_log(source: str) -> ServerLog:
    """Read a log: a path, gzip or not, or `-` for stdin. Never more than a line is in memory.

    Raises:
        UsageError: no such file, or a binary one.
        CorruptDataError: a gzip file that is cut off or damaged.
        DataError: no line of it is a vLLM server's, or none speaks of attention.
    """
    log = ServerLog("stdin" if source == "-" else source)
    reader = _Reader(log)
    try:
        if source == "-":
            reader.read(_unpacked(sys.stdin.buffer))
        else:
            with Path(source).expanduser().open("rb") as file:
                reader.read(_unpacked(file))
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise CorruptDataError(f"{log.name} is a damaged gzip file: {error}") from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise UsageError(
            f"--log {source}: {reason}; name a server's log file, or - for stdin"
        ) from (error)
    if not (log.version or log.taken or log.refusals or log.model):
        raise DataError(
            f"no line of {log.name} ({log.lines} lines) is of a vLLM server's start; name the log "
            "from the server's first line on"
        )
    if not (log.taken or log.refusals or log.platform == "cpu"):
        raise DataError(
            f"{log.name} ({log.lines} lines) names no attention backend: it is cut off before the "
            "model loads, or VLLM_LOGGING_LEVEL hides INFO"
        )
    return log


def _unpacked(file: Any) -> IO[bytes]:
    """The file itself, or what is packed in it."""
    head = file.peek(2)[:2]
    return gzip.GzipFile(fileobj=file) if head == b"\x1f\x8b" else file  # type: ignore[return-value]


_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_WORTH_READING = re.compile(
    rb"attention|backend|version|LLM engine|non-default|FlashAttention|KV cache|TRTLLM|"
    rb"--block-size|vLLM environment|platform|device_name|compute cap|NVIDIA|\xe2\x96\x88|"
    rb"block size|Forcing|forcing"
)


class _Reader:
    """Feeds a log's lines to the patterns."""

    def __init__(self, log: ServerLog) -> None:
        self._log = log

    def read(self, file: IO[bytes]) -> None:
        for line in _lines(file):
            self._log.lines += 1
            if b"\0" in line[:4096] and self._log.lines < 100:
                raise UsageError(f"{self._log.name} is binary; name a server's log, text or gzip")
            if _WORTH_READING.search(line):
                self._line(line.decode("utf-8", "replace").rstrip())

    def _line(self, text: str) -> None:
        text = _COLOURS.sub("", text)
        if text.startswith("{"):
            text = _message(text)
        for words, pattern, act in _PATTERNS:
            position = text.find(words)
            match = pattern.match(text, position) if position >= 0 else None
            if match:
                act(self._log, match)


def _lines(file: IO[bytes]) -> Iterator[bytes]:
    """Lines, the rest of an overlong one thrown away."""
    while line := file.readline(_MAX_LINE):
        yield line
        while len(line) == _MAX_LINE and not line.endswith(b"\n"):
            line = file.readline(_MAX_LINE)


def _message(text: str) -> str:
    try:
        loaded = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return str(loaded.get("message", text)) if isinstance(loaded, dict) else text


def _keep(kept: list[Any], value: Any) -> None:
    if value not in kept and len(kept) < _MAX_KEPT:
        kept.append(value)


def _started(log: ServerLog, match: re.Match[str]) -> None:
    """A server's first line. One that follows others of its own start does not say another."""
    if log.taken or log.refusals:
        fresh = ServerLog(log.name, lines=log.lines, starts=log.starts)
        log.__dict__.update(fresh.__dict__)
    if not log.version:
        log.starts += 1
    log.version = match[1]
    if match.re.groups > 1:
        log.model = match[2].strip()


def _banner_model(log: ServerLog, match: re.Match[str]) -> None:
    log.model = match[1].strip()


_CONFIG = {
    "model": re.compile(r"\bmodel=(?:'([^']*)'|\"([^\"]*)\")"),
    "dtype": re.compile(r"\bdtype=torch\.(\w+)"),
    "kv_cache_dtype": re.compile(r"\bkv_cache_dtype=(\w+)"),
    "platform": re.compile(r"\bdevice_config=(\w+)"),
    "tensor_parallel_size": re.compile(r"\btensor_parallel_size=(\d{1,4})\b"),
    "decode_context_parallel_size": re.compile(r"\bdecode_context_parallel_size=(\d{1,4})\b"),
}


def _engine(log: ServerLog, match: re.Match[str]) -> None:
    log.version = log.version or match[1]
    for name, pattern in _CONFIG.items():
        found = pattern.search(match[2])
        if found:
            text = next(group for group in found.groups() if group is not None)
            setattr(log, name, int(text) if name.endswith("size") else text)


_REQUESTED = re.compile(
    r"'attention_backend': (?:'|<AttentionBackendEnum\.)(\w+)"
    r"|AttentionConfig\(backend=<AttentionBackendEnum\.(\w+)"
    r"|'attention_config': \{[^}]{0,1000}'backend': (?:'|<AttentionBackendEnum\.)(\w+)"
)
_BLOCK_SIZE = re.compile(r"'block_size': (\d{1,6})\b")


def _arguments(log: ServerLog, match: re.Match[str]) -> None:
    requested = _REQUESTED.search(match[1])
    if requested:
        name = next(group for group in requested.groups() if group)
        log.requested = "" if name.lower() == "auto" else name.upper()
    block_size = _BLOCK_SIZE.search(match[1])
    if block_size:
        log.block_size = int(block_size[1])


_NAMES = re.compile(r"'(\w+)'")
_ATTENTION = re.compile(r"ATTN|ATTENTION|MLA|FLASHINFER$|SDPA|TURBOQUANT|ULTRAQUANT|OCTAVE|MSA")


def _chosen(log: ServerLog, match: re.Match[str]) -> None:
    taken = Taken(match[1], False, tuple(_NAMES.findall(match[2])), log.lines)
    _take(log, taken)


def _explicit(log: ServerLog, match: re.Match[str]) -> None:
    name = match[2].upper()  # older versions wrote FlashInfer
    if match[1] or _ATTENTION.search(name):
        _take(log, Taken(name, log.platform != "cpu", (), log.lines))


def _take(log: ServerLog, taken: Taken) -> None:
    if all(taken.backend != one.backend for one in log.taken) and len(log.taken) < _MAX_KEPT:
        log.taken.append(taken)


def _behind(what: str) -> Callable[[ServerLog, re.Match[str]], None]:
    def act(log: ServerLog, match: re.Match[str]) -> None:
        _keep(log.behind.setdefault(what, []), match[1])

    return act


_FIELD = re.compile(r"\b(\w{1,60})=((?:<[^>]*>|[^,()]|\([^)]*\))*)")
_REASONS = re.compile(r"\b(\w{1,60}): \[([^\]]*)\]")


def _asked(log: ServerLog, match: re.Match[str]) -> None:
    fields = {name: value.strip().strip("'") for name, value in _FIELD.findall(match[1])}
    _keep(log.questions, Question(fields, dict(_REASONS.findall(match[2]))))


def _refused(log: ServerLog, match: re.Match[str]) -> None:
    _keep(log.refusals, match[0][:2000])


def _remark(log: ServerLog, match: re.Match[str]) -> None:
    text = match[0][:500]
    if all(text not in one for one in log.remarks):
        _keep(log.remarks, text.replace("orcing", "Forcing", 1) if text[:2] == "or" else text)


def _ignored_on_cpu(log: ServerLog, match: re.Match[str]) -> None:
    log.platform = "cpu"
    _remark(log, match)


def _variable(log: ServerLog, match: re.Match[str]) -> None:
    _keep(log.unknown_variables, match[1])


def _device(log: ServerLog, match: re.Match[str]) -> None:
    log.device_name = log.device_name or match[1].replace("_", " ").strip()


def _capability(log: ServerLog, match: re.Match[str]) -> None:
    log.capability = log.capability or match[1]


def _platform(log: ServerLog, match: re.Match[str]) -> None:
    log.platform = match[1]


_Act = Callable[[ServerLog, re.Match[str]], None]
_ENUM = r"(?:AttentionBackendEnum\.)?"
# Each is tried where its first words stand first in the line, and nowhere else: a pattern that is
# searched for takes minutes on a line made for it.
_PATTERNS: tuple[tuple[str, re.Pattern[str], _Act], ...] = tuple(
    (words, re.compile(re.escape(words) + rest), act)
    for words, rest, act in (
        ("vLLM server version ", r"(\S+), serving model (.+)", _started),
        ("vLLM API server version ", r"(\S+)", _started),
        ("█", r".*?\bversion\s+(\d\S*)", _started),
        ("█", r".*?\bmodel\s+(\S.*)", _banner_model),
        ("Initializing a", r"n? V\d LLM engine \(v([^)\s]+)\) with config: (.*)", _engine),
        ("non-default args: ", r"(\{.*)", _arguments),
        (
            "Using ",
            rf"{_ENUM}(\w+) (?:attention )?backend out of potential backends: (.*)",
            _chosen,
        ),
        ("Overriding with ", rf"{_ENUM}(\w+) out of potential backends: (.*)", _chosen),
        ("Using ", r"(AttentionBackendEnum\.)?(\w+) backend(?:\.| \(selected via)", _explicit),
        ("Using FlashAttention version ", r"(\w+)", _behind("FlashAttention")),
        ("Using ", r"(\w+) KV cache layout", _behind("layout")),
        ("Setting KV cache layout to ", r"(\w+)", _behind("layout")),
        ("Using ", r"(\w+) MLA prefill backend", _behind("MLA prefill backend")),
        ("Using TRTLLM ", r"(.*?attention.*?)\.?$", _behind("TRT-LLM kernels")),
        ("Setting kv cache block size to ", r"(\d+) for ", _behind("block size")),
        ("Using ", r"(\w+) KV cache format for", _behind("KV cache dtype")),
        ("Using backend ", rf"{_ENUM}(\w+) for vit attention", _behind("vision encoder")),
        ("AttentionSelectorConfig(", r"(.*)\)\. Reasons: (\{.*)", _asked),
        ("No valid attention backend found for ", r".*", _refused),
        ("Selected backend ", r"\S+ is not valid for this configuration\. Reason: .*", _refused),
        ("Unknown attention backend: ", r".*", _refused),
        ("--block-size ", r"\d+ precluded higher-priority backend\(s\) .*? instead", _remark),
        ("Cannot use ", r"\S+ backend on CPU", _ignored_on_cpu),
        ("Gemma4 model has heterogeneous head dimensions", r".*", _remark),
        ("orcing ", r"[A-Z_]{0,40}(?:ATTN|MLA|FLASHINFER).*", _remark),
        ("defaulting to ", r"[A-Z_]{0,40}(?:ATTN|MLA|FLASHINFER).*", _remark),
        ("Unknown vLLM environment variable detected: ", r"(\w+)", _variable),
        ("detected platform ", r"(\w+)", _platform),
        ("device_name=", r"([\w -]+)", _device),
        ("NVIDIA ", r"((?:GeForce |RTX |GH|GB|[A-Z])[\w -]{1,40})", _device),
        ("with compute capability ", r"(\d{1,2}\.\d)", _capability),
        ("has compute capability ", r"(\d{1,2}\.\d)", _capability),
    )
)
