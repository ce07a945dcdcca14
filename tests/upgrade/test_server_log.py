"""Server logs, in the texts that vLLM 0.22.1, 0.30.0 and 0.33.0 format their lines with."""

from __future__ import annotations

import gzip
import io
import json
import time
from pathlib import Path

import pytest

from attnbench.errors import AttnBenchError, CorruptDataError, DataError, UsageError
from attnbench.upgrade import log_verdict
from attnbench.upgrade.cells import Cell
from attnbench.upgrade.log_verdict import capability_of, causes, cells_of_log, judge
from attnbench.upgrade.probe import CellAnswer, VersionAnswer
from attnbench.upgrade.server_log import ServerLog, read_server_log

ENGINE = (
    "Initializing a V1 LLM engine (v{version}) with config: model='meta/llama', "
    "speculative_config=None, tokenizer='meta/llama', dtype=torch.bfloat16, max_seq_len=8192, "
    "tensor_parallel_size=2, pipeline_parallel_size=1, decode_context_parallel_size=1, "
    "kv_cache_dtype=fp8, device_config={device}, compilation_config={{'mode': 3}}"
)
CHOSEN = (
    "Using FLASH_ATTN attention backend out of potential backends: "
    "['FLASH_ATTN', 'FLASHINFER', 'TRITON_ATTN']."
)
ASKED = (
    "Some attention backends are not valid for cuda with AttentionSelectorConfig(head_size=64, "
    "dtype=torch.bfloat16, kv_cache_dtype=auto, block_size=None, use_mla=False, has_sink=True, "
    "use_sparse=False, attn_type=AttentionType.DECODER, use_batch_invariant=False). Reasons: "
    "{FLASHINFER: [attention sinks not supported, partial], FLEX_ATTENTION: [ImportError: x]}."
)


def old(*messages: str, level: str = "INFO") -> list[str]:
    """Lines as 0.22.1 and 0.30.0 prefix them."""
    return [f"(EngineCore pid=90) {level} 11-20 10:11:12 [cuda.py:378] {one}" for one in messages]


def banner(version: str) -> list[str]:
    """The start of 0.22.1 and later on a terminal, in colours."""
    bold, orange, reset = "\x1b[1m", "\x1b[93m", "\x1b[0m"
    return old(
        f"  {orange}▄▄{reset} █     █ ▀▄▀ █  version {bold}{version}{reset}",
        f"  {orange}█{reset} {bold}█     █     █     █{reset}  model   {bold}meta/llama{reset}",
    )


def start(version: str = "0.22.1", device: str = "cuda") -> list[str]:
    return [*banner(version), *old(ENGINE.format(version=version, device=device))]


def read(tmp_path: Path, *lines: str) -> ServerLog:
    path = tmp_path / "server.log"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return read_server_log(str(path))


def test_a_start_is_read(tmp_path: Path) -> None:
    log = read(
        tmp_path,
        *banner("0.22.1"),
        *old("non-default args: {'model_tag': 'meta/llama', 'block_size': 16, 'port': 80}"),
        *old("Unknown vLLM environment variable detected: VLLM_ATTENTION_BACKEND", level="WARNING"),
        *old(ENGINE.format(version="0.22.1", device="cuda"), "Using NCCL backend."),
        *old("Using default MoE config, E=1,N=2,device_name=NVIDIA_H100_80GB_HBM3.json"),
        *old(CHOSEN, "Using FlashAttention version 3"),
        *old("Using 'TRITON' Fp8 MoE backend out of potential backends: ['MARLIN']."),
        *old("Using HND KV cache layout for FLASHINFER backend."),
        *old("Using backend AttentionBackendEnum.TORCH_SDPA for vit attention"),
    )
    assert (log.version, log.model, log.dtype) == ("0.22.1", "meta/llama", "bfloat16")
    assert (log.kv_cache_dtype, log.tensor_parallel_size, log.block_size) == ("fp8", 2, 16)
    assert [one.backend for one in log.taken] == ["FLASH_ATTN"]
    assert log.taken[0].potential == ("FLASH_ATTN", "FLASHINFER", "TRITON_ATTN")
    assert not log.taken[0].explicit
    assert log.behind == {
        "FlashAttention": ["3"],
        "layout": ["HND"],
        "vision encoder": ["TORCH_SDPA"],
    }
    assert log.unknown_variables == ["VLLM_ATTENTION_BACKEND"]
    assert capability_of(log) == "9.0"
    assert "write --attention-backend" in next(causes(log))


