"""`backends`, `explain`, `matrix` as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from attnbench.cli.main import main


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No settings file and no variable of the machine that runs the tests."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ATTNBENCH_ATTENTION_BACKEND", raising=False)
    monkeypatch.delenv("VLLM_ATTENTION_BACKEND", raising=False)


def _run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        main(list(words))
    out, err = capsys.readouterr()
    return int(left.value.code or 0), out, err


def test_backends_says_who_runs_here_and_who_cannot(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = _run(capsys, "backends", "--device", "cpu", "--format", "json")
    rows = {row["backend"]: row for row in json.loads(out)}
    assert code == 0
    assert rows["TORCH_SDPA"]["status"] == "available"
    assert rows["TRITON_ATTN"]["status"] == "interpreted"
    assert rows["TOKENSPEED_MLA"]["status"] == "selection only"
    assert "nothing to run" in rows["TOKENSPEED_MLA"]["why"]
    assert rows["FLASHINFER_MLA_SPARSE"]["kind"] == "sparse MLA"


def test_explain_names_the_chain_it_follows_and_every_reason(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ("explain", "sinks=1", "head_size=64", "heads=64/8", "--device", "sm80")
    code, out, _ = _run(capsys, *words)
    assert code == 0
    assert "vLLM 0.22.1 vllm/platforms/cuda.py:79-147" in out
    assert "sm80 (named), libraries assumed installed" in out
    assert "TRITON_ATTN (platform chain)" in out
    reasons = "attention sinks not supported; sink not supported on compute capability < 9.0"
    assert reasons in out
    code, out, _ = _run(capsys, *words, "--format", "json")
    answer = json.loads(out)
    assert answer["backend"] == answer["followed"] == "TRITON_ATTN"
    verdicts = {row["backend"]: row["verdict"] for row in answer["candidates"]}
    assert verdicts["FLASH_ATTN"] == verdicts["FLASHINFER"] == "refuses"
    assert verdicts["TRITON_ATTN"] == "taken"


def test_explain_leaves_the_block_size_to_the_backend_unless_asked(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ("explain", "--shape", "deepseek-v3", "--device", "sm100", "--format", "json")
    _, out, _ = _run(capsys, *words)
    assert json.loads(out)["backend"] == "FLASHINFER_MLA"
    _, out, _ = _run(capsys, *words, "--block-size", "16")
    answer = json.loads(out)
    assert answer["followed"] == "TRITON_MLA"
    assert "block size 16 alone rules out FLASHINFER_MLA" in answer["notes"][0]


def test_explain_of_a_refused_request_is_a_usage_error_with_all_reasons(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, out, err = _run(capsys, "explain", "--backend", "flashmla", "--device", "cpu")
    assert code == 2
    assert "An explicit request never falls back" in err
    for reason in ("head_size not supported", "non-MLA not supported", "device cpu not supported"):
        assert reason in err
        assert reason in out
    assert "CPU_ATTN" in out
    assert err.count("\n") == 1


def test_explain_reads_the_environment_and_names_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATTNBENCH_ATTENTION_BACKEND", "FLASHINFER")
    monkeypatch.setenv("VLLM_ATTENTION_BACKEND", "FLASHMLA")
    code, out, err = _run(capsys, "explain", "--device", "sm90", "--format", "json")
    answer = json.loads(out)
    assert code == 0
    assert answer["backend"] == "FLASHINFER"
    assert answer["source"] == "explicit request"
    assert "ATTNBENCH_ATTENTION_BACKEND" in answer["requested_by"]
    assert "VLLM_ATTENTION_BACKEND=FLASHMLA is set and has no effect" in err
    monkeypatch.setenv("ATTNBENCH_ATTENTION_BACKEND", "FLASHINFR")
    code, _, err = _run(capsys, "explain", "--device", "sm90")
    assert code == 2
    assert "variable ATTNBENCH_ATTENTION_BACKEND: unknown backend 'FLASHINFR'" in err
    assert "did you mean FLASHINFER?" in err


def test_settings_name_the_device_and_the_backend(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "attnbench.toml").write_text('device = "sm90"\nbackend = "FLASHINFER"\n')
    _, out, _ = _run(capsys, "explain", "--format", "json")
    answer = json.loads(out)
    assert (answer["device"], answer["backend"]) == ("sm90", "FLASHINFER")
    assert answer["requested_by"] == "backend in attnbench.toml"
    _, out, _ = _run(capsys, "explain", "--device", "cpu", "--backend", "auto", "--format", "json")
    answer = json.loads(out)
    assert (answer["device"], answer["backend"]) == ("cpu", "CPU_ATTN")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["explain", "--device", "h100"], "unknown device 'h100'"),
        (["explain", "--shape", "lama-3-8b"], "did you mean llama-3-8b"),
        (["explain", "--backend", "NOPE"], "--backend: unknown backend 'NOPE'"),
        (["explain", "--block-size", "-1"], "--block-size -1"),
        (["matrix", "--device", "sm90", "--feature", "sink"], "unknown feature 'sink'"),
        (["backends", "--device", "gpu9"], "unknown device 'gpu9'"),
    ],
)
def test_bad_words_are_one_line_and_exit_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = _run(capsys, *words)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("form", ["table", "markdown", "json", "csv"])
def test_matrix_in_every_format(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--device", "sm80", "--device", "gfx942", "--dtype", "bf16", "--feature", "sinks"]
    code, out, err = _run(capsys, "matrix", *words, "--format", form)
    assert code == 0
    assert "TRITON_ATTN" in out
    assert "ROCM_AITER_UNIFIED_ATTN" in out
    assert "FLASHINFER: attention sinks not supported" in out
    assert "sm80: chain of vLLM 0.22.1 vllm/platforms/cuda.py:79-147" in err
    assert "gfx942: chain of vLLM 0.22.1 vllm/platforms/rocm.py:362-393" in err


@pytest.mark.parametrize("verb", ["backends", "explain", "matrix"])
def test_every_option_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = _run(capsys, verb, "--help")
    assert code == 0
    assert "--device" in out
    assert "--format" in out
