"""WHICH backend: explicit request -> platform chain -> capability checks -> fallback."""

from __future__ import annotations

from attnbench.selection.config import config_of
from attnbench.selection.platform import (
    Platform,
    current_device,
    platform_of,
    platform_problems,
    platforms,
    resolve_device,
)
from attnbench.selection.request import (
    BackendRequest,
    find_request,
    ignored_variable_warnings,
    requested_backend,
)
from attnbench.selection.selector import (
    Candidate,
    Selection,
    Source,
    candidates,
    consider,
    describe_config,
    select,
)

__all__ = [
    "BackendRequest",
    "Candidate",
    "Platform",
    "Selection",
    "Source",
    "candidates",
    "config_of",
    "consider",
    "current_device",
    "describe_config",
    "find_request",
    "ignored_variable_warnings",
    "platform_of",
    "platform_problems",
    "platforms",
    "requested_backend",
    "resolve_device",
    "select",
]
