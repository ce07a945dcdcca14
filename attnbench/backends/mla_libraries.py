"""The libraries behind the latent-attention backends: which there are, and how one is found.

A variant is written `DECODE`, or `DECODE+PREFILL` where the library of the expanded form is not the
one the device gets by default: MLA's decode and its prefill are two kernels of two libraries, and
each is an axis of its own. Nothing here imports a library before `load_functions` is called.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from types import MappingProxyType, ModuleType
from typing import Any

import torch

from attnbench.backends.device import Device
from attnbench.backends.flash_attn_library import LIBRARIES as FLASH_ATTN_LIBRARIES
from attnbench.backends.flash_attn_library import vllm_package
from attnbench.backends.mla_prefill_library import PREFILLS, usual_prefills
from attnbench.errors import BackendUnavailableError, UsageError

_VLLM_FILES = "pip install vllm==0.22.1 (or put the folder that holds its vllm/ on PYTHONPATH: only"
_FLASHINFER = "pip install flashinfer-python==0.6.11.post2"


@dataclass(frozen=True, slots=True, kw_only=True)
class MLALibrary:
    """One build of one decode kernel.

    functions: what is called (`Class.method` for a class), and the parameters passed by name.
    ops_module, ops: an extension that registers `torch.ops.<namespace>.<name>`, called by position.
    majors: compute capabilities its kernels exist for.
    runs_prefills: its kernels are those of prefills too: there is no second library.
    kernel_pattern: found in the name of a kernel of every decode: read off the symbols of the wheel
        or the source, of TRTLLM-GEN's binaries off others' profiles; not yet seen on hardware.
    """

    variant: str
    module: str
    majors: tuple[int, ...]
    install: str
    kernel_pattern: str
    functions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    ops_module: str = ""
    ops_namespace: str = ""
    ops: tuple[str, ...] = ()
    runs_prefills: bool = False

    @property
    def top(self) -> str:
        return (self.module or self.ops_module).partition(".")[0]

    @property
    def is_found(self) -> bool:
        """Whether its package is installed; it may still fail to import."""
        return self.top in sys.modules or find_spec(self.top) is not None


_KVCACHE = (
    *("q", "k_cache", "block_table", "cache_seqlens", "head_dim_v", "tile_scheduler_metadata"),
    *("softmax_scale", "causal"),
)
_FLASHMLA = (
    MLALibrary(
        variant="VLLM",
        module="vllm.third_party.flashmla.flash_mla_interface",
        majors=(9,),
        kernel_pattern=r"\bflash_fwd_splitkv_mla_kernel",
        install=f"{_VLLM_FILES} vllm/third_party/flashmla and vllm/_flashmla*.so are imported)",
        functions={"flash_mla_with_kvcache": (*_KVCACHE, "out"), "get_mla_metadata": ()},
        ops_module="vllm._flashmla_extension_C",
        ops_namespace="_flashmla_extension_C",
        ops=("get_mla_decoding_metadata_dense_fp8", "fwd_kvcache_mla_fp8"),
    ),
    MLALibrary(
        variant="UPSTREAM",
        module="flash_mla.flash_mla_interface",
        majors=(9,),
        kernel_pattern=r"\bflash_fwd_splitkv_mla_kernel",
        install="build github.com/deepseek-ai/FlashMLA (pip install --no-build-isolation .)",
        functions={"flash_mla_with_kvcache": _KVCACHE, "get_mla_metadata": ()},
    ),
)

_SPARSE_FWD = ("q", "kv", "indices", "sm_scale", "d_v")
_SPARSE_KVCACHE = (
    *("q", "k_cache", "block_table", "cache_seqlens", "head_dim_v", "tile_scheduler_metadata"),
    *("softmax_scale", "is_fp8_kvcache", "indices"),
)
_SPARSE_KERNELS = (
    r"\b(sparse_attn_fwd_kernel|sparse_attn_fwd_for_small_topk_kernel"
    r"|flash_fwd_splitkv_mla_fp8_sparse_kernel)\b"
)
_FLASHMLA_SPARSE = (
    MLALibrary(
        variant="VLLM",
        module="vllm.third_party.flashmla.flash_mla_interface",
        majors=(9, 10),
        kernel_pattern=_SPARSE_KERNELS,
        install=f"{_VLLM_FILES} vllm/third_party/flashmla and vllm/_flashmla*.so are imported)",
        functions={
            "flash_mla_sparse_fwd": (*_SPARSE_FWD, "out"),
            "flash_mla_with_kvcache": (*_SPARSE_KVCACHE, "out"),
            "get_mla_metadata": (),
        },
        runs_prefills=True,
    ),
    MLALibrary(
        variant="UPSTREAM",
        module="flash_mla.flash_mla_interface",
        majors=(9, 10),
        kernel_pattern=_SPARSE_KERNELS,
        install="build github.com/deepseek-ai/FlashMLA (pip install --no-build-isolation .)",
        functions={
            "flash_mla_sparse_fwd": _SPARSE_FWD,
            "flash_mla_with_kvcache": _SPARSE_KVCACHE,
            "get_mla_metadata": (),
        },
        runs_prefills=True,
    ),
)

_SCHEDULE = (
    *("batch_size", "max_seqlen_q", "max_seqlen_k", "num_heads_q", "num_heads_kv", "headdim"),
    *("cache_seqlens", "qkv_dtype", "headdim_v", "cu_seqlens_q", "page_size", "causal"),
    "num_splits",
)
_SCHEDULED = ("softmax_scale", "causal", "scheduler_metadata", "num_splits", "return_softmax_lse")
_FLASH_ATTN = (
    MLALibrary(
        variant="FA3",
        module=FLASH_ATTN_LIBRARIES["FA3"].module,
        majors=(9,),
        kernel_pattern=r"\bflash::FlashAttnFwdSm90",
        install=FLASH_ATTN_LIBRARIES["FA3"].install,
        functions={
            "flash_attn_varlen_func": (
                *("q", "k", "v", "q_v", "out", "max_seqlen_q", "cu_seqlens_q", "max_seqlen_k"),
                *("seqused_k", "block_table", "fa_version", *_SCHEDULED),
            ),
            "get_scheduler_metadata": _SCHEDULE,
        },
    ),
    MLALibrary(
        variant="FA3_UPSTREAM",
        module=FLASH_ATTN_LIBRARIES["FA3_UPSTREAM"].module,
        majors=(9,),
        kernel_pattern=r"\bflash::FlashAttnFwdSm90",
        install=FLASH_ATTN_LIBRARIES["FA3_UPSTREAM"].install,
        functions={
            "flash_attn_with_kvcache": (
                *("q", "k_cache", "v_cache", "qv", "cache_seqlens", "page_table"),
                *("cu_seqlens_q", "max_seqlen_q", *_SCHEDULED),
            ),
            "get_scheduler_metadata": _SCHEDULE,
        },
    ),
)

_WRAPPER = {
    "BatchMLAPagedAttentionWrapper.__init__": (
        *("float_workspace_buffer", "backend", "use_cuda_graph", "qo_indptr", "kv_indptr"),
        *("kv_indices", "kv_len_arr"),
    ),
    "BatchMLAPagedAttentionWrapper.plan": (
        *("qo_indptr", "kv_indptr", "kv_indices", "kv_len_arr", "num_heads", "head_dim_ckv"),
        *("head_dim_kpe", "page_size", "causal", "sm_scale", "q_data_type", "kv_data_type"),
    ),
    "BatchMLAPagedAttentionWrapper.run": (
        *("q_nope", "q_pe", "ckv_cache", "kpe_cache", "out", "lse", "return_lse"),
        "return_lse_base_on_e",
    ),
}
_TRTLLM = {
    "trtllm_batch_decode_with_kv_cache_mla": (
        *("query", "kv_cache", "workspace_buffer", "qk_nope_head_dim", "kv_lora_rank"),
        *("qk_rope_head_dim", "block_tables", "seq_lens", "max_seq_len", "out", "bmm1_scale"),
        *("bmm2_scale", "backend"),
    )
}


def _flashinfer(
    variant: str,
    majors: tuple[int, ...],
    functions: Mapping[str, tuple[str, ...]],
    kernel_pattern: str,
) -> MLALibrary:
    return MLALibrary(
        variant=variant,
        module="flashinfer.mla",
        majors=majors,
        kernel_pattern=kernel_pattern,
        install=_FLASHINFER,
        functions=functions,
    )


_FLASHINFER_MLA = (
    # The same binaries without a paged cache are the kernels of prefills.
    _flashinfer("TRTLLM_GEN", (10,), _TRTLLM, r"\b[fF]mhaSm10\d[a-z]?Kernel_\w*PagedKv"),
    # A CuTe DSL kernel is named after its method and, run together, its module and its class.
    _flashinfer(
        "CUTE_DSL", (10,), _TRTLLM, r"split_kv_kernel_\w*BlackwellMultiLatentAttentionForward"
    ),
    _flashinfer("FA3", (9,), _WRAPPER, r"\bBatchMLAPageAttentionHopperKernel"),
    _flashinfer("FA2", (8, 9, 10, 12), _WRAPPER, r"\bBatchMLAPagedAttentionKernel"),
)
_CUTLASS = (
    MLALibrary(
        variant="SM100",
        module="",
        majors=(10,),
        kernel_pattern=r"\bSm100FmhaMlaKernelTmaWarpspecialized",
        install=f"{_VLLM_FILES} vllm/_C_stable_libtorch.abi3.so is imported)",
        ops_module="vllm._C_stable_libtorch",
        ops_namespace="_C",
        ops=("sm100_cutlass_mla_decode", "sm100_cutlass_mla_get_workspace_size"),
    ),
)


def _by_variant(libraries: tuple[MLALibrary, ...]) -> Mapping[str, MLALibrary]:
    return MappingProxyType({lib.variant: lib for lib in libraries})


#: Backend name: its libraries by decode variant, vLLM's choice first.
MLA_LIBRARIES: Mapping[str, Mapping[str, MLALibrary]] = MappingProxyType(
    {
        "FLASHMLA": _by_variant(_FLASHMLA),
        "FLASHMLA_SPARSE": _by_variant(_FLASHMLA_SPARSE),
        "FLASH_ATTN_MLA": _by_variant(_FLASH_ATTN),
        "FLASHINFER_MLA": _by_variant(_FLASHINFER_MLA),
        "CUTLASS_MLA": _by_variant(_CUTLASS),
    }
)


def split_variant(backend: str, variant: str) -> tuple[MLALibrary, str]:
    """The decode library and the prefill library's name, "" when the variant leaves it open.

    Raises: UsageError for a name that is none.
    """
    decode, plus, prefill = variant.partition("+")
    libraries = MLA_LIBRARIES[backend]
    whole = any(lib.runs_prefills for lib in libraries.values())
    if whole and (plus or decode not in libraries):
        raise UsageError(
            f"{backend} has no variant {variant!r}: its kernels run prefills too; write "
            f"{' or '.join(f'{backend}:{name}' for name in libraries)}"
        )
    if decode not in libraries or (plus and prefill not in PREFILLS):
        raise UsageError(
            f"{backend} has no variant {variant!r}; write {backend}:DECODE or "
            f"{backend}:DECODE+PREFILL with DECODE one of {', '.join(libraries)} and PREFILL one "
            f"of {', '.join(PREFILLS)}"
        )
    return libraries[decode], prefill


def variants_of(backend: str, device: Device) -> tuple[str, ...]:
    """Variants whose kernels exist for `device`, all of them where that is not known."""
    capability = device.capability
    usual = usual_prefills(device)[0]
    others = [
        prefill
        for prefill in PREFILLS
        if prefill != usual
        and (
            capability is None
            or not FLASH_ATTN_LIBRARIES[prefill].majors
            or capability.major in FLASH_ATTN_LIBRARIES[prefill].majors
        )
    ]
    if any(lib.runs_prefills for lib in MLA_LIBRARIES[backend].values()):
        others = []
    decodes = [
        lib.variant
        for lib in MLA_LIBRARIES[backend].values()
        if capability is None or capability.major in lib.majors
    ]
    return (*decodes, *(f"{decode}+{prefill}" for prefill in others for decode in decodes))


def kernel_patterns(backend: str, variant: str, device: Device) -> tuple[str, ...]:
    """`AttentionBackend.kernel_patterns`: those of decode and of prefill; a batch has either."""
    decode, _, prefill = variant.partition("+")
    lib = MLA_LIBRARIES[backend].get(decode)
    if lib is None:
        return ()
    if lib.runs_prefills:
        return (lib.kernel_pattern,)
    prefills = (prefill,) if prefill else usual_prefills(device)
    return (lib.kernel_pattern, *(FLASH_ATTN_LIBRARIES[name].kernel_pattern for name in prefills))


def capability_refusal(backend: str, lib: MLALibrary, device: Device) -> str | None:
    """Why `lib` has no kernel for `device`, with the variants that have one."""
    capability = device.capability
    if capability is None or capability.major in lib.majors:
        return None
    wanted = " or ".join(f"{major}.x" for major in lib.majors)
    reason = f"{lib.variant} needs compute capability {wanted}, {device} has {capability}"
    if others := [v for v in variants_of(backend, device) if "+" not in v]:
        reason += f"; ask for {' or '.join(f'{backend}:{variant}' for variant in others)}"
    return reason


def require_any(backend: str) -> None:
    """Raises BackendUnavailableError when no library of `backend` is installed; imports none."""
    libraries = MLA_LIBRARIES[backend].values()
    if not any(lib.is_found for lib in libraries):
        names = dict.fromkeys(lib.top for lib in libraries)
        commands = dict.fromkeys(lib.install for lib in libraries)
        raise BackendUnavailableError(
            f"{backend} needs {' or '.join(names)}, not installed; {', or '.join(commands)}"
        )


def missing_reason(backend: str, variant: str) -> str | None:
    """Why this process cannot load `variant`, with the command that brings it; None: it can.

    The prefill library is not asked for: a decode needs none, and a prefill without it says so.
    """
    lib = MLA_LIBRARIES[backend].get(variant.partition("+")[0])
    try:
        if lib is not None:  # else the selector says which variants there are
            load_functions(backend, lib)
    except BackendUnavailableError as error:
        return str(error)
    return None


def load_functions(backend: str, lib: MLALibrary) -> dict[str, Callable[..., Any]]:
    """What `lib` is called by, imported now, parameters checked. `Class.method` gives the class.

    Raises: BackendUnavailableError when it is absent, broken, or of another signature.
    """
    loaded: dict[str, Callable[..., Any]] = {}
    modules = [_import(backend, lib, name) for name in (lib.module, lib.ops_module) if name]
    for path, wanted in lib.functions.items():
        name, _, method = path.partition(".")
        found = getattr(modules[0], name, None)
        function = getattr(found, method, None) if method else found
        if found is None or function is None:
            raise _unavailable(backend, lib, f"{lib.module} has no {path}")
        have = inspect.signature(function).parameters
        if lacking := [parameter for parameter in wanted if parameter not in have]:
            raise _unavailable(backend, lib, f"its {path} has no parameter {', '.join(lacking)}")
        loaded[name] = found
    namespace = getattr(torch.ops, lib.ops_namespace) if lib.ops else None
    for name in lib.ops:
        operator = getattr(namespace, name, None)
        if operator is None:
            raise _unavailable(backend, lib, f"{lib.ops_module} registers no {name}")
        loaded[name] = operator
    return loaded


def _import(backend: str, lib: MLALibrary, name: str) -> ModuleType:
    try:
        if name.startswith("vllm."):
            with vllm_package():
                return importlib.import_module(name)
        return importlib.import_module(name)
    # A library built for another torch or CUDA fails in many ways while it is imported.
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        raise _unavailable(backend, lib, f"{type(error).__name__}: {error}") from error


def _unavailable(backend: str, lib: MLALibrary, why: str) -> BackendUnavailableError:
    return BackendUnavailableError(
        f"{backend}:{lib.variant} cannot be imported ({' '.join(why.split())}); {lib.install}"
    )
