"""A vLLM of a few hundred lines in each shape its selector's API has had.

`write(folder, shape)` writes the package and its dist-info. Only what the probe touches exists; the
backends (`fake_vllm_backends`) are three with known rules, so that every answer can be worked out
by hand:

- ALPHA: head sizes 64 and 128, compute capability 8.0 and later, no multimodal prefix, needs the
  extension `vllm._C`.
- BETA: any head size; needs the package `flashy`; with sinks it needs pre-built kernels (the
  environment variable VLLM_HAS_FLASHINFER_CUBIN), as FlashInfer does.
- GAMMA: everything.

`new` turns the order of ALPHA and BETA round on 9.x, drops 7.5 from BETA, and adds DELTA, which
sparse cells get. ROCM_ATTN is on no list and accepts everything. `new` also renames a field of
AttentionConfig and ends a flag. `future` has a field in its configuration the probe cannot know.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from tests.upgrade import fake_vllm_backends as backends

Shape = Literal["old", "new", "future"]
VERSIONS = {"old": "0.22.9", "new": "0.30.9", "future": "9.9.9"}

_PLATFORMS = """
from vllm.platforms.interface import DeviceCapability
_current_platform = None
def __getattr__(name):
    global _current_platform
    if name == "current_platform":
        if _current_platform is None:
            from vllm.third_party import pynvml
            pynvml.nvmlInit()
            assert pynvml.nvmlDeviceGetCount() == 1
            from vllm.platforms.cuda import CudaPlatform
            _current_platform = CudaPlatform()
        return _current_platform
    raise AttributeError(name)
"""

_INTERFACE = """
from typing import NamedTuple
class DeviceCapability(NamedTuple):
    major: int
    minor: int
"""

_CPU = """
class CpuPlatform:
    device_name = "cpu"
    @classmethod
    def get_device_capability(cls):
        return None
    @classmethod
    def get_attn_backend_cls(cls, selected_backend, attn_selector_config, num_heads=None):
        if attn_selector_config.use_sparse:
            raise NotImplementedError("Sparse Attention is not supported on CPU.")
        return "vllm.v1.attention.backends.gamma.GammaBackend"
"""

_CUDA = """
import vllm._C
from functools import cache
from typing import NamedTuple
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backends.registry import AttentionBackendEnum as E
NEW = {new}
class _BackendCandidate(NamedTuple):
    backend_class: type
    backend: E
    priority: int
@cache
def _get_backend_priorities(capability, use_sparse):
    if NEW and use_sparse:
        return [E.DELTA, E.GAMMA]
    if NEW and capability.major == 9:
        return [E.BETA, E.ALPHA, E.GAMMA]
    return [E.ALPHA, E.BETA, E.GAMMA]
class CudaPlatform:
    device_name = "cuda"
    @classmethod
    def get_device_capability(cls):
        from vllm.third_party import pynvml
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        return DeviceCapability(*pynvml.nvmlDeviceGetCudaComputeCapability(handle))
    @classmethod
    def get_valid_backends(cls, device_capability, attn_selector_config, num_heads=None):
        valid, invalid = [], {{}}
        names = _get_backend_priorities(device_capability, attn_selector_config.use_sparse)
        for priority, backend in enumerate(names):
            try:
                cls = backend.get_class()
                reasons = cls.validate_configuration(
                    device_capability=device_capability, **attn_selector_config._asdict())
            except ImportError as error:
                reasons = [f"ImportError: {{error}}"] if NEW else ["ImportError"]
            if reasons:
                invalid[backend] = (priority, reasons)
            elif NEW:
                valid.append(_BackendCandidate(cls, backend, priority))
            else:
                valid.append((backend, priority))
        return valid, invalid
    @classmethod
    def get_attn_backend_cls(cls, selected_backend, attn_selector_config, num_heads=None):
        valid, invalid = cls.get_valid_backends(
            cls.get_device_capability(), attn_selector_config, num_heads)
        if selected_backend is not None:
            reasons = selected_backend.get_class().validate_configuration(
                device_capability=cls.get_device_capability(), **attn_selector_config._asdict())
            if reasons:
                raise ValueError(
                f"Selected backend {{selected_backend}} is not valid for this configuration. "
                f"Reason: {{reasons}}")
            return selected_backend.get_path()
        if not valid:
            raise ValueError("No valid attention backend found")
        first = valid[0].backend if NEW else valid[0][0]
        return first.get_path()
