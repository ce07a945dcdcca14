"""Source of the backends of `fake_vllm`, and of what they derive from."""

from __future__ import annotations

BACKEND = """
class MultipleOf:
    def __init__(self, base):
        self.base = base
class Support:
    def __init__(self, name):
        self.name = name
class Builder:
    reorder_batch_threshold = 1
    @classmethod
    def get_cudagraph_support(cls, vllm_config, kv_cache_spec):
        return Support("{graphs}")
class AttentionBackend:
    @staticmethod
    def get_builder_cls():
        return Builder
    @staticmethod
    def get_supported_kernel_block_sizes():
        return [MultipleOf(16)]
    @classmethod
    def get_preferred_block_size(cls, default):
        return default
    @classmethod
    {layout}
    @classmethod
    def get_name(cls):
        return "a name of its own"
"""

ALPHA = """
import vllm._C
from vllm.v1.attention.backend import AttentionBackend
class AlphaBackend(AttentionBackend):
    @classmethod
    def validate_configuration(cls, device_capability, head_size, use_sparse, has_sink, **_rest):
        reasons = []
        if head_size not in (64, 128):
            reasons.append("head_size not supported")
        if use_sparse:
            reasons.append("sparse not supported")
        if has_sink:
            reasons.append("attention sinks not supported")
        if tuple(device_capability) < (8, 0):
            reasons.append("compute capability not supported")
        if _rest["use_mm_prefix"]:
            reasons.append("partial multimodal token full attention not supported")
        if {window} and _rest["has_sliding_window"]:
            reasons.append("sliding window not supported")
        return reasons
"""

BETA = """
import os
from functools import cache
import flashy
from vllm.v1.attention.backend import AttentionBackend
@cache
def has_cubins():
    if os.environ["VLLM_HAS_FLASHINFER_CUBIN"] == "1":
        return True
    import socket
    try:
        socket.create_connection(("kernels.example.org", 443), timeout=5)
    except OSError:
        return False
    return True
class BetaBackend(AttentionBackend):
    @classmethod
    def validate_configuration(cls, device_capability, use_sparse, has_sink, **_rest):
        reasons = []
        if use_sparse:
            reasons.append("sparse not supported")
        if has_sink and not has_cubins():
            reasons.append("attention sinks not supported")
        if {floor} and tuple(device_capability) < (8, 0):
            reasons.append("compute capability not supported")
        return reasons
"""

GAMMA = """
from vllm.v1.attention.backend import AttentionBackend
class GammaBackend(AttentionBackend):
    @classmethod
    def validate_configuration(cls, **_rest):
        return []
"""

ROCM = GAMMA.replace("Gamma", "Rocm")

DELTA = """
from vllm.v1.attention.backend import AttentionBackend
class DeltaBackend(AttentionBackend):
    @classmethod
    def validate_configuration(cls, **_rest):
        try:
            import cleverdsl
        except Exception as error:
            return [f"the DSL entry point failed: {error!r}"]
        return []
"""
