"""Step times from the measured times of a few batches.

A time is a line through the batches' features with no negative slope (non-negative least squares of
relative errors), times the ratio of measured to line of the nearest measured batches (their mean,
by the inverse square of the distance): exact at a measured batch, and between them as wrong as
leaving one out says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from attnbench.errors import UsageError
from attnbench.traffic.latency import StepModel
from attnbench.traffic.latency_costs import LayerCosts
from attnbench.traffic.reduce import features_of_workloads
from attnbench.traffic.reduce_features import coordinates, features_of_entries
from attnbench.traffic.types import Floats, Ints
from attnbench.workload import Workload

_NEIGHBOURS = 3
MIN_BATCHES = 16
#: Squared distance at which a batch counts as the measured one itself.
_SAME = 1e-9


@dataclass(frozen=True, slots=True, eq=False)
class Between:
    """Where steps lie among the measured batches: all that predicting them again needs.

    Attributes:
        features: (num_steps, 12) a one, then the features.
        neighbours, shares: (num_steps, 3) measured batches, and how much each counts.
    """

    features: Floats
    neighbours: Ints
    shares: Floats


class MeasuredLatency(StepModel):
    """Attention of `num_layers` layers of one kind, from measured batches.

    Args:
        workloads: the batches, all of one layer.
        seconds: (num_workloads,) measured, of one layer.
        num_layers: None: as many as the shape says.

    Raises:
        UsageError: fewer than 16 batches, several layers, a time that is none.
    """

    def __init__(
        self, workloads: Sequence[Workload], seconds: Floats, num_layers: int | None = None
    ) -> None:
        if len(workloads) < MIN_BATCHES or len(workloads) != len(seconds):
            raise UsageError(
                f"{len(workloads)} measured batches and {len(seconds)} times; give as many of the "
                f"one as of the other, {MIN_BATCHES} or more"
            )
        if (
            len({workload.replace(batch_spec=workloads[0].batch_spec) for workload in workloads})
            > 1
        ):
            raise UsageError("the measured batches are of several layers; fit one model per layer")
        if not np.all(np.isfinite(seconds) & (seconds > 0)):
            raise UsageError("a measured time is not above zero; leave that batch out")
        layer = workloads[0]
        self.num_layers = layer.shape.num_layers if num_layers is None else num_layers
        self.costs = LayerCosts(layer)
        self.seconds = seconds
        self._features = _with_one(features_of_workloads(tuple(workloads)))
        self._places = coordinates(self._features[:, 1:])
        self._slopes, self._ratios = self.refitted(seconds)
        self._tree = _tree(self._places)

    def refitted(self, seconds: Floats) -> tuple[Floats, Floats]:
        """(12,) slopes and (num_workloads,) ratios of the same batches with other times."""
        slopes = _slopes(self._features, seconds)
        return slopes, seconds / _line(self._features, slopes)

    def between(self, step_offsets: Ints, query_lens: Ints, context_lens: Ints) -> Between:
        """Where these steps lie."""
        features = _with_one(
            features_of_entries(step_offsets, query_lens, context_lens, self.costs)
        )
        found = _shares(self._tree, coordinates(features[:, 1:]), np.arange(len(self.seconds)))
        return Between(features, *found)

    def predicted(self, between: Between, slopes: Floats, ratios: Floats) -> Floats:
        """(num_steps,) seconds of all layers."""
        ratio = _blend(between, ratios)
        return self.num_layers * (_line(between.features, slopes) * ratio)

    def of_entries(self, step_offsets: Ints, query_lens: Ints, context_lens: Ints) -> Floats:
        between = self.between(step_offsets, query_lens, context_lens)
        return self.predicted(between, self._slopes, self._ratios)

    def left_out_errors(self) -> Floats:
        """(num_workloads,) relative error of each batch's time, predicted from all others."""
        count = len(self.seconds)
        errors = np.empty(count)
        for index in range(count):
            kept = np.delete(np.arange(count), index)
            slopes = _slopes(self._features[kept], self.seconds[kept])
            ratios = self.seconds / np.maximum(_line(self._features, slopes), 1e-300)
            here = slice(index, index + 1)
            found = _shares(_tree(self._places[kept]), self._places[here], kept)
            line = _line(self._features[here], slopes)
            guess = line * _blend(Between(self._features[here], *found), ratios)
            errors[index] = guess[0] / self.seconds[index] - 1.0
        return errors


def _with_one(features: Floats) -> Floats:
    return np.column_stack((np.ones(len(features)), features))


def _slopes(features: Floats, seconds: Floats) -> Floats:
    from scipy.optimize import nnls

    scale = np.maximum(features.max(axis=0), 1.0)
    slopes, _ = nnls(features / scale / seconds[:, None], np.ones(len(seconds)))
    return np.asarray(slopes / scale)


def _line(features: Floats, slopes: Floats) -> Floats:
    # Column by column: one step alone has the same last bit as among a million.
    total: Floats = features[:, 0] * slopes[0]
    for column in range(1, features.shape[1]):
        total = total + features[:, column] * slopes[column]
    return total


def _blend(between: Between, ratios: Floats) -> Floats:
    total: Floats = between.shares[:, 0] * ratios[between.neighbours[:, 0]]
    for column in range(1, between.shares.shape[1]):
        total = total + between.shares[:, column] * ratios[between.neighbours[:, column]]
    return total


def _tree(places: Floats) -> Any:
    from scipy.spatial import cKDTree

    return cKDTree(places)


def _shares(tree: Any, places: Floats, names: Ints) -> tuple[Ints, Floats]:
    distance, found = tree.query(places, k=_NEIGHBOURS)
    near = 1.0 / (distance**2 + _SAME)
    total = near[:, 0]
    for column in range(1, near.shape[1]):
        total = total + near[:, column]
    return names[found], near / total[:, None]