"""

_REGISTRY = """
from enum import Enum
class AttentionBackendEnum(Enum):
    ALPHA = "vllm.v1.attention.backends.alpha.AlphaBackend"
    BETA = "vllm.v1.attention.backends.beta.BetaBackend"
    GAMMA = "vllm.v1.attention.backends.gamma.GammaBackend"
    ROCM_ATTN = "vllm.v1.attention.backends.rocm.RocmBackend"
    {delta}
    CUSTOM = ""
    def get_path(self):
        if not self.value:
            raise ValueError("no class")
        return self.value
    def get_class(self):
        import importlib
        module, _, name = self.get_path().rpartition(".")
        return getattr(importlib.import_module(module), name)
"""

_SELECTOR = """
from functools import cache
from typing import NamedTuple
class AttentionSelectorConfig(NamedTuple):
    head_size: int
    dtype: object
    kv_cache_dtype: str
    block_size: int
    use_mla: bool = False
    has_sink: bool = False
    use_sparse: bool = False
    use_mm_prefix: bool = False
    use_batch_invariant: bool = False
    {fields}
def get_attn_backend(head_size, dtype, kv_cache_dtype, use_mla=False, has_sink=False,
                     use_sparse=False, use_mm_prefix=False, num_heads=None{arguments}):
    assert kv_cache_dtype in ("auto", "fp8"), f"Invalid kv_cache_dtype: {{kv_cache_dtype}}"
    import os
    from vllm.config import get_current_vllm_config
    config = get_current_vllm_config()
    {surprise}
    cache_config = config.cache_config
    asked = AttentionSelectorConfig(
        head_size=head_size, dtype=dtype, kv_cache_dtype=kv_cache_dtype,
        block_size=cache_config.block_size if cache_config.user_specified_block_size else None,
        use_mla=use_mla, has_sink=has_sink, use_sparse=use_sparse, use_mm_prefix=use_mm_prefix,
        use_batch_invariant=os.environ["VLLM_BATCH_INVARIANT"] == "1", {values})
    return _cached(config.attention_config.backend, asked, num_heads)
@cache
def _cached(backend, asked, num_heads):
    from vllm.platforms import current_platform
    import importlib
    path = current_platform.get_attn_backend_cls(
        backend, attn_selector_config=asked, num_heads=num_heads)
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)
"""

_CONFIG_VLLM = """
_current_vllm_config = None
def get_current_vllm_config():
    return _current_vllm_config
"""

_ATTENTION_CONFIG = """
class AttentionConfig:
    def __init__(self, backend=None, flash_attn_version=None, use_trtllm_attention=None,
                 {field}=None):
        from vllm.v1.attention.backends.registry import AttentionBackendEnum
        if isinstance(backend, str):
            backend = backend.upper()
            if backend not in AttentionBackendEnum.__members__:
                raise ValueError(f"Unknown attention backend: {{backend!r}}")
            backend = AttentionBackendEnum[backend]
        self.backend = backend
        self.flash_attn_version = flash_attn_version
        self.use_trtllm_attention = use_trtllm_attention
        self.{field} = {field}
"""

_ENVS = """
import os
def layout():
    value = os.environ.get("VLLM_KV_CACHE_LAYOUT")
    if value not in (None, "NHD", "HND"):
        raise ValueError(f"Invalid value {value!r} for VLLM_KV_CACHE_LAYOUT")
    return value
