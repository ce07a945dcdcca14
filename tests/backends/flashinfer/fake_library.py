"""FlashInfer as it looks from outside, computing with plain torch on the CPU.

Signatures are the recorded ones (`signatures.json`): a parameter they lack is a TypeError. What the
real library refuses is refused, with its words (prefill.py, decode.py, cascade.py, jit/xqa.py and
jit/attention/modules.py), and what it leaves out in silence is left out: the soft cap of FA3's fp8
kernels. A wrapper runs its last plan, in graph mode through the buffers it was made with.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from tests.backends.flash_attn.fake_library import attend

RECORDED: dict[str, Any] = json.loads((Path(__file__).parent / "signatures.json").read_text())
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
HALF = (torch.float16, torch.bfloat16)
SEMAPHORE_BYTES = 8 * 1024 * 1024


class Call(NamedTuple):
    """One call: `module.Class.method` or `module.function`, what was passed, and all values."""

    path: str
    given: frozenset[str]
    arguments: SimpleNamespace


def signature_of(record: str, path: str) -> inspect.Signature:
    """The recorded signature, `self` included."""
    parameters, after_star = [], False
    for name, text in RECORDED[record]["functions"][path]:
        kind: Any = inspect.Parameter.POSITIONAL_OR_KEYWORD
        if after_star:
            kind = inspect.Parameter.KEYWORD_ONLY
        if name.startswith("*"):
            kind, after_star = inspect.Parameter.VAR_POSITIONAL, True
        default = inspect.Parameter.empty if text is None else _default(text)
        parameters.append(inspect.Parameter(name.lstrip("*"), kind, default=default))
    return inspect.Signature(parameters)


def _default(text: str) -> Any:
    return eval(text, {"torch": torch})


def recorded(
    record: str, path: str, calls: list[Call], body: Callable[[SimpleNamespace], Any]
) -> Callable[..., Any]:
    """A function of the recorded signature that hands its bound arguments to `body`."""
    signature = signature_of(record, path)

    def function(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        given = frozenset(bound.arguments) - {"self"}
        bound.apply_defaults()
        arguments = SimpleNamespace(**bound.arguments)
        calls.append(Call(path, given, arguments))
        return body(arguments)

    function.__signature__ = signature  # type: ignore[attr-defined]
    return function


def expect(ok: bool, message: str, error: type[Exception] = ValueError) -> None:
    if not ok:
        raise error(message)


def gather(
    cache: torch.Tensor, layout: str, blocks: torch.Tensor, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of one request: (length, heads, size) float32."""
    if layout == "HND":
        cache = cache.transpose(2, 3)
    stored = cache.view(torch.uint8) if cache.dtype in FP8 else cache
    rows = stored[blocks.long()].view(cache.dtype).float()
    return rows[:, 0].flatten(0, 1)[:length], rows[:, 1].flatten(0, 1)[:length]


def call_of(
    query: torch.Tensor,
    starts: torch.Tensor,
    scale: float,
    causal: bool,
    window_left: int,
    soft_cap: float,
) -> SimpleNamespace:
    """What `attend` reads."""
    return SimpleNamespace(
        q=query.float(),
        cu_seqlens_q=starts,
        softmax_scale=scale,
        causal=causal,
        window_size=(window_left, -1),
        softcap=soft_cap,
    )


def check_cache(cache: torch.Tensor, layout: str, page_size: int, heads: int, size: int) -> None:
    inner = (page_size, heads) if layout == "NHD" else (heads, page_size)
    expect(tuple(cache.shape[1:]) == (2, *inner, size), f"paged_kv_cache is not {layout}")
    expect(cache.stride(-1) == 1, "the last dimension must be contiguous")


def make_wrapper(self: Any, a: SimpleNamespace, graph: dict[str, torch.Tensor | None]) -> None:
    if a.kv_layout not in ("NHD", "HND"):
        raise KeyError(f"Invalid kv_layout {a.kv_layout}")
    expect(a.float_workspace_buffer.dtype is torch.uint8, "workspace")
    expect(a.backend in ("fa2", "fa3"), f"another choice than ours: {a.backend}")
    self.layout, self.backend, self.use_cuda_graph = a.kv_layout, a.backend, a.use_cuda_graph
    self.buffers = graph
    self.max_rows = None
    if a.use_cuda_graph:
        for name, buffer in graph.items():
            expect(torch.is_tensor(buffer), f"{name} should be a torch.Tensor in cudagraph mode")
        expect(len(graph["indptr"]) == len(graph["last"]) + 1, "should be batch_size + 1")  # type: ignore[arg-type]


