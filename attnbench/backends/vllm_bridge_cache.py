"""The two KV-cache APIs of vLLM's backends, as one: which shape, which order, which view.

- Up to 0.2x a backend states its cache (`get_kv_cache_shape`, `get_kv_cache_stride_order`), and the
  layout is a global.
- From 0.30 on a cache is `(num_blocks, head slots, states, content)` of the layer's spec, which the
  backend may repack (`customize_spec`), in one of the layouts it names
  (`supported_kv_cache_layouts`); the layout is in the configuration.

Which one an installed vLLM has is read off its `AttentionBackend`.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any, NamedTuple

import torch

from attnbench.backends.abstract import MultipleOf
from attnbench.backends.dtypes import is_fp8, torch_dtype
from attnbench.errors import BackendUnavailableError, WorkloadError

#: Our layouts as orders of the logical `(blocks, heads, tokens, content)` of 0.30+.
_VIEW_ORDERS = {"NHD": (0, 2, 1, 3), "HND": (0, 1, 2, 3)}


class _Numbers(NamedTuple):
    """What a KV-cache spec is asked for."""

    block_size: int
    num_kv_heads: int
    head_size: int


class CacheApi(ABC):
    """How KV caches are described. `theirs` is a backend class of vLLM."""

    @abstractmethod
    def shape(
        self,
        theirs: type[Any],
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        kv_cache_dtype: str,
    ) -> tuple[int, ...]:
        """Logical shape in the words of `AttentionBackend.get_kv_cache_shape`.

        Raises: WorkloadError for a cache that is no K and V of one size (nor one latent).
        """

    @abstractmethod
    def stride_order(self, theirs: type[Any], layout: str) -> tuple[int, ...]:
        """Physical order of that shape's dimensions. Raises NotImplementedError: as it is."""

    @abstractmethod
    def layouts(self, theirs: type[Any]) -> tuple[str, ...]:
        """Which of NHD and HND its kernels take; empty: neither."""

    @abstractmethod
    def kernel_block_sizes(self, theirs: type[Any]) -> tuple[int | MultipleOf, ...]:
        """Block sizes its kernels take, exact or as multiples."""

    @abstractmethod
    def apply_layout(self, config: Any, layout: str) -> None:
        """Make `layout` the one vLLM sees."""

    @abstractmethod
    def spec(self, theirs: type[Any], layer: Any, config: Any, block_size: int) -> Any:
        """The KV-cache spec of a layer of any `attn_type`, as its builder gets it."""

    @abstractmethod
    def view(self, kv_cache: torch.Tensor, num_blocks: int | None) -> torch.Tensor:
        """The cache as vLLM hands it to an impl: a view, of the first `num_blocks` blocks."""


def cache_api(base: type[Any]) -> CacheApi:
    """The API of vLLM's `AttentionBackend`. Raises BackendUnavailableError when it is neither."""
    if hasattr(base, "customize_spec"):
        return CacheApiSince030()
    if hasattr(base, "get_kv_cache_shape"):
        return CacheApiBefore030()
    raise BackendUnavailableError(
        "this vLLM's AttentionBackend has neither get_kv_cache_shape nor customize_spec; "
        "pip install vllm==0.22.1, whose API is known"
    )


def _block_sizes(sizes: Sequence[Any]) -> tuple[int | MultipleOf, ...]:
    return tuple(size if isinstance(size, int) else MultipleOf(size.base) for size in sizes)


def _spec_of(layer: Any, config: Any) -> Any:
    """The layer's own spec; those of other than decoders are made by layers and runners around it.

    (`CrossAttention.get_kv_cache_spec`; `EncoderOnlyAttentionSpec` in the model runner.)
    """
    if getattr(layer, "attn_type", "decoder") == "decoder":
        return layer.get_kv_cache_spec(config)
    interface = importlib.import_module("vllm.v1.kv_cache_interface")
    facts = {
        "block_size": config.cache_config.block_size,
        "num_kv_heads": layer.num_kv_heads,
        "head_size": layer.head_size,
        "dtype": layer.kv_cache_torch_dtype,
    }
    if layer.attn_type == "encoder_decoder":
        quant_mode = interface.get_kv_quant_mode(layer.kv_cache_dtype)
        return interface.CrossAttentionSpec(**facts, kv_quant_mode=quant_mode)
    return interface.EncoderOnlyAttentionSpec(**facts)


