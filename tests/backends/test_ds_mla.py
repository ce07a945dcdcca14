"""The `fp8_ds_mla` format against the bytes, read by hand, and the data that needs no rounding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnbench.backends.batch import make_batch
from attnbench.backends.ds_mla import (
    ROW_BYTES,
    TileRounding,
    dequantize_rows,
    quantize_rows,
    write_rows,
)
from attnbench.backends.kv_cache import (
    allocate_kv_cache,
    fill_context,
    read_tokens,
    request_slots,
    stored_planes,
    write_new_tokens,
)
from attnbench.backends.paging import NULL_BLOCK
from attnbench.backends.torch_mla import TorchMLABackend
from attnbench.workload import Workload
from attnbench.workload.cost import DS_MLA_BYTES_PER_TOKEN
from tests.backends.mla.fake_sparse import decode_row


def test_a_token_is_656_bytes_and_one_of_them_by_hand() -> None:
    assert ROW_BYTES == DS_MLA_BYTES_PER_TOKEN == 656
    latent, rope = torch.zeros(1, 512), torch.zeros(1, 64)
    latent[0, 0], latent[0, 1], latent[0, 130] = 448.0, -1.5, 896.0
    rope[0, 63] = -2.0
    (row,) = quantize_rows(latent, rope).tolist()
    assert row[:2] == [0x7E, 0xBC]  # 448: s1111.110; -1.5: 1 0111 100
    assert row[130] == 0x7E
    assert row[512:520] == [0, 0, 0x80, 0x3F, 0, 0, 0, 0x40]  # 1.0 and 2.0
    assert row[-2:] == [0x00, 0xC0]  # bf16 -2
    assert set(row[2:130]) == {0}


@given(st.integers(0, 10_000), st.sampled_from([1e-30, 1e-3, 1.0, 300.0]))
@settings(deadline=None, max_examples=30)
def test_reading_equals_decoding_by_hand_and_errors_are_those_of_e4m3(
    seed: int, size: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    latent = torch.randn((2, 512), generator=generator) * size
    rope = torch.randn((2, 64), generator=generator).to(torch.bfloat16)
    rows = quantize_rows(latent, rope)
    found = dequantize_rows(rows, torch.float64)
    for row, expected in zip(found, rows, strict=True):
        torch.testing.assert_close(row, decode_row(expected), rtol=1e-7, atol=0)
    assert torch.equal(found[:, 512:], rope.double())
    tiles = (found[:, :512] - latent).abs().view(2, 4, 128)
    top = latent.abs().view(2, 4, 128).amax(-1, keepdim=True)
    # Half a unit in the last of three places of what the largest scales to, or of a subnormal.
    bound = torch.maximum(latent.abs().view(2, 4, 128) / 16, top / 448 * 2.0**-10)
    assert bool((tiles <= bound * (1 + 1e-5)).all())


@given(st.integers(0, 10_000), st.sampled_from([1e-20, 0.02, 1.0, 50.0]))
@settings(deadline=None, max_examples=30)
def test_rounded_latents_are_stored_exactly_with_either_sign(seed: int, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn((3, 512), generator=generator) * size
    latent = TileRounding(torch.bfloat16)(drawn)
    signs = torch.randint(0, 2, (3, 512), generator=generator) * 2 - 1
    for values in (latent, latent * signs.to(latent.dtype)):
        rows = quantize_rows(values, torch.zeros(3, 64))
        assert torch.equal(dequantize_rows(rows, torch.bfloat16)[:, :512], values)
    error = (latent.float() - torch.where(_halved(drawn), drawn / 2, drawn)).abs()
    top = drawn.abs().view(3, 4, 128).amax(-1).repeat_interleave(128, 1)
    # e4m3's rounding of all but the largest, which goes up to the next power of two times 448/512.
    assert bool((error <= top).all())
    assert float((error > drawn.abs() / 15 + top / 500).float().mean()) <= 12 / 1536


def _halved(drawn: torch.Tensor) -> torch.Tensor:
    return (drawn.view(3, 4, 128)[..., :1] > 0).expand(-1, -1, 128).reshape(3, 512)


def test_scales_differ_within_a_token_and_between_tokens() -> None:
    latent = TileRounding(torch.bfloat16)(torch.randn(64, 512))
    scales = quantize_rows(latent, torch.zeros(64, 64))[:, 512:528].contiguous().view(torch.float32)
    assert all(len(set(scales[:, tile].tolist())) > 1 for tile in range(4))
    assert sum(len(set(row)) > 1 for row in scales.tolist()) > 32


def test_zeros_and_padding() -> None:
    rows = quantize_rows(torch.zeros(1, 512), torch.zeros(1, 64))
    assert bool((dequantize_rows(rows, torch.float32) == 0).all())
    assert bool(TileRounding(torch.bfloat16)(torch.zeros(2, 512)).isfinite().all())
    cache = torch.full((2, 4, 656), 0xFF, dtype=torch.uint8)
    write_rows(torch.ones(2, 512), torch.ones(2, 1, 64), cache, torch.tensor([-1, 5]))
    written = (cache != 0xFF).any(-1).nonzero().tolist()
    assert written == [[1, 1]]


@pytest.mark.parametrize("kind", ["topk=16:random", ""])
def test_the_cache_of_a_batch(kind: str) -> None:
    """Context exact, new tokens NaN until they are written, what a mask must hide finite."""
    batch = make_batch(
        Workload.parse(f"q3s40_2q1s21 block=8 heads=2 mla=512+64:8+8 kv=fp8_ds_mla {kind}")
    )
    cache = allocate_kv_cache(TorchMLABackend, batch.spec, batch.num_blocks, "cpu")
    assert cache.shape == (batch.num_blocks, 8, 656)
    assert cache.dtype is torch.uint8
    fill_context(batch, cache, TorchMLABackend)
    planes = stored_planes(TorchMLABackend, batch.spec, cache)
    for step in ("before", "after"):
        for i, request in enumerate(batch.requests):
            slots = request_slots(batch, i, torch.arange(request.seq_len))
            key, value = read_tokens(batch, planes, slots)
            expected = batch.keys_values(i)
            known = batch.num_computed(i) if step == "before" else request.seq_len
            for found, wanted in zip((key, value), expected, strict=True):
                assert torch.equal(found[:known], wanted[:known].double())
                assert bool(found[known:].isnan().all())
        write_new_tokens(batch, cache, TorchMLABackend)
    hidden = dequantize_rows(cache[NULL_BLOCK], torch.float32)
    torch.testing.assert_close(hidden, torch.full_like(hidden, 64.0))
