"""`attnbench asv`: asv's own command line, with what attnbench's suites need in place."""

from __future__ import annotations

from collections.abc import Sequence

import attnbench.asv_bridge.plugin  # noqa: F401  asv finds its publisher as a subclass
from attnbench.asv_bridge import asv_api
from attnbench.asv_bridge.prepare import check_repository, find_config, prepare

#: asv's default factor of 1.1 ignores an 8 % step.
FACTOR = "1.02"

_WITHOUT_CONFIG = ("", "help", "quickstart")
_COMPARING = ("continuous", "compare")


def asv_command(arguments: Sequence[str]) -> int:
    """Run `asv ARGUMENTS...` here and return asv's exit status, unchanged.

    Raises: UsageError when there is no asv.conf.json, git repository or commit, or a suite or
        preset is wrong.
    """
    command = asv_api.subcommand(arguments)
    if command not in _WITHOUT_CONFIG and not {"-h", "--help"}.intersection(arguments):
        config = find_config(asv_api.config_argument(arguments))
        check_repository(config)
        prepare(command, config)
    return asv_api.run_asv(with_factor(arguments))


def with_factor(arguments: Sequence[str]) -> list[str]:
    """`arguments` with our factor before the user's own options, which win."""
    command = asv_api.subcommand(arguments)
    words = list(arguments)
    if command in _COMPARING:
        after = words.index(command) + 1
        words[after:after] = ["--factor", FACTOR]
    return words
