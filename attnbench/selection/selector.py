"""Which backend, and why: explicit request -> platform chain -> fallback, with every reason."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

from attnbench.backends.abstract import AttentionBackend, AttentionConfig
from attnbench.backends.declared.base import DeclaredBackend
from attnbench.backends.declared.families import families
from attnbench.backends.device import Device
from attnbench.backends.registry import (
    backend_entry,
    backend_status,
    generation,
    get_backend_class,
    runnable_backend_names,
    split_request,
)
from attnbench.errors import BackendUnavailableError, SelectionError
from attnbench.selection.platform import Platform, platform_of


class Source(StrEnum):
    """Why a candidate was looked at."""

    EXPLICIT = "explicit request"
    CHAIN = "platform chain"
    FALLBACK = "fallback"


@dataclass(frozen=True, slots=True)
class Candidate:
    """One backend that was considered. `priority` counts from 0 within its source."""

    name: str
    source: Source
    priority: int
    reasons: tuple[str, ...]
    note: str = ""
    variant: str = ""  # that the chain names with it

    @property
    def accepted(self) -> bool:
        return not self.reasons


@dataclass(frozen=True, slots=True)
class Selection:
    """An answer and everything that led to it.

    `followed` is what the followed program itself would take, with all of its libraries installed;
    "": it has no valid backend. It differs from `backend` where attnbench's own kernel of the same
    name accepts less or more, and on a present device that lacks a library.
    """

    backend: str  # "": every candidate refuses (only `consider` returns that)
    variant: str
    source: Source
    device: Device
    device_is_present: bool
    config: AttentionConfig
    requested: str
    follows: str
    followed: str
    candidates: tuple[Candidate, ...]
    notes: tuple[str, ...]

    def better_ranked(self) -> tuple[Candidate, ...]:
        """Candidates tried before the chosen one, all of them refused; all when none accepts."""
        for position, candidate in enumerate(self.candidates):
            if candidate.accepted:
                return self.candidates[:position]
        return self.candidates


def select(config: AttentionConfig, device: Device, requested: str | None = None) -> Selection:
    """The backend for `config` on `device`. Memoised; no side effect.

    Args:
        requested: a backend somebody asked for, `NAME` or `NAME:variant`; it wins or fails, and
            never falls back.

    Raises:
        SelectionError: the requested backend refuses or has no such variant, or every candidate
            refuses; has all reasons.
        UnknownBackendError, DeviceError: a name nobody registered, a kind nobody brings.
    """
    selection = consider(config, device, requested)
    if not selection.backend:
        raise SelectionError(_refusal(selection))
    return selection


def consider(config: AttentionConfig, device: Device, requested: str | None = None) -> Selection:
    """As `select`, but a refusal is an answer too: `backend` is then empty."""
    if requested is not None and requested.lower() in ("", "auto"):
        requested = None
    return _consider(config, device, requested, generation(), platform_of(device))


def candidates(config: AttentionConfig, device: Device) -> tuple[Candidate, ...]:
    """Every backend of `device`'s chain, then the fallbacks, each with all its reasons."""
    return consider(config, device).candidates


@lru_cache(maxsize=65536)
def _consider(
    config: AttentionConfig,
    device: Device,
    requested: str | None,
    _generation: int,
    platform: Platform,
) -> Selection:
    present = platform.is_present(device)
    chain = platform.get_backend_priorities(config, device)
    name, variant = split_request(requested or "")
    if name:
        backend_entry(name)  # raises for a name nobody registered
        looked_at = [_candidate(name, Source.EXPLICIT, 0, config, device, present, variant)]
    else:
        looked_at = [
            _candidate(
                split_request(text)[0],
                Source.CHAIN,
                priority,
                config,
                device,
                present,
                split_request(text)[1],
            )
            for priority, text in enumerate(chain)
        ]
        named = {candidate.name for candidate in looked_at}
        rest = [name for name in runnable_backend_names() if name not in named]
        looked_at += [
            _candidate(name, Source.FALLBACK, priority, config, device, present)
            for priority, name in enumerate(rest)
        ]
    chosen = next((c for c in looked_at if c.accepted), None)
    notes = list(platform.get_notes(config, device))
    if chosen is not None and (excluded := _excluded_by_block_size(looked_at, chosen)):
        notes.append(
            f"block size {config.block_size} alone rules out {', '.join(excluded)}, ranked higher; "
            "leave it out and the backend takes the size it prefers"
        )
    return Selection(
        backend=chosen.name if chosen else "",
        variant=(
            _variant(chosen.name, variant or chosen.variant, config, device) if chosen else ""
        ),
        source=chosen.source if chosen else looked_at[0].source,
        device=device,
        device_is_present=present,
        config=config,
        requested=name,
        follows=platform.follows,
        followed=platform.get_followed_choice(config, device),
        candidates=tuple(looked_at),
        notes=tuple(notes),
    )


