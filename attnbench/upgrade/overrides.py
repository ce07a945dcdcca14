"""Which of a server's settings still do what they say, and the spelling that does in each version.

Whether a version knows a setting, takes its value, and what it then chooses, is that version's own
answer (`vllm_probe/settings.py` and the cells). Only what became of an old name is written down
here, and a new spelling is given only where the version accepts it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from attnbench.upgrade.probe import CellAnswer, SettingAnswer, VersionAnswer
from attnbench.upgrade.user_settings import (
    CONFIG_FLAG,
    CUBIN_VARIABLE,
    Setting,
    SettingKind,
)


class Status(StrEnum):
    """What a version makes of a setting."""

    ACCEPTED = "accepted"
    DEAD = "dead"
    """It starts and the setting has no effect."""
    RENAMED = "renamed"
    """Refused under this name; the new spelling is accepted."""
    REJECTED = "rejected"
    """The server does not start with it."""
    CANNOT_WORK = "accepted, cannot work"
    """It starts, and what was asked for cannot run on the device, or does not."""
    UNKNOWN = "not known"
    """This could not be found out."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """One setting in one version on one device. `instead` is what to type for the old choice."""

    setting: str
    where: str
    version: str
    capability: str
    status: Status
    why: str
    instead: str


Spelling = tuple[str, Any]
"""A field of AttentionConfig and its value."""


def _same(field: str, convert: Callable[[str], Any]) -> Callable[[str], list[Spelling]]:
    return lambda value: [(field, convert(value))]


def _yes(value: str) -> bool:
    return value.strip().lower() in ("1", "true", "yes", "on")


def _cudnn(value: str) -> list[Spelling]:
    return [("use_cudnn_prefill", True)] if _yes(value) else []


def _ragged(value: str) -> list[Spelling]:
    if not _yes(value):
        return []
    return [("use_trtllm_ragged_deepseek_prefill", True), ("mla_prefill_backend", "TRTLLM_RAGGED")]


def _flashinfer_prefill(value: str) -> list[Spelling]:
    if _yes(value):
        return []
    return [("disable_flashinfer_prefill", False), ("mla_prefill_backend", "FLASHINFER")]


def _fp4_indexer(value: str) -> list[Spelling]:
    return [("indexer_kv_dtype", "mxfp4")] if _yes(value) else []


_VARIABLES: Mapping[str, Callable[[str], list[Spelling]]] = {
    "VLLM_ATTENTION_BACKEND": _same("backend", str.upper),
    "VLLM_FLASH_ATTN_VERSION": _same("flash_attn_version", int),
    "VLLM_FLASH_ATTN_MAX_NUM_SPLITS_FOR_CUDA_GRAPH": _same(
        "flash_attn_max_num_splits_for_cuda_graph", int
    ),
    "VLLM_V1_USE_PREFILL_DECODE_ATTENTION": _same("use_prefill_decode_attention", _yes),
    "VLLM_USE_TRTLLM_ATTENTION": _same("use_trtllm_attention", _yes),
    "VLLM_USE_TRTLLM_DECODE_ATTENTION": _same("use_trtllm_attention", _yes),
    "VLLM_USE_TRTLLM_CONTEXT_ATTENTION": _same("use_trtllm_attention", _yes),
    "VLLM_FLASHINFER_DISABLE_Q_QUANTIZATION": _same("disable_flashinfer_q_quantization", _yes),
    "VLLM_USE_CUDNN_PREFILL": _cudnn,
    "VLLM_USE_TRTLLM_RAGGED_DEEPSEEK_PREFILL": _ragged,
    "VLLM_DISABLE_FLASHINFER_PREFILL": _flashinfer_prefill,
}
"""What became of a variable, the older spelling first. Sources: the fields are those that vLLM's
own deprecation names for each variable (`AttentionConfig.__post_init__` of 0.12 and 0.13, vLLM pull
request 26315, variables removed by 30564); the TRTLLM decode and context variables were joined in
one by pull request 22378. 0.22.1 has `mla_prefill_backend` for the two MLA prefill switches."""

_FIELDS: Mapping[str, Callable[[str], list[Spelling]]] = {
    "use_cudnn_prefill": _cudnn,
    "use_trtllm_ragged_deepseek_prefill": _ragged,
    "disable_flashinfer_prefill": _flashinfer_prefill,
    "use_fp4_indexer_cache": _fp4_indexer,
}
"""What became of a field of AttentionConfig: the MLA prefill switches as above; 0.30 gives the
sparse indexer's cache a dtype, of which 0.22.1's `use_fp4_indexer_cache` was one (MXFP4)."""

_OLD_SUFFIX = "_VLLM_V1"
"""0.8 to 0.10 named the backends of its new engine so (`FLASH_ATTN_VLLM_V1`)."""

_FOREIGN = {"ROCM_": "an AMD GPU", "CPU_": "a CPU", "AMX_": "a CPU", "XPU_": "an Intel GPU"}
"""Whose kernels a backend's name promises. Explicit, ROCM_ATTN is accepted on CUDA by 0.22.1,
0.30.0 and 0.33.0, and CPU_ATTN by the first two."""


def proposals(settings: Sequence[Setting]) -> tuple[Setting, ...]:
    """The new spellings that may realise the settings: to be put before each version."""
    return tuple(dict.fromkeys(new for one in settings for new in _successors(one)))


def _successors(setting: Setting) -> tuple[Setting, ...]:
    value = setting.value
    if value is None:
        return ()
    text = str(value)
    spellings: list[Spelling] = []
    try:
        if setting.name in _VARIABLES:
            spellings = _VARIABLES[setting.name](text)
        elif setting.field in _FIELDS:
            spellings = _FIELDS[setting.field](text)
        elif setting.field == "backend" and text.upper().endswith(_OLD_SUFFIX):
            spellings = [("backend", text.upper())]
    except ValueError:
        return ()
    return tuple(_as_flag(field, value, setting.where) for field, value in spellings)


def _as_flag(field: str, value: Any, where: str) -> Setting:
    if field == "backend":
        value = str(value).removesuffix(_OLD_SUFFIX)
        return Setting(SettingKind.FLAG, "--attention-backend", value, where)
    return Setting(SettingKind.FLAG, f"{CONFIG_FLAG}.{field}", value, where)


def lint(settings: Sequence[Setting], answers: Iterable[VersionAnswer]) -> list[Verdict]:
    """What each version, asked with the settings and their `proposals`, makes of each setting."""
    verdicts = []
    for setting in dict.fromkeys(settings):
        for answer in answers:
            status, why, instead = _judge(setting, settings, answer)
            verdicts.append(
                Verdict(
                    setting.text,
                    setting.where,
                    answer.version,
                    answer.capability,
                    status,
                    why,
                    instead,
                )
            )
    return verdicts


def _judge(
    setting: Setting, settings: Sequence[Setting], version: VersionAnswer
) -> tuple[Status, str, str]:
    by_itself = {one.setting: one for one in version.settings}
    answer = by_itself[setting]
    fate = _by_itself(answer, version.version)
    if fate is None:
        status, why = _among_others(setting, settings, version)
        return status, why, ""
    status, why = fate
    if status is Status.UNKNOWN:
        return status, why, ""
    accepted = [
        one
        for one in _successors(setting)
        if by_itself[one].known and not by_itself[one].refused and not by_itself[one].ended
    ]
    instead = accepted[-1].text if accepted else ""
    if accepted and status is Status.REJECTED:
        status = Status.RENAMED
    if not accepted and setting.name in _VARIABLES and setting.value is not None:
        nothing = not _successors(setting)
        why += "; leave it out, that is the default" if nothing else "; nothing takes its place"
    return status, why, instead


def _by_itself(answer: SettingAnswer, version: str) -> tuple[Status, str] | None:
    """The verdict where the setting alone decides it, None where the version takes it."""
    setting = answer.setting
    if answer.known is None:
        return Status.UNKNOWN, answer.not_evaluated or f"{version} did not tell"
    if not answer.known and setting.kind is SettingKind.VARIABLE:
        if answer.read_by:
            return Status.UNKNOWN, f"vllm.envs does not list it, but {answer.read_by} names it"
        return Status.DEAD, f"no file of {version} knows it"
    if not answer.known:
        what = f"AttentionConfig has no {setting.field}" if setting.field else "there is no such"
        return Status.REJECTED, what if setting.field else f"{what} flag"
    if answer.ended:
        return Status.DEAD, answer.ended
    if answer.refused:
        return Status.REJECTED, plain(answer.refused)
    if answer.not_evaluated:
        return Status.UNKNOWN, answer.not_evaluated
    return None


def _among_others(
    setting: Setting, settings: Sequence[Setting], version: VersionAnswer
) -> tuple[Status, str]:
    """The verdict on a setting that the version takes by itself, from what the cells chose."""
    if setting.value is None:
        return Status.ACCEPTED, "its value is not in the text"
    if setting.name == CUBIN_VARIABLE:
        return Status.ACCEPTED, "said to this command with --assume flashinfer-cubin=yes|no"
    same_field = [one for one in settings if one.field and one.field == setting.field]
    if setting.field == "backend" and len({one.name for one in same_field}) > 1:
        # engine/arg_utils.py of 0.22.1, 0.30.0 and 0.33.0.
        return Status.REJECTED, "--attention-backend and --attention-config.backend exclude another"
    if same_field and same_field[-1] != setting:
        return Status.DEAD, f"{same_field[-1].where} sets it again"
    cells = [one for one in version.cells.values() if not _not_evaluated(one)]
    if setting.field and (stopped := _stopped_by(settings, version)):
        return Status.UNKNOWN, f"{version.version} does not start with {stopped}; mend that first"
    if setting.field == "backend" and cells:
        return _backend(setting, version, cells)
    if setting.field == "flash_attn_version" and cells:
        return _flash_attn_version(setting, cells)
    return Status.ACCEPTED, ""


def _stopped_by(settings: Sequence[Setting], version: VersionAnswer) -> str:
    """A setting of AttentionConfig that the version refuses, and every cell with it."""
    asked = set(settings)
    refused = (
        one.setting.text
        for one in version.settings
        if one.setting in asked and one.setting.field and (one.refused or one.known is False)
    )
    return next(refused, "")


def _backend(
    setting: Setting, version: VersionAnswer, cells: Sequence[CellAnswer]
) -> tuple[Status, str]:
    asked = str(setting.value).upper()
    becomes = next(one.becomes for one in version.settings if one.setting == setting)
    if becomes != asked:
        return Status.ACCEPTED, "the version chooses" + (
            "" if asked == "AUTO" else f", not {asked}"
        )
    refused = Counter(plain(one.refused) for one in cells if one.backend is None)
    others = Counter(
        one.model_override or f"{one.backend} runs instead"
        for one in cells
        if one.backend not in (None, asked)
    )
    taken = len(cells) - refused.total() - others.total()
    said = []
    if refused:
        said.append(f"refused for {_of(refused.total(), len(cells))}: {_most(refused)}")
    if others:
        said.append(f"not taken for {_of(others.total(), len(cells))}: {_most(others)}")
    why = "; ".join(said)
    if taken:
        host = next((host for part, host in _FOREIGN.items() if asked.startswith(part)), "")
        here = "a CPU" if version.capability == "cpu" else "an NVIDIA GPU"
        if host and host != here:
            foreign = f"its kernels are for {host}, and the selector does not look"
            return Status.CANNOT_WORK, "; ".join([foreign, *said])
        return Status.ACCEPTED, why
    return (Status.DEAD if others else Status.REJECTED), why


def _flash_attn_version(setting: Setting, cells: Sequence[CellAnswer]) -> tuple[Status, str]:
    found = Counter(
        one.behind["flash_attn_version"] for one in cells if "flash_attn_version" in one.behind
    )
    others = Counter({f"{one} runs": count for one, count in found.items() if one != setting.value})
    if not found:
        return Status.CANNOT_WORK, "no cell that is asked about runs FlashAttention"
    if not others:
        return Status.ACCEPTED, ""
    why = f"not taken for {_of(others.total(), found.total())} of FlashAttention: {_most(others)}"
    return (Status.CANNOT_WORK if others.total() == found.total() else Status.ACCEPTED), why


def _not_evaluated(answer: CellAnswer) -> bool:
    return any(text.startswith("selection") for text in answer.not_evaluated)


def _of(count: int, total: int) -> str:
    if count < total:
        return f"{count} of {total} cells"
    return f"all {total} cells" if total > 1 else "the one cell"


def _most(counts: Counter[str]) -> str:
    text, _ = counts.most_common(1)[0]
    return text + (f" (and {len(counts) - 1} other reasons)" if len(counts) > 1 else "")


_VALUE_ERROR = re.compile(r"(?:Value|Assertion) error, (.*?)\s*(?:\[type=|$)", re.DOTALL)
_INVALID = re.compile(r"\n\w+\n\s+(.*?)\s*\[type=")
_REASON = re.compile(r"Reason: \[(.*)\]\s*$", re.DOTALL)


def plain(text: str, limit: int = 300) -> str:
    """A refusal without its exception's wrapping: the reasons a selector or validator gave."""
    for pattern in (_REASON, _VALUE_ERROR, _INVALID):
        match = pattern.search(text)
        if match:
            text = match[1].strip("'\"") if pattern is _REASON else match[1]
            break
    flat = " ".join(text.replace("', '", ", ").split())
    return flat if len(flat) <= limit else flat[: limit - 1] + "…"


