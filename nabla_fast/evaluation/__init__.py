"""Does it beat Best-of-N for the same compute? Tasks, grading, and runs that can be killed at any moment."""

from nabla_fast.evaluation.methods import load
from nabla_fast.evaluation.report import compare, write_report
from nabla_fast.evaluation.runner import describe, evaluate, make_plan, open_run
from nabla_fast.evaluation.tasks import load_task

__all__ = ["compare", "describe", "evaluate", "load", "load_task", "make_plan", "open_run", "write_report"]
