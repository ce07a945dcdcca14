"""A saved choice (`attnbench choose --save`) as the chain of its platform.

It holds for one device class, one driver and one set of package versions, and until a date; for
anything else it is refused, never bent. docs/choose.md has the file's schema.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from attnbench.backends.abstract import AttentionConfig
from attnbench.backends.device import Device
from attnbench.backends.registry import backend_entry, split_request
from attnbench.errors import DataError, SchemaError, UnknownBackendError
from attnbench.selection.platform import Platform, platform_of, use_chosen

SCHEMA = "attnbench-choices"
VERSION = 1
FREE = ("block_size", "kv_cache_layout")
"""Fields of a layer that a choice may set where nobody asks for them."""

_AGAIN = "choose again: attnbench choose --save"


@dataclass(frozen=True, slots=True)
class Here:
    """The machine a table is loaded on. `versions` are `name==version`."""

    device_class: str
    driver_version: str
    versions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SavedLayer:
    """A kind of layer and its backends, `NAME:variant`, the best first."""

    layer: Mapping[str, Any]
    block_size: int
    kv_cache_layout: str
    priorities: tuple[str, ...]

    def fits(self, config: AttentionConfig) -> bool:
        """Whether it is this layer, and asks for no other block size or layout."""
        return (
            layer_fields(config) == dict(self.layer)
            and config.block_size in (None, self.block_size)
            and config.kv_cache_layout in (None, self.kv_cache_layout)
        )


@dataclass(frozen=True, slots=True)
class SavedChoices:
    """A table that was loaded and holds here."""

    path: str
    device_kind: str
    compute_capability: str
    layers: tuple[SavedLayer, ...]


def layer_fields(config: AttentionConfig) -> dict[str, Any]:
    """What identifies a layer in a table, as JSON has it."""
    values = {k: v for k, v in config._asdict().items() if k not in FREE}
    return {k: v if isinstance(v, (bool, int)) or v is None else str(v) for k, v in values.items()}


class ChosenPlatform(Platform):
    """A platform whose chain starts with what was chosen for a layer."""

    def __init__(self, inner: Platform, saved: SavedChoices) -> None:
        self._inner = inner
        self._saved = saved
        self.kind = inner.kind  # type: ignore[misc]  # one instance, one platform
        self.follows = f"{saved.path}, then {inner.follows}"  # type: ignore[misc]
        self.examples = inner.examples  # type: ignore[misc]

    def present_device(self) -> Device | None:
        return self._inner.present_device()

    def parse_device(self, text: str) -> Device | None:
        return self._inner.parse_device(text)

    def is_present(self, device: Device) -> bool:
        return self._inner.is_present(device)

    def get_backend_priorities(self, config: AttentionConfig, device: Device) -> tuple[str, ...]:
        chain = self._inner.get_backend_priorities(config, device)
        if str(device.capability or "") != self._saved.compute_capability:
            return chain
        found = next((one for one in self._saved.layers if one.fits(config)), None)
        if found is None:
            return chain
        first = [split_request(one)[0] for one in found.priorities]
        return (*found.priorities, *(name for name in chain if name not in first))

    def get_followed_choice(self, config: AttentionConfig, device: Device) -> str:
        return self._inner.get_followed_choice(config, device)

    def get_notes(self, config: AttentionConfig, device: Device) -> tuple[str, ...]:
        return self._inner.get_notes(config, device)


def load_choices(path: Path, here: Here, now: datetime | None = None) -> SavedChoices:
    """Read a table and check that it holds here and now.

    Raises:
        DataError: it cannot be read, is of another device class, driver or package version, or has
            expired.
        SchemaError: it is no table of choices, or of a newer version.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); {_AGAIN} FILE") from error
    except (ValueError, RecursionError) as error:
        raise SchemaError(f"{path}: not valid JSON ({error}); {_AGAIN} {path}") from error
    if not isinstance(table, dict) or table.get("schema") != SCHEMA:
        raise SchemaError(f"{path}: no table of choices; {_AGAIN} FILE")
    if table.get("version") != VERSION:
        raise SchemaError(
            f"{path}: version {_shown(table.get('version'))}, and this attnbench reads {VERSION}; "
            f"update attnbench, or {_AGAIN} {path}"
        )
    try:
        scope = table["scope"]
        layers = tuple(
            SavedLayer(
                dict(one["layer"]),
                int(one["block_size"]),
                str(one["kv_cache_layout"]),
                tuple(str(name) for name in one["priorities"]),
            )
            for one in table["layers"]
        )
        _check_scope(path, scope, here, now or datetime.now(UTC))
        for name in (name for one in layers for name in one.priorities):
            backend_entry(split_request(name)[0])
        return SavedChoices(
            str(path), str(scope["device_kind"]), str(scope["compute_capability"]), layers
        )
    except UnknownBackendError as error:
        raise SchemaError(f"{path}: {error}") from error
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise SchemaError(
            f"{path}: incomplete or of wrong kinds ({type(error).__name__}: {error}); "
            f"{_AGAIN} {path}"
        ) from error


def use_choices(saved: SavedChoices | None) -> None:
    """Put a table before its platform's chain, for every selection from here on; None: take it off.

    Raises DeviceError for a kind of device that nobody brings.
    """
    use_chosen(None)
    if saved is not None:
        capability = saved.compute_capability
        device = Device(saved.device_kind, f"sm{capability.replace('.', '')}" if capability else "")
        use_chosen(ChosenPlatform(platform_of(device), saved))


def _check_scope(path: Path, scope: Mapping[str, Any], here: Here, now: datetime) -> None:
    wrong = []
    if scope["device_class"] != here.device_class:
        named = _shown(scope["device_class"])
        wrong.append(f"it is for device class {named}, not {here.device_class}")
    if scope["driver_version"] != here.driver_version:
        told = here.driver_version or "none"
        wrong.append(f"it is for driver {_shown(scope['driver_version'] or 'none')}, not {told}")
    installed = dict(one.split("==", 1) for one in here.versions)
    if not isinstance(scope["versions"], list):
        raise TypeError("scope.versions is no list")
    for one in scope["versions"]:
        name, _, version = str(one).partition("==")
        if installed.get(name) != version:
            wrong.append(f"it is for {_shown(one)}, and here is {installed.get(name, 'none')}")
    expires = datetime.fromisoformat(scope["expires_at"])
    if now >= expires:
        wrong.append(f"it expired on {expires:%Y-%m-%d}")
    if wrong:
        raise DataError(f"{path} does not hold here: {'; '.join(wrong)}; {_AGAIN} {path}")


def _shown(value: object) -> str:
    """As it may stand in a message: a table is somebody's file, and a terminal takes commands."""
    text = str(value)
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:80]) + "…" * (
        len(text) > 80
    )
