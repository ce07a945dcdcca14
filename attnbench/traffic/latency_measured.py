"""Step times from the measured times of a few batches.

A time is a sum of terms with no negative factor (non-negative least squares of relative errors
over `latency_terms`), times the ratio of measured to sum that the batches nearby suggest
(`latency_kriging` of its logarithm): exact at a measured batch, and between them as wrong as
leaving some out says. Of the groups of terms only as many are used as predict batches left out
better. Steps with prompts and steps without have models of their own, since kernels serve the two
differently, unless few batches of either kind were measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from attnbench.errors import UsageError
from attnbench.traffic.latency import StepModel
from attnbench.traffic.latency_costs import LayerCosts
from attnbench.traffic.latency_kriging import Kriging, Scales, fitted_scales
from attnbench.traffic.latency_terms import (
    Term,
    number,
    numbers_of_entries,
    term_values,
    terms_of,
)
from attnbench.traffic.reduce_features import features_of_entries
from attnbench.traffic.types import Floats, Ints
from attnbench.workload import Workload

MIN_BATCHES = 16
#: Batches of a kind (with prompts, without) that a model of their own needs.
_MIN_OF_A_KIND = 16
#: Parts that batches are left out in.
_FOLDS = 16
#: More terms are only used where fewer are worse by this factor and by this much.
_WORSE, _WORSE_BY = 1.05, 1e-3
_CHUNK_STEPS = 1 << 16
#: Pairs that take as long to multiply as one token takes to read, where prompts' share is told.
_PAIRS_PER_READ = 64.0


@dataclass(frozen=True, slots=True, eq=False)
class Between:
    """Where steps lie among the measured batches: all that predicting them again needs.

    Attributes:
        features: (num_steps, 12) a one, then the features.
        terms: (num_steps, num_slopes) of each step's own kind; zeros for the other's.
        neighbours, shares: (num_steps, at most 12) measured batches, the nearest first, and how
            much each one's ratio counts.
    """

    features: Floats
    terms: Floats
    neighbours: Ints
    shares: Floats


@dataclass(frozen=True, slots=True, eq=False)
class _Kind:
    """What was fitted to the batches of one kind."""

    batches: Ints
    terms: tuple[Term, ...]
    #: The places of `terms` among all slopes.
    columns: slice
    #: (num_batches, num_terms), and (num_batches, all terms that these were chosen from).
    values: Floats
    all_values: Floats
    kriging: Kriging


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
        self._kinds = self._fitted_kinds(terms_of(layer), _numbers_of(workloads, self.costs))
        self._slopes, self._ratios = self.refitted(seconds)

    def _fitted_kinds(self, groups: tuple[tuple[Term, ...], ...], numbers: Floats) -> list[_Kind]:
        has_long = number(numbers, "long_reqs") > 0
        of_kinds = [np.flatnonzero(~has_long), np.flatnonzero(has_long)]
        if min(map(len, of_kinds)) < _MIN_OF_A_KIND:
            of_kinds = [np.arange(len(numbers))]
        kinds: list[_Kind] = []
        first = 0
        for batches in of_kinds:
            times = self.seconds[batches]
            terms = _needed(groups, numbers[batches], times)
            values = term_values(terms, numbers[batches])
            slopes = _slopes(values, times)
            [used] = slopes.nonzero()
            left = np.log(times / _line(values[:, used], slopes[used]))
            places = _places(numbers[batches])
            kinds.append(
                _Kind(
                    batches=batches,
                    terms=tuple(terms[index] for index in used),
                    columns=slice(first, first + len(used)),
                    values=values[:, used],
                    all_values=values,
                    kriging=Kriging(places, fitted_scales(places, left)),
                )
            )
            first += len(used)
        return kinds

    @property
    def scales(self) -> tuple[Scales, ...]:
        """What was learned of distances: of steps without prompts, and with; or of both at once."""
        return tuple(kind.kriging.scales for kind in self._kinds)

    def refitted(self, seconds: Floats) -> tuple[Floats, Floats]:
        """(num_slopes,) and (num_workloads,) logarithms of the ratios of the same batches with
        other times: the same terms and scales."""
        slopes, ratios = np.zeros(self._kinds[-1].columns.stop), np.zeros(len(seconds))
        for kind in self._kinds:
            times = seconds[kind.batches]
            found = _slopes(kind.values, times)
            slopes[kind.columns] = found
            ratios[kind.batches] = np.log(times / _line(kind.values, found))
        return slopes, ratios

    def between(self, step_offsets: Ints, query_lens: Ints, context_lens: Ints) -> Between:
        """Where these steps lie."""
        entries = (step_offsets, query_lens, context_lens, self.costs)
        features = np.column_stack((np.ones(len(step_offsets) - 1), features_of_entries(*entries)))
        return self._between(features, numbers_of_entries(*entries))

    def _between(self, features: Floats, numbers: Floats) -> Between:
        kind_of = np.zeros(len(numbers), dtype=np.int64)
        if len(self._kinds) > 1:
            kind_of = (number(numbers, "long_reqs") > 0).astype(np.int64)
        most = max(kind.kriging.num_neighbours for kind in self._kinds)
        terms = np.zeros((len(numbers), self._kinds[-1].columns.stop))
        neighbours = np.zeros((len(numbers), most), dtype=np.int64)
        shares = np.zeros((len(numbers), most))
        for index, kind in enumerate(self._kinds):
            rows = np.flatnonzero(kind_of == index)
            if not len(rows):
                continue
            count = kind.kriging.num_neighbours
            terms[rows, kind.columns] = term_values(kind.terms, numbers[rows])
            near, shares[rows, :count] = kind.kriging.shares(_places(numbers[rows]))
            neighbours[rows, :count] = kind.batches[near]
            neighbours[rows, count:] = kind.batches[near[:, :1]]
        return Between(features, terms, neighbours, shares)

    def predicted(self, between: Between, slopes: Floats, ratios: Floats) -> Floats:
        """(num_steps,) seconds of all layers."""
        left = between.shares[:, 0] * ratios[between.neighbours[:, 0]]
        for column in range(1, between.shares.shape[1]):
            left = left + between.shares[:, column] * ratios[between.neighbours[:, column]]
        return self.num_layers * (_line(between.terms, slopes) * np.exp(left))

    def of_entries(self, step_offsets: Ints, query_lens: Ints, context_lens: Ints) -> Floats:
        found = [np.zeros(0)]
        for first in range(0, len(step_offsets) - 1, _CHUNK_STEPS):
            offsets = step_offsets[first : first + _CHUNK_STEPS + 1]
            part = slice(int(offsets[0]), int(offsets[-1]))
            numbers = numbers_of_entries(
                offsets - offsets[0], query_lens[part], context_lens[part], self.costs
            )
            # A clock asks for one step at a time: features, which times do not need, cost as much.
            between = self._between(np.zeros((len(numbers), 0)), numbers)
            found.append(self.predicted(between, self._slopes, self._ratios))
        return np.concatenate(found)

    def left_out_errors(self) -> Floats:
        """(num_workloads,) relative error of each batch's time, predicted from others.

        Terms and factors are fitted without the sixteenth of the batches that it is in, and what is
        left comes from all but itself, by the scales of all.
        """
        errors = np.empty(len(self.seconds))
        for kind in self._kinds:
            times, from_others = self.seconds[kind.batches], kind.kriging.from_others()
            for out, line in _folds(kind.all_values, times):
                guess = line[out] * np.exp(from_others[out] @ np.log(times / line))
                errors[kind.batches[out]] = guess / times[out] - 1.0
        return errors


def _numbers_of(workloads: Sequence[Workload], costs: LayerCosts) -> Floats:
    offsets = np.cumsum(np.array([0, *(workload.num_reqs for workload in workloads)]))
    requests = [request for workload in workloads for request in workload.requests]
    query = np.array([request.query_len for request in requests], dtype=np.int64)
    tokens = np.array([request.seq_len for request in requests], dtype=np.int64)
    return numbers_of_entries(offsets.astype(np.int64), query, tokens - query, costs)


def _places(numbers: Floats) -> Floats:
    """(num_steps, 10) where steps lie, for kriging: octaves of counts, lengths and imbalance, and
    the share of the short part; their scales are learned."""

    def mean(total: str, count: str) -> Floats:
        return number(numbers, total) / np.maximum(number(numbers, count), 1.0)

    def octaves(values: Floats) -> Floats:
        return np.asarray(np.log2(1.0 + values))

    def imbalance(most: str, mean: Floats) -> Floats:
        return np.asarray(np.log2(np.maximum(number(numbers, most), 1.0) / np.maximum(mean, 1.0)))

    reads = number(numbers, "short_reads")
    prompts = number(numbers, "long_reads") + number(numbers, "long_pairs") / _PAIRS_PER_READ
    return np.stack(
        (
            octaves(number(numbers, "short_reqs")),
            octaves(mean("short_tokens", "short_reqs")),
            octaves(mean("short_reads", "short_reqs")),
            imbalance("short_longest", mean("short_reads", "short_reqs")),
            octaves(number(numbers, "long_reqs")),
            octaves(number(numbers, "long_tokens")),
            octaves(mean("long_pairs", "long_tokens")),
            imbalance("long_longest", mean("long_reads", "long_reqs")),
            imbalance("most_pairs", mean("long_pairs", "long_reqs")),
            8.0 * reads / np.maximum(reads + prompts, 1.0),
        ),
        axis=1,
    )


def _needed(
    groups: tuple[tuple[Term, ...], ...], numbers: Floats, seconds: Floats
) -> tuple[Term, ...]:
    """The fewest groups, from the first, that predict batches left out about as well as any."""
    candidates: list[tuple[Term, ...]] = [()]
    errors = []
    for group in groups:
        candidates.append((*candidates[-1], *group))
        values = term_values(candidates[-1], numbers)
        guesses = np.empty(len(seconds))
        for out, line in _folds(values, seconds):
            guesses[out] = line[out]
        errors.append(float(np.abs(guesses / seconds - 1.0).mean()))
    enough = _WORSE * min(errors) + _WORSE_BY
    return next(
        terms for terms, error in zip(candidates[1:], errors, strict=True) if error <= enough
    )


def _folds(values: Floats, seconds: Floats) -> Iterator[tuple[npt.NDArray[np.bool_], Floats]]:
    """Which batches are left out, and (num_batches,) of all fitted to the others."""
    fold_of = np.arange(len(seconds)) % _FOLDS
    for fold in range(_FOLDS):
        out = fold_of == fold
        yield out, _line(values, _slopes(values[~out], seconds[~out]))


def _slopes(values: Floats, seconds: Floats) -> Floats:
    from scipy.optimize import nnls

    scale = np.maximum(values.max(axis=0), 1.0)
    rounds = 20 * values.shape[1]
    slopes, _ = nnls(values / scale / seconds[:, None], np.ones(len(seconds)), maxiter=rounds)
    return np.asarray(slopes / scale)


def _line(values: Floats, slopes: Floats) -> Floats:
    # Column by column: one step alone has the same last bit as among a million.
    total = np.zeros(len(values))
    for column in np.flatnonzero(slopes):
        total = total + values[:, column] * slopes[column]
    return np.asarray(np.maximum(total, 1e-300))