def test_a_start_of_0_33_is_read_plain_and_as_json(tmp_path: Path) -> None:
    messages = [
        "vLLM server version 0.33.0, serving model meta/llama",
        "non-default args: {'attention_backend': 'FLASHINFER', 'model_tag': 'meta/llama'}",
        ENGINE.format(version="0.33.0", device="cuda"),
        "Using AttentionBackendEnum.FLASHINFER backend.",
        "Using LBHNC KV cache layout.",
        "Using TRTLLM decode attention (auto-detected).",
    ]
    plain = [f"(EngineCore_DP0 pid=9) INFO 11-20 10:11:12 [x.py:1] {one}" for one in messages]
    packed = [json.dumps({"levelname": "INFO", "message": one}) for one in messages]
    for lines in (plain, packed):
        log = read(tmp_path, *lines)
        assert (log.version, log.requested) == ("0.33.0", "FLASHINFER")
        assert [(one.backend, one.explicit) for one in log.taken] == [("FLASHINFER", True)]
        assert log.behind["layout"] == ["LBHNC"]
        assert log.behind["TRT-LLM kernels"] == ["decode attention (auto-detected)"]
        assert list(causes(log)) == ["--attention-backend FLASHINFER was asked for"]


@pytest.mark.parametrize(
    "arguments",
    [
        "{'attention_backend': <AttentionBackendEnum.TRITON_ATTN: 'a.b.C'>}",
        "{'attention_config': AttentionConfig(backend=<AttentionBackendEnum.TRITON_ATTN: 'a'>)}",
        "{'attention_config': {'flash_attn_version': 2, 'backend': 'triton_attn'}}",
    ],
)
def test_a_request_is_found_however_it_was_made(tmp_path: Path, arguments: str) -> None:
    log = read(tmp_path, *start(), *old(f"non-default args: {arguments}", CHOSEN))
    assert log.requested == "TRITON_ATTN"


def test_rocm_cpu_and_old_names_are_understood(tmp_path: Path) -> None:
    rocm = read(
        tmp_path, *start(), *old("Using ROCM_ATTN backend out of potential backends: ['A']")
    )
    assert rocm.taken[0].backend == "ROCM_ATTN"
    name = read(tmp_path, *start(), *old("Using FlashInfer backend."))
    assert name.taken[0].backend == "FLASHINFER"
    cpu = read(tmp_path, *start(device="cpu"), *old("Cannot use FLASHINFER backend on CPU."))
    assert (cpu.taken, capability_of(cpu)) == ([], "cpu")
    assert list(causes(cpu)) == ["Cannot use FLASHINFER backend on CPU"]


def test_a_debug_line_gives_the_layer_itself(tmp_path: Path) -> None:
    log = read(tmp_path, *start(), *old(ASKED, level="DEBUG"), *old(CHOSEN))
    (cell,) = cells_of_log(log, "")
    assert cell == Cell(head_size=64, sinks=True)
    assert log.questions[0].refused["FLASHINFER"] == "attention sinks not supported, partial"


def test_the_last_of_several_starts_counts(tmp_path: Path) -> None:
    second = "Using TRITON_ATTN attention backend out of potential backends: ['TRITON_ATTN']."
    log = read(tmp_path, *start(), *old(CHOSEN), *start("0.30.0"), *old(second))
    assert (log.version, log.starts) == ("0.30.0", 2)
    assert [one.backend for one in log.taken] == ["TRITON_ATTN"]


