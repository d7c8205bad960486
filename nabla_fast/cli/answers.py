"""Answers prompts under a progress bar, and shows the answers: text, rewards, revised tokens, counters, seconds."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.panel import Panel
from rich.text import Text

from nabla_fast import baselines, profiling
from nabla_fast.cli.console import ERR, OUT, counted, plain, print_json, print_panel, print_table, status
from nabla_fast.cli.progress import AnswerProgress
from nabla_fast.config import NablaConfig
from nabla_fast.generate import NablaOutput, generate, joined
from nabla_fast.record import NABLA
from nabla_fast.rollout import RolloutError
from nabla_fast.stats import PHASES
from nabla_fast.stopping import StoppedError
from nabla_fast.whole_files import write_file


@dataclass(frozen=True)
class Outcome:
    """Questions, their answers, and what it took.

    Attributes:
        questions: strings or chats.
        config: settings of the refined answers.
        refined: answers of ∇-Reasoner.
        compared: answers to compare with, as ``--json`` calls them.
        tokenizer: spells the revised tokens.
        unanswered: further questions, whose answers were not finished when the command ended early.
    """

    questions: list[Any]
    config: NablaConfig
    refined: NablaOutput
    compared: dict[str, NablaOutput]
    tokenizer: Any
    unanswered: Sequence[Any] = ()

    @property
    def beside(self) -> dict[str, NablaOutput]:
        """The answers to compare with, as a reader knows them."""
        return {output.details[0].method: output for output in self.compared.values()}

    @property
    def outputs(self) -> dict[str, NablaOutput]:
        """What the columns of the tables are of, by name."""
        return {**self.beside, NABLA: self.refined}

    def to_dict(self) -> dict[str, Any]:
        """Plain data for ``--json``."""
        answers = []
        for i, question in enumerate(self.questions):
            compared = {name: _answer(output, i) for name, output in self.compared.items()}
            answers.append({"prompt": question, **_answer(self.refined, i), **compared})
        told = self.refined.stats.to_dict()
        whole = {"config": self.config.to_dict(), "answers": answers, "totals": told["totals"], "cache": told["cache"]}
        if told["graphs"]:
            whole["graphs"] = told["graphs"]
        return whole | ({"unanswered": list(self.unanswered)} if self.unanswered else {})

    def show(self) -> None:
        """Prints answers and tables."""
        for i, question in enumerate(self.questions):
            print_panel("question", _text(question))
            for name, output in self.outputs.items():
                told = [f"reward {output.rewards[i]:.3f}", counted(len(output.sequences[i]), "token")]
                reason = output.stats.sequences[i].finish_reason
                told += [] if reason is None else [f"finish reason {reason}"]
                body = Group(plain(output.texts[i].strip()), Text(" · ".join(told), style="bold"))
                OUT.print(Panel(body, title=name, title_align="left"))
            self._show_revisions(i)
        self._show_tables()

    def _show_revisions(self, i: int) -> None:
        rows: list[tuple[str | Text, ...]] = []
        for r in self.refined.stats.sequences[i].revisions:
            spelled = [Text(repr(self.tokenizer.decode([token]))) for token in (r.old_token, r.new_token)]
            verdict = Text("accepted", "green") if r.accepted else Text("rejected", "yellow")
            rows.append((str(r.position), *spelled, f"{r.old_reward:.3f}", f"{r.new_reward:.3f}", verdict))
        if not rows:
            OUT.print("No token was changed.")
            return
        columns = ("position", "was", "proposed", "reward\nbefore", "reward of\nproposal", "verdict")
        print_table("revised tokens", columns, rows, text=["was", "proposed", "verdict"])

    def _show_tables(self) -> None:
        totals = {name: output.stats.totals for name, output in self.outputs.items()}
        told: list[dict[str, int]] = [{**record.counters(), **record.passes()} for record in totals.values()]
        rows = [(name.replace("_", " "), *(str(one[name]) for one in told)) for name in told[0]]
        print_table("counters", ("counter", *totals), rows)
        seconds = [{**record.seconds, "total": sum(record.seconds.values())} for record in totals.values()]
        rows = [(phase, *(f"{one[phase]:.2f}" for one in seconds)) for phase in (*PHASES, "total")]
        print_table("seconds per phase", ("phase", *totals), rows)
        graphs = self.refined.stats.graphs
        if graphs:
            rows = [(name.replace("_", " "), f"{number:.4g}") for name, number in graphs.items()]
            print_table("graphs", ("counter", "∇-Reasoner"), rows)


def answer(
    models: tuple[Any, Any, Any, Any],
    questions: list[Any],
    config: NablaConfig,
    *,
    compare_greedy: bool,
    best_of_n: int | None = None,
    profile: Path | None = None,
    html: Path | None = None,
    as_json: bool = False,
) -> None:
    """Answers questions under a progress bar, and prints the answers: those that are finished, whatever ends it.

    Args:
        models: the first four arguments of `nabla_fast.generate`.
        compare_greedy: whether to answer greedily as well, with the same ``max_new_tokens``.
        best_of_n: how many samples to choose from in another answer to compare with; None draws none.
        profile: a directory for `nabla_fast.profiling`, for the refined answers; None profiles nothing.
        html: the file of a page of the answers; None writes none.
        as_json: print one JSON object instead of panels and tables.
    """

    def present(outcome: Outcome) -> None:
        print_json(outcome.to_dict()) if as_json else outcome.show()
        if html is not None:
            write_file(html, outcome.refined.to_html(beside=outcome.beside).encode())
            (ERR if as_json else OUT).print(f"the page is in {html}", soft_wrap=True)

    compared: dict[str, NablaOutput] = {}
    if compare_greedy:
        compared["greedy"] = _under_progress("greedy", baselines.greedy, models, questions, config)
    if best_of_n is not None:
        with status(f"drawing {counted(best_of_n, 'sample')} for Best-of-{best_of_n}"):
            compared["best_of_n"] = baselines.best_of_n(*models, questions, best_of_n, config)
    finished: dict[int, NablaOutput] = {}
    method = partial(generate, on_answer=finished.__setitem__, record=html is not None)
    method = method if profile is None else partial(profiling.profile, profile, method)
    try:
        refined = _under_progress("∇-Reasoner", method, models, questions, config)
    except BaseException as error:
        if finished:
            places = sorted(finished)
            some = {name: joined([output.only(i) for i in places]) for name, output in compared.items()}
            asked, left = [questions[i] for i in places], [q for i, q in enumerate(questions) if i not in finished]
            present(Outcome(asked, config, joined([finished[i] for i in places]), some, models[1], left))
        if isinstance(error, RolloutError):
            _show_unfinished(questions, error, models[1], finished)
        if finished or isinstance(error, KeyboardInterrupt | StoppedError):
            ERR.print(f"stopped with {len(finished)} of {counted(len(questions), 'answer')}")
        raise
    present(Outcome(questions, config, refined, compared, models[1]))


def _show_unfinished(questions: list[Any], error: RolloutError, tokenizer: Any, finished: Collection[int]) -> None:
    """Prints what the other questions of a decode had come to when its rollouts were lost."""
    for i, (question, tokens, committed) in enumerate(zip(questions, error.responses, error.committed, strict=False)):
        if i not in finished:
            print_panel("question", _text(question), console=ERR)
            title = f"unfinished: {len(committed)} of {counted(len(tokens), 'token')} are committed"
            print_panel(title, tokenizer.decode(tokens, skip_special_tokens=True), console=ERR)


def _under_progress(
    label: str, method: Any, models: tuple[Any, Any, Any, Any], questions: list[Any], config: NablaConfig
) -> NablaOutput:
    observer = AnswerProgress(label)
    with observer.progress:
        output: NablaOutput = method(*models, questions, config, observer=observer)
        observer.done()
    return output


def _answer(output: NablaOutput, i: int) -> dict[str, Any]:
    stats = output.stats.sequences[i]
    told = {"text": output.texts[i], "reward": output.rewards[i], "tokens": output.sequences[i].tolist()}
    return {**told, "finish_reason": stats.finish_reason, "stats": stats.to_dict()}


def _text(question: Any) -> str:
    return question if isinstance(question, str) else "\n".join(f"{m['role']}: {m['content']}" for m in question)