def plan_wrapper(
    self: Any,
    a: SimpleNamespace,
    tables: dict[str, torch.Tensor],
    head_dim: int,
    causal: bool,
) -> None:
    """What both plans do; `tables`: starts, indptr, indices, last."""
    for name, table in tables.items():
        expect(table.dtype is torch.int32, f"{name} must be int32")
    counts = tables["indptr"].diff()
    batch = len(counts)
    expect(len(tables["last"]) == batch, "last_page_len")
    expect(bool((counts > 0).all()), "a request without pages")
    last = tables["last"]
    expect(bool(((last >= 1) & (last <= a.page_size)).all()), "1 <= kv_last_page_len <= page_size")
    expect(int(tables["indptr"][-1]) == len(tables["indices"]), "kv_indptr[-1]")
    expect(a.num_qo_heads % a.num_kv_heads == 0, "num_qo_heads must be a multiple of num_kv_heads")
    expect(a.o_data_type not in FP8, "FP8 output is not supported", AssertionError)
    sizes = (64, 128, 256, 512) if self.backend == "fa2" else (64, 128, 256)
    expect(head_dim in sizes, f"Unsupported head_dim: {head_dim}", RuntimeError)
    if self.backend == "fa2":
        expect(a.q_data_type in HALF, "fp8 tensor core is not supported in fa2", AssertionError)
        expect(a.kv_data_type in FP8 or a.kv_data_type is a.q_data_type, "dtype", RuntimeError)
    else:
        # FA3's static_assert.
        expect(a.q_data_type is a.kv_data_type, "queries and keys of two types", RuntimeError)
    self.plan_is = SimpleNamespace(
        **vars(a), head=head_dim, causal_mask=causal, rows=int(tables["starts"][-1])
    )
    if not self.use_cuda_graph:
        self.tables = {name: table.clone() for name, table in tables.items()}
        return
    rows = int(tables["starts"][-1])
    self.max_rows = self.max_rows or rows
    expect(rows <= self.max_rows, "The total number of rows in qo_indptr")
    expect(batch == len(self.buffers["last"]), "The batch size should be fixed in cudagraph mode")
    expect(len(tables["indices"]) <= len(self.buffers["indices"]), "the allocated buffer")
    for name, table in tables.items():
        if name in self.buffers:
            self.buffers[name][: len(table)].copy_(table)
    self.tables = {**tables, **self.buffers}


def run_wrapper(self: Any, a: SimpleNamespace) -> Any:
    """What both runs do. The tables are read now: as a captured graph reads its buffers."""
    p, tables = self.plan_is, self.tables
    expect(a.q.dtype is p.q_data_type, "The dtype of q does not match the q_data_type")
    expect(a.paged_kv_cache.dtype is p.kv_data_type, "The dtype of k does not match")
    expect(a.q.shape == (p.rows, p.num_qo_heads, p.head), "q.shape[0] does not match qo_indptr[-1]")
    expect(a.out.shape == a.q.shape, "Invalid shape of out")
    expect(a.out.dtype is p.o_data_type, "The dtype of out does not match the o_data_type")
    check_cache(a.paged_kv_cache, self.layout, p.page_size, p.num_kv_heads, p.head)
    expect(a.window_left in (None, p.window_left), "window_left", AssertionError)
    indptr, last = tables["indptr"].tolist(), tables["last"].tolist()
    lengths = [
        (indptr[i + 1] - indptr[i] - 1) * p.page_size + tokens for i, tokens in enumerate(last)
    ]
    pairs = [
        gather(a.paged_kv_cache, self.layout, tables["indices"][indptr[i] : indptr[i + 1]], n)
        for i, n in enumerate(lengths)
    ]
    scale = p.sm_scale * (a.q_scale or 1.0) * (a.k_scale or 1.0)
    soft_cap = 0.0 if p.q_data_type in FP8 else p.logits_soft_cap or 0.0
    call = call_of(a.q, tables["starts"], scale, p.causal_mask, p.window_left, soft_cap)
    out, lse = attend(call, [k for k, _ in pairs], [v for _, v in pairs], None, None)
    a.out.copy_(out)
    if a.v_scale is not None and a.v_scale != 1.0:
        a.out.mul_(a.v_scale)
    base_2 = lse.T / torch.log(torch.tensor(2.0))
    return (a.out, base_2) if a.return_lse else a.out


# --- the three wrappers ---------------------------------------------------------------------------
def prefill_init(a: SimpleNamespace) -> None:
    graph = {
        "starts": a.qo_indptr_buf,
        "indptr": a.paged_kv_indptr_buf,
        "indices": a.paged_kv_indices_buf,
        "last": a.paged_kv_last_page_len_buf,
    }
    make_wrapper(a.self, a, graph)


