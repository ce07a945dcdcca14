"""How long: plan -> worker process -> checked output -> timer -> samples and conditions."""

from attnbench.measure.options import MeasureOptions
from attnbench.measure.plan import PlannedPoint, make_plan, plan_workloads
from attnbench.measure.sweep import SweepOutcome, run_sweep

__all__ = [
    "MeasureOptions",
    "PlannedPoint",
    "SweepOutcome",
    "make_plan",
    "plan_workloads",
    "run_sweep",
]
