"""A stack as two text files, and back.

Stored names and versions may be anything. Only what is a plain `name==version` goes into the lock
file, which somebody may hand to pip; the rest is quoted text in the TOML file.
"""

from __future__ import annotations

import re
import tomllib
from datetime import UTC, datetime

from attnbench.history.stacks import Stack
from attnbench.store.record import short_hash

LOCK_FILE = "requirements.lock"
MACHINE_FILE = "machine.toml"

_LOCK_LINE = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?==[A-Za-z0-9][A-Za-z0-9._+!-]*")

#: Entries of a stack that no package index has: the interpreter and the host's compiler.
_NO_PACKAGES = frozenset({"python", "gxx"})


def folder_name(device_class: str) -> str:
    """A folder for what may be any text; different texts get different folders."""
    slug = re.sub(r"[^a-z0-9._-]+", "-", device_class.lower()).strip("-.")[:60]
    if slug == device_class:
        return slug
    return f"{slug or 'device'}-{short_hash('device', device_class)[:8]}"


def stack_files(stack: Stack) -> dict[str, str]:
    """Text by file name."""
    installable = [p for p in stack.packages if is_installable(p)]
    others = [p for p in stack.packages if not is_installable(p)]
    values = {
        "device_class": stack.device_class,
        "stack": stack.key,
        "stack_id": stack.stack_id,
        "first_measured": stack.first_measured.astimezone(UTC).isoformat(),
        "driver": stack.driver_version,
        "cuda": stack.cuda_version,
        "container": stack.container_digest,
    }
    lines = [f"{name} = {_quoted(value)}\n" for name, value in values.items()]
    listed = "".join(f"    {_quoted(entry)},\n" for entry in others)
    lines.append(f"not_installable = [\n{listed}]\n" if others else "not_installable = []\n")
    return {
        MACHINE_FILE: "".join(lines),
        LOCK_FILE: "".join(f"{entry}\n" for entry in installable),
    }


def read_stack(machine: str, lock: str) -> Stack:
    """What `stack_files` wrote. Raises ValueError, KeyError or TypeError for anything else."""
    values = tomllib.loads(machine)
    packages = [*lock.splitlines(), *values["not_installable"]]
    stack = Stack(
        device_class=values["device_class"],
        stack_id=values["stack_id"],
        packages=tuple(sorted(packages)),
        driver_version=values["driver"],
        cuda_version=values["cuda"],
        container_digest=values["container"],
        first_measured=datetime.fromisoformat(values["first_measured"]),
    )
    if stack_files(stack) != {MACHINE_FILE: machine, LOCK_FILE: lock}:
        raise ValueError("its files are not as attnbench writes them")
    return stack


def is_installable(entry: str) -> bool:
    """Whether pip can be given this `name==version`, and nothing else is meant by it."""
    name = entry.partition("==")[0]
    return name not in _NO_PACKAGES and _LOCK_LINE.fullmatch(entry) is not None


def _quoted(text: str) -> str:
    """A TOML string. Control characters, and what would turn text around, are written as codes."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in escaped) + '"'
