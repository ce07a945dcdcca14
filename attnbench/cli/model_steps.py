"""`attnbench run --metric step`: batches as steps of a model, with their attention beside them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from attnbench.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from attnbench.workload import AttentionShape, Workload

MODEL_HELP = (
    "With --metric step: whose step, a name or a config.json. Default: the batches' own shape."
)
LAYERS_HELP = (
    "With --metric step: a step of so many layers (beside a model's first dense ones); repeat. "
    "Default: 2 and 4."
)

_DEFAULT_LAYERS = (2, 4)


class PointMetric(StrEnum):
    """What a run is for."""

    ATTENTION = "attention"
    STEP = "step"


def check_step_options(metric: PointMetric, model: str, tp: int, layers: Sequence[int]) -> None:
    """Raises UsageError for options of steps without steps, or that name none."""
    if metric is PointMetric.STEP:
        if any(count < 1 for count in layers) or tp < 1:
            raise UsageError("--step-layers and --tp: give numbers of 1 or more, e.g. --tp 8")
        return
    for given, option in ((model, "--model"), (tp != 1, "--tp"), (layers, "--step-layers")):
        if given:
            raise UsageError(f"{option} is for steps of a model; add --metric step")


def steps_of(
    workloads: Iterable[Workload], model: str, tp: int, layers: Sequence[int]
) -> list[Workload]:
    """Of each batch its attention, then steps of the model with so many layers.

    Args:
        model: a name, or the path of a `config.json`; "": that of each workload's shape.

    Raises:
        UsageError: a model that is not known, or whose layers are of several kinds; a workload of
            another model's layer.
    """
    from attnbench.traffic.model_sizes import model_sizes
    from attnbench.workload import Workload

    given = _of_model(model, tp) if model else None
    plain = Workload.parse("q1").shape
    found: dict[str, Workload] = {}
    for workload in workloads:
        shape, config = given or _of_shape(workload, tp)
        if given and workload.shape not in (plain, shape):
            raise UsageError(
                f"--model {model}: {workload.text!r} names another layer; leave its shape out, or "
                "--model"
            )
        whole = model_sizes(config, shape.tensor_parallel_size if shape.name else tp)
        first, most = whole.sizes.num_dense_layers, whole.num_layers
        alone = workload.replace(shape=shape)
        found[alone.text] = alone
        for count in sorted({min(first + n, most) for n in layers or _DEFAULT_LAYERS}):
            step = alone.replace(shape=replace(shape, num_layers=count), model=whole.sizes.text)
            found[step.text] = step
    return list(found.values())


def _of_model(model: str, tp: int) -> tuple[AttentionShape, str | Mapping[str, Any]]:
    from attnbench.upgrade.batches import shape_of
    from attnbench.upgrade.models import cells_of_model

    cells = cells_of_model(model, tensor_parallel_size=tp)
    if len(cells) > 1 or cells[0].topk:
        raise UsageError(
            f"--model {model}: a step is measured of layers that are all of one dense kind; name "
            "another model"
        )
    return shape_of(cells[0]), cells[0].hf_config or model


def _of_shape(workload: Workload, tp: int) -> tuple[AttentionShape, str]:
    from attnbench.workload import get_shape

    name, ranks = workload.shape.name, workload.shape.tensor_parallel_size
    if not name:
        raise UsageError(
            f"--metric step: {workload.text!r} has no model's name; give --model NAME, or the path "
            "of a config.json"
        )
    if tp not in (1, ranks):
        if ranks != 1:
            raise UsageError(f"--tp {tp}: {workload.text!r} says tp={ranks}; leave one out")
        return get_shape(name, tp), name
    return workload.shape, name
