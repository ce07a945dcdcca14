"""Asks a prepared vLLM, in processes of its own, what it would choose on a device.

One process answers every cell for one compute capability: vLLM caches its device, its platform and
half of its answers for the life of a process.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnbench.errors import DataError, InfrastructureError, UsageError
from attnbench.upgrade.cells import Cell
from attnbench.upgrade.probe_env import PreparedVersion
from attnbench.upgrade.user_settings import Setting, case_changes, variables_asked

_PROBE = Path(__file__).parent / "vllm_probe"
# The probe's folder becomes a package of its own in the other interpreter: nothing else of
# attnbench, and nothing installed beside it, comes with it.
_START = """
import importlib.util, sys
folder = sys.argv[1]
spec = importlib.util.spec_from_file_location(
    "attnbench_vllm_probe", folder + "/__init__.py", submodule_search_locations=[folder])
package = importlib.util.module_from_spec(spec)
sys.modules["attnbench_vllm_probe"] = package
spec.loader.exec_module(package)
from attnbench_vllm_probe.main import main
sys.exit(main())
"""
TIMEOUT_S = 300.0

CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "10.3", "12.0", "12.1", "cpu")
"""What can be asked about, in order. 11.0 (Thor) behaves like none of them."""

FACTS: Mapping[str, bool] = {
    "flashinfer-cubin": True,
    "nvidia-cutlass-dsl": True,
    "nvcc": True,
    "tokenspeed_mla": False,
}
"""What is assumed of the host besides what the vLLM release requires: FlashInfer's pre-built
kernels are there (installed, or NVIDIA's host can be reached), the CuTe DSL imports, a CUDA
compiler and ninja are there, and the package `tokenspeed-mla` is not."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One backend of the platform's list, in its order, and why it was passed over."""

    backend: str
    priority: int
    reasons: tuple[str, ...]
    environmental: bool
    absent: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CellAnswer:
    """What one version chooses for one cell.

    `backend` is the registry's name, None where everything refuses. `behind` holds what may change
    while the name stays. `untrusted` says why the answer may be this machine's and not the host's.
    `forced` is the backend that the user's settings ask for, "" where the version chooses.
    """

    cell: Cell
    backend: str | None
    backend_class: str | None
    behind: Mapping[str, Any]
    candidates: tuple[Candidate, ...]
    refused: str
    depends_on: tuple[str, ...]
    untrusted: tuple[str, ...]
    not_evaluated: tuple[str, ...]
    not_asked: tuple[str, ...]
    model_override: str
    forced: str = ""

    @property
    def trusted(self) -> bool:
        return not self.untrusted


@dataclass(frozen=True, slots=True)
class SettingAnswer:
    """What one version makes of one setting by itself.

    `known` is None where it could not be found out. `refused` and `ended` are the version's own
    words: it does not start with the value; the setting has no effect. `becomes` is what it turns
    the value into, `read_by` a file that names a variable which it does not list.
    """

    setting: Setting
    known: bool | None
    refused: str = ""
    ended: str = ""
    becomes: str | None = None
    read_by: str = ""
    not_evaluated: str = ""


@dataclass(frozen=True, slots=True)
class VersionAnswer:
    """Every cell's answer of one version on one compute capability."""

    version: str
    capability: str
    how: str
    platform: str
    registered: tuple[str, ...]
    requires: Mapping[str, str]
    facts: Mapping[str, bool]
    duration_s: float
    cells: Mapping[str, CellAnswer]
    settings: tuple[SettingAnswer, ...] = ()


def parse_capability(text: str) -> str:
    """`9.0`, `sm_90`, `90` or `cpu`, as this project writes it.

    Raises:
        UsageError: not a compute capability that a device has.
    """
    word = text.strip().lower().removeprefix("sm_").removeprefix("sm")
    if word.isdigit() and len(word) >= 2:
        word = f"{word[:-1]}.{word[-1]}"
    if word == "cpu" or word in CAPABILITIES or word == "11.0" or word == "7.0":
        return word
    raise UsageError(f"unknown compute capability {text!r}; write one of {', '.join(CAPABILITIES)}")


def parse_facts(words: Sequence[str]) -> dict[str, bool]:
    """The assumed facts with the user's changes: `flashinfer-cubin=no`, `tokenspeed_mla=yes`.

    Raises:
        UsageError: an unknown fact or a value other than yes and no.
    """
    facts = dict(FACTS)
    for word in words:
        name, _, value = word.partition("=")
        if name not in FACTS or value not in ("yes", "no"):
            known = ", ".join(f"{fact}=yes|no" for fact in FACTS)
            raise UsageError(f"unknown assumption {word!r}; write one of {known}")
        facts[name] = value == "yes"
    return facts


def probe(
    version: PreparedVersion,
    capability: str,
    cells: Sequence[Cell],
    facts: Mapping[str, bool] = FACTS,
    settings: Sequence[Setting] = (),
    proposed: Sequence[Setting] = (),
) -> VersionAnswer:
    """Ask one version about one device.

    Args:
        settings: the server's: each is looked at, and the cells are asked with all of them.
        proposed: settings that are looked at only.

    Raises:
        DataError: this vLLM cannot be asked: no selector, or its imports fail.
        InfrastructureError: the process died or hung.
    """
    changes = case_changes(settings)
    forced = str(changes.get("attention_config", {}).get("backend", ""))
    with tempfile.TemporaryDirectory(prefix="attnbench-probe-") as folder:
        answer_file = Path(folder) / "answer.json"
        request = {
            "capability": None
            if capability == "cpu"
            else [int(part) for part in capability.split(".")],
            "paths": [str(path) for path in version.paths],
            "stubs": not version.on_device,
            "facts": dict(facts),
            "tools": str(Path(folder) / "tools"),
            "cases": [cell.case() | changes for cell in cells],
            "settings": [_question(one) for one in (*settings, *proposed)],
            "environment": variables_asked(settings),
            "answer": str(answer_file),
        }
        raw = _ask(version, capability, request, answer_file)
    if "failed" in raw:
        raise DataError(_failure(version, raw))
    wanted = None if capability == "cpu" else capability
    found = raw["capability"]
    if wanted is not None and found is not None and ".".join(map(str, found)) != wanted:
        raise DataError(
            f"{version.label} answered for compute capability {'.'.join(map(str, found))} and not "
            f"for {wanted}: an installed vLLM on a GPU answers for that GPU only"
        )
    known = set(facts)
    return VersionAnswer(
        version=raw["vllm"],
        capability=capability,
        how="installed, on its device" if version.on_device else "executed",
        platform=raw["platform"],
        registered=tuple(raw["registered"]),
        requires=_pins(raw["requires"]),
        facts=dict(facts),
        duration_s=raw["duration_s"],
        cells={
            cell.text: _cell_answer(cell, one, known, forced)
            for cell, one in zip(cells, raw["answers"], strict=True)
        },
        settings=tuple(
            SettingAnswer(setting=setting, **one)
            for setting, one in zip((*settings, *proposed), raw["settings"], strict=True)
        ),
    )


def probe_all(
    asked: Sequence[tuple[PreparedVersion, str]],
    cells: Sequence[Cell],
    facts: Mapping[str, bool] = FACTS,
    progress: Callable[[int, int], None] | None = None,
    settings: Sequence[Setting] = (),
    proposed: Sequence[Setting] = (),
) -> list[VersionAnswer]:
    """Ask several (version, capability) pairs, as many at once as there are cores; in order.

    Raises:
        DataError, InfrastructureError: see `probe`; the first one in order.
    """
    workers = max(1, min(len(asked), os.cpu_count() or 1))
    done = 0
    with ThreadPoolExecutor(workers) as pool:
        running = [
            pool.submit(probe, version, one, cells, facts, settings, proposed)
            for version, one in asked
        ]
        answers = []
        for future in running:
            answers.append(future.result())
            done += 1
            if progress is not None:
                progress(done, len(asked))
    return answers


def _ask(
    version: PreparedVersion, capability: str, request: Mapping[str, Any], answer_file: Path
) -> dict[str, Any]:
    where = f"the probe of {version.label} for {capability}"
    try:
        done = subprocess.run(
            [str(version.python), "-I", "-c", _START, str(_PROBE)],
            input=json.dumps(request) + "\n",
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise InfrastructureError(f"{where} did not end in {TIMEOUT_S:.0f} s") from error
    except OSError as error:
        raise DataError(f"{where} cannot start {version.python}: {error}") from error
    if not answer_file.exists():
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise InfrastructureError(f"{where} died with exit code {done.returncode}: {last}")
    answer: dict[str, Any] = json.loads(answer_file.read_text(encoding="utf-8"))
    return answer


def _failure(version: PreparedVersion, raw: Mapping[str, Any]) -> str:
    missing = raw.get("module")
    if missing and missing.partition(".")[0] != "vllm":
        return (
            f"{version.label} could not be imported: it needs the package {missing!r}, which the "
            f"probe's environment lacks; add it with --probe-requirement {missing}"
        )
    return f"{version.label} could not be asked: {raw['failed']}"


def _question(setting: Setting) -> dict[str, Any]:
    return {
        "kind": str(setting.kind),
        "name": setting.name,
        "field": setting.field,
        "value": setting.value,
    }


def _cell_answer(
    cell: Cell, raw: Mapping[str, Any], known_facts: set[str], forced: str
) -> CellAnswer:
    candidates = tuple(
        Candidate(
            one["backend"],
            one["priority"],
            tuple(one["reasons"]),
            one["environmental"],
            tuple(one["absent"]),
        )
        for one in raw.get("candidates", ())
    )
    backend = raw.get("backend")
    not_evaluated = tuple(raw["not_evaluated"])
    return CellAnswer(
        cell=cell,
        backend=backend,
        backend_class=raw.get("backend_class"),
        behind=raw.get("behind", {}),
        candidates=candidates,
        refused=raw.get("refused", ""),
        depends_on=tuple(_dependency(one) for one in raw.get("depends_on", ())),
        untrusted=_untrusted(backend, candidates, not_evaluated, known_facts),
        not_evaluated=not_evaluated,
        not_asked=tuple(dict.fromkeys(raw.get("dropped", ()))),
        model_override=raw.get("model_override", ""),
        forced="" if forced.lower() == "auto" else forced.upper(),
    )


def _untrusted(
    backend: str | None,
    candidates: Sequence[Candidate],
    not_evaluated: Sequence[str],
    known_facts: set[str],
) -> tuple[str, ...]:
    """Why the answer may be this machine's: a better candidate lost for an environmental reason.

    A candidate that misses only what is among the stated assumptions is covered by `depends_on`.
    """
    why = [text for text in not_evaluated if text.startswith(("selection", "model override"))]
    for candidate in candidates:
        if candidate.backend == backend:
            break
        stated = {one.partition(" ")[2] for one in candidate.absent} <= known_facts
        if candidate.environmental and not (candidate.absent and stated):
            absent = f" (absent here: {', '.join(candidate.absent)})" if candidate.absent else ""
            why.append(f"{candidate.backend}: {'; '.join(candidate.reasons)}{absent}")
    return tuple(why)


def _dependency(raw: Mapping[str, Any]) -> str:
    holds = "" if raw["assumed"] else "no "
    if "otherwise" in raw:
        return f"{holds}{raw['fact']}; otherwise {raw['otherwise'] or 'no backend'}"
    changes = ", ".join(
        f"{key.replace('_', ' ')} {value}" for key, value in raw["otherwise_behind"].items()
    )
    return f"{holds}{raw['fact']}; otherwise {changes}"


_PINNED = (
    "torch",
    "triton",
    "flashinfer-python",
    "flashinfer-cubin",
    "nvidia-cutlass-dsl",
    "quack-kernels",
)


def _pins(requires: Sequence[str]) -> dict[str, str]:
    """The versions a release asks for of what kernels come from (`Requires-Dist`)."""
    from packaging.requirements import Requirement

    pins = {}
    for text in requires:
        requirement = Requirement(text)
        if requirement.name in _PINNED and "extra" not in str(requirement.marker or ""):
            pins[requirement.name] = str(requirement.specifier) or "any"
    return pins
