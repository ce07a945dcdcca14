"""Measured stacks: which packages, driver, CUDA and image a run had, and what differs between two.

The stored `stack_id` is of the packages alone. A driver, CUDA or container that changes under the
same packages changes times as well, so the stack axis goes by `stack_key`, which has all of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING

from attnbench.store.record import short_hash

if TYPE_CHECKING:
    from attnbench.history.runs import RunSummary

#: `580.105.08` in what the kernel says of NVIDIA's driver.
_DRIVER_NUMBER = re.compile(r"(?<![\w.])\d{3,}\.\d+(?:\.\d+)*(?![\w.])")

#: What differs between two sides: (name, old version, new version); "" is absent.
Changed = tuple[tuple[str, str, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """What one device was measured with. `commit` is of a manifest repository; "": of none."""

    device_class: str
    stack_id: str
    packages: tuple[str, ...]  # `name==version`, sorted
    driver_version: str = ""
    cuda_version: str = ""
    container_digest: str = ""
    first_measured: datetime  # UTC: the start of the first run that had it
    commit: str = ""

    @property
    def key(self) -> str:
        return stack_key(
            self.stack_id, self.driver_version, self.cuda_version, self.container_digest
        )

    @property
    def versions(self) -> dict[str, str]:
        """Version by name; the machine's parts are called driver, cuda and container."""
        return versions_of(
            self.packages, self.driver_version, self.cuda_version, self.container_digest
        )


@lru_cache(maxsize=4096)
def stack_key(stack_id: str, driver: str = "", cuda: str = "", container: str = "") -> str:
    """`stack_id` where nothing else is known, as on a CPU without a container, else
    `<stack_id>-<8 digits>` of driver, CUDA and container."""
    machine = (driver_number(driver), cuda, container)
    return f"{stack_id}-{short_hash('machine', *machine)[:8]}" if any(machine) else stack_id


def driver_number(text: str) -> str:
    """The driver's version in `text`, else `text`.

    The kernel tells a line with the builder and date in it, NVML the number alone: one driver.
    """
    found = _DRIVER_NUMBER.search(text)
    return found[0] if found else text


def versions_of(
    packages: Iterable[str], driver: str = "", cuda: str = "", container: str = ""
) -> dict[str, str]:
    """Version by name; the machine's parts are called driver, cuda and container."""
    versions = {}
    for entry in packages:
        name, _, version = entry.partition("==")
        versions[name] = version
    machine = {"driver": driver_number(driver), "cuda": cuda, "container": container}
    return versions | {name: text for name, text in machine.items() if text}


def changed_versions(old: Mapping[str, str], new: Mapping[str, str]) -> Changed:
    """What differs, in order of names."""
    return tuple(
        (name, old.get(name, ""), new.get(name, ""))
        for name in sorted(old.keys() | new.keys())
        if old.get(name, "") != new.get(name, "")
    )


def change_text(changed: Changed) -> str:
    """`torch 2.12.0 -> 2.13.0, + triton 3.7.1`, for people."""
    parts = []
    for name, old, new in changed:
        if old and new:
            parts.append(f"{name} {old} -> {new}")
        else:
            parts.append(f"+ {name} {new}" if new else f"- {name} {old}")
    return ", ".join(parts)


def stacks_of_runs(runs: Iterable[RunSummary]) -> list[Stack]:
    """Each stack of each device class once, by when it was first measured.

    Runs that do not know their stack have none.
    """
    return merged(
        Stack(
            device_class=run.device_class,
            stack_id=run.stack_id,
            packages=tuple(sorted(run.stack)),
            driver_version=driver_number(run.driver_version),
            cuda_version=run.facts.get("cuda_version", ""),
            container_digest=run.facts.get("container_digest", ""),
            first_measured=run.started_at,
        )
        for run in runs
        if run.stack_id
    )


def merged(stacks: Iterable[Stack]) -> list[Stack]:
    """Each stack of each device class once, as first measured; in that order.

    In whatever order and however often they are given: the same list.
    """
    first: dict[tuple[str, str], Stack] = {}
    for stack in sorted(stacks, key=_order):
        first.setdefault((stack.device_class, stack.key), stack)
    return list(first.values())


def stack_before(stacks: Iterable[Stack], stack: Stack) -> Stack | None:
    """The stack of the same device class that was first measured before `stack`; None: none."""
    earlier = [
        s for s in stacks if s.device_class == stack.device_class and _order(s) < _order(stack)
    ]
    return max(earlier, key=_order, default=None)


def _order(stack: Stack) -> tuple[datetime, str, str, tuple[str, ...]]:
    return (stack.first_measured, stack.device_class, stack.key, stack.packages)