def prefill_plan(a: SimpleNamespace) -> None:
    tables = {
        "starts": a.qo_indptr,
        "indptr": a.paged_kv_indptr,
        "indices": a.paged_kv_indices,
        "last": a.paged_kv_last_page_len,
    }
    plan_wrapper(a.self, a, tables, a.head_dim_qk, a.causal)


def decode_init(a: SimpleNamespace) -> None:
    graph = {
        "indptr": a.paged_kv_indptr_buffer,
        "indices": a.paged_kv_indices_buffer,
        "last": a.paged_kv_last_page_len_buffer,
    }
    make_wrapper(a.self, a, graph)
    a.self.use_tensor_cores = a.use_tensor_cores


def decode_plan(a: SimpleNamespace) -> None:
    if not a.self.use_tensor_cores:
        group = a.num_qo_heads // a.num_kv_heads
        expect(group in (1, 2, 3, 4, 8), f"Unsupported group_size: {group}", RuntimeError)
    starts = torch.arange(len(a.last_page_len) + 1, dtype=torch.int32)
    tables = {
        "starts": starts,
        "indptr": a.indptr,
        "indices": a.indices,
        "last": a.last_page_len,
    }
    plan_wrapper(a.self, a, tables, a.head_dim, causal=False)


def cascade_init(a: SimpleNamespace) -> None:
    a.self.num_levels, a.self.layout = a.num_levels, a.kv_layout
    expect(a.float_workspace_buffer.dtype is torch.uint8, "workspace")


def cascade_plan(a: SimpleNamespace) -> None:
    levels = zip(
        a.qo_indptr_arr,
        a.paged_kv_indptr_arr,
        a.paged_kv_indices_arr,
        a.paged_kv_last_page_len,
        strict=True,
    )
    a.self.levels = []
    for number, (starts, indptr, indices, last) in enumerate(levels):
        level = SimpleNamespace(layout=a.self.layout, backend="fa2", use_cuda_graph=False)
        tables = {"starts": starts, "indptr": indptr, "indices": indices, "last": last}
        is_last = number == a.self.num_levels - 1
        plan = SimpleNamespace(**vars(a), o_data_type=a.q_data_type)
        plan_wrapper(level, plan, tables, a.head_dim, causal=a.causal and is_last)
        a.self.levels.append(level)
    expect(len(a.self.levels) == a.self.num_levels, "num_levels")


def cascade_run(a: SimpleNamespace) -> torch.Tensor:
    parts = []
    for level in a.self.levels:
        run = SimpleNamespace(
            q=a.q,
            paged_kv_cache=a.paged_kv_cache,
            out=torch.empty_like(a.q),
            q_scale=None,
            k_scale=None,
            v_scale=None,
            window_left=None,
            return_lse=True,
        )
        parts.append(run_wrapper(level, run))
    powers = torch.exp2(torch.stack([lse for _, lse in parts]))
    weights = powers / powers.sum(0)
    outputs = torch.stack([out.float() for out, _ in parts])
    return (outputs * weights[..., None]).sum(0).to(a.q.dtype)


