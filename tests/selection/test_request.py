"""Flag, environment, settings: who wins, who is named, and the variable vLLM no longer reads."""

from __future__ import annotations

import pytest

from attnbench.errors import UnknownBackendError
from attnbench.selection import find_request, requested_backend
from attnbench.selection.request import ENVIRONMENT_VARIABLE, VLLM_ENVIRONMENT_VARIABLE

ENV = {ENVIRONMENT_VARIABLE: "TORCH_SDPA"}


@pytest.mark.parametrize(
    ("flag", "environ", "settings", "name", "origin"),
    [
        ("CPU_ATTN", ENV, "TORCH_MLA", "CPU_ATTN", "--backend"),
        (None, ENV, "TORCH_MLA", "TORCH_SDPA", "environment variable"),
        (None, {}, "TORCH_MLA", "TORCH_MLA", "attnbench.toml"),
        (None, {}, "", "", ""),
        (None, {}, None, "", ""),
        ("auto", ENV, "TORCH_MLA", "", "--backend"),
        ("", ENV, None, "TORCH_SDPA", "environment variable"),
        (" cpu_attn ", {}, None, "CPU_ATTN", "--backend"),
        ("torch_sdpa:math", {}, None, "TORCH_SDPA:math", "--backend"),
    ],
)
def test_precedence(
    flag: str | None, environ: dict[str, str], settings: str | None, name: str, origin: str
) -> None:
    request = find_request(flag, settings, environ)
    assert request.name == name
    assert origin in request.origin
    assert request.warnings == ()
    assert requested_backend(flag, settings, environ) == name


@pytest.mark.parametrize(
    ("flag", "environ", "settings", "origin"),
    [
        ("NOPE", {}, None, "--backend: "),
        (None, {ENVIRONMENT_VARIABLE: "NOPE"}, None, f"{ENVIRONMENT_VARIABLE}: "),
        (None, {}, "NOPE", "backend in attnbench.toml: "),
    ],
)
def test_an_unknown_name_says_where_it_was_written(
    flag: str | None, environ: dict[str, str], settings: str | None, origin: str
) -> None:
    with pytest.raises(UnknownBackendError, match="unknown backend 'NOPE'") as caught:
        find_request(flag, settings, environ)
    assert origin in str(caught.value)


def test_vllm_s_old_variable_is_warned_about_and_never_obeyed() -> None:
    environ = {VLLM_ENVIRONMENT_VARIABLE: "FLASHINFER"}
    request = find_request(None, None, environ)
    assert request.name == ""
    (warning,) = request.warnings
    for word in ("VLLM_ATTENTION_BACKEND=FLASHINFER", "no effect", "#26315", "#30564"):
        assert word in warning
    assert "--attention-backend FLASHINFER" in warning
    assert ENVIRONMENT_VARIABLE in warning
    assert find_request("CPU_ATTN", None, environ).warnings == request.warnings
    assert find_request(None, None, {VLLM_ENVIRONMENT_VARIABLE: ""}).warnings == ()
