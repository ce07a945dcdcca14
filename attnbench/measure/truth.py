"""Inputs and reference outputs, computed once per workload and shared by every backend."""

from __future__ import annotations

import contextlib
from dataclasses import fields
from pathlib import Path

import torch

from attnbench.backends.abstract import AttentionBackend
from attnbench.backends.batch import AttentionBatch, make_batch
from attnbench.backends.device import Device
from attnbench.backends.reference import ReferenceResult, reference_attention
from attnbench.measure.model_truth import StepTruth, step_truth
from attnbench.measure.model_weights import StepWeights, make_weights
from attnbench.measure.plan import PlannedPoint

#: References of one sweep kept on disk; those of large points are computed again.
_MAX_KEPT_BYTES = 1 << 30


class TruthCache:
    """The latest batch in memory; reference outputs also on disk, for the next replicates.

    Inputs depend on the workload alone (its text seeds them), and on the order of requests a
    backend asks for, so every process computes the same ones.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._key = ""
        self._latest: tuple[AttentionBatch, ReferenceResult] | None = None
        self._step: tuple[AttentionBatch, StepWeights, StepTruth] | None = None
        self._room = _MAX_KEPT_BYTES - _kept_bytes(folder) if folder else 0

    def get(
        self, planned: PlannedPoint, backend: type[AttentionBackend], device: Device
    ) -> tuple[AttentionBatch, ReferenceResult]:
        """The batch on `device`, requests in the order `backend` asks for, and its truth."""
        threshold = backend.get_builder_cls().reorder_batch_threshold
        key = f"{planned.workload.id}-{threshold}-{device.torch_device}"
        if self._latest is None or key != self._key:
            self._latest = self._step = None  # free the last one before making the next
            batch = make_batch(planned.workload, device.torch_device, threshold)
            self._latest = (batch, self._reference(key, batch))
            self._key = key
        return self._latest

    def get_step(
        self, planned: PlannedPoint, backend: type[AttentionBackend], device: Device
    ) -> tuple[AttentionBatch, StepWeights, StepTruth]:
        """The same of a whole step, and the model's weights. Kept in memory only."""
        threshold = backend.get_builder_cls().reorder_batch_threshold
        key = f"{planned.workload.id}-{threshold}-{device.torch_device}"
        if self._step is None or key != self._key:
            self._latest = self._step = None
            batch = make_batch(planned.workload, device.torch_device, threshold)
            weights = make_weights(batch)
            self._step = (batch, weights, step_truth(batch, weights))
            self._key = key
        return self._step

    def _reference(self, key: str, batch: AttentionBatch) -> ReferenceResult:
        path = self._folder / f"{key}.pt" if self._folder else None
        if path is not None and path.exists():
            # A file that cannot be read is one that was never kept.
            with contextlib.suppress(OSError, RuntimeError):
                return ReferenceResult(**torch.load(path, weights_only=True))
        result = reference_attention(batch)
        if path is not None:
            self._keep(path, {f.name: getattr(result, f.name) for f in fields(result)})
        return result

    def _keep(self, path: Path, tensors: dict[str, torch.Tensor]) -> None:
        """Save if there is room: a full disk costs the next replicate time, never a point."""
        size = sum(tensor.nbytes for tensor in tensors.values())
        if size > self._room:
            return
        partial = path.with_suffix(".tmp")
        try:
            torch.save(tensors, partial)
            partial.replace(path)
            self._room -= size
        except (OSError, RuntimeError):
            partial.unlink(missing_ok=True)


def _kept_bytes(folder: Path) -> int:
    """What earlier workers of the sweep have kept."""
    return sum(file.stat().st_size for file in folder.glob("*.pt"))
