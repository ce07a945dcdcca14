"""`explain --log` and `upgrade --settings` as a user types them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from attnbench.cli.main import main
from attnbench.upgrade.cells import Cell
from attnbench.upgrade.compare import Step, compare
from attnbench.upgrade.probe import CellAnswer, SettingAnswer, VersionAnswer
from attnbench.upgrade.user_settings import Setting

LOG = """\
INFO 11-20 10:11:12 [api_server.py:129] vLLM API server version 0.22.1
WARNING 11-20 10:11:12 [envs.py:2057] Unknown vLLM environment variable detected: \
VLLM_ATTENTION_BACKEND
INFO 11-20 10:11:13 [core.py:113] Initializing a V1 LLM engine (v0.22.1) with config: \
model='a/model', dtype=torch.bfloat16, tensor_parallel_size=1, kv_cache_dtype=auto, \
device_config=cuda, seed=0
INFO 11-20 10:11:14 [cuda.py:378] Using TRITON_ATTN attention backend out of potential backends: \
['TRITON_ATTN', 'FLEX_ATTENTION'].
"""


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No settings file, and no vLLM kept from other runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def _run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        main(list(words))
    out, err = capsys.readouterr()
    return int(left.value.code or 0), out, err


def test_a_log_is_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "server.log").write_text(LOG, encoding="utf-8")
    words = ("explain", "--log", "server.log", "--device", "9.0", "--model", "llama-3-8b")
    code, out, err = _run(capsys, *words)
    assert (code, err) == (0, "")
    assert "TRITON_ATTN (line 4, of TRITON_ATTN, FLEX_ATTENTION)" in out
    assert "VLLM_ATTENTION_BACKEND is set and unknown to this version" in out
    assert "differs" in out
    code, out, _ = _run(capsys, *words, "--format", "json")
    (cell,) = json.loads(out)["cells"]
    assert (cell["ours"], cell["vllm"], cell["agrees"]) == ("FLASH_ATTN", None, False)
    assert any("FLASH_ATTN is not among the server's potential" in one for one in cell["why"])


def test_what_the_log_does_not_tell_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "server.log").write_text(LOG, encoding="utf-8")
    code, out, err = _run(capsys, "explain", "--log", "server.log")
    assert code == 0
    assert "TRITON_ATTN (line 4" in out
    assert "say it with --device 9.0" in err
    assert "--model CONFIG.JSON" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--log", "nowhere.log"), "--log nowhere.log: No such file"),
        (("--log", "server.log", "--model", "nobody"), "unknown model 'nobody'"),
        (("--log", "server.log", "--device", "h900"), "unknown compute capability 'h900'"),
        (("--log", "server.log", "q1s1k"), "--log says what was asked for"),
        (("--model", "llama-3-8b", "q1s1k"), "are of --log"),
    ],
)
def test_bad_input_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    (tmp_path / "server.log").write_text(LOG, encoding="utf-8")
    code, _, err = _run(capsys, "explain", *words)
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1


def _answer(version: str, cell: Cell, settings: Sequence[Setting]) -> VersionAnswer:
    known = version == "0.22.1"
    return VersionAnswer(
        version=version,
        capability="9.0",
        how="executed",
        platform="",
        registered=("FLASH_ATTN",),
        requires={},
        facts={},
        duration_s=0.0,
        cells={
            cell.text: CellAnswer(
                cell=cell,
                backend="FLASH_ATTN",
                backend_class=None,
                behind={},
                candidates=(),
                refused="",
                depends_on=(),
                untrusted=(),
                not_evaluated=(),
                not_asked=(),
                model_override="",
            )
        },
        settings=tuple(SettingAnswer(one, known) for one in settings),
    )


@pytest.mark.parametrize("format", ["table", "markdown", "json"])
def test_settings_are_judged_beside_the_cells(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    asked: list[Cell] = []

    def assess(
        _sources: Any, _where: Any, cells: Sequence[Cell], _facts: Any, **named: Any
    ) -> list[Step]:
        asked.extend(cells)
        given = named["settings"]
        sides = [_answer(version, cells[0], given) for version in ("0.22.1", "0.33.0")]
        return [compare(*sides)]

    monkeypatch.setattr("attnbench.upgrade.assess.assess", assess)
    command = "VLLM_MLA_DISABLE=1 vllm serve m --kv-cache-dtype fp8 -dcp 2"
    sides = ("--from", "vllm==0.22.1", "--to", "vllm==0.33.0", "-c", "9.0")
    words = ("upgrade", *sides, "--model", "llama-3-8b", "--settings", command)
    code, out, _ = _run(capsys, *words, "--format", format)
    assert code == 0
    assert "VLLM_MLA_DISABLE=1" in out
    assert "dead" in out
    assert "no file of 0.33.0 knows it" in out
    assert {(one.kv_cache_dtype, one.dcp) for one in asked} == {("fp8", 2)}
    if format == "json":
        statuses = [(one["version"], one["status"]) for one in json.loads(out)["settings"]]
        assert ("0.22.1", "accepted") in statuses
        assert ("0.33.0", "dead") in statuses


def test_settings_that_cannot_be_read_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    sides = ("--from", "vllm==0.22.1", "--to", "vllm==0.33.0", "-c", "9.0")
    code, _, err = _run(capsys, "upgrade", *sides, "--settings", "gone.env")
    assert code == 2
    assert "--settings 'gone.env' is no file and no command line" in err
