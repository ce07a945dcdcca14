"""`--model` of the traffic verbs: a registered name or a `config.json`, as `choose` takes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from attnbench.cli.output import note
from attnbench.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from attnbench.upgrade.cells import Cell
    from attnbench.workload import Workload


@dataclass(frozen=True, slots=True)
class ModelLayer:
    """The attention layer that a trace is reduced for, and the model around it.

    Attributes:
        layer: one rank's share, as a workload; its batch is not looked at.
        num_layers: how many of the model's are such.
        sizes: whose linear layers are around it, as `linear_sizes` takes it.
    """

    layer: Workload
    num_layers: int
    sizes: str | Mapping[str, Any]


def model_layer(model: str, tensor_parallel_size: int, words: str = "") -> ModelLayer:
    """A model's attention layer, e.g. with words `kv=fp8_e4m3 block=64` in place of the model's.

    Raises:
        UsageError, WorkloadError: an unknown model, ranks or words that are no workload's.
    """
    from attnbench.upgrade.models import cells_of_model

    if tensor_parallel_size < 1:
        raise UsageError(f"--tp {tensor_parallel_size}: give the number of ranks, 1 or more")
    cells = cells_of_model(model, tensor_parallel_size=tensor_parallel_size)
    if len(cells) > 1:
        note(
            f"{model} has {len(cells)} kinds of attention layer; the batches and their times are "
            f"of the first, {cells[0].text!r}, and the others take no time here"
        )
    return layer_of_cell(cells[0], model, words)


def layer_of_cell(cell: Cell, model: str, words: str = "") -> ModelLayer:
    """As `model_layer`, for a cell of the model."""
    from attnbench.upgrade.batches import BatchShare, UnmeasurableError, workload_of
    from attnbench.upgrade.models import num_layers_of
    from attnbench.workload import Workload

    try:
        layer = workload_of(cell, BatchShare(Workload.parse("q1"), 1.0))
    except UnmeasurableError as error:
        raise UsageError(f"--model {model}: {error}; name another model") from error
    if words.strip():
        said = {word.partition("=")[0] for word in words.split()}
        for word in ("model", "layers", "shape", "tp"):
            if word in said:
                raise UsageError(
                    f"--layer: {word}= is said by --model and --tp; leave it out, and give words "
                    "of the layer only, e.g. 'kv=fp8_e4m3 block=64'"
                )
        kept = [word for word in layer.text.split() if word.partition("=")[0] not in said]
        layer = Workload.parse(" ".join([*kept, words]))
    return ModelLayer(layer, num_layers_of(cell), cell.hf_config or model)
