"""Which stored times `itl` and `choose` go by: the same options, checked alike."""

from __future__ import annotations

from typing import Annotated

import typer

StoredTimerOption = Annotated[
    str,
    typer.Option(
        "--timer",
        help="Only times by this timer: wall, event, graph, cupti_span, cupti_sum, or fake for "
        "exact made-up ones. Default: the one that covers most.",
    ),
]
StoredL2Option = Annotated[
    str,
    typer.Option(
        "--l2",
        help="Only times in this state of a GPU's L2 cache, cold or hot. Default: the one that "
        "covers most.",
    ),
]


def check_how(timer: str, l2: str) -> None:
    """Raises UsageError for a timer or a state of the L2 cache that is none; "": not named."""
    from attnbench.measure.options import MeasureOptions

    if timer:
        MeasureOptions(timer=timer)
    if l2:
        MeasureOptions(l2_states=(l2,))