def rows(verdicts: Iterable[Verdict]) -> list[dict[str, Any]]:
    """One row a setting and version; devices with the same verdict stand together."""
    devices: dict[tuple[str, ...], list[str]] = {}
    for one in verdicts:
        key = (one.setting, one.version, one.status, one.why, one.instead, one.where)
        devices.setdefault(key, []).append(one.capability)
    return [
        {
            "setting": setting,
            "version": version,
            "device": ", ".join(where),
            "verdict": str(status),
            "why": why,
            "write instead": instead,
            "from": source,
        }
        for (setting, version, status, why, instead, source), where in devices.items()
    ]


def markdown(verdicts: Iterable[Verdict]) -> Iterator[str]:
    """The lines of a section of the Markdown report."""
    listed = rows(verdicts)
    if not listed:
        return
    names = [name for name in listed[0] if name != "from"]
    yield ""
    yield "## Your settings"
    yield ""
    yield "| " + " | ".join(names) + " |"
    yield "|" + "---|" * len(names)
    for row in listed:
        yield "| " + " | ".join(str(row[name]).replace("|", "\\|") for name in names) + " |"


def to_json(verdicts: Iterable[Verdict]) -> list[dict[str, Any]]:
    """Every verdict in full."""
    return [asdict(one) for one in verdicts]
