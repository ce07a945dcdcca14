"""A server's settings: read from what people keep, judged by each version's own code."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from attnbench.errors import UsageError
from attnbench.upgrade import overrides
from attnbench.upgrade.cells import Cell
from attnbench.upgrade.compare import ChangeKind, compare
from attnbench.upgrade.overrides import Status, Verdict, lint, plain, proposals
from attnbench.upgrade.probe import Candidate, CellAnswer, VersionAnswer, probe
from attnbench.upgrade.probe_env import PreparedVersion
from attnbench.upgrade.user_settings import Setting, SettingKind, read_settings, served_with
from tests.upgrade import fake_vllm

PLAIN = Cell()
BIG = Cell(head_size=256)
SCRIPT = """#!/bin/bash
# don't mind the apostrophe
export VLLM_ATTENTION_BACKEND=BETA   # nor it's here
VLLM_FLASH_ATTN_VERSION=3
VLLM_USE_CUDNN_PREFILL=1
VLLM_MLA_BY_THE_WAY=1
VLLM_KV_CACHE_LAYOUT=XYZ
WANTED=ALPHA
echo --block-size 999; docker ps
vllm serve a/model --port 80 \\
  --attention_backend "$WANTED" --disable-cascade-attn --kv-cache-dtype nope \\
  --no-such-attention-flag 3 | tee log