environment_variables = {
    "VLLM_KV_CACHE_LAYOUT": layout,
    "VLLM_BATCH_INVARIANT": lambda: os.environ.get("VLLM_BATCH_INVARIANT") == "1",
}
"""

_ARG_UTILS = """
import a_package_that_is_nowhere
CASCADE = "deprecated and has no effect"
def add_cli_args(parser, group, config):
    group.add_argument("--attention-backend", **config["backend"])
    parser.add_argument("--attention-config", "-ac", **config["attention"])
    parser.add_argument("--block-size", type=int)
    parser.add_argument("--kv-cache-dtype")
    parser.add_argument("--disable-cascade-attn", help={cascade})
"""

_CACHE = """
from typing import Literal
CacheDType = Literal["auto", "fp8"]
class CacheConfig:
    DEFAULT_BLOCK_SIZE = 16
"""

_SPECS = """
from dataclasses import dataclass
@dataclass
class FullAttentionSpec:
    block_size: int
    num_kv_heads: int
    head_size: int
    dtype: object
@dataclass
class MLAAttentionSpec(FullAttentionSpec):
    pass
"""


def write(folder: Path, shape: Shape = "old") -> Path:
    """Write the package into `folder` and give it back: what `PreparedVersion.paths` names."""
    new = shape != "old"
    layout = (
        "def supported_kv_cache_layouts(cls):\n        return ('LBHNC', 'BLHNC')"
        if new
        else "def get_required_kv_cache_layout(cls):\n        import os\n"
        "        return os.environ.get('VLLM_KV_CACHE_LAYOUT', 'HND')"
    )
    files = {
        "__init__": "",
        "platforms/__init__": _PLATFORMS,
        "platforms/interface": _INTERFACE,
        "platforms/cpu": _CPU,
        "platforms/cuda": _CUDA.format(new=new),
        "third_party/__init__": "",
        "config/__init__": "from vllm.config.vllm import get_current_vllm_config\n",
        "config/vllm": _CONFIG_VLLM,
        "config/attention": _ATTENTION_CONFIG.format(
            field="indexer_kv_dtype" if new else "use_fp4_indexer_cache"
        ),
        "config/cache": _CACHE,
        "envs": _ENVS,
        "engine/__init__": "",
        "engine/arg_utils": _ARG_UTILS.format(cascade="CASCADE" if new else "'less overhead'"),
        "elsewhere": "# reads VLLM_MLA_BY_THE_WAY\n",
        "v1/__init__": "",
        "v1/kv_cache_interface": _SPECS,
        "v1/attention/__init__": "",
        "v1/attention/backend": backends.BACKEND.format(
            layout=layout, graphs="ALWAYS" if new else "NEVER"
        ),
        "v1/attention/selector": _SELECTOR.format(
            fields="has_sliding_window: bool = False" if new else "",
            arguments=", has_sliding_window=False" if new else "",
            values="has_sliding_window=has_sliding_window" if new else "",
            surprise="config.cache_config.quantum_state" if shape == "future" else "",
        ),
        "v1/attention/backends/__init__": "",
        "v1/attention/backends/registry": _REGISTRY.format(
            delta='DELTA = "vllm.v1.attention.backends.delta.DeltaBackend"' if new else ""
        ),
        "v1/attention/backends/alpha": backends.ALPHA.format(window=new),
        "v1/attention/backends/beta": backends.BETA.format(floor=new),
        "v1/attention/backends/gamma": backends.GAMMA,
        "v1/attention/backends/rocm": backends.ROCM,
        "v1/attention/backends/delta": backends.DELTA if new else "",
    }
    for name, text in files.items():
        path = folder / "vllm" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    info = folder / f"vllm-{VERSIONS[shape]}.dist-info"
    info.mkdir()
    pins = "Requires-Dist: torch==2.14.0\n" if new else "Requires-Dist: torch==2.11.0\n"
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: vllm\nVersion: {VERSIONS[shape]}\n{pins}", encoding="utf-8"
    )
    (info / "RECORD").write_text("vllm/__init__.py,,\nvllm/_C.abi3.so,,\n", encoding="utf-8")
    return folder


def write_package(folder: Path, name: str) -> Path:
    """An empty package beside it: `flashy`, which BETA needs."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.py").write_text("", encoding="utf-8")
    return folder
