"""Whether the backend in a server's log is the one the selectors say, and if not, why not."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from attnbench.errors import DataError
from attnbench.upgrade.cache import default_cache_folder, read_stamp
from attnbench.upgrade.cells import Cell, MLADims
from attnbench.upgrade.metadata import read_metadata
from attnbench.upgrade.models import cells_of_model
from attnbench.upgrade.overrides import plain
from attnbench.upgrade.package_index import pinned
from attnbench.upgrade.probe import CellAnswer, VersionAnswer, probe
from attnbench.upgrade.probe_env import FLASHINFER, prepare
from attnbench.upgrade.server_log import Question, ServerLog
from attnbench.upgrade.tell import Tell
from attnbench.upgrade.user_settings import Setting, SettingKind
from attnbench.upgrade.versions import parse_source

_CAPABILITIES = {
    "10.3": "B300",
    "10.0": "B200",
    "12.1": "GB10",
    "12.0": r"RTX 50\d\d|RTX PRO [456]\d00",
    "9.0": "H100|H200|H800|H20|GH200",
    "8.9": r"L4|L40S?|L20|RTX 40\d\d|RTX [456]000 Ada",
    "8.6": r"A10G?|A40|A16|A2|RTX 30\d\d|RTX A\d+",
    "8.0": "A100|A800|A30",
    "7.5": r"T4|RTX 20\d\d|Quadro RTX|TITAN RTX",
    "7.0": "V100|TITAN V",
}
"""Names as NVIDIA's list of CUDA GPUs gives their compute capability (developer.nvidia.com)."""

_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "half": "fp16"}


def capability_of(log: ServerLog) -> str:
    """The compute capability the log tells, itself or by the GPU's name; "" if it does not."""
    if log.platform == "cpu":
        return "cpu"
    if log.capability:
        return log.capability
    for capability, names in _CAPABILITIES.items():
        if re.search(rf"(?:^|[\s-])G?(?:{names})(?!\d)", log.device_name):
            return capability
    return ""


def cells_of_log(log: ServerLog, model: str) -> tuple[Cell, ...]:
    """The layers the server was asked about, as exactly as the log or the user tells.

    Args:
        model: a registered shape, a config.json or its folder; "": what a debug log says of each
            layer, else the folder the log names the model by.

    Raises:
        UsageError: `model` is none of these.
    """
    if not model and log.questions:
        return tuple(dict.fromkeys(_cell(one, log) for one in log.questions))
    if not model and log.model and (Path(log.model) / "config.json").is_file():
        model = log.model
    if not model:
        return ()
    return tuple(
        replace(
            one,
            dcp=log.decode_context_parallel_size,
            dtype=_DTYPES.get(log.dtype, one.dtype),
        )
        for one in cells_of_model(
            model,
            tensor_parallel_size=log.tensor_parallel_size,
            kv_cache_dtype=log.kv_cache_dtype or "auto",
            block_size=log.block_size,
        )
    )


def _cell(question: Question, log: ServerLog) -> Cell:
    """The cell of one question. Its words leave out heads, MLA's dims, the window's length and
    what a sparse layer reads: usual ones are assumed, no selector known looks at more than whether
    there is one, but for sparse layers and their heads."""
    said = question.fields

    def is_so(name: str) -> bool:
        return said.get(name) == "True"

    def number(name: str) -> int | None:
        text = said.get(name, "")
        return int(text) if text.isdecimal() and len(text) < 6 else None

    is_mla = is_so("use_mla")
    head_size = number("head_size") or 128
    return Cell(
        head_size=head_size,
        num_kv_heads=1 if is_mla else 8,
        dtype=_DTYPES.get(said.get("dtype", "").removeprefix("torch."), "bf16"),
        kv_cache_dtype=said.get("kv_cache_dtype", "auto").replace("None", "auto"),
        block_size=number("block_size"),
        sliding_window=4096 if is_so("has_sliding_window") else 0,
        sinks=is_so("has_sink"),
        mm_prefix=is_so("use_mm_prefix"),
        mla=MLADims(kv_lora_rank=head_size - 64) if is_mla and head_size > 64 else None,
        topk=2048 if is_so("use_sparse") else 0,
        attn_type=_attn_type(said.get("attn_type", "")),
        batch_invariant=is_so("use_batch_invariant"),
        dcp=2 if is_so("use_dcp") else 1,
        pcp=2 if is_so("use_pcp") else 1,
    )


def _attn_type(text: str) -> str:
    quoted = re.search(r"(encoder_only|encoder_decoder|encoder|decoder)", text.lower())
    return quoted[1] if quoted else "decoder"


def is_cached(version: str, cache: Path | None = None) -> bool:
    """Whether asking this version would download nothing."""
    folder = default_cache_folder() if cache is None else cache
    entry = folder / "wheels" / f"vllm-{version}"
    if read_stamp(entry) is None:
        return False
    metadata = read_metadata(entry / "files", "vllm")
    wanted = pinned(metadata.requires, FLASHINFER) if metadata else None
    if wanted is not None and read_stamp(folder / "wheels" / f"{FLASHINFER}-{wanted}") is None:
        return False
    made = (folder / "environments").glob("*")
    return any(read_stamp(one) is not None for one in made if one.is_dir())


