"""Progress bars on stderr: of answers in the making, and of an evaluation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Task as Bar
from rich.table import Column
from rich.text import Text

from nabla_fast.cli.console import ERR, counted
from nabla_fast.evaluation.journal import Record
from nabla_fast.evaluation.records import latest
from nabla_fast.evaluation.runner import Plan
from nabla_fast.evaluation.tasks import Problem
from nabla_fast.stats import STEPS

_ALL = "all"
_WIDE = 70


class _OfAll(ProgressColumn):
    """A column for the bar of everything alone: methods take turns, so their own times would mislead."""

    def __init__(self, column: TimeElapsedColumn | TimeRemainingColumn) -> None:
        super().__init__()
        self._column = column

    def render(self, task: Bar) -> Text:
        """See `rich.progress.ProgressColumn.render`."""
        return self._column.render(task) if task.description == _ALL else Text()


def _bars(told: str, *columns: ProgressColumn) -> Progress:
    """A description, a bar and what is told beside it; in a narrow terminal the words alone, which wrap."""
    if ERR.width < _WIDE:
        return Progress(_words(f"{{task.description}}: {told}"), console=ERR)
    bar = BarColumn(bar_width=min(30, ERR.width - 60))
    return Progress(_words("{task.description}"), bar, _words(told), *columns, console=ERR)


def _words(form: str) -> TextColumn:
    return TextColumn(form, markup=False, table_column=Column(overflow="fold"))


class AnswerProgress:
    """Hears of a decode (`nabla_fast.decoder.Observer`): committed tokens of all answers, and the running phase."""

    def __init__(self, label: str) -> None:
        self.progress = _bars("{task.fields[told]}", SpinnerColumn(), TimeElapsedColumn())
        self._label = label
        self._bar = self.progress.add_task(label, total=None, told="")
        self._rollouts = 0
        self._committed: dict[int, int] = {}
        self._lengths: dict[int, int] = {}

    def on_phase(self, phase: str, sequences: int) -> None:
        """See `nabla_fast.decoder.Observer`."""
        self._rollouts += sequences if phase == "rollout" else 0
        self._tell(f"{self._label}: {STEPS[phase]:<10}")

    def on_commit(self, index: int, tokens: list[int], length: int) -> None:
        """See `nabla_fast.decoder.Observer`."""
        self._committed[index] = self._committed.get(index, 0) + len(tokens)
        self._lengths[index] = length
        self._tell()

    def done(self) -> None:
        """All are answered."""
        self._tell(f"{self._label}: done")

    def _tell(self, description: str | None = None) -> None:
        done, total = sum(self._committed.values()), sum(self._lengths.values())
        told = f"{done}/{total} tokens · " if total else ""
        self.progress.update(
            self._bar,
            description=description,
            completed=done,
            total=total or None,
            told=told + counted(self._rollouts, "rollout"),
        )


class RunProgress:
    """One bar for each arm of a plan, with its accuracy so far, and one for all; hears of records.

    Args:
        records: what earlier runs have done.
        retry_failed: whether their failures are to be done again.
    """

    def __init__(
        self, plan: Plan, problems: Sequence[Problem], records: Sequence[Record], *, retry_failed: bool = False
    ) -> None:
        told = "{task.completed:.0f}/{task.total:.0f}{task.fields[told]}"
        self.progress = _bars(told, _OfAll(TimeElapsedColumn()), _OfAll(TimeRemainingColumn()))
        self._graded: dict[str, list[bool]] = {arm.label: [] for arm in plan.arms}
        self._labels = {(arm.method, arm.n): arm.label for arm in plan.arms}
        keys = plan.keys(problems)
        totals = Counter(self._labels[method, n] for method, n, *_ in keys)
        self._all = self.progress.add_task(_ALL, total=len(keys), told="")
        self._bars = {label: self.progress.add_task(label, total=totals[label], told="") for label in self._graded}
        for record in latest(records):
            if not (retry_failed and record["error"] is not None):
                self.on_record(record)

    def on_record(self, record: Record) -> None:
        """Counts a record."""
        label = self._labels[record["method"], record["n"]]
        graded = self._graded[label]
        if record["error"] is None:
            graded.append(record["right"])
        told = f", {sum(graded) / len(graded):.1%} right" if graded else ", all failed"
        self.progress.update(self._bars[label], advance=1, told=told)
        self.progress.update(self._all, advance=1)
