"""From two named versions to what changes between them: the whole way, as one function."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from attnbench.errors import UsageError
from attnbench.upgrade.cells import Cell
from attnbench.upgrade.compare import Step, compare
from attnbench.upgrade.overrides import proposals
from attnbench.upgrade.probe import FACTS, VersionAnswer, probe_all
from attnbench.upgrade.probe_env import PreparedVersion, prepare
from attnbench.upgrade.tell import Silent, Tell
from attnbench.upgrade.user_settings import Setting
from attnbench.upgrade.versions import Source


def assess(
    sources: Sequence[Source],
    capabilities: Sequence[str],
    cells: Sequence[Cell],
    facts: Mapping[str, bool] = FACTS,
    *,
    tell: Tell | None = None,
    cache: Path | None = None,
    requirements: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
    settings: Sequence[Setting] = (),
) -> list[Step]:
    """Compare each version with the next, on every device; steps of a device stand together.

    Args:
        sources: two or more versions of vLLM, the oldest first.
        capabilities: as `parse_capability` gives them.
        cells: what to ask; see `default_grid` and `cells_of_model`.
        facts: what is assumed of the host; see `parse_facts`.
        cache: the folder environments are kept in. Default: the user's cache.
        requirements: more packages for the probe's environment.
        settings: the server's; every cell is asked with them.

    Raises:
        UsageError: fewer than two versions, or one that is not vLLM.
        DataError, InfrastructureError: a version cannot be got or asked.
    """
    if len(sources) < 2:
        raise UsageError("an upgrade has two sides; name them with --from and --to")
    for source in sources:
        if source.distribution != "vllm":
            raise UsageError(
                f"{source.text!r} is {source.distribution} and has no attention selector; its "
                "default backends do not change, its speed is measured with --measure"
            )
    versions = [prepare(source, tell or Silent(), cache, requirements) for source in sources]
    asked = [(version, one) for one in capabilities for version in versions]
    answers = probe_all(asked, cells, facts, progress, settings, proposals(settings))
    return [step for row in _rows(answers, versions) for step in map(compare, row, row[1:])]


def _rows(
    answers: Sequence[VersionAnswer], versions: Sequence[PreparedVersion]
) -> list[Sequence[VersionAnswer]]:
    width = len(versions)
    return [answers[first : first + width] for first in range(0, len(answers), width)]