# --- XQA and TRTLLM-GEN ---------------------------------------------------------------------------
def paged_function(
    a: SimpleNamespace, starts: torch.Tensor, is_trtllm: bool, heads: int, page_size: int
) -> torch.Tensor:
    """What both functions do once they know where each request's queries begin."""
    semaphores = a.workspace_buffer[:SEMAPHORE_BYTES]
    expect(a.workspace_buffer.dtype is torch.uint8 and not bool(semaphores.any()), "workspace")
    expect(a.block_tables.ndim == 2, "block_tables must be 2D for shared paged KV layout")
    batch = len(starts) - 1
    expect(a.block_tables.dtype is torch.int32 and len(a.block_tables) == batch, "block_tables")
    expect(tuple(a.seq_lens.shape) == (batch,), "seq_lens")
    expect(a.query.is_contiguous() and a.out.is_contiguous(), "contiguous")
    expect(a.out.shape == a.query.shape, "Invalid shape of out")
    size = a.query.shape[-1]
    check_cache(a.kv_cache, a.kv_layout, page_size, heads, size)
    if a.sinks is not None:
        expect(a.sinks.dtype is torch.float32, "attention_sinks must be a float tensor")
    is_fp8 = a.kv_cache.dtype is FP8[0]
    if is_trtllm:
        expect(page_size in (16, 32, 64), f"no kernel for page size {page_size}", RuntimeError)
        expect(is_fp8 == (a.query.dtype is FP8[0]), "no kernel of mixed types", RuntimeError)
    else:
        expect(page_size in (16, 32, 64, 128), f"Invalid page_size: {page_size}")
        expect(size % 16 == 0 and 16 <= size <= 256, f"Invalid head_dim: {size}")
        expect(a.query.dtype in HALF, "only float16 and bfloat16 input are supported")
        expect(a.out.dtype is a.query.dtype, "Output and query", AssertionError)
    expect(is_fp8 or a.kv_cache.dtype is a.query.dtype, "no such kernel", RuntimeError)
    pairs = []
    for table, length in zip(a.block_tables, a.seq_lens.tolist(), strict=True):
        used = -(-length // page_size)
        pairs.append(gather(a.kv_cache, a.kv_layout, table[:used], length))
    call = call_of(a.query, starts, a.bmm1_scale, True, a.window_left, 0.0)
    out, _ = attend(call, [k for k, _ in pairs], [v for _, v in pairs], None, a.sinks)
    a.out.copy_(out * a.bmm2_scale)
    return a.out  # type: ignore[no-any-return]


def cache_numbers(a: SimpleNamespace) -> tuple[int, int]:
    """(KV heads, page size) of the cache, by the layout that was said."""
    heads, page_size = (3, 2) if a.kv_layout == "NHD" else (2, 3)
    return a.kv_cache.shape[heads], a.kv_cache.shape[page_size]


def trtllm_decode(a: SimpleNamespace) -> torch.Tensor:
    expect(a.backend in ("xqa", "trtllm-gen"), f"another choice than ours: {a.backend}")
    expect(a.query.shape[0] % a.q_len_per_req == 0, "q_len_per_req")
    if a.backend == "xqa":
        expect(a.q_len_per_req == 1, "Mask is required for speculative decoding", AssertionError)
    expect(int(a.seq_lens.max()) <= a.max_seq_len, "a context is longer than max_seq_len")
    starts = torch.arange(0, a.query.shape[0] + 1, a.q_len_per_req, dtype=torch.int32)
    return paged_function(a, starts, a.backend == "trtllm-gen", *cache_numbers(a))


def trtllm_context(a: SimpleNamespace) -> torch.Tensor:
    heads, page_size = cache_numbers(a)
    expect(a.batch_size == len(a.cum_seq_lens_q) - 1, "batch_size")
    for starts in (a.cum_seq_lens_q, a.cum_seq_lens_kv):
        expect(starts.dtype is torch.int32 and int(starts[0]) == 0, "cum_seq_lens")
    expect(int(a.cum_seq_lens_q.diff().max()) == a.max_q_len, "max_q_len")
    expect(int(a.cum_seq_lens_q[-1]) == len(a.query), "cum_seq_lens_q")
    pages = (a.seq_lens + page_size - 1) // page_size
    expect(a.cum_seq_lens_kv.diff().tolist() == pages.tolist(), "cum_seq_lens_kv")
    expect(int(a.seq_lens.max()) <= a.max_kv_len, "a context is longer than max_kv_len")
    return paged_function(a, a.cum_seq_lens_q, True, heads, page_size)


_METHODS: dict[str, dict[str, Callable[[SimpleNamespace], Any]]] = {
    "prefill.BatchPrefillWithPagedKVCacheWrapper": {
        "__init__": prefill_init,
        "plan": prefill_plan,
        "run": lambda a: run_wrapper(a.self, a),
    },
    "decode.BatchDecodeWithPagedKVCacheWrapper": {
        "__init__": decode_init,
        "plan": decode_plan,
        "run": lambda a: run_wrapper(a.self, a),
    },
    "cascade.MultiLevelCascadeAttentionWrapper": {
        "__init__": cascade_init,
        "plan": cascade_plan,
        "run": cascade_run,
    },
}
_FUNCTIONS = {
    "prefill.trtllm_batch_context_with_kv_cache": trtllm_context,
    "decode.trtllm_batch_decode_with_kv_cache": trtllm_decode,
}


def install(patch: pytest.MonkeyPatch, record: str) -> list[Call]:
    """Make one recorded library importable. Returns its calls, filled as they come."""
    calls: list[Call] = []
    package = ModuleType("flashinfer")
    package.__path__ = []
    patch.setitem(sys.modules, "flashinfer", package)
    modules = {name: ModuleType(f"flashinfer.{name}") for name in ("prefill", "decode", "cascade")}
    for path, methods in _METHODS.items():
        module, name = path.split(".")
        members = {n: recorded(record, f"{path}.{n}", calls, b) for n, b in methods.items()}
        setattr(modules[module], name, type(name, (), members))
    for path, body in _FUNCTIONS.items():
        module, name = path.split(".")
        setattr(modules[module], name, recorded(record, path, calls, body))
    for module_name, each in modules.items():
        patch.setitem(sys.modules, f"flashinfer.{module_name}", each)
    return calls
