"""What the command line shows: progress, answers, counters, the doctor's report."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.panel import Panel
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from nabla_fast.stopping import StoppedError
from nabla_fast.terminal import ERR, OUT, plain, print_json, print_warning, status

# What loads torch and transformers is imported where it is used: `nabla-fast doctor` needs little of it.
if TYPE_CHECKING:
    from nabla_fast.config import NablaConfig
    from nabla_fast.evaluation.journal import Journal
    from nabla_fast.evaluation.methods import Models
    from nabla_fast.evaluation.ray_engine import Cluster
    from nabla_fast.evaluation.runner import Plan
    from nabla_fast.evaluation.tasks import Task
    from nabla_fast.generate import NablaOutput
    from nabla_fast.rollout import RolloutError

_SHOWN_FAILURES = 5

_PHASE_NAMES = {
    "rollout": "rolling out",
    "selection": "selecting a token",
    "gradient": "taking gradients",
    "dto": "optimising",
    "resample": "resampling",
    "reward": "scoring",
}


class ProgressObserver:
    """A progress bar on stderr: committed tokens of all answers, and the phase that is running."""

    def __init__(self, label: str) -> None:
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            TextColumn("{task.completed}/{task.total} tokens"),
            TextColumn("· {task.fields[rollouts]} rollouts"),
            TimeElapsedColumn(),
            console=ERR,
        )
        self.label = label
        self.task = self.progress.add_task(label, total=None, rollouts=0)
        self.rollouts = 0
        self.committed: dict[int, int] = {}
        self.lengths: dict[int, int] = {}

    def on_phase(self, phase: str, sequences: int) -> None:
        """See `nabla_fast.decoder.Observer`."""
        self.rollouts += sequences if phase == "rollout" else 0
        text = f"{self.label}: {_PHASE_NAMES[phase]:<17}"
        self.progress.update(self.task, description=text, rollouts=self.rollouts)

    def on_commit(self, index: int, tokens: list[int], length: int) -> None:
        """See `nabla_fast.decoder.Observer`."""
        self.committed[index] = self.committed.get(index, 0) + len(tokens)
        self.lengths[index] = length
        self.progress.update(self.task, completed=sum(self.committed.values()), total=sum(self.lengths.values()))


@dataclass(frozen=True)
class Outcome:
    """Questions, their answers, and what it took.

    Attributes:
        questions: strings or chats.
        config: settings of the refined answers.
        refined: answers of ∇-Reasoner.
        greedy: greedy answers to compare with, or None.
        tokenizer: spells the revised tokens.
        unanswered: further questions, whose answers were not finished when the command ended early.
    """

    questions: list[Any]
    config: NablaConfig
    refined: NablaOutput
    greedy: NablaOutput | None
    tokenizer: Any
    unanswered: tuple[Any, ...] = ()

    def present(self, *, as_json: bool) -> None:
        """Prints it in one way or the other."""
        if as_json:
            print_json(self.to_dict())
        else:
            self.show()

    def to_dict(self) -> dict[str, Any]:
        """Plain data for ``--json``."""
        answers = []
        for i, question in enumerate(self.questions):
            entry = {"prompt": question, **_answer(self.refined, i), "stats": self.refined.stats.sequences[i].to_dict()}
            if self.greedy is not None:
                entry["greedy"] = {**_answer(self.greedy, i), "stats": self.greedy.stats.sequences[i].to_dict()}
            answers.append(entry)
        told = self.refined.stats.to_dict()
        whole = {"config": self.config.to_dict(), "answers": answers, "totals": told["totals"], "cache": told["cache"]}
        return whole | ({"unanswered": list(self.unanswered)} if self.unanswered else {})

    def show(self) -> None:
        """Prints answers and tables."""
        for i, question in enumerate(self.questions):
            OUT.print(Panel(plain(_text(question)), title="question", title_align="left"))
            if self.greedy is not None:
                OUT.print(_answer_panel("greedy", self.greedy, i))
            OUT.print(_answer_panel("∇-Reasoner", self.refined, i))
            revisions = self._revisions(i)
            OUT.print(revisions if revisions.rows else "No token was changed.")
        OUT.print(*self._tables(), sep="\n")

    def _revisions(self, i: int) -> Table:
        table = Table("position", "was", "proposed", "reward before", "reward of proposal", "", title="revised tokens")
        for r in self.refined.stats.sequences[i].revisions:
            spelled = [Text(repr(self.tokenizer.decode([token]))) for token in (r.old_token, r.new_token)]
            verdict = Text("accepted", "green") if r.accepted else Text("rejected", "yellow")
            table.add_row(str(r.position), *spelled, f"{r.old_reward:.3f}", f"{r.new_reward:.3f}", verdict)
        return table

    def _tables(self) -> list[Table]:
        columns = {"∇-Reasoner": self.refined.stats.totals}
        if self.greedy is not None:
            columns = {"greedy": self.greedy.stats.totals, **columns}
        counters = Table("counter", title="counters")
        seconds = Table("phase", title="seconds per phase")
        for name in columns:
            counters.add_column(name, justify="right")
            seconds.add_column(name, justify="right")
        told = {name: {**record.counters(), **record.passes()} for name, record in columns.items()}
        for counter in next(iter(told.values())):
            counters.add_row(counter, *(str(one[counter]) for one in told.values()))
        for phase in _PHASE_NAMES:
            seconds.add_row(phase, *(f"{record.seconds[phase]:.2f}" for record in columns.values()))
        seconds.add_section()
        seconds.add_row("total", *(f"{sum(record.seconds.values()):.2f}" for record in columns.values()))
        return [counters, seconds]


def answer(
    models: tuple[Any, Any, Any, Any],
    questions: list[Any],
    config: NablaConfig,
    *,
    compare_greedy: bool,
    profile: Path | None = None,
    as_json: bool = False,
) -> None:
    """Answers questions under a progress bar, and prints the answers: those that are finished, whatever ends it.

    Args:
        models: the first four arguments of `nabla_fast.generate`.
        compare_greedy: whether to answer greedily as well.
        profile: a directory for `nabla_fast.profiling`, for the refined answers; None profiles nothing.
        as_json: print one JSON object instead of panels and tables.
    """
    from nabla_fast import baselines, profiling
    from nabla_fast.generate import generate
    from nabla_fast.rollout import RolloutError

    greedy = None
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        if compare_greedy:
            greedy = _under_progress("greedy", baselines.greedy, models, questions, config)
        finished: dict[int, NablaOutput] = {}
        method = partial(generate, on_answer=finished.__setitem__)
        method = method if profile is None else partial(profiling.profile, profile, method)
        try:
            refined = _under_progress("∇-Reasoner", method, models, questions, config)
        except BaseException as error:
            if finished:
                _some(finished, questions, config, greedy, models[1]).present(as_json=as_json)
            if isinstance(error, RolloutError):
                _show_unfinished(questions, error, models[1], finished)
            if finished or isinstance(error, KeyboardInterrupt | StoppedError):
                ERR.print(f"stopped with {len(finished)} of {len(questions)} answers")
            raise
    Outcome(questions, config, refined, greedy, models[1]).present(as_json=as_json)


def _some(
    finished: Mapping[int, NablaOutput],
    questions: list[Any],
    config: NablaConfig,
    greedy: NablaOutput | None,
    tokenizer: Any,
) -> Outcome:
    """What there is when not all questions are answered."""
    from nabla_fast.generate import joined

    places = sorted(finished)
    return Outcome(
        [questions[i] for i in places],
        config,
        joined([finished[i] for i in places]),
        None if greedy is None else joined([greedy.only(i) for i in places]),
        tokenizer,
        tuple(question for i, question in enumerate(questions) if i not in finished),
    )


def _show_unfinished(questions: list[Any], error: RolloutError, tokenizer: Any, finished: Collection[int]) -> None:
    """Prints what the other questions of a decode had come to when its rollouts were lost."""
    for i, (question, tokens, committed) in enumerate(zip(questions, error.responses, error.committed, strict=False)):
        if i in finished:
            continue
        ERR.print(Panel(plain(_text(question)), title="question", title_align="left"))
        title = f"unfinished: {len(committed)} of {len(tokens)} tokens are committed"
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        ERR.print(Panel(plain(text), title=title, title_align="left"))


def evaluate(
    load: Callable[[], Models],
    task: Task,
    plan: Plan,
    journal: Journal,
    out: Path,
    *,
    cluster: Cluster | None = None,
    retry_failed: bool = False,
    as_json: bool = False,
    profile: Path | None = None,
) -> int:
    """Runs an evaluation under progress bars, writes its report and shows it.

    Args:
        load: makes the models.
        out: the directory of ``journal``.
        cluster: runs it; None runs it in this process.
        profile: a directory for a trace of the first problems, taken in this process, and the run's seconds per phase.

    Returns:
        How many answers failed.
    """
    from nabla_fast import profiling
    from nabla_fast.evaluation import ray_engine, report, runner
    from nabla_fast.evaluation.progress import RunProgress
    from nabla_fast.rollout import ServerLostError

    if cluster is None:
        with status("loading the models"):
            models = load()
        if profile is not None:
            with status("profiling the first problems"):
                runner.trace(models, task, plan, profile)
        engine = partial(runner.evaluate, models, task, plan, journal)
    else:
        engine = partial(ray_engine.evaluate, load, task, plan, journal, cluster)
    bars = RunProgress(plan, task.problems, journal.records, ERR, retry_failed=retry_failed)
    try:
        with warnings.catch_warnings(), bars.progress:
            warnings.showwarning = _show_warning
            records = engine(retry_failed=retry_failed, on_record=bars.on_record)
    except (KeyboardInterrupt, StoppedError, ServerLostError):
        done, total = len(runner.latest(journal.records)), len(plan.keys(task.problems))
        ERR.print(f"stopped with {done} of {total} answers in {out}; the same command goes on from there")
        raise
    failed = [record for record in records if record["error"] is not None]
    if profile is not None:
        profiling.write(profile / profiling.PHASE_TABLE, runner.phase_tables(records))
    try:
        summary = report.write_report(out)
    except ImportError as error:
        print_warning(f"no plots: {error}")
        summary = report.summarise(*report.read_run(out))
    if as_json:
        print_json(summary)
    else:
        OUT.print(*report.tables(summary))
    for record in failed[:_SHOWN_FAILURES]:
        where = f"{record['method']} {record['n']}, seed {record['seed']}, {record['problem']}"
        ERR.print(Text.assemble((f"failed: {where}: ", "red"), plain(record["error"])), soft_wrap=True)
    if failed:
        ERR.print(f"{len(failed)} of {len(records)} answers failed; {runner.RESULTS} has them all")
    return len(failed)


def show_report(report: dict[str, Any]) -> None:
    """Prints the doctor's report as tables."""
    versions = Table("package", "version", title="versions")
    for name, version in report["versions"].items():
        versions.add_row(name, version)
    devices = Table("device", "", title="devices")
    cpu = report["devices"]["cpu"]
    devices.add_row("CPU", f"{cpu['architecture']}, {cpu['threads']} threads, {cpu['vector_instructions']}")
    for gpu in report["devices"]["cuda"]:
        memory = gpu["memory_bytes"] / 2**30
        devices.add_row(gpu["name"], f"sm_{gpu['compute_capability'].replace('.', '')}, {memory:.0f} GiB")
    if not report["devices"]["cuda"]:
        devices.add_row("CUDA", "no GPU is visible to torch")
    operators = Table("operator", *report["backends"], title="operators")
    for operator, reasons in report["operators"].items():
        operators.add_row(operator, *(_mark(reasons[name] is None) for name in report["backends"]))
    OUT.print(versions, devices, _availability("back ends", report["backends"]), operators)
    for operator, reasons in report["operators"].items():
        for name, reason in reasons.items():
            # What is true of the whole back end stands in its own table.
            if reason is not None and report["backends"][name]["available"]:
                OUT.print(f"{operator}, {name}: {reason}")
    OUT.print(_availability("demo", report["demo"]))


