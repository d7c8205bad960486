"""One pair of models at work on pieces of an evaluation, in whatever process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

from nabla_fast.config import NablaConfig
from nabla_fast.evaluation.batch import Answer, Models, make_batch
from nabla_fast.evaluation.budget import Budget
from nabla_fast.evaluation.journal import Record
from nabla_fast.evaluation.methods import METHODS, ONE_N, PROPOSALS, SEARCHES
from nabla_fast.evaluation.records import Key
from nabla_fast.evaluation.tasks import Problem, Task
from nabla_fast.rollout import ServerLostError
from nabla_fast.sampling import sequence_seeds
from nabla_fast.search_config import SearchConfig


@dataclass(frozen=True)
class Arm:
    """A method at one n.

    Attributes:
        method: of `nabla_fast.evaluation.methods.METHODS`.
        n: see `nabla_fast.evaluation.batch.Batch`; 1 for a method that draws once, 0 where a budget says how many.
    """

    method: str
    n: int

    @property
    def label(self) -> str:
        """What tables and plots call it."""
        return self.method if self.method in ONE_N or not self.n else f"{self.method} {self.n}"


@dataclass(frozen=True)
class Plan:
    """What is to be run.

    Attributes:
        arms: methods, each at its n.
        seeds: of the noise. Greedy decoding has none and is run for the first seed alone.
        config: settings of all methods; ``seed`` and ``max_rollouts`` are replaced.
        batch_size: most sequences decoded together.
        budget: what each problem may cost; arms that draw more than once then have the n 0, and ``max_rollouts`` of
            ``config`` counts.
        search: settings of the searches over steps.
    """

    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    config: NablaConfig
    batch_size: int
    budget: Budget | None = None
    search: SearchConfig = field(default_factory=SearchConfig)

    def runs(self, seed: int) -> list[Arm]:
        """The arms that are run for ``seed``."""
        return [arm for arm in self.arms if arm.method != "greedy" or seed == self.seeds[0]]

    def sequences(self, arm: Arm) -> int:
        """Most sequences of one problem that an arm has under way together."""
        if arm.method == SEARCHES[0]:
            return arm.n or self.search.search_width**2
        # A sequence of the decode loop is one sequence whatever its n, and so is a simulation.
        return 1 if arm.method in (*PROPOSALS, *SEARCHES) else max(1, arm.n)

    def keys(self, problems: Sequence[Problem]) -> list[Key]:
        """Everything that there is to do."""
        return [
            (arm.method, arm.n, seed, problem.id)
            for seed in self.seeds
            for arm in self.runs(seed)
            for problem in problems
        ]


@dataclass(frozen=True)
class Piece:
    """Problems, with distinct prompts, that an arm decodes together for a seed."""

    arm: Arm
    seed: int
    problems: tuple[Problem, ...]

    def failed(self, error: Exception) -> list[Record]:
        """The records of problems that came to nothing."""
        return [_record(self, problem, error=error) for problem in self.problems]


class Worker:
    """Does pieces of an evaluation.

    Args:
        models: loaded once for all pieces.
        task: problems and their grader.
        plan: what the pieces are of.
    """

    def __init__(self, models: Models, task: Task, plan: Plan) -> None:
        self._models, self._task, self._plan = models, task, plan
        self._prompts: dict[str, tuple[int, ...]] = {}
        self._refused: dict[str, Exception] = {}
        for problem in task.problems:
            # A template may refuse a chat.
            try:
                self._prompts[problem.id] = models.prompt_ids(problem)
            except Exception as error:
                self._refused[problem.id] = error
        self._noise: dict[int, dict[str, int]] = {}

    def run(self, piece: Piece, tell: Callable[[Record], None]) -> None:
        """Tells of each problem of a piece when it is answered; where the piece fails, its problems run one by one.

        Args:
            tell: hears of a record while others of the piece are under way. What it raises is raised here.

        Raises:
            ServerLostError: if rollouts come from a server and it is lost.
        """
        gradable = []
        for problem in piece.problems:
            try:
                if problem.id in self._refused:
                    raise self._refused[problem.id]
                self._task.grader.check(problem.id, problem.reference)
            except Exception as error:
                tell(_record(piece, problem, error=error))
            else:
                gradable.append(problem)
        if gradable:
            self._decode(piece, gradable, tell)

    def _decode(self, piece: Piece, problems: Sequence[Problem], tell: Callable[[Record], None]) -> None:
        plan, grader = self._plan, self._task.grader
        told: set[int] = set()
        untold: list[Exception] = []

        def answered(i: int, answer: Answer) -> None:
            record = self._graded(piece, problems[i], answer)
            if plan.budget is not None:
                record["budget"] = str(plan.budget)
            try:
                tell(record)
            except Exception as error:
                untold.append(error)
                raise
            told.add(i)

        try:
            config = plan.config.replace(seed=piece.seed)
            seeds = [self._seeds(piece.seed)[problem.id] for problem in problems]
            more = {"on_answer": answered, "budget": plan.budget, "search": plan.search}
            batch = make_batch(self._models, problems, seeds, grader, config, piece.arm.n, plan.batch_size, **more)
            for i, answer in enumerate(METHODS[piece.arm.method](batch)):
                if i not in told:
                    answered(i, answer)
        except ServerLostError:
            # Every other problem would fail, too. The same command goes on when the server is back.
            raise
        except Exception as error:
            if untold:
                raise
            if len(problems) == 1:
                tell(_record(piece, problems[0], error=error))
                return
            for i, problem in enumerate(problems):
                if i not in told:
                    self._decode(piece, [problem], tell)

    def _seeds(self, seed: int) -> dict[str, int]:
        """Problem id → seed of its noise, by all problems of the task, so that no batch has a say in it."""
        if seed not in self._noise:
            drawn = sequence_seeds(seed, list(self._prompts.values()))
            self._noise[seed] = dict(zip(self._prompts, drawn, strict=True))
        return self._noise[seed]

    def _graded(self, piece: Piece, problem: Problem, answer: Answer) -> Record:
        grader, told = self._task.grader, answer.to_dict()
        try:
            found = grader.answer(problem.id, answer.text if answer.spoken is None else answer.spoken)
            right = grader.right(problem.id, problem.reference, found)
            shown = None if found is None else str(found)
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
