"""`Platform`: a kind of device and the order in which its backends are tried.

A vendor adds one by the entry point group `attnbench.platforms` (`NAME = "package.module:Class"`)
and changes nothing here; `attnbench/plugins/xpu.py` is a complete example.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import lru_cache
from importlib.metadata import entry_points
from typing import ClassVar

from attnbench.backends.abstract import AttentionConfig
from attnbench.backends.declared.families import families
from attnbench.backends.device import Device
from attnbench.errors import DeviceError, UsageError

ENTRY_POINT_GROUP = "attnbench.platforms"


class Platform(ABC):
    """One kind of device. Stateless: a single instance serves the process."""

    kind: ClassVar[str]
    #: Which program's rule the chain follows, and where it is written.
    follows: ClassVar[str]
    #: Device texts for messages and for the default matrix.
    examples: ClassVar[tuple[str, ...]]

    @abstractmethod
    def present_device(self) -> Device | None:
        """The device of this kind in this machine, None if there is none."""

    @abstractmethod
    def parse_device(self, text: str) -> Device | None:
        """The device `text` names, None if it is not of this kind.

        Raises: DeviceError for a text that is of this kind but names no device.
        """

    @abstractmethod
    def get_backend_priorities(self, config: AttentionConfig, device: Device) -> tuple[str, ...]:
        """Backend names in the order they are tried; a pure function of its arguments."""

    def get_followed_choice(self, config: AttentionConfig, device: Device) -> str:
        """What the followed program itself takes, all of its libraries installed; "": nothing.

        The default asks that program's own backends along the chain.
        """
        theirs = families()
        for name in self.get_backend_priorities(config, device):
            if name in theirs and not theirs[name].validate_configuration(config, device):
                return name
        return ""

    def get_notes(self, config: AttentionConfig, device: Device) -> tuple[str, ...]:
        """What a reader must know about this answer beyond the reasons."""
        return ()

    def is_present(self, device: Device) -> bool:
        """Whether `device` is the one in this machine: only then do missing libraries count."""
        return self.present_device() == device


@lru_cache(maxsize=1)
def _found() -> tuple[dict[str, Platform], tuple[str, ...]]:
    """Platforms by kind, and what went wrong with those that could not be loaded."""
    from attnbench.selection.builtin_platforms import CpuPlatform, CudaPlatform, RocmPlatform

    platforms: dict[str, Platform] = {}
    owners: dict[str, str] = {}
    problems: list[str] = []

    def add(platform: Platform, owner: str) -> None:
        if platform.kind in platforms:
            raise UsageError(
                f"platform {platform.kind} is registered twice: by {owners[platform.kind]} and by "
                f"{owner}; uninstall one of them"
            )
        platforms[platform.kind] = platform
        owners[platform.kind] = owner

    add(CudaPlatform(), "attnbench")
    add(RocmPlatform(), "attnbench")
    for point in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda p: p.name):
        package = point.dist.name if point.dist is not None else point.value
        try:
            found = point.load()()
        except Exception as error:  # a third party's code: it must not take the selector down
            problems.append(
                f"platform {point.name} of package {package} cannot be loaded "
                f"({type(error).__name__}: {error}); update or uninstall {package}"
            )
            continue
        if not isinstance(found, Platform):
            problems.append(
                f"platform {point.name} of package {package} is no Platform; derive "
                f"{point.value} from attnbench.selection.Platform"
            )
            continue
        add(found, f"package {package}")
    # Last, so that an accelerator is preferred where one is present.
    add(CpuPlatform(), "attnbench")
    return platforms, tuple(problems)


def platforms() -> tuple[Platform, ...]:
    """Every platform, built in or from an installed package, in order of preference.

    Raises: UsageError when two of them claim one kind.
    """
    return tuple(_found()[0].values())


def platform_problems() -> tuple[str, ...]:
    """One line for each installed platform that could not be loaded."""
    return _found()[1]


_CHOSEN: dict[str, Platform] = {}


def use_chosen(platform: Platform | None) -> None:
    """Let `platform` stand for the one of its kind from here on; None: none does any more."""
    _CHOSEN.clear()
    if platform is not None:
        _CHOSEN[platform.kind] = platform


def reload_platforms() -> None:
    """Read the installed packages' entry points again."""
    _found.cache_clear()
    current_device.cache_clear()


def platform_of(device: Device) -> Platform:
    """The platform of `device`.

    Raises: DeviceError when no platform of that kind is installed.
    """
    found = _CHOSEN.get(device.kind) or _found()[0].get(device.kind)
    if found is None:
        raise DeviceError(
            f"no platform for devices of kind {device.kind!r}; install the package that brings it "
            f"(entry point {ENTRY_POINT_GROUP}), or take one of: {', '.join(_found()[0])}"
        )
    return found


@lru_cache(maxsize=1)
def current_device() -> Device:
    """The device of this machine: an accelerator if there is one, else the CPU."""
    for platform in platforms():
        if device := platform.present_device():
            return device
    raise DeviceError("no device here; name one, e.g. --device sm90")


def resolve_device(text: str) -> Device:
    """The device `text` names (`sm90`, `9.0`, `gfx942`, `cpu`, ...); `""` and `auto`: this one.

    Raises: DeviceError naming the texts that would do.
    """
    word = text.strip().lower()
    if word in ("", "auto"):
        return current_device()
    for platform in platforms():
        if device := platform.parse_device(word):
            return device
    examples = ", ".join(text for platform in platforms() for text in platform.examples)
    raise DeviceError(f"unknown device {text!r}; write auto, or for example: {examples}")
