"""Who wins where, and what the engine's default costs in each run: plain values for the pages.

Both follow `choose`: which stored times may stand together is `choose.stored`, who may be chosen is
`choose.valid`, and what is a tie is `choose.rank`. Nothing is asked of the user: every stored
device class, layer and batch of equal requests has its place.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from attnbench.backends.abstract import AttentionConfig
from attnbench.backends.device import Device
from attnbench.choose.crossover import crossovers, place_of
from attnbench.choose.rank import Part, Ranking, Standing, rank, ratio_of
from attnbench.choose.stored import Measured, Point, Timed, unstable
from attnbench.choose.tries import Choice, Try
from attnbench.choose.valid import Default, followed_default, matching, refusal
from attnbench.errors import DeviceError
from attnbench.history.rule import Estimate, Verdict, VerdictSettings, decide
from attnbench.selection import config_of, resolve_device
from attnbench.store.record import Status
from attnbench.workload import Workload

Tries = Sequence[Try]
_OF_A_BATCH = ("shape=", "dtype=", "block=", "layout=", "lengths=", "seed=", "prefix=")
"""Words of a workload that are said elsewhere, or are the batch's or the backend's own."""


def choices_of(tries: Tries, published: Iterable[str] = (), runs: int = 60) -> dict[str, Any]:
    """Everything the page of choices shows of stored times.

    Args:
        tries: of `read_tries`, with made-up times only where they are to be shown.
        published: runs that may be of a stranger's machine.
        runs: how many of the newest runs of a layer have their regret told.
    """
    hidden = frozenset(published)
    layers: dict[tuple[str, Any], list[Try]] = defaultdict(list)
    for tried in tries:
        layers[tried.what.how.device_class, tried.what.layer].append(tried)
    found = [
        layer
        for (device_class, _), own in sorted(layers.items(), key=lambda item: str(item[0]))
        if (layer := _Layer.of(own, device_class, hidden)) is not None
    ]
    return {
        "maps": [one for layer in found for one in layer.maps()],
        "regret": [one for layer in found if (one := layer.regret(runs))],
    }


class _Layer:
    """One layer on one device class."""

    def __init__(
        self, tries: Tries, device_class: str, device: Device, hidden: frozenset[str]
    ) -> None:
        self._tries, self._device_class, self._device = tries, device_class, device
        self._settings = VerdictSettings()
        texts = sorted({what.workload for what in {one.what for one in tries}})
        self._workloads = {text: Workload.parse(text) for text in texts}
        self.measured = Measured.all_of(tries, device_class, hidden)
        self._batches = {
            text: (str(one.columns()["batch_spec"]), str(one.phase), config_of(one))
            for text, one in self._workloads.items()
        }
        self._refused: dict[tuple[Choice, AttentionConfig], str] = {}

    @classmethod
    def of(cls, tries: Tries, device_class: str, hidden: frozenset[str]) -> _Layer | None:
        """None: no time, or a device that selection does not know."""
        text = tries[0].what.compute_capability or tries[0].what.device_kind
        try:
            layer = cls(tries, device_class, resolve_device(text), hidden)
        except DeviceError:
            return None
        return layer if layer.measured.how is not None else None

    def maps(self) -> list[dict[str, Any]]:
        """One a phase and query length (0: the whole of a prompt): requests by sequence length."""
        assert self.measured.how is not None
        name, first = next(iter(self._workloads.items()))
        grid = self.measured.grid(first)
        valid = {c for point in grid.values() for c in point.timed if not self._refusal(c, name)}
        timer = self.measured.how.timer
        about = self._about()
        told = crossovers(grid, sorted(valid), timer, self._settings)
        slices: dict[tuple[str, int], dict[tuple[int, int], dict[str, Any]]] = defaultdict(dict)
        for text, point in grid.items():
            workload = self._workloads[text]
            place = place_of(workload)
            if place is None or not point.timed:
                continue
            requests, query, context = place
            prompts = str(workload.phase) == "prefill"
            key = (str(workload.phase), 0 if prompts else query)
            at = (requests, query + context)
            if at not in slices[key]:  # other seeds are other pages of the same batch
                slices[key][at] = self._cell(text, workload, point)
        return [
            {
                **about,
                "phase": phase,
                "query": query,
                "cells": [
                    {"requests": at[0], "tokens": at[1], **cell}
                    for at, cell in sorted(cells.items())
                ],
                "crossovers": [
                    {
                        "axis": one.axis,
                        "fixed": dict(one.fixed),
                        "below": one.below,
                        "above": one.above,
                        "low": one.low,
                        "high": one.high,
                        "at": one.at,
                    }
                    for one in told
                    if _is_in(one.axis, one.fixed, phase, query)
                ],
            }
            for (phase, query), cells in sorted(slices.items())
        ]

    def regret(self, runs: int) -> dict[str, Any] | None:
        """Of each run, oldest first: batch by batch the default's time over the fastest one's."""
        default = followed_default(self._workloads, self._device, 0)
        by_run: dict[str, list[Try]] = defaultdict(list)
        for one in self._tries:
            by_run[one.run_id].append(one)
        started = {run: min(one.started_at for one in own) for run, own in by_run.items()}
        newest = sorted(by_run, key=lambda run: (started[run], run))[-runs:]
        told = [row for run in newest if (row := self._regret_of(run, by_run[run], default))]
        if not told:
            return None
        return {
            **self._about(),
            "engine": default.engine,
            "default": default.backend or "none",
            "why": default.why,
            "runs": told,
        }

    def _regret_of(self, run: str, tries: Tries, default: Default) -> dict[str, Any] | None:
        # Of one way of measuring: a run may have several.
        own = Measured.all_of(tries, self._device_class)
        if own.how is None:
            return None
        batches = []
        missing = 0
        for text, point in sorted(own.points().items()):
            workload = self._workloads[text]
            timed = {c: t for c, t in point.timed.items() if not self._why_not(c, t, text)}
            if len(timed) < 2:
                continue
            its = matching(default, text, list(timed), workload.block_size)
            if its is None:
                missing += 1
                continue
            best = min(timed, key=lambda choice: (timed[choice].seconds, choice))
            part = Part(0, text, 1.0, 1, workload)
            base, other = {0: timed[best]}, {0: timed[its]}
            ratio = ratio_of([(0, part)], base, other, own.how.timer, self._settings)
            verdict = decide(ratio, self._settings.noise(own.how.timer))[0]
            batches.append(
                {
                    "workload": workload.text,
                    "batch": self._batches[text][0],
                    "phase": self._batches[text][1],
                    "default": its.text,
                    "best": best.text,
                    **_limits(ratio),
                    "standing": _STANDINGS.get(verdict, "tied"),
                }
            )
        if not batches:
            return None
        return {"run": run, "how": own.how.text, "batches": batches, "not_measured": missing}

    def _cell(self, text: str, workload: Workload, point: Point) -> dict[str, Any]:
        assert self.measured.how is not None
        barred = {
            choice.text: f"{one.status}: {one.reason}" if one.reason else str(one.status)
            for choice, one in point.ended.items()
        }
        times = {}
        by_name = {}
        for choice, timed in point.timed.items():
            if why := self._why_not(choice, timed, text):
                barred[choice.text] = why
            else:
                times[choice.text] = {0: timed}
                by_name[choice.text] = choice
        part = Part(0, text, 1.0, 1, workload)
        ranking = rank(text, [(0, part)], times, self.measured.how.timer, self._settings)
        return {
            "workload": workload.text,
            "verdict": str(ranking.verdict),
            "winner": ranking.winner.name if ranking.winner else None,
            "tied": [line.name for line in ranking.tied],
            "lines": [
                {
                    "backend": line.name,
                    "series": _series_name(by_name[line.name]),
                    "workload": _as_measured(workload, by_name[line.name]).text,
                    "seconds": line.seconds,
                    "standing": str(line.standing),
                    **_limits(line.ratio),
                }
                for line in ranking.lines
            ],
            "margin": _margin(ranking),
            "excluded": [{"backend": name, "why": why} for name, why in sorted(barred.items())],
        }

    def _about(self) -> dict[str, Any]:
        measured = self.measured
        assert measured.how is not None
        first = next(iter(self._workloads.values()))
        columns = first.columns()
        names = sorted({str(one.columns()["shape"]) for one in self._workloads.values()} - {""})
        shape = ", ".join(names) or (
            f"{columns['num_heads']}/{columns['num_kv_heads']} heads of {columns['head_size']}"
        )
        words = [w for w in first.text.split()[1:] if not w.startswith(_OF_A_BATCH)]
        return {
            "device": self._device_class,
            "how": measured.how.text,
            "driver": measured.how.driver_version,
            "layer": " ".join([shape, str(columns["dtype"]), *words]),
            "made_up": measured.how.timer == "fake",
            "published": measured.is_published,
            "versions": list(measured.versions),
            "notes": list(measured.notes),
        }

    def _why_not(self, choice: Choice, timed: Timed, text: str) -> str:
        """Why a choice does not count on a batch; "": it does."""
        if why := self._refusal(choice, text):
            return why
        return f"{Status.NOISY}: {why}" if (why := unstable([timed])) else ""

    def _refusal(self, choice: Choice, text: str) -> str:
        key = (choice, self._batches[text][2])
        if key not in self._refused:
            self._refused[key] = refusal(choice, self._workloads[text], self._device)
        return self._refused[key]


_STANDINGS = {Verdict.REGRESSION: "slower", Verdict.UNDECIDED: "open"}


def _limits(found: Estimate) -> dict[str, Any]:
    limits = (found.low, found.high) if found.enough else (None, None)
    return {"ratio": found.ratio, "low": limits[0], "high": limits[1]}


def _margin(ranking: Ranking) -> dict[str, Any] | None:
    """Of a clear winner over the next, of a tie class over the first outside it."""
    outside = [one for one in ranking.lines if one.standing in (Standing.SLOWER, Standing.OPEN)]
    return _limits(outside[0].ratio) if outside else None


def _series_name(choice: Choice) -> str:
    """As the pages name the backend of a series."""
    return f"{choice.backend} [{choice.variant}]" if choice.variant else choice.backend


def _as_measured(workload: Workload, choice: Choice) -> Workload:
    return workload.replace(block_size=choice.block_size, kv_cache_layout=choice.kv_cache_layout)


def _is_in(axis: str, fixed: Mapping[str, int], phase: str, query: int) -> bool:
    """Whether a crossover lies in the slice of this phase and query length."""
    if phase == "prefill":
        return fixed.get("context") == 0 and axis in ("requests", "query")
    return fixed.get("query") == query and (axis == "context" or fixed.get("context") != 0)