def _candidate(
    name: str,
    source: Source,
    priority: int,
    config: AttentionConfig,
    device: Device,
    present: bool,
    variant: str = "",
) -> Candidate:
    try:
        cls = get_backend_class(name)
    except BackendUnavailableError as error:
        # Without the class there are no predicates to ask, here or for a device elsewhere.
        return Candidate(name, source, priority, (str(error),))
    reasons = cls.validate_configuration(config, device)
    asked = variant
    variant = variant or cls.default_variant(config, device)
    if not reasons and (refusal := cls.variant_refusal(variant, config, device)):
        reasons.append(refusal)
    if present:
        # Whether it can run there is no question for a device the family does not exist for.
        where = device if cls.supports_device(device) else None
        status = backend_status(name, where, variant)
        reasons += [status] if status and status not in reasons else []
    note = _note(name, cls, config, device)
    return Candidate(name, source, priority, tuple(reasons), note, asked)


def _variant(name: str, wanted: str, config: AttentionConfig, device: Device) -> str:
    cls = get_backend_class(name)
    variants = cls.get_variants(device)
    if wanted and wanted not in variants:
        known = ", ".join(variant for variant in variants if variant) or "none"
        raise SelectionError(
            f"backend {name} has no variant {wanted!r} on device {device}; it has: {known}"
        )
    return wanted or cls.default_variant(config, device)


def _note(name: str, cls: type[AttentionBackend], config: AttentionConfig, device: Device) -> str:
    """The sub-variant behind a declared name, or where vLLM's kernel of our name differs here."""
    if issubclass(cls, DeclaredBackend):
        return cls.note(config, device)
    theirs = families().get(name)
    if theirs is None or not theirs.supports_device(device):
        return ""
    their_reasons = theirs.validate_configuration(config, device)
    our_reasons = cls.validate_configuration(config, device)
    if bool(their_reasons) == bool(our_reasons):
        return ""
    verdict = f"refuses this: {'; '.join(their_reasons)}" if their_reasons else "accepts this"
    return f"{theirs.version}'s own {name} {verdict}"


def _excluded_by_block_size(looked_at: list[Candidate], chosen: Candidate) -> list[str]:
    before = looked_at[: looked_at.index(chosen)]
    return [c.name for c in before if c.reasons == ("block_size not supported",)]


def describe_config(config: AttentionConfig) -> str:
    """The configuration in a line, values at their defaults left out."""
    words = [f"head_size {config.head_size}", str(config.dtype).removeprefix("torch.")]
    if config.kv_cache_dtype != "auto":
        words.append(f"kv_cache_dtype {config.kv_cache_dtype}")
    if config.block_size is not None:
        words.append(f"block_size {config.block_size}")
    if config.kv_cache_layout is not None:
        words.append(config.kv_cache_layout)
    if config.use_mla:
        words.append("MLA")
    elif config.v_head_size not in (None, config.head_size):
        words.append(f"v_head_size {config.v_head_size}")
    flags = {
        "sparse": config.use_sparse,
        "sinks": config.has_sink,
        "multimodal prefix": config.use_mm_prefix,
        "per-head quant scales": config.use_per_head_quant_scales,
        "non-causal": config.use_non_causal,
        "batch-invariant": config.use_batch_invariant,
        "sliding window": config.has_sliding_window,
        "logits soft cap": config.has_logits_soft_cap,
        "ALiBi": config.use_alibi,
    }
    words += [word for word, is_set in flags.items() if is_set]
    if config.attn_type != "decoder":
        words.append(f"attention type {config.attn_type}")
    return ", ".join(words)


def _refusal(selection: Selection) -> str:
    what = describe_config(selection.config)
    where = f"device {selection.device}"
    if selection.source is Source.EXPLICIT:
        asked = selection.candidates[0]
        others = [c.name for c in candidates(selection.config, selection.device) if c.accepted]
        mend = (
            f"leave the request out to take {others[0]}, or ask for one of: {', '.join(others)}"
            if others
            else "no other backend accepts it either; `attnbench explain` shows why"
        )
        return (
            f"backend {asked.name} was asked for and refuses ({what}) on {where}: "
            f"{'; '.join(asked.reasons)}. An explicit request never falls back: {mend}"
        )
    listed = " | ".join(f"{c.name}: {'; '.join(c.reasons)}" for c in selection.candidates)
    return (
        f"no valid attention backend for ({what}) on {where}, chain of {selection.follows}. "
        f"Refusals: {listed}. Change what the reasons name, or take another --device"
    )
