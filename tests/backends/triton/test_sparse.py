"""The kernels around sparse attention against their oracles in torch, and compiled for Hopper."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from triton.runtime.driver import driver

from attnbench.backends.ds_mla import dequantize_rows, quantize_rows, write_rows
from attnbench.backends.topk import topk_slots
from attnbench.backends.triton_aot import _AbsentDevice, aot_device
from attnbench.backends.triton_launch import Launch, is_interpreted
from attnbench.backends.triton_sparse_launch import (
    read_ds_mla_launch,
    topk_slots_launch,
    write_ds_mla_launch,
)

BLOCK = 8


def _indices(tokens: int, topk: int) -> torch.Tensor:
    found = torch.randint(0, 5 * BLOCK, (tokens, topk), dtype=torch.int32)
    return torch.where(torch.rand(found.shape) < 0.3, -1, found)


def _table() -> torch.Tensor:
    return torch.randperm(40, dtype=torch.int32).view(4, 10)[:, :5]  # rows wider than their view


def exact_latents(count: int) -> torch.Tensor:
    """bf16 latents that any right writer stores without rounding: the interpreter rounds wrongly.

    Their tiles are e4m3 numbers times a power of two, which is another one in each.
    """
    codes = torch.randint(-15, 16, (count, 4, 128)).float()
    codes[..., 5] = torch.where(torch.arange(4) % 2 == 0, 448.0, -448.0)
    sizes = torch.exp2(torch.randint(-12, 3, (count, 4, 1)).float())
    return (codes * sizes).flatten(1).to(torch.bfloat16)


def fitted_cache(device: str) -> torch.Tensor:
    """(3, BLOCK, 656) bytes of a larger allocation: blocks do not follow each other."""
    return torch.full((3, BLOCK + 2, 656), 0xFF, dtype=torch.uint8, device=device)[:, :BLOCK]


def check_slots(device: str) -> None:
    for topk, width in ((3, 128), (128, 128), (600, 640)):
        indices, table = _indices(6, topk).to(device), _table().to(device)
        request = torch.tensor([0, 0, 1, 3, 3, 2], dtype=torch.int32, device=device)
        expected = torch.full((6, width), -1, dtype=torch.int32, device=device)
        expected[:, :topk] = topk_slots(indices, request, table, BLOCK)
        slots = torch.full((6, width), 77, dtype=torch.int32, device=device)
        topk_slots_launch(slots, indices, request, table, BLOCK).run()
        assert torch.equal(slots, expected)
        start = torch.tensor([-1, -1, 0, 70, 70, -1], dtype=torch.int32, device=device)
        moved = torch.where(indices >= 0, indices + start[:, None], -1)
        expected[:, :topk] = torch.where(start[:, None] >= 0, moved, expected[:, :topk])
        topk_slots_launch(slots, indices, request, table, BLOCK, start).run()
        assert torch.equal(slots, expected)


def check_cache(device: str, dtype: torch.dtype) -> None:
    latent, rope = exact_latents(4).to(device), torch.randn(4, 1, 64).to(torch.bfloat16).to(device)
    latent[2, 128:256] = 0
    slots = torch.tensor([17, -1, 3, 8], device=device)
    expected, cache = fitted_cache(device), fitted_cache(device)
    write_rows(latent, rope, expected, slots)
    write_ds_mla_launch(latent, rope, cache, slots).run()
    assert torch.equal(cache, expected)
    keep = torch.tensor([0, 2, 3], device=device)
    output = torch.full((3, 576), torch.nan, dtype=dtype, device=device)
    read_ds_mla_launch(output, cache, slots[keep].to(torch.int32)).run()
    real = torch.cat([latent, rope.flatten(1)], dim=1)[keep]
    assert torch.equal(output, real.to(dtype))
    rows = quantize_rows(latent, rope.flatten(1))
    assert torch.equal(dequantize_rows(rows, dtype)[keep], output)


@pytest.mark.interpreter
@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1 from the start"
)
class TestInterpreted:
    def test_positions_become_slots(self) -> None:
        check_slots("cpu")

    def test_the_cache_is_written_and_read(self) -> None:
        check_cache("cpu", torch.float32)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
class TestOnAGpu:
    def test_positions_become_slots(self) -> None:
        check_slots("cuda")

    def test_the_cache_is_written_and_read(self) -> None:
        if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 9):
            pytest.skip("no e4m3 below compute capability 8.9")
        check_cache("cuda", torch.bfloat16)

    def test_any_numbers_are_quantised_as_torch_does(self) -> None:
        if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 9):
            pytest.skip("no e4m3 below compute capability 8.9")
        latent = torch.randn(24, 512, device="cuda").to(torch.bfloat16)
        rope = torch.randn(24, 1, 64, device="cuda").to(torch.bfloat16)
        slots = torch.arange(24, device="cuda")
        expected, cache = fitted_cache("cuda"), fitted_cache("cuda")
        write_rows(latent, rope, expected, slots)
        write_ds_mla_launch(latent, rope, cache, slots).run()
        assert torch.equal(cache, expected)


@pytest.fixture
def hopper() -> Iterator[None]:
    before = driver._active
    driver.set_active(_AbsentDevice(aot_device("sm90")))
    yield
    driver._active = before


@pytest.mark.skipif(is_interpreted(), reason="TRITON_INTERPRET=1 excludes compiling")
@pytest.mark.usefixtures("hopper")
def test_they_compile_for_hopper() -> None:
    def meta(*size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    cache = meta(64, 64, 656, dtype=torch.uint8)
    ints = meta(8, dtype=torch.int32)
    table, indices = meta(8, 64, dtype=torch.int32), meta(8, 2048, dtype=torch.int32)
    rope = meta(8, 1, 64, dtype=torch.bfloat16)
    launches: list[Launch] = [
        topk_slots_launch(indices, indices, ints, table, 64),
        topk_slots_launch(indices, indices, ints, table, 64, ints),
        write_ds_mla_launch(
            meta(8, 512, dtype=torch.bfloat16), rope, cache, meta(8, dtype=torch.int64)
        ),
        read_ds_mla_launch(meta(8, 576, dtype=torch.bfloat16), cache, ints),
    ]
    for launch in launches:
        compiled = launch.kernel.warmup(
            grid=launch.grid,
            **launch.arguments,
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
        )
        assert "cubin" in compiled.asm
        assert compiled.metadata.shared <= 48 * 1024
