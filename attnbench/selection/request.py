"""Who asked for a backend by name: flag, environment or settings file, in that order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from attnbench.backends.registry import backend_entry, split_request
from attnbench.errors import UnknownBackendError

ENVIRONMENT_VARIABLE = "ATTNBENCH_ATTENTION_BACKEND"
VLLM_ENVIRONMENT_VARIABLE = "VLLM_ATTENTION_BACKEND"


@dataclass(frozen=True, slots=True)
class BackendRequest:
    """A name, "" when nobody asked; where it was written; what to tell the user besides."""

    name: str
    origin: str
    warnings: tuple[str, ...] = ()


def find_request(
    flag: str | None, settings_value: str | None, environ: Mapping[str, str]
) -> BackendRequest:
    """The backend asked for by `--backend`, else by the environment, else by attnbench.toml.

    Names are upper-cased; `NAME:variant` is taken as it is. `auto` asks for nothing and ends the
    search; an empty value is not written at all.

    Raises: UnknownBackendError naming where the unknown name was written.
    """
    written = (
        (flag, "--backend"),
        (environ.get(ENVIRONMENT_VARIABLE), f"the environment variable {ENVIRONMENT_VARIABLE}"),
        (settings_value, "backend in attnbench.toml"),
    )
    warnings = ignored_variable_warnings(environ)
    for value, origin in written:
        if value is None or not value.strip():
            continue
        name, variant = split_request(value)
        name = name.upper()
        if name == "AUTO":
            return BackendRequest("", origin, warnings)
        try:
            backend_entry(name)
        except UnknownBackendError as error:
            raise UnknownBackendError(f"{origin}: {error}") from None
        return BackendRequest(f"{name}:{variant}" if variant else name, origin, warnings)
    return BackendRequest("", "", warnings)


def requested_backend(
    flag: str | None, settings_value: str | None, environ: Mapping[str, str]
) -> str:
    """The name alone of `find_request`; "" when nobody asked."""
    return find_request(flag, settings_value, environ).name


def ignored_variable_warnings(environ: Mapping[str, str]) -> tuple[str, ...]:
    """A line when the environment sets vLLM's old variable, which nothing reads any more."""
    ignored = environ.get(VLLM_ENVIRONMENT_VARIABLE)
    if not ignored:
        return ()
    text = (
        f"{VLLM_ENVIRONMENT_VARIABLE}={ignored} is set and has no effect: recent vLLM ignores it "
        f"(vLLM PRs #26315 and #30564), and so does attnbench; set {ENVIRONMENT_VARIABLE} or pass "
        f"--backend here, and pass --attention-backend {ignored} to vLLM"
    )
    return (text,)