def _availability(title: str, entries: dict[str, dict[str, Any]]) -> Table:
    table = Table("", "available", "why not", title=title)
    for name, entry in entries.items():
        table.add_row(name, _mark(entry["available"]), entry["reason"] or "")
    return table


def _mark(available: bool) -> Text:
    return Text("yes", "green") if available else Text("no", "yellow")


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print_warning(str(message))


def _under_progress(
    label: str, method: Any, models: tuple[Any, Any, Any, Any], questions: list[Any], config: NablaConfig
) -> NablaOutput:
    observer = ProgressObserver(label)
    with observer.progress:
        output: NablaOutput = method(*models, questions, config, observer=observer)
        observer.progress.update(observer.task, description=f"{label}: done")
    return output


def _answer(output: NablaOutput, i: int) -> dict[str, Any]:
    return {"text": output.texts[i], "reward": output.rewards[i], "tokens": output.sequences[i].tolist()}


def _answer_panel(name: str, output: NablaOutput, i: int) -> Panel:
    body = Group(plain(output.texts[i].strip()), Text(f"reward {output.rewards[i]:.3f}", style="bold"))
    return Panel(body, title=name, title_align="left")


def _text(question: Any) -> str:
    return question if isinstance(question, str) else "\n".join(f"{m['role']}: {m['content']}" for m in question)
