"""Measures the bundled pair on held-out problems and writes the figures as JSON.

    python tools/evaluate_demo_pair.py --output benchmarks/results/quality/pair.json

Greedy accuracy, the AUROC of the rewards of sampled answers, and the ceiling of any method that chooses among samples:
how often the best of 64 by reward is right, and how often any of the 64 is. And whether the reward's gradient, which is
what ∇-Reasoner follows, points at the right token where an answer goes wrong.
"""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from evaluate_reward import auroc

from nabla_fast import baselines, ops
from nabla_fast.config import Sampling
from nabla_fast.demo import arithmetic
from nabla_fast.evaluation import arithmetic as sums
from nabla_fast.evaluation import methods
from nabla_fast.evaluation.bootstrap import interval
from nabla_fast.evaluation.tasks import ARITHMETIC, Task, load_task
from nabla_fast.models.loading import load_reward_model
from nabla_fast.objective import Objective, Request
from nabla_fast.sequence import Sequence

PROBLEMS_AT_ONCE = 16


def main(
    output: Annotated[Path, typer.Option(help="JSON file to write.")],
    problems: Annotated[int, typer.Option(help="Held-out problems for greedy decoding.")] = 500,
    small: Annotated[int, typer.Option(help="The first of them, of which many samples are drawn.")] = 200,
    samples: Annotated[int, typer.Option(help="Samples of each of those.")] = 64,
    reward_model: Annotated[Path, typer.Option(help="Another reward model for the policy.")] = arithmetic.REWARD_PATH,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
) -> None:
    """Samples, scores, grades, writes OUTPUT and prints it."""
    torch.set_num_threads(threads)
    models = methods.load(
        *arithmetic.load_policy(dtype="float32"), *load_reward_model(reward_model, dtype="float32"), arithmetic.CONFIG
    )
    task = load_task(ARITHMETIC, max_problems=problems)
    greedy = arithmetic.CONFIG.replace(rollout=Sampling(temperature=0.0))
    decoded = sample(models, task, problems, 1, greedy)
    drawn = sample(models, task, small, samples, arithmetic.CONFIG)
    best = [max(rows, key=lambda row: row[1])[0] for rows in drawn]
    flat = [row for rows in drawn for row in rows]
    pointed = compass(models, task, problems)
    figures = {
        "greedy": _interval([rows[0][0] for rows in decoded]),
        "greedy_problems": problems,
        "problems": small,
        "samples": samples,
        "single_sample": _interval([sum(right for right, _ in rows) / len(rows) for rows in drawn]),
        f"best_of_{samples}_by_reward": _interval(best),
        f"any_of_{samples}": _interval([any(right for right, _ in rows) for rows in drawn]),
        "auroc": auroc([reward for _, reward in flat], [right for right, _ in flat]),
        "auroc_within_problems": _within(drawn),
        "compass": pointed,
        "rollout": {"temperature": arithmetic.CONFIG.rollout.temperature, "top_p": arithmetic.CONFIG.rollout.top_p},
        "bytes": {folder.name: _bytes(folder) for folder in (arithmetic.POLICY_PATH, reward_model)},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


def sample(
    models: methods.Models, task: Task, problems: int, samples: int, config: Any
) -> list[list[tuple[bool, float]]]:
    """Whether each answer is right, and its reward; a list for each problem."""
    found = []
    for first in range(0, problems, PROBLEMS_AT_ONCE):
        asked = task.problems[first : min(first + PROBLEMS_AT_ONCE, problems)]
        ids = [models.prompt_ids(problem) for problem in asked]
        frames = [models.pair.reward_model.chat_frame(problem.chat) for problem in asked]
        groups = baselines.sample(models.pair, ids, frames, samples, config, scored=True, batch_size=256)
        for problem, group in zip(asked, groups, strict=True):
            answers = [task.grader.answer(problem.id, text) for text in group.texts]
            rights = [task.grader.right(problem.id, problem.reference, answer) for answer in answers]
            assert group.rewards is not None
            found.append(list(zip(rights, group.rewards, strict=True)))
    return found


def compass(models: methods.Models, task: Task, problems: int) -> dict[str, Any]:
    """Where the reward's gradient points in one sample of each problem: at its first wrong token, and before it.

    Points are of the first-order change of the reward for every token in the place of the one that is there. For
    comparison, how often the policy itself finds the right token likelier than the wrong one.
    """
    pair, tokenizer = models.pair, models.pair.tokenizer
    config = arithmetic.CONFIG.replace(nll_coeff=0.0, reward_coeff=1.0)
    objective = Objective(pair.language_model, pair.reward_model, config)
    found: dict[str, list[bool]] = {name: [] for name in ("above", "first", "kept", "policy")}
    solved = islice(sums.problems("test"), problems)
    asked = task.problems[:problems]
    drawn = _sequences(models, task, problems)
    for problem, source, answer in zip(asked, solved, drawn, strict=True):
        assert problem.chat[-1]["content"] == source.question
        solution = [*tokenizer(source.solution, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        same = next((i for i, (a, b) in enumerate(zip(answer, solution, strict=False)) if a != b), len(answer))
        frame = pair.reward_model.chat_frame(problem.chat)
        sequence = Sequence(models.prompt_ids(problem), (), 0, len(answer), frame)
        (evaluation,) = objective.evaluate([Request(sequence, torch.tensor(answer), 0)])
        # dL/dy of L = -reward: the lower, the better.
        points = -ops.token_gradient(evaluation.factors, objective.tables)
        found["kept"] += [int(points[i].argmax()) == solution[i] for i in range(same)]
        if same < min(len(answer), len(solution)):
            right, wrong, row = solution[same], answer[same], points[same]
            likely = pair.language_model.logits(evaluation.factors.hidden[same : same + 1])[0]
            found["above"].append(bool(row[right] > row[wrong]))
            found["first"].append(int(row.argmax()) == right)
            found["policy"].append(bool(likely[right] > likely[wrong]))
    return {
        "first_mistakes": len(found["first"]),
        "right_token_above_the_wrong_one": _interval(found["above"]),
        "right_token_first": _interval(found["first"]),
        "right_token_likelier_by_the_policy": _interval(found["policy"]),
        "right_tokens_left_alone": sum(found["kept"]) / len(found["kept"]),
    }


def _sequences(models: methods.Models, task: Task, problems: int) -> list[list[int]]:
    """One sampled answer (token ids) to each problem."""
    asked = task.problems[:problems]
    ids = [models.prompt_ids(problem) for problem in asked]
    frames = [models.pair.reward_model.chat_frame(problem.chat) for problem in asked]
    groups = baselines.sample(models.pair, ids, frames, 1, arithmetic.CONFIG, scored=False, batch_size=256)
    return [group.sequences[0].tolist() for group in groups]


def _within(drawn: list[list[tuple[bool, float]]]) -> float:
    """Mean AUROC over the problems that have right and wrong answers."""
    mixed = [rows for rows in drawn if len({right for right, _ in rows}) == 2]
    found = [auroc([reward for _, reward in rows], [right for right, _ in rows]) for rows in mixed]
    return sum(found) / len(found)


def _interval(values: list[Any]) -> dict[str, float]:
    found = interval([float(value) for value in values])
    return {"mean": found.mean, "low": found.low, "high": found.high}


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


if __name__ == "__main__":
    typer.run(main)
