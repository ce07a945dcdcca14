"""The flags with which a vLLM does what was chosen.

Names are vLLM's: `--attention-backend` and the fields of `--attention-config`
(`vllm/config/attention.py`); `backend_per_kind` by `KVCacheSpecKind` is there from 0.30.0 on. The
two ways to name a backend exclude one another. No release takes one backend for prefill and another
for decode of one kind of layer; MLA's prefill is a setting of its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from attnbench.backends.declared.families import families
from attnbench.choose.tries import Choice
from attnbench.workload import Workload

PER_KIND_SINCE = (0, 30)
_FLASH_ATTN = re.compile(r"FA([234])(_UPSTREAM)?")
_TRTLLM = ("TRTLLM_GEN", "XQA")


@dataclass(frozen=True, slots=True)
class Realised:
    """`words` are for the shell; `why` says that, or what of it, the version cannot do."""

    version: str
    words: tuple[str, ...]
    why: str = ""


def kind_of(workload: Workload) -> str:
    """The `KVCacheSpecKind` of a layer."""
    shape = workload.shape
    if workload.attn_type in ("encoder", "encoder_only"):
        return "encoder_only_attention"
    if workload.attn_type == "encoder_decoder":
        return "cross_attention"
    if shape.is_mla:
        return "sliding_window_mla" if shape.sliding_window else "mla_attention"
    return "sliding_window" if shape.sliding_window else "full_attention"


def takes_per_kind(version: str) -> bool:
    return _release(version) >= PER_KIND_SINCE


def realise(chosen: Mapping[str, Choice], version: str) -> Realised:
    """Flags for the choice of each kind of layer, in the words of vLLM `version`.

    What the engine takes unasked is not known here: a block size is named where it is not 16.
    """
    choices = list(dict.fromkeys(chosen.values()))
    for choice in choices:
        if choice.backend not in families():
            return Realised(version, (), f"vLLM {version} has no backend {choice.backend}")
    names = list(dict.fromkeys(choice.backend for choice in choices))
    if len(names) > 1 and not takes_per_kind(version):
        return Realised(
            version,
            (),
            f"vLLM {version} takes one backend for all kinds of layers; per kind from 0.30.0 on",
        )
    fields: dict[str, object] = {}
    if len(names) > 1:
        fields["backend_per_kind"] = {kind: choice.backend for kind, choice in chosen.items()}
    why = []
    for choice in choices:
        more, said = _behind(choice)
        clash = [key for key in more if fields.get(key, more[key]) != more[key]]
        if clash:
            why.append(f"{clash[0]} is one for all kinds of layers")
        fields |= more
        why += [said] if said else []
    words: list[str] = []
    if len(names) == 1:
        words += ["--attention-backend", names[0]]
        for key, value in fields.items():
            words.append(f"--attention-config.{key}={json.dumps(value)}")
    else:
        words += ["--attention-config", json.dumps(fields)]
    sizes = {choice.block_size for choice in choices}
    if len(sizes) > 1:
        why.append("--block-size is one for all kinds of layers")
    elif sizes != {16}:
        words += ["--block-size", str(sizes.pop())]
    layouts = {choice.kv_cache_layout for choice in choices}
    if layouts == {"HND"}:
        words.insert(0, "VLLM_KV_CACHE_LAYOUT=HND")
    return Realised(version, tuple(words), "; ".join(dict.fromkeys(why)))


def _behind(choice: Choice) -> tuple[dict[str, object], str]:
    """Fields that fix the kernels behind a name."""
    if match := _FLASH_ATTN.fullmatch(choice.variant):
        said = (
            f"{choice.variant} is FlashAttention's own package; vLLM runs its own build"
            if match[2]
            else ""
        )
        if choice.backend == "FLASH_ATTN":
            return {"flash_attn_version": int(match[1])}, said
    if choice.backend == "FLASHINFER":
        return {"use_trtllm_attention": choice.variant in _TRTLLM}, ""
    return {}, ""


def by_phase(version: str, winners: Mapping[str, str]) -> str:
    """What is said where the phases' winners differ; "" where they do not."""
    if len(set(winners.values())) < 2:
        return ""
    listed = ", ".join(f"{phase} {name}" for phase, name in winners.items())
    return (
        f"the phases' winners differ ({listed}); vLLM {version} runs one backend for all phases of "
        "a layer, so only separate prefill and decode servers can have both"
    )


def quoted(words: Sequence[str]) -> str:
    """As a shell takes them."""
    import shlex

    return " ".join(shlex.quote(word) for word in words)


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])