def ask_vllm(
    log: ServerLog, cells: Sequence[Cell], capability: str, tell: Tell, cache: Path | None = None
) -> VersionAnswer:
    """What the log's own version of vLLM says to these cells, with the backend asked for.

    Raises:
        DataError: the log tells no version.
        UsageError, InfrastructureError: it cannot be got or asked.
    """
    if not re.fullmatch(r"\d+(\.\d+)+(\.post\d+|rc\d+)?", log.version):
        known = f"{log.version!r} is no release" if log.version else "names no version of vLLM"
        raise DataError(f"{log.name}: {known}, so its selector cannot be asked; leave out --probe")
    prepared = prepare(parse_source(f"vllm=={log.version}"), tell, cache)
    return probe(prepared, capability, cells, settings=_request(log))


def _request(log: ServerLog) -> tuple[Setting, ...]:
    if not log.requested:
        return ()
    return (Setting(SettingKind.FLAG, "--attention-backend", log.requested, log.name),)


def ask_ours(log: ServerLog, cell: Cell, capability: str) -> tuple[str, tuple[str, ...]]:
    """Our own selector's backend for the cell ("": none), and why better ones were passed over."""
    import torch

    from attnbench.backends.abstract import AttentionConfig
    from attnbench.backends.registry import backend_names
    from attnbench.selection import consider, resolve_device
    from attnbench.workload.types import AttentionType

    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    mla = cell.mla
    config = AttentionConfig(
        head_size=cell.head_size,
        dtype=dtypes[cell.dtype],
        kv_cache_dtype={"fp8": "fp8_e4m3"}.get(cell.kv_cache_dtype, cell.kv_cache_dtype),
        block_size=cell.block_size,
        use_mla=mla is not None,
        has_sink=cell.sinks,
        use_sparse=bool(cell.topk),
        use_mm_prefix=cell.mm_prefix,
        attn_type=AttentionType(cell.attn_type),
        use_batch_invariant=cell.batch_invariant,
        num_heads=cell.num_heads,
        num_kv_heads=cell.num_kv_heads,
        v_head_size=mla.v_head_dim if mla else None,
        has_sliding_window=bool(cell.sliding_window),
        has_logits_soft_cap=cell.softcap,
        use_alibi=cell.alibi,
        kv_lora_rank=mla.kv_lora_rank if mla else 0,
        qk_nope_head_dim=mla.qk_nope_head_dim if mla else 0,
        qk_rope_head_dim=mla.qk_rope_head_dim if mla else 0,
    )
    wanted = log.requested if log.requested in backend_names() else None
    selection = consider(config, resolve_device(capability), wanted)
    passed = selection.better_ranked()
    return selection.backend, tuple(f"{one.name}: {', '.join(one.reasons)}" for one in passed)


@dataclass(frozen=True, slots=True)
class LogVerdict:
    """One kind of layer: what the log shows, what the selectors say, and why they differ."""

    cell: str
    taken: tuple[str, ...]
    ours: str
    vllm: str | None
    agrees: bool
    why: tuple[str, ...]


def judge(
    log: ServerLog, cells: Sequence[Cell], capability: str, vllm: VersionAnswer | None
) -> list[LogVerdict]:
    """Compare for each cell; where vLLM's own selector was asked, it decides."""
    found = []
    taken = tuple(one.backend for one in log.taken)
    if not taken and capability == "cpu" and not log.refusals:
        taken = ("CPU_ATTN",)  # the CPU's platform has one for plain layers, and logs no choice
    for cell in cells:
        ours, passed = ask_ours(log, cell, capability)
        answer = vllm.cells[cell.text] if vllm else None
        not_told = answer is not None and any(
            text.startswith("selection") for text in answer.not_evaluated
        )
        expected = (answer.backend or "") if answer and not not_told else ours
        agrees = expected in taken if expected else not taken
        why = tuple(dict.fromkeys(_why(log, expected, agrees, answer, passed)))
        theirs = None if answer is None or not_told else answer.backend or "none"
        found.append(LogVerdict(cell.text, taken, ours or "none", theirs, agrees, why))
    return found


def _why(
    log: ServerLog,
    expected: str,
    agrees: bool,
    answer: CellAnswer | None,
    passed: Sequence[str],
) -> Iterator[str]:
    if not agrees:
        yield from causes(log)
        potential = {name for one in log.taken for name in one.potential}
        refused = {name: text for one in log.questions for name, text in one.refused.items()}
        if expected in refused:
            yield f"the server refused {expected}: {refused[expected]}"
        elif potential and expected and expected not in potential:
            yield (
                f"{expected} is not among the server's potential backends: a package or an "
                "extension it needs is missing there, or the layer is another one; "
                "VLLM_LOGGING_LEVEL=DEBUG shows the reason"
            )
        elif expected in potential:
            yield f"the server found {expected} valid and tried another first"
    if answer is not None:
        yield from (f"holds with {one}" for one in answer.depends_on)
        yield from (f"not certain: {one}" for one in answer.untrusted)
        if answer.refused:
            yield f"vLLM's selector refuses: {plain(answer.refused)}"
        if answer.model_override:
            yield answer.model_override
    elif not agrees:
        yield from (f"our selector passed over {one}" for one in passed)


def causes(log: ServerLog) -> Iterator[str]:
    """What the log itself says about why the choice is not the default one."""
    for refusal in log.refusals:
        yield f"the server did not start: {plain(refusal)}"
    if log.requested:
        yield f"--attention-backend {log.requested} was asked for"
    elif any(one.explicit for one in log.taken):
        yield "the backend was asked for, by a setting or by a rule for the model"
    for name in log.unknown_variables:
        instead = "; write --attention-backend" if name == "VLLM_ATTENTION_BACKEND" else ""
        yield f"{name} is set and unknown to this version: it has no effect{instead}"
    yield from log.remarks