def _as_bytes(kv_cache: torch.Tensor) -> torch.Tensor:
    """vLLM allocates fp8 caches as bytes; impls view them as fp8 themselves."""
    return kv_cache.view(torch.uint8) if is_fp8(kv_cache.dtype) else kv_cache


class CacheApiBefore030(CacheApi):
    """`get_kv_cache_shape` and `get_kv_cache_stride_order`."""

    def shape(
        self,
        theirs: type[Any],
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        kv_cache_dtype: str,
    ) -> tuple[int, ...]:
        found: tuple[int, ...] = theirs.get_kv_cache_shape(
            num_blocks, block_size, num_kv_heads, head_size, kv_cache_dtype
        )
        wanted = 3 if theirs.is_mla() else 5
        if len(found) != wanted or prod(found) != prod(
            (num_blocks, block_size, num_kv_heads, head_size, 1 if theirs.is_mla() else 2)
        ):
            raise _unknown_form(theirs, found)
        return tuple(found)

    def stride_order(self, theirs: type[Any], layout: str) -> tuple[int, ...]:
        self._set_layout(layout)
        order: tuple[int, ...] = theirs.get_kv_cache_stride_order()
        return tuple(order)

    def layouts(self, theirs: type[Any]) -> tuple[str, ...]:
        required = theirs.get_required_kv_cache_layout()
        return ("NHD", "HND") if required is None else (required,)

    def kernel_block_sizes(self, theirs: type[Any]) -> tuple[int | MultipleOf, ...]:
        return _block_sizes(theirs.get_supported_kernel_block_sizes())

    def apply_layout(self, config: Any, layout: str) -> None:
        self._set_layout(layout)

    def spec(self, theirs: type[Any], layer: Any, config: Any, block_size: int) -> Any:
        return replace(_spec_of(layer, config), block_size=block_size)

    def view(self, kv_cache: torch.Tensor, num_blocks: int | None) -> torch.Tensor:
        kv_cache = _as_bytes(kv_cache)
        if num_blocks is None or kv_cache.dim() < 3:
            return kv_cache
        # K and V first, or blocks first; a latent cache has blocks first.
        axis = 1 if kv_cache.dim() == 5 and kv_cache.shape[0] == 2 else 0
        return kv_cache.narrow(axis, 0, num_blocks)

    @staticmethod
    def _set_layout(layout: str) -> None:
        utils = importlib.import_module("vllm.v1.attention.backends.utils")
        utils.set_kv_cache_layout(layout)


