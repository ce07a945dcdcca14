"""The candidates between two stacks: those measured between them, or package by package."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product

from attnbench.errors import UsageError
from attnbench.history.manifest_files import is_installable
from attnbench.history.stacks import Stack, change_text, changed_versions
from attnbench.upgrade.bisect_sides import Candidate, parse_range
from attnbench.upgrade.side_env import make_stack_side

#: Of what changed with a stack, in its label.
_MAX_CHANGES = 80

Versions = dict[str, str]


def known_stacks(written: Sequence[Stack], measured: Sequence[Stack]) -> list[Stack]:
    """Those of a manifest repository and those of stored runs, each once, by first measurement."""
    have = {(stack.device_class, stack.key) for stack in written}
    every = [*written, *(s for s in measured if (s.device_class, s.key) not in have)]
    return sorted(every, key=lambda stack: (stack.first_measured, stack.key))


def stack_candidates(
    text: str,
    stacks: Sequence[Stack],
    tell: Callable[[str], None],
    device_class: Callable[[], str],
) -> list[Candidate]:
    """From one stack to another of one device class, through those first measured between them.

    Where none was, one package at a time in order of names: candidate n has the first n of those
    that differ at the bad stack's version, and a mixture that does not load is skipped. What the
    stacks differ in and pip cannot change beside this Python is as here, and `tell` says so.

    Args:
        text: `GOOD..BAD`, each a prefix of a stack's id, key or manifest commit.
        stacks: by first measurement, as `known_stacks` gives them.
        device_class: of this machine; asked only where several were measured with both.

    Raises UsageError.
    """
    line = _with_what_differs(_between(text, stacks, device_class), tell)
    installable = [_installable(stack) for stack in line]
    common = set(installable[0]).intersection(*installable)
    names = sorted(name for name in common if len({one[name] for one in installable}) > 1)
    versions = [{name: one[name] for name in names} for one in installable]
    if versions[0] == versions[-1]:
        raise UsageError(
            f"--stacks {text}: no package is in both with different versions; what else differs "
            "(driver, Python, compiler) cannot be installed side by side"
        )
    _tell_what_is_as_here(line, names, tell)
    # Stacks that differ in what cannot be installed are one candidate: the first of them.
    places = [n for n, own in enumerate(versions) if n == 0 or own != versions[n - 1]]
    if len(places) == 2:
        return _by_package(_name(line[0]), versions[0], versions[-1])
    return [
        _stack_candidate(
            _name(line[place]),
            versions[place],
            _name(line[before]) if place else "",
            versions[before],
        )
        for before, place in zip([0, *places], places, strict=False)
    ]


def _with_what_differs(line: Sequence[Stack], tell: Callable[[str], None]) -> list[Stack]:
    """The ends, and what lies between and has every package that the ends have different ones of.

    One without such a package would take it, and with it perhaps the culprit, out of the search.
    """
    good, bad = (_installable(line[end]) for end in (0, -1))
    differ = {name for name in good.keys() & bad.keys() if good[name] != bad[name]}
    kept = [stack for stack in line[1:-1] if differ <= _installable(stack).keys()]
    for stack in line[1:-1]:
        if lacking := sorted(differ - _installable(stack).keys()):
            tell(f"{_name(stack)} is no candidate: it has no {', '.join(lacking)}")
    return [line[0], *kept, line[-1]]


def _by_package(name: str, good: Versions, bad: Versions) -> list[Candidate]:
    moved = [one for one in good if good[one] != bad[one]]
    line = []
    for count in range(len(moved) + 1):
        versions = {n: bad[n] if n in moved[:count] else v for n, v in good.items()}
        new = moved[count - 1] if count else ""
        label = f"{new} {good[new]} -> {bad[new]}" if new else f"stack {name}"
        line.append(Candidate(label, partial(make_stack_side, label, _pins(versions))))
    return line


def _stack_candidate(name: str, versions: Versions, before: str, old: Versions) -> Candidate:
    changed = changed_versions(old, versions) if before else ()
    what = change_text(changed)
    if len(what) > _MAX_CHANGES:
        what = what[: _MAX_CHANGES - 4] + " ..."
    label = f"{name} {what}".strip()
    finer = f"{before}..{name}" if len(changed) > 1 else ""
    return Candidate(label, partial(make_stack_side, label, _pins(versions)), finer)


def _between(
    text: str, stacks: Sequence[Stack], device_class: Callable[[], str]
) -> Sequence[Stack]:
    names = parse_range("--stacks", text)
    found = [_named(stacks, name) for name in names]
    good, bad = ({stack.device_class for stack in one} for one in found)
    devices = sorted(good & bad)
    if not devices:
        raise UsageError(
            f"--stacks {text}: measured on different devices, {', '.join(sorted(good))} and "
            f"{', '.join(sorted(bad))}; name two of one device, see `attnbench manifest log`"
        )
    if len(devices) > 1:
        here = device_class()
        if here not in devices:
            raise UsageError(
                f"--stacks {text}: measured on {', '.join(devices)}, and this is {here}; name "
                "commits of a manifest repository, which are of one device each"
            )
        devices = [here]
    line = [stack for stack in stacks if stack.device_class == devices[0]]
    goods, bads = ([n for n, stack in enumerate(line) if stack in one] for one in found)
    # A `stack_id` alone is of every driver it was measured under: those next to each other.
    first, last = min(product(goods, bads), key=lambda ends: abs(ends[0] - ends[1]))
    # A newer stack may be the good one: what is searched is a step, not a date.
    return line[first : last + 1] if first <= last else line[last : first + 1][::-1]


def _named(stacks: Sequence[Stack], name: str) -> list[Stack]:
    """Every device and driver of the one stack that `name` means."""
    found = [s for s in stacks if s.commit.startswith(name) or s.key.startswith(name)]
    exact = [s for s in found if name in (s.commit, s.key, s.stack_id)]
    found = exact or found
    if len({stack.stack_id for stack in found}) != 1:
        known = ", ".join(dict.fromkeys(_name(stack) for stack in reversed(stacks))) or "none"
        what = "names several stacks" if found else "is no measured stack"
        raise UsageError(f"--stacks: {name!r} {what}; known, newest first: {known}")
    return found


def _name(stack: Stack) -> str:
    """As `attnbench manifest log` and `history --by stack` call it."""
    return stack.commit[:10] or stack.key


def _installable(stack: Stack) -> Versions:
    """What may be handed to pip: stored names and versions may be anything."""
    pairs = (entry.partition("==") for entry in stack.packages if is_installable(entry))
    return {name: version for name, _, version in pairs}


def _pins(versions: Mapping[str, str]) -> list[str]:
    return [f"{name}=={version}" for name, version in versions.items()]


def _tell_what_is_as_here(
    line: Sequence[Stack], names: Sequence[str], tell: Callable[[str], None]
) -> None:
    every = [stack.versions for stack in line]
    differ = sorted(
        name
        for name in {name for versions in every for name in versions}.difference(names)
        if len({versions.get(name, "") for versions in every}) > 1
    )
    if differ:
        tell(f"the stacks differ in {', '.join(differ)} too; every candidate has what is here")
    others = []
    for name, version in _installable(line[0]).items():
        here = _version_here(name)
        if name not in names and name not in differ and here != version:
            others.append(f"{name} {here or 'is not here'} (they: {version})")
    if others:
        tell(f"every candidate has, unlike these stacks: {', '.join(others)}")


def _version_here(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