def test_a_server_that_did_not_start_says_why(tmp_path: Path) -> None:
    refusal = (
        "ValueError: Selected backend AttentionBackendEnum.FLASHMLA is not valid for this "
        "configuration. Reason: ['non-MLA not supported']"
    )
    log = read(tmp_path, *start(), *old(refusal, level="ERROR"))
    assert list(causes(log)) == ["the server did not start: non-MLA not supported"]


@pytest.mark.parametrize(
    ("name", "capability"),
    [
        ("NVIDIA_H100_80GB_HBM3", "9.0"),
        ("NVIDIA_H20-3e", "9.0"),
        ("NVIDIA_A100-SXM4-80GB", "8.0"),
        ("NVIDIA_A10G", "8.6"),
        ("NVIDIA_L40S", "8.9"),
        ("NVIDIA_B200", "10.0"),
        ("NVIDIA_GB200", "10.0"),
        ("NVIDIA_GB10", "12.1"),
        ("NVIDIA_GeForce_RTX_5090", "12.0"),
        ("NVIDIA_GeForce_RTX_4090", "8.9"),
        ("Tesla_T4", "7.5"),
        ("Something_New", ""),
    ],
)
def test_a_gpus_name_tells_its_capability(name: str, capability: str) -> None:
    assert capability_of(ServerLog("a", device_name=name.replace("_", " "))) == capability


def answer(cell: Cell, backend: str | None, **more: object) -> VersionAnswer:
    fields: dict[str, object] = {
        "behind": {},
        "candidates": (),
        "refused": "",
        "depends_on": (),
        "untrusted": (),
        "not_evaluated": (),
        "not_asked": (),
        "model_override": "",
    }
    one = CellAnswer(cell=cell, backend=backend, backend_class=None, **(fields | more))  # type: ignore[arg-type]
    return VersionAnswer("0.22.1", "9.0", "executed", "", (), {}, {}, 0.0, {cell.text: one})


def test_the_selectors_are_compared_with_what_ran(tmp_path: Path) -> None:
    log = read(tmp_path, *start(), *old(CHOSEN))
    (same,) = judge(log, [Cell()], "9.0", answer(Cell(), "FLASH_ATTN"))
    assert (same.agrees, same.ours, same.vllm) == (True, "FLASH_ATTN", "FLASH_ATTN")
    assert same.why == ()
    (other,) = judge(log, [Cell()], "9.0", answer(Cell(), "FLEX_ATTENTION"))
    assert not other.agrees
    assert "FLEX_ATTENTION is not among the server's potential backends" in other.why[0]
    (order,) = judge(log, [Cell()], "9.0", answer(Cell(), "FLASHINFER"))
    assert order.why == ("the server found FLASHINFER valid and tried another first",)
    untold = ("selection: the probe does not know the field x",)
    (unasked,) = judge(log, [Cell()], "9.0", answer(Cell(), None, not_evaluated=untold))
    assert (unasked.agrees, unasked.vllm) == (True, None)


def test_a_reason_of_the_servers_own_comes_before_a_guess(tmp_path: Path) -> None:
    log = read(tmp_path, *start(), *old(ASKED, CHOSEN))
    (cell,) = cells_of_log(log, "")
    (verdict,) = judge(log, [cell], "9.0", answer(cell, "FLASHINFER"))
    assert verdict.why == ("the server refused FLASHINFER: attention sinks not supported, partial",)


def test_a_block_size_that_shut_out_a_backend_is_named(tmp_path: Path) -> None:
    precluded = (
        "--block-size 16 precluded higher-priority backend(s) FLASHMLA. Using TRITON_MLA instead, "
        "which may result in reduced performance."
    )
    log = read(tmp_path, *start(), *old(precluded, level="WARNING"), *old(CHOSEN))
    assert list(causes(log)) == [
        "--block-size 16 precluded higher-priority backend(s) FLASHMLA. Using TRITON_MLA instead"
    ]


