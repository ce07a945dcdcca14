"""Runs the Python files of an unpacked vLLM wheel on the CPU: the bridge against the real thing.

    TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES= TORCHDYNAMO_DISABLE=1 \\
        python -m tests.backends.vllm.unpacked FOLDER NAME WORKLOAD [WORKLOAD...]

prints a JSON object a line: {"text", "outcome"}, where the outcome is "ok", "refused: ..." or
"failed: ...". vLLM's Triton kernels run in Triton's interpreter. Its compiled extensions are empty
modules; the operators of theirs that are reached (cache writes, FlashAttention) are plain torch
here, with the parameters the Python files pass. Nothing of vLLM is changed otherwise.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

#: pip packages whose absence is a reason to skip, and not a failure.
PACKAGES = ("transformers", "pydantic", "msgspec", "cbor2", "openai", "zmq", "regex", "cloudpickle")
CAPABILITY = (9, 0)


class Extensions(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Empty modules in place of extensions, and a driver library that knows one device."""

    def __init__(self, names: set[str]) -> None:
        self.names = names

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name in self.names or name == "vllm.third_party.pynvml":
            return importlib.machinery.ModuleSpec(name, self)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _nvml(spec.name) if spec.name.endswith("pynvml") else ModuleType(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        return


def _nvml(name: str) -> ModuleType:
    module: Any = ModuleType(name)
    module.NVMLError = type("NVMLError", (Exception,), {})
    module.nvmlInit = module.nvmlShutdown = lambda: None
    module.nvmlDeviceGetCount = lambda: 1
    module.nvmlDeviceGetHandleByIndex = lambda index: index
    module.nvmlDeviceGetCudaComputeCapability = lambda handle: CAPABILITY
    module.nvmlDeviceGetName = lambda handle: "none"
    module.nvmlDeviceGetUUID = lambda handle: "GPU-0"
    module.nvmlDeviceGetMemoryInfo = lambda handle: SimpleNamespace(total=1 << 37)
    return module  # type: ignore[no-any-return]


def make_importable(root: Path) -> None:
    """The wheel unpacked in `root` is what `import vllm` finds, on a Hopper that is not there."""
    sys.path.insert(0, str(root))
    record = next(root.glob("vllm-*.dist-info")) / "RECORD"
    files = [line.partition(",")[0] for line in record.read_text().splitlines()]
    extensions = {f.partition(".")[0].replace("/", ".") for f in files if f.endswith(".so")}
    sys.meta_path.insert(0, Extensions(extensions))
    cuda: Any = torch.cuda
    numbers = SimpleNamespace(
        major=CAPABILITY[0], minor=CAPABILITY[1], name="none", multi_processor_count=132
    )
    cuda.get_device_properties = lambda *_: numbers
    cuda.get_device_capability = lambda *_: CAPABILITY
    cuda.get_device_name = lambda *_: "none"
    accelerator: Any = torch.accelerator
    accelerator.empty_cache = lambda: None
    tensor: Any = torch.Tensor
    tensor.pin_memory = lambda self, *_: self
    for name in ("empty", "zeros", "ones", "full", "tensor", "arange", "empty_like", "zeros_like"):
        setattr(torch, name, _without_pinning(getattr(torch, name)))
    _define_cache_writes()


def _without_pinning(make: Callable[..., Any]) -> Callable[..., Any]:
    def made(*args: Any, pin_memory: bool = False, **kwargs: Any) -> Any:
        return make(*args, **kwargs)

    return made


_LIBRARY: Any = torch.library.Library("_C_cache_ops", "FRAGMENT")  # type: ignore[no-untyped-call]


def _define_cache_writes() -> None:
    kinds = "Tensor slot_mapping, str kv_cache_dtype, Tensor"

    def store(cache: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor, scale: Any) -> None:
        keep, size = slots >= 0, cache.shape[1]
        rows = rows[: len(slots)][keep]
        if cache.dtype is torch.uint8:
            rows = (rows.float() / scale).to(torch.float8_e4m3fn).view(torch.uint8)
        cache[slots[keep] // size, slots[keep] % size] = rows

    def pairs(key: Any, value: Any, keys: Any, values: Any, slots: Any, _: str, *s: Any) -> None:
        store(keys, key, slots, s[0])
        store(values, value, slots, s[1])

    def latents(
        kv_c: Any, k_pe: Any, cache: Any, slots: Any, _: str, scale: Any, skip_scale: bool = False
    ) -> None:
        assert not skip_scale or float(scale) == 1.0
        store(cache, torch.cat([kv_c, k_pe], -1), slots, scale)

    _LIBRARY.define(
        "reshape_and_cache_flash(Tensor key, Tensor value, Tensor key_cache, Tensor value_cache, "
        f"{kinds} k_scale, Tensor v_scale) -> ()"
    )
    _LIBRARY.define(
        f"concat_and_cache_mla(Tensor kv_c, Tensor k_pe, Tensor kv_cache, {kinds} scale, "
        "bool skip_scale=False) -> ()"
    )
    _LIBRARY.impl("reshape_and_cache_flash", pairs, "CompositeExplicitAutograd")
    _LIBRARY.impl("concat_and_cache_mla", latents, "CompositeExplicitAutograd")


def replace_flash_attention() -> None:
    """FlashAttention's two entry points, in plain torch; called by keyword, as vLLM calls them."""
    names: Any = importlib.import_module("vllm.v1.attention.backends.fa_utils")
    names.get_scheduler_metadata = lambda **_: torch.zeros(1, dtype=torch.int32)
    names.flash_attn_varlen_func = _flash_attention


def _flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    cu_seqlens_k: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    window_size: Sequence[int] | None = None,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    s_aux: torch.Tensor | None = None,
    q_descale: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
    return_softmax_lse: bool = False,
    **unused: Any,
) -> Any:
    from tests.backends.flash_attn.fake_library import attend

    tuning = {"scheduler_metadata", "fa_version", "num_splits", "dropout_p", "return_attn_probs"}
    asked = {name for name, value in unused.items() if value is not None and value is not False}
    assert asked <= tuning, asked - tuning
    batch = len(cu_seqlens_q) - 1
    assert max_seqlen_q >= int(cu_seqlens_q.diff().max())
    keys, values = [], []
    for request in range(batch):
        if block_table is None:
            assert cu_seqlens_k is not None or seqused_k is not None
            starts = cu_seqlens_k if cu_seqlens_k is not None else cu_seqlens_q
            rows = slice(int(starts[request]), int(starts[request + 1]))
            key, value = k[rows], v[rows]
        else:
            assert seqused_k is not None
            length = int(seqused_k[request])
            assert length <= max_seqlen_k
            blocks = block_table[request, : -(-length // k.shape[1])].long()
            as_bytes = k.element_size() == 1
            source = (k.view(torch.uint8), v.view(torch.uint8)) if as_bytes else (k, v)
            key, value = (s[blocks].view(k.dtype).flatten(0, 1)[:length] for s in source)
        keys.append(key.float() * (1.0 if k_descale is None else float(k_descale.flatten()[0])))
        values.append(value.float() * (1.0 if v_descale is None else float(v_descale.flatten()[0])))
    call = SimpleNamespace(
        q=q.float() * (1.0 if q_descale is None else float(q_descale.flatten()[0])),
        cu_seqlens_q=cu_seqlens_q,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=None if window_size is None else tuple(window_size),
        softcap=softcap,
    )
    found, lse = attend(call, keys, values, alibi_slopes, s_aux)
    dtype = q.dtype if q.element_size() > 1 else torch.float16
    if out is None:
        out = found.to(dtype)
    else:
        out.copy_(found)
    return (out, lse) if return_softmax_lse else out


def outcome(name: str, text: str) -> str:
    """What `VLLM:name` makes of a workload."""
    from attnbench.backends.device import cuda_device
    from attnbench.backends.vllm_bridge import vllm_backend
    from attnbench.workload import Workload
    from tests.backends.running import Run, config_of

    backend = vllm_backend(name)
    config = config_of(Workload.parse(text))
    if reasons := backend.validate_configuration(config, cuda_device(*CAPABILITY)):
        return f"refused: {'; '.join(reasons)}"
    try:
        run = Run(backend, text)
        if name == "FLEX_ATTENTION" and run.kv_cache.numel():
            # Without its compiler it reads every block there is, and gives most a weight of zero.
            run.kv_cache.nan_to_num_()
        check = run.check()
    except Exception as error:  # whatever vLLM raises is the outcome
        return f"failed: {type(error).__name__}: {str(error).splitlines()[0][:200]}"
    return "ok" if check.ok else f"failed: {check.reason}"


def main(folder: str, name: str, *texts: str) -> None:
    torch.set_num_threads(1)
    make_importable(Path(folder))
    if "FLASH" in name or "MLA" in name:
        replace_flash_attention()
    for text in texts:
        print(json.dumps({"text": text, "outcome": outcome(name, text)}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
