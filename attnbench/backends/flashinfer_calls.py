"""What FlashInfer's planners make: the requests of one phase, ready to be run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch

from attnbench.backends.dtypes import is_fp8
from attnbench.backends.impl import AttentionLayer
from attnbench.backends.paged_ops import quantize
from attnbench.errors import UsageError

#: vLLM 0.22.1's VLLM_FLASHINFER_WORKSPACE_BUFFER_SIZE: how far contexts can be split.
WORKSPACE_BYTES = 394 * 1024 * 1024


@lru_cache(maxsize=8)
def workspace(device: torch.device, kernels: str) -> torch.Tensor:
    """Scratch of one kind of kernels, zero before its first use: shared by all calls on a device,
    which run one after another, so that copies of a point do not each hold theirs."""
    return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)


#: FlashInfer's LSE is of base 2.
LN_2 = 0.6931471805599453


@dataclass(frozen=True, slots=True)
class LayerInputs:
    """What a call takes of its layer besides tokens. Scales are 1 unless the cache is fp8."""

    query_scale: float
    key_scale: float
    value_scale: float
    sinks: torch.Tensor | None

    @classmethod
    def of(
        cls, layer: AttentionLayer, sinks: torch.Tensor | None, is_quantized: bool
    ) -> LayerInputs:
        if not is_quantized:
            return cls(1.0, 1.0, 1.0, sinks)
        return cls(layer._q_scale_float, layer._k_scale_float, layer._v_scale_float, sinks)


class Planned(Protocol):
    """The requests of one phase, ready to run over any layer of the same shape."""

    def run(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        output: torch.Tensor,
        inputs: LayerInputs,
        return_lse: bool,
    ) -> torch.Tensor | None:
        """Attention of the phase's tokens into `output`.

        Args:
            query, output: (num_tokens, num_heads, head_size) of the phase.
            kv_cache: (num_blocks, 2, ...) in the order of the layout.

        Returns: LSE (num_tokens, num_heads) float32 of base e, if asked for.
        Raises: UsageError where the kernels give no LSE.
        """
        ...


@dataclass(slots=True, weakref_slot=True)
class PlannedWrapper:
    """A planned prefill or decode wrapper."""

    wrapper: Any
    takes_fp8_query: bool
    is_quantized: bool

    def run(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        output: torch.Tensor,
        inputs: LayerInputs,
        return_lse: bool,
    ) -> torch.Tensor | None:
        scales: dict[str, float] = {}
        if self.is_quantized:
            scales = {"k_scale": inputs.key_scale, "v_scale": inputs.value_scale}
        if self.takes_fp8_query:
            query = as_fp8(query, inputs)
            scales["q_scale"] = inputs.query_scale
        result = self.wrapper.run(
            q=query, paged_kv_cache=kv_cache, out=output, return_lse=return_lse, **scales
        )
        return result[1] * LN_2 if return_lse else None


@dataclass(slots=True, weakref_slot=True)
class PlannedCascade:
    """A planned cascade wrapper. It returns a new tensor: the copy is in the time."""

    wrapper: Any

    def run(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        output: torch.Tensor,
        inputs: LayerInputs,
        return_lse: bool,
    ) -> torch.Tensor | None:
        if return_lse:
            raise no_lse("CASCADE")
        output.copy_(self.wrapper.run(q=query, paged_kv_cache=kv_cache))
        return None


def no_lse(name: str) -> UsageError:
    return UsageError(f"FLASHINFER:{name} gives no LSE; ask for FLASHINFER:FA2")


def as_fp8(query: torch.Tensor, inputs: LayerInputs) -> torch.Tensor:
    if is_fp8(query.dtype):
        return query
    return quantize(query, torch.float8_e4m3fn, inputs.query_scale)


@dataclass(slots=True)
class PlannedTrtllm:
    """A call of XQA or TRTLLM-GEN; `arguments` are those that no layer changes."""

    kernels: str
    function: Callable[..., Any]
    takes_fp8_query: bool
    scale: float
    arguments: dict[str, Any]

    def run(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        output: torch.Tensor,
        inputs: LayerInputs,
        return_lse: bool,
    ) -> torch.Tensor | None:
        if return_lse:
            raise no_lse(self.kernels.upper().replace("-", "_"))
        scale = self.scale * inputs.key_scale
        if self.takes_fp8_query:
            query = as_fp8(query, inputs)
            scale *= inputs.query_scale
        self.function(
            query=query,
            kv_cache=kv_cache,
            bmm1_scale=scale,
            bmm2_scale=inputs.value_scale,
            out=output,
            sinks=inputs.sinks,
            **self.arguments,
        )
        return None
