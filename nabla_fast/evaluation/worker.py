"""One pair of models at work on pieces of an evaluation, in whatever process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from nabla_fast.config import NablaConfig
from nabla_fast.evaluation.grading import GradingError
from nabla_fast.evaluation.journal import Record
from nabla_fast.evaluation.methods import METHODS, Models, make_batch
from nabla_fast.evaluation.tasks import Problem, Task
from nabla_fast.rollout import ServerLostError
from nabla_fast.sampling import sequence_seeds


@dataclass(frozen=True)
class Arm:
    """A method at one n: samples of self-consistency and best-of-n, rollouts of nabla, 1 for greedy."""

    method: str
    n: int

    @property
    def label(self) -> str:
        """What tables and plots call it."""
        return self.method if self.method == "greedy" else f"{self.method} {self.n}"


@dataclass(frozen=True)
class Piece:
    """Problems, with distinct prompts, that an arm decodes together for a seed."""

    arm: Arm
    seed: int
    problems: tuple[Problem, ...]

    @property
    def key(self) -> tuple[Arm, int, tuple[str, ...]]:
        """Tells pieces of one task apart."""
        return self.arm, self.seed, tuple(problem.id for problem in self.problems)

    def split(self) -> list[Piece]:
        """A piece for each problem."""
        return [replace(self, problems=(problem,)) for problem in self.problems]

    def failed(self, error: Exception) -> list[Record]:
        """The records of problems that came to nothing."""
        return [_record(self, problem, error=error) for problem in self.problems]


class Worker:
    """Does pieces of an evaluation.

    Args:
        models: loaded once for all pieces.
        task: problems and their grader.
        config: settings; the seed is a piece's own.
        size: most sequences to decode together.
    """

    def __init__(self, models: Models, task: Task, config: NablaConfig, size: int) -> None:
        self._models = models
        self._task = task
        self._config = config
        self._size = size
        self._prompts = [models.prompt_ids(problem) for problem in task.problems]
        self._noise: dict[int, dict[str, int]] = {}

    def run(self, piece: Piece) -> Iterator[Record]:
        """Records of a piece; where it fails, of its problems one by one, so that only those fail that must.

        Raises:
            ServerLostError: if rollouts come from a server and it is lost.
        """
        gradable = []
        for problem in piece.problems:
            try:
                self._task.grader.check(problem.id, problem.reference)
                gradable.append(problem)
            except GradingError as error:
                yield _record(piece, problem, error=error)
        if not gradable:
            return
        try:
            config = self._config.replace(seed=piece.seed)
            seeds = [self._seeds(piece.seed)[problem.id] for problem in gradable]
            batch = make_batch(self._models, gradable, seeds, self._task.grader, config, piece.arm.n, self._size)
            answers = METHODS[piece.arm.method](batch)
        except ServerLostError:
            # Every other problem would fail, too. The same command goes on when the server is back.
            raise
        except Exception as error:
            if len(gradable) == 1:
                yield _record(piece, gradable[0], error=error)
                return
            for single in replace(piece, problems=tuple(gradable)).split():
                yield from self.run(single)
            return
        for problem, answer in zip(gradable, answers, strict=True):
            yield self._graded(piece, problem, answer.to_dict())

    def _seeds(self, seed: int) -> dict[str, int]:
        """Problem id → seed of its noise, by all problems of the task, so that no batch has a say in it."""
        if seed not in self._noise:
            ids = [problem.id for problem in self._task.problems]
            self._noise[seed] = dict(zip(ids, sequence_seeds(seed, self._prompts), strict=True))
        return self._noise[seed]

    def _graded(self, piece: Piece, problem: Problem, told: dict[str, Any]) -> Record:
        grader = self._task.grader
        try:
            found = grader.answer(problem.id, told["text"])
            right = grader.right(problem.id, problem.reference, found)
            shown = None if found is None else grader.text(found)
        except Exception as error:
            return {**_record(piece, problem, error=error), **told}
        return {**_record(piece, problem, right=right, answer=shown), **told}


def _record(
    piece: Piece,
    problem: Problem,
    *,
    right: bool | None = None,
    answer: str | None = None,
    error: Exception | None = None,
) -> Record:
    message = None if error is None else " ".join(f"{type(error).__name__}: {error}".split())
    named = {**asdict(piece.arm), "seed": piece.seed, "problem": problem.id}
    return {**named, "right": right, "answer": answer, "reference": problem.reference, "error": message}
