"""FLASHMLA_SPARSE through the real libraries on a real device."""

from __future__ import annotations

import pytest
import torch

from attnbench.backends.check import check_output
from attnbench.backends.device import cuda_device
from attnbench.backends.flashmla_sparse import NAME, FlashMLASparseBackend
from attnbench.backends.reference import reference_attention
from attnbench.backends.registry import backend_status
from attnbench.workload import Workload
from tests.backends.mla.sparse_workloads import WORKLOADS, reason
from tests.backends.running import Run
from tests.backends.running import config_of as asked

_SHAPE = "block=64 shape=deepseek-v3.2"
GPU_WORKLOADS = WORKLOADS | {
    "large decode": f"32q1s8k {_SHAPE} topk=2048:random",
    "large decode, tp=8": f"32q1s8k {_SHAPE} tp=8 topk=2048:random",
    "large decode, short": f"8q1s500 {_SHAPE} topk=2048:random",
    "large speculative": f"8q4s4k {_SHAPE} tp=4 topk=2048:random",
    "large prefill": f"q1k {_SHAPE} tp=4 topk=512:random",
    "large extend": f"2q300s4k {_SHAPE} topk=2048:window",
    "large mixed": f"16q1s2k_q700_q200s3k {_SHAPE} topk=1024:random",
}


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.version.hip is not None, reason="no CUDA device here"
)
class TestOnAGpu:
    def run(self, variant: str, text: str) -> Run:
        """Skips with the refusal, and where the library is not here."""
        device = cuda_device(*torch.cuda.get_device_capability())
        config = asked(Workload.parse(text))
        refusals = FlashMLASparseBackend.validate_configuration(config, device)
        refusal = "; ".join(refusals) or FlashMLASparseBackend.variant_refusal(
            variant, config, device
        )
        if refusal := refusal or backend_status(NAME, device, variant):
            pytest.skip(refusal)
        return Run(FlashMLASparseBackend, text, variant, "cuda")

    @pytest.mark.parametrize("variant", ["VLLM", "UPSTREAM"])
    @pytest.mark.parametrize("kv", ["", " kv=fp8_ds_mla"])
    @pytest.mark.parametrize("name", GPU_WORKLOADS)
    def test_output_and_lse_equal_the_reference(self, name: str, kv: str, variant: str) -> None:
        run = self.run(variant, f"{GPU_WORKLOADS[name]}{kv}")
        assert reason(run) == ""
        assert reason(run) == "", "the second call"

    @pytest.mark.parametrize("variant", ["VLLM", "UPSTREAM"])
    @pytest.mark.parametrize("kv", ["", " kv=fp8_ds_mla"])
    @pytest.mark.parametrize("name", ["large decode", "large decode, tp=8", "large speculative"])
    def test_a_captured_graph_replays_to_the_reference(
        self, name: str, kv: str, variant: str
    ) -> None:
        run = self.run(variant, f"{GPU_WORKLOADS[name]}{kv}")
        run.metadata = run.builder.build_for_cudagraph_capture(run.batch.metadata)
        batch, shape, impl = run.batch, run.workload.shape, run.impl
        widths = [shape.qk_nope_head_dim, shape.qk_rope_head_dim]
        nope, rope = torch.split(batch.query, widths, dim=-1)
        query = torch.cat([torch.einsum("thn,hnl->thl", nope, batch.layer.W_UK), rope], -1)
        latent = query.new_empty((*query.shape[:2], shape.kv_lora_rank))
        impl.forward_mqa(batch.layer, query, run.kv_cache, run.metadata, latent)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run.lse = impl.forward_mqa(batch.layer, query, run.kv_cache, run.metadata, latent)
        for _ in range(3):
            latent.fill_(torch.nan)
            graph.replay()
            torch.cuda.synchronize()
            output = torch.einsum("thl,hlv->thv", latent, batch.layer.W_UV)
            check = check_output(
                output,
                reference_attention(batch),
                run.workload.dtype,
                run.workload.resolved_kv_cache_dtype,
                lse=run.lse,
            )
            assert check.reason == ""