class CacheApiSince030(CacheApi):
    """`customize_spec` and `supported_kv_cache_layouts`.

    Logical shapes here: `(blocks, heads, tokens, 2, size)` when K and V of a token lie side by
    side, `(blocks, 2, heads, tokens, size)` when the backend gives each its own head slots.
    """

    def shape(
        self,
        theirs: type[Any],
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        kv_cache_dtype: str,
    ) -> tuple[int, ...]:
        asked = _Numbers(block_size, num_kv_heads, head_size)
        found = self._content(theirs, asked, kv_cache_dtype)
        size = head_size * torch_dtype(kv_cache_dtype).itemsize
        if theirs.is_mla():
            if found == (1, block_size, size):
                return (num_blocks, block_size, head_size)
        elif found == (num_kv_heads, block_size, 2 * size) and not self._has_planes(theirs):
            return (num_blocks, num_kv_heads, block_size, 2, head_size)
        elif found == (2 * num_kv_heads, block_size, size) and self._has_planes(theirs):
            return (num_blocks, 2, num_kv_heads, block_size, head_size)
        raise _unknown_form(theirs, (num_blocks, *found))

    @staticmethod
    def _content(theirs: type[Any], asked: _Numbers, kv_cache_dtype: str) -> tuple[int, int, int]:
        """(head slots, states, bytes of a state) that a backend makes of a usual spec."""
        interface = importlib.import_module("vllm.v1.kv_cache_interface")
        dtype = torch_dtype(kv_cache_dtype)
        make = interface.MLAAttentionSpec if theirs.is_mla() else interface.FullAttentionSpec
        usual = make(
            block_size=asked.block_size,
            num_kv_heads=asked.num_kv_heads,
            head_size=asked.head_size,
            dtype=torch.uint8 if is_fp8(dtype) else dtype,
            kv_quant_mode=interface.get_kv_quant_mode(kv_cache_dtype),
        )
        spec = theirs.customize_spec(usual)
        states = spec.get_num_kernel_states(asked.block_size)
        return spec.num_heads, states, spec.state_content_size_bytes

    def _has_planes(self, theirs: type[Any]) -> bool:
        """Whether K and V have head slots of their own, else they lie beside each other.

        Asked with numbers that differ: with one or two heads a cache of another form, such as one
        slot with all heads for each of K and V, has the same numbers.

        Raises: WorkloadError for another form.
        """
        asked = _Numbers(32, 3, 64)
        found = self._content(theirs, asked, "bf16")
        if found not in ((3, 32, 256), (6, 32, 128)):
            raise _unknown_form(theirs, found)
        return found[0] == 6

    def stride_order(self, theirs: type[Any], layout: str) -> tuple[int, ...]:
        if theirs.is_mla():
            return (0, 1, 2)
        dims: tuple[tuple[int, ...], ...] = ((0,), (1,), (2,), (3, 4))
        if self._has_planes(theirs):
            dims = ((0,), (1, 2), (3,), (4,))
        return tuple(dim for axis in _VIEW_ORDERS[layout] for dim in dims[axis])

    def layouts(self, theirs: type[Any]) -> tuple[str, ...]:
        supported = theirs.supported_kv_cache_layouts()
        if supported is None or theirs.is_mla():
            return ("NHD", "HND")
        orders = {tuple(layout.layer_view_order) for layout in supported}
        return tuple(name for name, order in _VIEW_ORDERS.items() if order in orders)

    def kernel_block_sizes(self, theirs: type[Any]) -> tuple[int | MultipleOf, ...]:
        return _block_sizes(theirs.get_supported_kernel_block_sizes())

    def apply_layout(self, config: Any, layout: str) -> None:
        config.cache_config.kv_cache_layout = {"NHD": "LBNHC", "HND": "LBHNC"}[layout]

    def spec(self, theirs: type[Any], layer: Any, config: Any, block_size: int) -> Any:
        spec = theirs.customize_spec(_spec_of(layer, config))
        return replace(spec, block_size=block_size)

    def view(self, kv_cache: torch.Tensor, num_blocks: int | None) -> torch.Tensor:
        kv_cache = _as_bytes(kv_cache)
        if num_blocks is not None and kv_cache.dim() >= 3:
            kv_cache = kv_cache.narrow(0, 0, num_blocks)
        if kv_cache.dim() != 5:
            return kv_cache
        # `flatten` would copy what cannot be a view; `view` refuses.
        shape = kv_cache.shape
        if shape[3] == 2:
            return kv_cache.view(*shape[:3], 2 * shape[4])
        return kv_cache.view(shape[0], 2 * shape[2], *shape[3:])


def _unknown_form(theirs: type[Any], shape: Sequence[int]) -> WorkloadError:
    return WorkloadError(
        f"VLLM:{theirs.__name__} keeps its KV cache as {tuple(shape)}, which is neither K and V of "
        "one size nor one latent a token; measure another backend"
    )
