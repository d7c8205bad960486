"""The progress of a run: a bar for each method, with its accuracy so far."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from nabla_fast.evaluation.journal import Record
from nabla_fast.evaluation.records import latest
from nabla_fast.evaluation.runner import Plan
from nabla_fast.evaluation.tasks import Problem

_ALL = "all"


class _OfAll(ProgressColumn):
    """A column for the bar of everything alone: methods take turns, so their own times would mislead."""

    def __init__(self, column: TimeElapsedColumn | TimeRemainingColumn) -> None:
        super().__init__()
        self._column = column

    def render(self, task: Task) -> Text:
        """See `rich.progress.ProgressColumn.render`."""
        return self._column.render(task) if task.description == _ALL else Text()


class RunProgress:
    """One bar for each arm of a plan, and one for all; hears of records.

    Args:
        records: what earlier runs have done.
        retry_failed: whether their failures are to be done again.
    """

    def __init__(
        self,
        plan: Plan,
        problems: Sequence[Problem],
        records: Sequence[Record],
        console: Console,
        *,
        retry_failed: bool = False,
    ) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[accuracy]:<16}"),
            _OfAll(TimeElapsedColumn()),
            _OfAll(TimeRemainingColumn()),
            console=console,
        )
        self._graded: dict[str, list[bool]] = {arm.label: [] for arm in plan.arms}
        self._labels = {(arm.method, arm.n): arm.label for arm in plan.arms}
        keys = plan.keys(problems)
        totals = dict.fromkeys(self._graded, 0)
        for method, n, *_ in keys:
            totals[self._labels[method, n]] += 1
        self._all = self.progress.add_task(_ALL, total=len(keys), accuracy="")
        self._tasks = {
            label: self.progress.add_task(label, total=total, accuracy="") for label, total in totals.items()
        }
        for record in latest(records):
            if not (retry_failed and record["error"] is not None):
                self.on_record(record)

    def on_record(self, record: Record) -> None:
        """Counts a record."""
        label = self._labels[record["method"], record["n"]]
        if record["error"] is None:
            self._graded[label].append(record["right"])
        graded = self._graded[label]
        accuracy = f"{sum(graded) / len(graded):.1%} right" if graded else "all failed"
        self.progress.update(self._tasks[label], advance=1, accuracy=accuracy)
        self.progress.update(self._all, advance=1)
