"""What a sweep will measure: every workload on every backend, refused ones included."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from attnbench.backends.device import Device
from attnbench.backends.family import BackendFamily
from attnbench.backends.registry import (
    get_backend_class,
    runnable_backend_names,
    split_request,
)
from attnbench.errors import BackendUnavailableError, UsageError
from attnbench.selection import config_of
from attnbench.store.record import Metric, point_id
from attnbench.workload import Suite, Workload


@dataclass(frozen=True, slots=True)
class PlannedPoint:
    """A workload on a backend variant. Ends as a row, whatever happens."""

    workload: Workload
    backend: str
    variant: str = ""
    suite: str = ""

    @property
    def point_id(self) -> str:
        return point_id(self.workload.text, self.backend, self.variant)

    @property
    def metric(self) -> Metric:
        """What the point is timed as, and what its status is told by."""
        return Metric.STEP if self.workload.is_step else Metric.ATTENTION

    def to_json(self) -> dict[str, str]:
        """For a run's header, so that `--resume` needs nothing retyped."""
        return {
            "workload": self.workload.text,
            "backend": self.backend,
            "variant": self.variant,
            "suite": self.suite,
        }

    @classmethod
    def from_json(cls, row: dict[str, str]) -> PlannedPoint:
        return cls(Workload.parse(row["workload"]), row["backend"], row["variant"], row["suite"])


def runnable_backends(device: Device, is_mla: bool) -> tuple[str, ...]:
    """Registered backends attnbench can run on this kind of device, of the right family.

    Ordinary workloads meet ordinary backends and MLA ones MLA backends: a row that says a whole
    family is something else would say nothing. A class that cannot be imported says nothing about
    itself and is left out; `attnbench backends` shows it with its reason.
    """
    names = []
    for name in runnable_backend_names():
        try:
            backend = get_backend_class(name)
        except BackendUnavailableError:
            continue
        if backend.supports_device(device) and backend.is_mla() == is_mla:
            names.append(name)
    return tuple(names)


def resolve_backend(text: str, device: Device) -> tuple[str, str | None]:
    """Read `NAME` or `NAME:variant`; None: the variant is the backend's choice per workload.

    Raises UnknownBackendError, or UsageError for the variant.
    """
    name, variant = split_request(text)
    name = name.upper()
    backend = get_backend_class(name)
    if issubclass(backend, BackendFamily):
        raise UsageError(f"--backend {text!r}: {backend.mend()}")
    variants = backend.get_variants(device)
    if variant and variant not in variants:
        listed = ", ".join(v for v in variants if v) or "none"
        raise UsageError(f"--backend {text!r}: {name} has no variant {variant!r}; it has: {listed}")
    return name, variant or None


def plan_workloads(
    workloads: Iterable[Workload],
    backends: Sequence[str],
    device: Device,
    suite: str = "",
) -> list[PlannedPoint]:
    """Points of `workloads` on `backends` (empty: all that run here), without doubles."""
    chosen = [resolve_backend(text, device) for text in backends]
    points: dict[str, PlannedPoint] = {}
    for workload in workloads:
        pairs = chosen or [
            (name, None) for name in runnable_backends(device, workload.shape.is_mla)
        ]
        for name, asked in pairs:
            variant = asked
            if variant is None:
                variant = get_backend_class(name).default_variant(config_of(workload), device)
            point = PlannedPoint(workload, name, variant, suite)
            points.setdefault(point.point_id, point)
    return list(points.values())


def make_plan(
    suites: Iterable[Suite],
    preset: str,
    backends: Sequence[str],
    device: Device,
    change: Callable[[Iterable[Workload]], Iterable[Workload]] = lambda workloads: workloads,
) -> list[PlannedPoint]:
    """Points of the suites' preset. A point two suites share is measured once, for the first.

    `change` makes what is measured of what a suite says.
    """
    points: dict[str, PlannedPoint] = {}
    for suite in suites:
        for point in plan_workloads(
            change(suite.workloads(preset)), backends or suite.backends, device, suite.name
        ):
            points.setdefault(point.point_id, point)
    return list(points.values())


def interleave(plan: Sequence[PlannedPoint], seed: str) -> list[PlannedPoint]:
    """`plan` with the backends of each workload in random order, another one for each `seed`.

    What is compared is measured within seconds of each other, and no backend is always the first
    on a device that the one before has warmed. Workloads stay where they are: their inputs and
    reference are made once for all their backends.
    """
    draw = random.Random(seed)
    ordered: list[PlannedPoint] = []
    for _, group in groupby(plan, key=lambda point: point.workload.text):
        points = list(group)
        draw.shuffle(points)
        ordered += points
    return ordered
