"""Capabilities by name, each a small workload: what a backend accepts is asked, and can be run.

`docs/backends.md` (`backends_page.py`) shows both: what the predicates accept on which device, and
what was run on which hardware (`attnbench.measure.record_runs` writes `docs/backend-runs.csv`).
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path

from attnbench.backends.abstract import AttentionBackend
from attnbench.backends.device import Device, parse_device
from attnbench.backends.registry import get_backend_class
from attnbench.errors import DataError
from attnbench.selection.config import config_of
from attnbench.workload import Workload

#: A mixed batch: two extends and three decodes, no length a whole number of blocks.
_BATCH = "2q20s50_3q1s70"
_PLAIN = f"{_BATCH} heads=4/2 dtype=fp16"

#: Capability -> workload. Small enough for a CPU and for Triton's interpreter.
ATTENTION: Mapping[str, str] = {
    "fp16": _PLAIN,
    "bf16": f"{_BATCH} heads=4/2",
    "fp32": f"{_BATCH} heads=4/2 dtype=fp32",
    "decode only": "4q1s70 heads=4/2 dtype=fp16",
    "prefill only": "2q50 heads=4/2 dtype=fp16",
    "8 heads a KV head": f"{_BATCH} heads=8/1 dtype=fp16",
    "head size 32": f"{_PLAIN} head_size=32",
    "head size 64": f"{_PLAIN} head_size=64",
    "head size 80": f"{_PLAIN} head_size=80",
    "head size 96": f"{_PLAIN} head_size=96",
    "head size 256": f"{_PLAIN} head_size=256",
    "head size 512": f"{_PLAIN} head_size=512",
    "keys 192, values 128": f"{_PLAIN} head_size=192 v_head_size=128",
    "block size 1": f"{_PLAIN} block=1",
    "block size 7": f"{_PLAIN} block=7",
    "block size 64": f"{_PLAIN} block=64",
    "block size 256": f"{_PLAIN} block=256",
    "HND layout": f"{_PLAIN} layout=HND",
    "fp8_e4m3 KV cache": f"{_BATCH} heads=4/2 kv=fp8_e4m3",
    "fp8_e5m2 KV cache": f"{_BATCH} heads=4/2 kv=fp8_e5m2",
    "sliding window": f"{_PLAIN} window=33",
    "soft cap": f"{_PLAIN} softcap=20",
    "sinks": f"{_PLAIN} head_size=64 sinks=1",
    "ALiBi": f"{_PLAIN} alibi=1",
    "shared prefix": f"{_PLAIN} prefix=16",
    "encoder": "2q50 heads=4/2 dtype=fp16 attn=encoder",
    "encoder only": "2q50 heads=4/2 dtype=fp16 attn=encoder_only",
    "encoder-decoder": f"{_PLAIN} attn=encoder_decoder",
}
_SHAPE = "shape=deepseek-v2-lite"
#: Blocks of 64, which most MLA kernels take.
_LATENT = f"{_SHAPE} block=64"
MLA: Mapping[str, str] = {
    "fp16": f"{_BATCH} {_LATENT} dtype=fp16",
    "bf16": f"{_BATCH} {_LATENT}",
    "fp32": f"{_BATCH} {_LATENT} dtype=fp32",
    "decode only": f"4q1s70 {_LATENT} dtype=fp16",
    "4 tokens a request": f"3q4s70 {_LATENT} dtype=fp16",
    "prefill only": f"2q90 {_LATENT} dtype=fp16",
    "128 heads": "2q1s70 shape=deepseek-v3 block=64 dtype=fp16",
    "block size 16": f"{_BATCH} {_SHAPE} block=16 dtype=fp16",
    "block size 32": f"{_BATCH} {_SHAPE} block=32 dtype=fp16",
    "block size 128": f"{_BATCH} {_SHAPE} block=128 dtype=fp16",
    "fp8_e4m3 KV cache": f"{_BATCH} {_LATENT} kv=fp8_e4m3",
    "fp8_e4m3 KV cache, block size 128": f"{_BATCH} {_SHAPE} block=128 kv=fp8_e4m3",
}


_SPARSE_BATCH = "q20_3q1s170_q30s100"
SPARSE: Mapping[str, str] = {
    "top-k, bf16": f"{_SPARSE_BATCH} {_LATENT} topk=64:random",
    "top-k, fp16": f"{_SPARSE_BATCH} {_LATENT} dtype=fp16 topk=64:random",
    "top-k, decode only": f"4q1s170 {_LATENT} topk=64:random",
    "top-k, 4 tokens a request": f"3q4s170 {_LATENT} topk=64:window",
    "top-k, prefill only": f"2q90 {_LATENT} topk=64:prefix",
    "top-k, 128 heads": "2q1s170 shape=deepseek-v3 block=64 topk=64:random",
    "top-k, block size 16": f"{_SPARSE_BATCH} {_SHAPE} block=16 topk=64:random",
    "top-k, fp8_e4m3 KV cache": f"{_SPARSE_BATCH} {_LATENT} kv=fp8_e4m3 topk=64:random",
    "top-k, fp8_ds_mla KV cache": f"{_SPARSE_BATCH} {_LATENT} kv=fp8_ds_mla topk=64:random",
    "top-k, fp8_ds_mla KV cache, 128 heads": (
        "q20_2q1s170 shape=deepseek-v3 block=64 kv=fp8_ds_mla topk=64:random"
    ),
}


def capabilities_of(backend: type[AttentionBackend]) -> Mapping[str, Workload]:
    """The capabilities to ask `backend` about: dense, sparse, or both where it takes either."""
    texts = ATTENTION
    if backend.is_mla():
        texts = MLA
        if backend.is_sparse():
            texts = SPARSE
        elif _takes_sparse(backend):
            texts = {**MLA, **SPARSE}
    return {name: Workload.parse(text) for name, text in texts.items()}


def _takes_sparse(backend: type[AttentionBackend]) -> bool:
    config = config_of(Workload.parse(SPARSE["top-k, bf16"]))
    return not backend.validate_configuration(config, Device("cpu"))


def accepting_variants(
    backend: type[AttentionBackend], workload: Workload, device: Device
) -> tuple[str, ...]:
    """Variants whose predicates accept `workload` on `device`; libraries are not looked for."""
    config = config_of(workload)
    if backend.validate_configuration(config, device):
        return ()
    return tuple(
        variant
        for variant in backend.get_variants(device)
        if backend.variant_refusal(variant, config, device) is None
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CapabilityRun:
    """One capability that was run: a line of `backend-runs.csv`.

    Attributes:
        workload: what the capability stood for then: a run of another one is none of this.
        device: as `--device` takes it, e.g. `sm90`; hardware: its name.
        status: OK, or how it failed; `interpreted` says that Triton's interpreter ran it.
    """

    backend: str
    variant: str
    capability: str
    workload: str
    device: str
    hardware: str
    date: str
    status: str
    interpreted: str
    versions: str

    @property
    def key(self) -> tuple[str, str, str, str]:
        """A later run of the same takes its place."""
        return (self.backend, self.variant, self.capability, self.device)


_COLUMNS = tuple(field.name for field in fields(CapabilityRun))


def read_runs(path: Path) -> list[CapabilityRun]:
    """The runs in a file; none where there is no file. Raises DataError for other columns."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != _COLUMNS:
            raise DataError(
                f"{path}: its columns are {', '.join(reader.fieldnames or ())}, not "
                f"{', '.join(_COLUMNS)}; take the committed file back"
            )
        return [CapabilityRun(**row) for row in reader]


def is_current(run: CapabilityRun) -> bool:
    """Whether `run` is of what its capability stands for now, and not refused since.

    Raises UnknownBackendError.
    """
    backend, device = get_backend_class(run.backend), parse_device(run.device)
    workload = capabilities_of(backend).get(run.capability)
    if workload is None or workload.text != run.workload or device is None:
        return False
    return run.variant in accepting_variants(backend, workload, device)


def format_runs(runs: Iterable[CapabilityRun]) -> str:
    """The file of `runs`, the latest of each, in a fixed order."""
    latest = {run.key: run for run in runs}
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(latest[key]) for key in sorted(latest))
    return text.getvalue()


def describe_numbers(values: Sequence[int]) -> str:
    """`64, 128, 256`, `32–512`, `32–256 in steps of 8`; "none" for none."""
    if not values:
        return "none"
    if len(values) <= 6:
        return ", ".join(map(str, values))
    steps = {b - a for a, b in pairwise(values)}
    if len(steps) == 1:
        (step,) = steps
        ends = f"{values[0]}–{values[-1]}"
        return ends if step == 1 else f"{ends} in steps of {step}"
    return ", ".join(map(str, values))
