"""Values between places where they are known: kriging, with scales learned from the values.

The covariance is Matern's of smoothness 3/2 with a length scale for every coordinate, and a nugget
(Rasmussen and Williams, Gaussian Processes for Machine Learning, 2006, sections 2.2, 4.2 and 5.4).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from attnbench.traffic.types import Floats, Ints

#: Places that a value is predicted from.
NEIGHBOURS = 12
#: Squared distance, in scales, at which a place is a known one.
_SAME = 1e-12
_CHUNK = 2048
#: Before anything is known: the scale of a coordinate, and e-folds it may well be off by.
_SCALE, _SCALE_SPREAD = 3.0, 1.5
_ROUNDS = 30


@dataclass(frozen=True, slots=True, eq=False)
class Scales:
    """How far a value says something about others.

    Attributes:
        lengths: (num_coordinates,) where the covariance has fallen to a half, nearly.
        nugget: variance of what a place has for itself, against that of what neighbours share.
    """

    lengths: Floats
    nugget: float


def fitted_scales(places: Floats, values: Floats) -> Scales:
    """The most probable ones, for (num_places, num_coordinates) and the values known there."""
    from scipy.linalg import cho_factor, cho_solve
    from scipy.optimize import minimize

    count, axes = places.shape
    apart = [(places[:, None, axis] - places[None, :, axis]) ** 2 for axis in range(axes)]
    used = [axis for axis in range(axes) if apart[axis].any()]
    apart = [apart[axis] for axis in used]
    eye = np.eye(count)

    def loss(logs: Floats) -> tuple[float, Floats]:
        lengths, signal, nugget = np.exp(logs[:-2]), np.exp(2 * logs[-2]), np.exp(2 * logs[-1])
        squares = np.zeros((count, count))
        for square, length in zip(apart, lengths, strict=True):
            squares += square / length**2
        distance = np.sqrt(3.0 * squares)
        fallen = np.exp(-distance)
        shared = (1.0 + distance) * fallen
        factor = cho_factor(signal * shared + nugget * eye, lower=True, check_finite=False)
        solved = cho_solve(factor, values, check_finite=False)
        inverse = cho_solve(factor, eye, check_finite=False)
        off = (logs[:-2] - np.log(_SCALE)) / _SCALE_SPREAD
        lost = 0.5 * values @ solved + np.log(np.diag(factor[0])).sum() + 0.5 * (off**2).sum()
        slope = np.outer(solved, solved) - inverse
        steep = slope * (3.0 * signal * fallen)
        gradient = np.empty(len(logs))
        for index, (square, length) in enumerate(zip(apart, lengths, strict=True)):
            gradient[index] = -0.5 * (steep * square).sum() / length**2 + off[index] / _SCALE_SPREAD
        gradient[-2] = -(slope * shared).sum() * signal
        gradient[-1] = -np.trace(slope) * nugget
        return float(lost), gradient

    begin = [np.log(_SCALE)] * len(used)
    begin += [float(np.log(np.clip(values.std(), 2e-3, 2.0))), float(np.log(0.02))]
    bounds = [(np.log(0.05), np.log(100.0))] * len(used)
    bounds += [(np.log(1e-3), np.log(3.0)), (np.log(2e-3), np.log(0.5))]
    found = minimize(
        *(loss, np.array(begin)),
        jac=True,
        method="L-BFGS-B",
        bounds=bounds,
        options={"maxiter": _ROUNDS},
    ).x
    lengths = np.full(axes, _SCALE)
    lengths[used] = np.exp(found[:-2])
    return Scales(lengths, float(np.exp(2 * (found[-1] - found[-2]))))


class Kriging:
    """Shares of known values in the value anywhere else; around zero where nothing is near.

    A known place has its own value: the mean of them where several are known there.
    """

    def __init__(self, places: Floats, scales: Scales) -> None:
        from scipy.spatial import cKDTree

        self.scales = scales
        self._places = places / scales.lengths
        self._tree: Any = cKDTree(self._places)
        self.num_neighbours = min(NEIGHBOURS, len(places))

    def shares(self, places: Floats) -> tuple[Ints, Floats]:
        """(num, num_neighbours) indices of the nearest known places, and the share of each value.

        A row depends on its own place only, to the last bit.
        """
        scaled = places / self.scales.lengths
        count = self.num_neighbours
        near = np.empty((len(places), count), dtype=np.int64)
        shares = np.empty((len(places), count))
        for first in range(0, len(places), _CHUNK):
            part = slice(first, first + _CHUNK)
            distance, found = self._tree.query(scaled[part], k=list(range(1, count + 1)))
            known = self._places[found]
            between = np.zeros((len(found), count, count))
            for axis in range(known.shape[2]):
                between += (known[:, :, None, axis] - known[:, None, :, axis]) ** 2
            among = _covariance(between)
            among[:, np.arange(count), np.arange(count)] += self.scales.nugget
            same = distance**2 < _SAME
            own = same / np.maximum(same.sum(axis=1, keepdims=True), 1)
            to_here = _covariance(distance**2) + self.scales.nugget * own
            near[part] = found
            shares[part] = np.linalg.solve(among, to_here[:, :, None])[:, :, 0]
        return near, shares

    def from_others(self) -> Floats:
        """(num, num) shares of the others in each known place's value; zeros on the diagonal.

        From the inverse of the covariance (Rasmussen and Williams, section 5.4.2).
        """
        squares = ((self._places[:, None] - self._places[None]) ** 2).sum(axis=2)
        among = _covariance(squares) + self.scales.nugget * np.eye(len(squares))
        inverse = np.linalg.inv(among)
        shares: Floats = -inverse / np.diag(inverse)[:, None]
        np.fill_diagonal(shares, 0.0)
        return shares


def _covariance(squares: Floats) -> Floats:
    distance = np.sqrt(3.0 * squares)
    return np.asarray((1.0 + distance) * np.exp(-distance))