def test_a_model_brings_its_layers_as_served(tmp_path: Path) -> None:
    log = read(tmp_path, *start(), *old(CHOSEN))
    (cell,) = cells_of_log(log, "llama-3-8b")
    assert (cell.num_heads, cell.num_kv_heads, cell.kv_cache_dtype) == (16, 4, "fp8")
    assert cells_of_log(log, "") == ()


def test_gzip_stdin_and_an_endless_line_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "\n".join([*start(), "x" * 500_000 + CHOSEN, *old(CHOSEN)]).encode()
    packed = tmp_path / "server.log.gz"
    packed.write_bytes(gzip.compress(text))
    log = read_server_log(str(packed))
    assert log.taken[0].line == log.lines == 5
    for raw in (text, gzip.compress(text)):
        stdin = io.TextIOWrapper(io.BufferedReader(io.BytesIO(raw)))
        monkeypatch.setattr("sys.stdin", stdin)
        assert read_server_log("-").taken[0].backend == "FLASH_ATTN"


def test_a_hostile_log_does_not_grow_without_end(tmp_path: Path) -> None:
    many = [f"Unknown vLLM environment variable detected: VLLM_{n}" for n in range(500)]
    many += [f"Using X{n}_ATTN attention backend out of potential backends: []" for n in range(500)]
    log = read(tmp_path, *start(), *old(*many))
    assert len(log.unknown_variables) == len(log.taken) == 64


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (b"", DataError, "no line of .* is of a vLLM server's start"),
        (b"INFO: a web server\n" * 9, DataError, r"\(9 lines\)"),
        ("\n".join(start()).encode(), DataError, "names no attention backend: it is cut off"),
        (b"\x7fELF\0\0\0", UsageError, "is binary"),
        (gzip.compress(b"a log\n" * 9999, mtime=0)[:-20], CorruptDataError, "damaged gzip"),
        (b"\x1f\x8bno gzip at all", CorruptDataError, "damaged gzip"),
    ],
)
def test_a_log_that_is_none_is_named(
    tmp_path: Path, content: bytes, error: type[AttnBenchError], message: str
) -> None:
    path = tmp_path / "server.log"
    path.write_bytes(content)
    with pytest.raises(error, match=message) as raised:
        read_server_log(str(path))
    assert raised.value.exit_code == 2


@pytest.mark.parametrize("name", ["nowhere.log", "."])
def test_a_log_that_cannot_be_opened_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="or - for stdin"):
        read_server_log(str(tmp_path / name))


def test_a_version_that_is_no_release_cannot_be_asked(tmp_path: Path) -> None:
    log = ServerLog("a.log", version="0.34.0.dev3+g12")
    with pytest.raises(DataError, match="is no release"):
        log_verdict.ask_vllm(log, [Cell()], "9.0", None, tmp_path)  # type: ignore[arg-type]
    assert not log_verdict.is_cached("0.22.1", tmp_path)


@pytest.mark.parametrize(
    "piece",
    [
        "█ version ",
        "attention backend with AttentionSelectorConfig(",
        "AttentionSelectorConfig(a=((((",
        "defaulting to A_A_A_",
        "Using TRTLLM attention ",
        "NVIDIA GGGG",
        "non-default args: {'attention_config': {",
        "AttentionSelectorConfig(). Reasons: {aaaaaaaaaaaaaaaaaaaaaaa",
    ],
)
def test_a_line_made_to_take_long_does_not(tmp_path: Path, piece: str) -> None:
    started = time.process_time()
    with pytest.raises(DataError):
        read(tmp_path, piece * (100_000 // len(piece)))
    assert time.process_time() - started < 2
