"""Who may be chosen: the selector's predicates, the chain, and what an engine takes unasked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from attnbench.backends.abstract import AttentionBackend, AttentionConfig
from attnbench.backends.device import Device
from attnbench.backends.registry import backend_entry, get_backend_class, runnable_backend_names
from attnbench.choose.tries import Choice
from attnbench.errors import BackendUnavailableError, UnknownBackendError
from attnbench.selection import config_of, platform_of
from attnbench.upgrade.batches import UnmeasurableError
from attnbench.upgrade.kernels import own_kernels
from attnbench.upgrade.probe import CellAnswer
from attnbench.workload import Workload


@dataclass(frozen=True, slots=True)
class Default:
    """What an engine takes unasked for one kind of layer.

    `backend` "": it has no valid one. `variants` by batch are the kernels behind the name, the best
    first; `why` says why they cannot be told.
    """

    engine: str
    backend: str
    variants: Mapping[str, tuple[str, ...]]
    why: str = ""


def free_config(workload: Workload, block_size: int) -> AttentionConfig:
    """What is asked of a backend that may take the block size it likes; 0: none is named."""
    config = config_of(workload)
    return config._replace(block_size=block_size or None, kv_cache_layout=None)


def refusal(choice: Choice, workload: Workload, device: Device) -> str:
    """Why a choice does not take a workload on a device, by its own predicates; "": it does."""
    try:
        cls = get_backend_class(choice.backend)
    except (BackendUnavailableError, UnknownBackendError) as error:
        return str(error)
    config = config_of(workload)._replace(
        block_size=choice.block_size, kv_cache_layout=choice.kv_cache_layout
    )
    if backend_entry(choice.backend).selection_only:
        return "attnbench has no kernel to run under this name"
    if device.kind == "cpu" and cls.interpreted_on_cpu:
        return "Triton's interpreter: its times on a CPU mean nothing"
    reasons = list(cls.validate_configuration(config, device))
    if not reasons and (why := cls.variant_refusal(choice.variant, config, device)):
        reasons.append(why)
    return "; ".join(reasons)


def expected(
    workload: Workload, device: Device, block_size: int
) -> tuple[list[Choice], dict[str, str]]:
    """Valid backends of the platform's chain as they would be measured, and why others refuse."""
    config = free_config(workload, block_size)
    found, refused = [], {}
    chain = platform_of(device).get_backend_priorities(config, device)
    for name in chain:
        if name not in runnable_backend_names():
            continue
        try:
            cls = get_backend_class(name)
        except BackendUnavailableError as error:
            refused[name] = str(error)
            continue
        block = block_size or cls.get_preferred_block_size(workload.block_size)
        sized = config._replace(block_size=block)
        choice = Choice(name, cls.default_variant(sized, device), block, _layout(cls, workload))
        why = refusal(choice, workload, device)
        if why:
            refused[name] = why
        else:
            found.append(choice)
    return found, refused


def _layout(cls: type[AttentionBackend], workload: Workload) -> str:
    return str(cls.get_required_kv_cache_layout() or workload.kv_cache_layout)


def followed_default(workloads: Mapping[str, Workload], device: Device, block_size: int) -> Default:
    """What the followed release takes for a layer; `workloads` are its batches."""
    platform = platform_of(device)
    first = next(iter(workloads.values()))
    config = free_config(first, block_size)
    name = platform.get_followed_choice(config, device)
    engine = platform.follows.rsplit(" ", 1)[0]
    if not name:
        return Default(engine, "", {}, "it has no valid backend for this layer")
    if name not in runnable_backend_names():
        return Default(engine, name, {}, f"attnbench has no kernels of {name}")
    cls = get_backend_class(name)
    variants = {
        batch: (cls.default_variant(config_of(one), device),) for batch, one in workloads.items()
    }
    return Default(engine, name, variants)


def probed_default(
    engine: str, answer: CellAnswer, workloads: Mapping[str, Workload], capability: str
) -> Default:
    """What a version's own selector answered, as attnbench's kernels."""
    if answer.backend is None:
        return Default(engine, "", {}, answer.refused or "it has no valid backend for this layer")
    variants: dict[str, tuple[str, ...]] = {}
    why = "; ".join(answer.untrusted)
    for batch, workload in workloads.items():
        try:
            variants[batch] = own_kernels(answer, workload, capability).variants
        except UnmeasurableError as error:
            why = str(error)
    return Default(engine, answer.backend, variants, why)


def matching(default: Default, batch: str, choices: Sequence[Choice], block: int) -> Choice | None:
    """The stored choice that is the default on a batch: its best variant, its nearest block."""
    for variant in default.variants.get(batch, ()):
        mine = [c for c in choices if (c.backend, c.variant) == (default.backend, variant)]
        if mine:
            return min(mine, key=lambda one: (abs(one.block_size - block), one))
    return None