"""


def texts(settings: tuple[Setting, ...]) -> list[str]:
    return [one.text for one in settings]


def ask(folder: Path, shape: fake_vllm.Shape, text: str, capability: str = "9.0") -> VersionAnswer:
    fake_vllm.write(folder, shape)
    extra = fake_vllm.write_package(folder / "extra", "flashy")
    version = PreparedVersion(
        python=Path(sys.executable),
        paths=(folder, extra),
        label=f"fake {shape}",
        vllm_version=fake_vllm.VERSIONS[shape],
        requires=(),
        how="a test's",
    )
    settings = read_settings(text)
    cells = [PLAIN, BIG]
    return probe(version, capability, cells, settings=settings, proposed=proposals(settings))


def judged(answer: VersionAnswer, text: str) -> dict[str, Verdict]:
    return {one.setting: one for one in lint(read_settings(text), [answer])}


def test_a_script_gives_its_variables_and_the_flags_of_its_server_only(tmp_path: Path) -> None:
    path = tmp_path / "serve.sh"
    path.write_text(SCRIPT, encoding="utf-8")
    settings = read_settings(str(path))
    assert texts(settings) == [
        "VLLM_ATTENTION_BACKEND=BETA",
        "VLLM_FLASH_ATTN_VERSION=3",
        "VLLM_USE_CUDNN_PREFILL=1",
        "VLLM_MLA_BY_THE_WAY=1",
        "VLLM_KV_CACHE_LAYOUT=XYZ",
        "--attention-backend ALPHA",
        "--disable-cascade-attn",
        "--kv-cache-dtype nope",
        "--no-such-attention-flag 3",
    ]
    assert settings[5].where == f"{path}:10"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("vllm serve m -ac.flash_attn_version=2 -tp 4", ["flash_attn_version=2", "4"]),
        ("""-ac '{"backend": "X", "use_trtllm_attention": true}'""", ["backend=X", "=true"]),
        ("VLLM_ATTENTION_BACKEND=$NOBODY vllm serve m", ["VLLM_ATTENTION_BACKEND=?"]),
        ("VLLM_ATTENTION_BACKEND=${X:-Y} vllm serve m", ["VLLM_ATTENTION_BACKEND=Y"]),
        ("docker run -e VLLM_MLA_DISABLE=1 -p 1:1 vllm/vllm-openai --block-size 16", ["=1", "16"]),
        ("vllm serve m && other --block-size 16", []),
        ("VLLM_USE_FLASHINFER_MOE_FP8=1 VLLM_PORT=1 vllm serve m --port 1", []),
    ],
)
def test_a_command_line_is_read_as_a_shell_would(text: str, expected: list[str]) -> None:
    found = texts(read_settings(text))
    assert len(found) == len(expected)
    assert all(one.endswith(end) for one, end in zip(found, expected, strict=True))


def test_yaml_is_read_as_vllm_does(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        "model: a/model\nport: 80\nattention_config:\n  backend: BETA\n  flash_attn_version: 2\n"
        "block-size: 32\ndisable-cascade-attn: false\ntensor-parallel-size: 2\n",
        encoding="utf-8",
    )
    expected = [
        "--attention-config.backend=BETA",
        "--attention-config.flash_attn_version=2",
        "--block-size 32",
        "--tensor-parallel-size 2",
    ]
    assert texts(read_settings(str(path))) == expected
    assert texts(read_settings(f"vllm serve --config {path}")) == expected
    served = served_with(read_settings(str(path)))
    assert (served.tp, served.block_size, served.kv_cache_dtype) == (2, 32, "auto")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\0\1\2", "binary"),
        (b"\xff\xfeA=1", "not UTF-8"),
        (b"VLLM_MLA_DISABLE='1", r"line 1: No closing quotation.*close the quotes"),
        (b"a: [\nb: {", "not readable YAML"),
        (b"---\n- a\n", "holds no `name: value`"),
        (b"vllm serve m -ac nonsense", "takes a JSON object"),
        (b"vllm serve --config gone.yaml", "gone.yaml does not exist"),
        (b"#" * (1 << 20) + b"##", "larger than 1 MiB"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "settings"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        read_settings(str(path))


@pytest.mark.parametrize("text", ["", "nowhere.sh", "9.0"])
def test_a_text_that_is_nothing_says_what_would_do(text: str) -> None:
    with pytest.raises(UsageError, match="quote the command"):
        read_settings(text)


def test_a_size_must_be_one() -> None:
    with pytest.raises(UsageError, match="--block-size large is no size"):
        served_with(read_settings("vllm serve m --block-size large"))


def test_each_setting_is_judged_by_the_versions_own_code(tmp_path: Path) -> None:
    path = tmp_path / "serve.sh"
    path.write_text(SCRIPT, encoding="utf-8")
    old = judged(ask(tmp_path / "old", "old", str(path)), str(path))
    status = {text: one.status for text, one in old.items()}
    assert status == {
        "VLLM_ATTENTION_BACKEND=BETA": Status.DEAD,
        "VLLM_FLASH_ATTN_VERSION=3": Status.DEAD,
        "VLLM_USE_CUDNN_PREFILL=1": Status.DEAD,
        "VLLM_MLA_BY_THE_WAY=1": Status.UNKNOWN,
        "VLLM_KV_CACHE_LAYOUT=XYZ": Status.REJECTED,
        "--attention-backend ALPHA": Status.ACCEPTED,
        "--disable-cascade-attn": Status.ACCEPTED,
        "--kv-cache-dtype nope": Status.REJECTED,
        "--no-such-attention-flag 3": Status.REJECTED,
    }
    assert old["VLLM_ATTENTION_BACKEND=BETA"].instead == "--attention-backend BETA"
    instead = "--attention-config.flash_attn_version=3"
    assert old["VLLM_FLASH_ATTN_VERSION=3"].instead == instead
    assert old["VLLM_USE_CUDNN_PREFILL=1"].instead == ""
    assert "nothing takes its place" in old["VLLM_USE_CUDNN_PREFILL=1"].why
    assert "elsewhere.py" in old["VLLM_MLA_BY_THE_WAY=1"].why
    assert "Invalid value 'XYZ'" in old["VLLM_KV_CACHE_LAYOUT=XYZ"].why
    assert old["--kv-cache-dtype nope"].why == "'nope' is none of auto, fp8"
    # ALPHA takes head sizes 64 and 128 only.
    assert old["--attention-backend ALPHA"].why == (
        "refused for 1 of 2 cells: head_size not supported"
    )


def test_a_forced_backend_that_one_side_refuses_is_a_lost_cell(tmp_path: Path) -> None:
    text = "vllm serve m -ac.use_fp4_indexer_cache=true --disable-cascade-attn"
    old, new = ask(tmp_path / "old", "old", text), ask(tmp_path / "new", "new", text)
    assert judged(old, text)["--attention-config.use_fp4_indexer_cache=true"].status == "accepted"
    renamed = judged(new, text)["--attention-config.use_fp4_indexer_cache=true"]
    assert renamed.status is Status.RENAMED
    assert renamed.instead == "--attention-config.indexer_kv_dtype=mxfp4"
    ended = judged(new, text)["--disable-cascade-attn"]
    assert (ended.status, ended.why) == (Status.DEAD, "deprecated and has no effect")
    step = compare(old, new)
    assert [one.kind for one in step.changes] == [ChangeKind.LOST, ChangeKind.LOST]
    (why,) = {one.reasons[0] for one in step.changes}
    assert why.startswith("0.30.9 refuses the cell: ")
    assert "use_fp4_indexer_cache" in why


def test_a_backend_of_another_device_is_accepted_and_cannot_work(tmp_path: Path) -> None:
    text = "vllm serve m --attention-backend rocm_attn"
    verdict = judged(ask(tmp_path, "old", text), text)["--attention-backend rocm_attn"]
    assert verdict.status is Status.CANNOT_WORK
    assert "an AMD GPU" in verdict.why


def test_on_a_cpu_a_backend_is_ignored(tmp_path: Path) -> None:
    text = "vllm serve m --attention-backend ALPHA"
    verdict = judged(ask(tmp_path, "new", text, "cpu"), text)["--attention-backend ALPHA"]
    assert verdict.status is Status.DEAD
    assert verdict.why == "not taken for all 2 cells: GAMMA runs instead"


def test_a_forced_backend_that_is_refused_keeps_its_reason(tmp_path: Path) -> None:
    text = "vllm serve m --attention-backend BETA"
    old = ask(tmp_path / "a", "old", text, "7.5")
    new = ask(tmp_path / "b", "new", text, "7.5")
    assert {one.backend for one in old.cells.values()} == {"BETA"}
    lost = compare(old, new).changes[0]
    assert lost.kind is ChangeKind.LOST
    assert "compute capability not supported" in lost.reasons[0]
    verdict = judged(new, text)["--attention-backend BETA"]
    assert verdict.status is Status.REJECTED
    assert verdict.why == "refused for all 2 cells: compute capability not supported"


def test_the_servers_variables_hold_and_the_shells_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", "of this shell")
    asked = {
        text: ask(tmp_path / text, "old", text).cells[PLAIN.text].behind["kv_cache_layout"]
        for text in ("VLLM_KV_CACHE_LAYOUT=NHD", "VLLM_BATCH_INVARIANT=1")
    }
    assert list(asked.values()) == ["NHD", "HND"]


def test_a_forced_backend_on_no_list_is_not_said_to_be_tried() -> None:
    def side(version: str, backend: str | None, refused: str) -> VersionAnswer:
        candidates = (Candidate("GAMMA", 0, (), False, ()),)
        answer = CellAnswer(
            cell=PLAIN,
            backend=backend,
            backend_class=None,
            behind={},
            candidates=candidates,
            refused=refused,
            depends_on=(),
            untrusted=(),
            not_evaluated=(),
            not_asked=(),
            model_override="",
            forced="ROCM_ATTN",
        )
        cells = {PLAIN.text: answer}
        registered = ("GAMMA", "ROCM_ATTN")
        return VersionAnswer(version, "9.0", "executed", "", registered, {}, {}, 0.0, cells)

    before, after = side("1.0", "ROCM_ATTN", ""), side("2.0", None, "Reason: ['not here']")
    (lost,) = compare(before, after).changes
    assert lost.reasons == ("ROCM_ATTN was asked for, and is refused since 2.0: not here",)
    (gained,) = compare(after, before).changes
    assert gained.reasons == ("ROCM_ATTN was asked for, and 2.0 refused it: not here",)


@pytest.mark.parametrize(
    ("variable", "spelling"),
    [
        ("VLLM_ATTENTION_BACKEND=FLASH_ATTN_VLLM_V1", "--attention-backend FLASH_ATTN"),
        ("VLLM_USE_TRTLLM_ATTENTION=0", "--attention-config.use_trtllm_attention=false"),
        (
            "VLLM_FLASHINFER_DISABLE_Q_QUANTIZATION=1",
            "--attention-config.disable_flashinfer_q_quantization=true",
        ),
        (
            "VLLM_DISABLE_FLASHINFER_PREFILL=0",
            "--attention-config.mla_prefill_backend=FLASHINFER",
        ),
        (
            "VLLM_USE_TRTLLM_RAGGED_DEEPSEEK_PREFILL=1",
            "--attention-config.mla_prefill_backend=TRTLLM_RAGGED",
        ),
    ],
)
def test_the_newest_spelling_is_proposed_last(variable: str, spelling: str) -> None:
    assert proposals(read_settings(variable))[-1].text == spelling


def test_a_value_that_cannot_be_read_proposes_nothing() -> None:
    assert proposals(read_settings("VLLM_FLASH_ATTN_VERSION=three")) == ()
    assert proposals(read_settings("VLLM_FLASH_ATTN_VERSION=$N")) == ()


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (
            "Selected backend X is not valid for this configuration. Reason: ['a', 'b c']",
            "a, b c",
        ),
        (
            "1 error\nbackend\n  Value error, Unknown backend 'X' [type=value_error]\n  For",
            "Unknown backend 'X'",
        ),
        (
            "1 error\nflash_attn_version\n  Input should be 2, 3 or 4 [type=literal_error]",
            "Input should be 2, 3 or 4",
        ),
        ("x" * 400, "x" * 299 + "…"),
    ],
)
def test_a_refusal_is_told_without_its_wrapping(raw: str, said: str) -> None:
    assert plain(raw) == said


def test_devices_with_one_verdict_stand_together() -> None:
    one = Verdict("A=1", "f:1", "0.30.0", "9.0", Status.DEAD, "why", "new")
    other = Verdict("A=1", "f:1", "0.30.0", "10.0", Status.DEAD, "why", "new")
    assert [row["device"] for row in overrides.rows([one, other])] == ["9.0, 10.0"]
    assert "| A=1 | 0.30.0 | 9.0, 10.0 | dead | why | new |" in list(
        overrides.markdown([one, other])
    )
    assert list(overrides.markdown([])) == []


def test_settings_with_objects_are_kept_apart() -> None:
    text = """vllm serve m -ac '{"backend_per_kind": {"mla_attention": "X"}}'"""
    (setting,) = read_settings(text)
    assert setting.kind is SettingKind.FLAG
    assert setting.value == {"mla_attention": "X"}
    assert len({setting, setting}) == 1
