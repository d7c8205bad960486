"""Measures the bundled pair on held-out problems and writes the figures as JSON.

    python tools/evaluate_demo_pair.py --output benchmarks/results/quality/pair.json

Greedy accuracy, the AUROC of the rewards of sampled answers, and the ceiling of any method that chooses among samples:
how often the best of 64 by reward is right, and how often any of the 64 is.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from evaluate_reward import auroc

from nabla_fast import baselines
from nabla_fast.config import Sampling
from nabla_fast.demo import arithmetic
from nabla_fast.evaluation import methods
from nabla_fast.evaluation.bootstrap import interval
from nabla_fast.evaluation.tasks import ARITHMETIC, Task, load_task

PROBLEMS_AT_ONCE = 16


def main(
    output: Annotated[Path, typer.Option(help="JSON file to write.")],
    problems: Annotated[int, typer.Option(help="Held-out problems for greedy decoding.")] = 500,
    small: Annotated[int, typer.Option(help="The first of them, of which many samples are drawn.")] = 200,
    samples: Annotated[int, typer.Option(help="Samples of each of those.")] = 64,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
) -> None:
    """Samples, scores, grades, writes OUTPUT and prints it."""
    torch.set_num_threads(threads)
    models = methods.load(*arithmetic.load_policy(), *arithmetic.load_reward(), arithmetic.CONFIG)
    task = load_task(ARITHMETIC, max_problems=problems)
    greedy = arithmetic.CONFIG.replace(rollout=Sampling(temperature=0.0))
    decoded = sample(models, task, problems, 1, greedy)
    drawn = sample(models, task, small, samples, arithmetic.CONFIG)
    best = [max(rows, key=lambda row: row[1])[0] for rows in drawn]
    flat = [row for rows in drawn for row in rows]
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
        "rollout": {"temperature": arithmetic.CONFIG.rollout.temperature, "top_p": arithmetic.CONFIG.rollout.top_p},
        "bytes": {folder.name: _bytes(folder) for folder in (arithmetic.POLICY_PATH, arithmetic.REWARD_PATH)},
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
