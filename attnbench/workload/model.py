"""The model around an attention layer, for workloads that are a whole step: the word `model=`.

    model=4096:14336:128256                     hidden, MLP and vocabulary sizes: a dense model
    model=7168:18432:129280:q1536:256x2048k8+2048d3
        and the rank of the query's low-rank projection; 256 experts of width 2048, 8 a token, a
        shared MLP of width 2048, 3 dense layers before the first with experts

Sizes are one rank's, as `heads=` are. `layers=` of the same text is how many layers the step has,
dense ones included.

**FLOPs and bytes** of a step: `layers` times those of the attention layer (`workload/cost.py`), and
of every matrix product 2 FLOPs a weight and token, and its weights read once, at the width of the
dtype. The output head sees one token of each request. Of E experts of which each token picks k, T
tokens touch `E (1 - (1 - k/E)^T)` on average when the choice is even. MLA's `W_UK` and `W_UV` count
for requests served in the absorbed form; of others the up-projection is in the attention's count.
Norms, rotations, activations, sampling and what ranks tell each other are not counted.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attnbench.workload.workload import Workload

_TEXT = re.compile(
    r"([1-9]\d{0,8}):(\d{1,9}):([1-9]\d{0,8})(?::q([1-9]\d{0,8}))?"
    r"(?::([1-9]\d{0,5})x([1-9]\d{0,8})k([1-9]\d{0,5})(?:\+([1-9]\d{0,8}))?(?:d([1-9]\d{0,5}))?)?"
)
EXPECTED = "HIDDEN:MLP:VOCABULARY[:qRANK][:EXPERTSxWIDTHkPER_TOKEN[+SHARED][dDENSE_LAYERS]]"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSizes:
    """One rank's sizes of a decoder, beside its attention.

    Attributes:
        intermediate_size: of a dense layer's MLP; 0: no layer has one.
        q_lora_rank: of MLA's query projection; 0: the query is projected at once.
        shared_intermediate_size: of the MLP that all tokens of an expert layer pass; 0: none.
        num_dense_layers: layers before the first with experts; 0 too where none has any.
    """

    hidden_size: int
    intermediate_size: int
    vocab_size: int
    q_lora_rank: int = 0
    num_experts: int = 0
    moe_intermediate_size: int = 0
    num_experts_per_token: int = 0
    shared_intermediate_size: int = 0
    num_dense_layers: int = 0

    @property
    def text(self) -> str:
        """The value of `model=`."""
        words = f"{self.hidden_size}:{self.intermediate_size}:{self.vocab_size}"
        if self.q_lora_rank:
            words += f":q{self.q_lora_rank}"
        if self.num_experts:
            words += (
                f":{self.num_experts}x{self.moe_intermediate_size}k{self.num_experts_per_token}"
            )
            words += f"+{self.shared_intermediate_size}" if self.shared_intermediate_size else ""
            words += f"d{self.num_dense_layers}" if self.num_dense_layers else ""
        return words

    @classmethod
    def parse(cls, text: str) -> ModelSizes:
        """Read `text`. Raises ValueError."""
        match = _TEXT.fullmatch(text)
        if match is None:
            raise ValueError(text)
        numbers = [int(group or 0) for group in match.groups()]
        hidden, mlp, vocab, rank, experts, width, per_token, shared, dense = numbers
        if per_token > experts or (not mlp and (dense or not experts)):
            raise ValueError(text)
        return cls(
            hidden_size=hidden,
            intermediate_size=mlp,
            vocab_size=vocab,
            q_lora_rank=rank,
            num_experts=experts,
            moe_intermediate_size=width,
            num_experts_per_token=per_token,
            shared_intermediate_size=shared,
            num_dense_layers=dense,
        )

    def has_experts(self, layer: int) -> bool:
        """Whether layer number `layer`, counted from 0, has experts."""
        return self.num_experts > 0 and layer >= self.num_dense_layers


def normalise_model(text: str) -> str:
    """The one spelling of a value of `model=`. Raises ValueError."""
    return ModelSizes.parse(text).text


def step_flops(workload: Workload) -> int:
    """Floating-point operations of a step (module docstring: formula)."""
    from attnbench.workload.cost import attention_flops

    sizes, tokens = ModelSizes.parse(workload.model), workload.num_tokens
    flops = workload.shape.num_layers * attention_flops(workload)
    flops += 2 * workload.num_reqs * sizes.hidden_size * sizes.vocab_size
    for layer in range(workload.shape.num_layers):
        flops += 2 * tokens * (_projections(workload, sizes) + _mlp(sizes, layer))
        if sizes.has_experts(layer):
            chosen = sizes.num_experts_per_token * _expert(sizes)
            flops += 2 * tokens * chosen
    return flops + 2 * workload.shape.num_layers * _absorbed_tokens(workload) * _latent(workload)


def step_bytes(workload: Workload) -> int:
    """Bytes a step must move (module docstring: formula)."""
    from attnbench.workload.cost import BYTES_PER_VALUE, attention_bytes

    sizes, layers = ModelSizes.parse(workload.model), workload.shape.num_layers
    weights = float(sizes.hidden_size * sizes.vocab_size)
    for layer in range(layers):
        weights += _projections(workload, sizes) + _mlp(sizes, layer)
        if sizes.has_experts(layer):
            missed = 1.0 - sizes.num_experts_per_token / sizes.num_experts
            touched = sizes.num_experts * (1.0 - missed**workload.num_tokens)
            weights += touched * _expert(sizes)
    if _absorbed_tokens(workload):
        weights += layers * _latent(workload)
    moved = weights * BYTES_PER_VALUE[workload.dtype]
    return layers * attention_bytes(workload) + round(moved)


def _projections(workload: Workload, sizes: ModelSizes) -> int:
    shape, hidden = workload.shape, sizes.hidden_size
    query = shape.num_heads * shape.qk_head_dim
    output = shape.num_heads * shape.v_head_size * hidden
    if not shape.is_mla:
        return (
            hidden * (query + shape.num_kv_heads * (shape.head_size + shape.v_head_size)) + output
        )
    rank = sizes.q_lora_rank
    projected = rank * (hidden + query) if rank else hidden * query
    return projected + hidden * shape.head_size + output


def _mlp(sizes: ModelSizes, layer: int) -> int:
    """What every token passes, the router included."""
    if not sizes.has_experts(layer):
        return 3 * sizes.hidden_size * sizes.intermediate_size
    return sizes.hidden_size * (3 * sizes.shared_intermediate_size + sizes.num_experts)


def _expert(sizes: ModelSizes) -> int:
    return 3 * sizes.hidden_size * sizes.moe_intermediate_size


def _latent(workload: Workload) -> int:
    shape = workload.shape
    if not shape.is_mla:
        return 0
    return shape.num_heads * shape.kv_lora_rank * (shape.qk_nope_head_dim + shape.v_head_size)


def _absorbed_tokens(workload: Workload) -> int:
    from attnbench.workload.cost import is_absorbed

    if not workload.shape.is_mla:
        return 0
    return sum(r.query_len for r in workload.requests if is_absorbed(workload, r))
