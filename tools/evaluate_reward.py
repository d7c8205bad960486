"""Measures the demo's reward model on problems it was not trained on and writes the figures as JSON.

    python tools/evaluate_reward.py --output benchmarks/results/reward_smollm2.json --work DIR

SmolLM2's sampled answers are kept in DIR, so that a second reward model is judged on the very same ones.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from demo_answers import answer_text, sample_answers, score_answers
from demo_tasks import TASKS, is_right, load_task, task_chat
from rich.console import Console
from rich.table import Table

from nabla_fast.demo import load_smollm2, load_smollm2_reward
from nabla_fast.models.loading import load_reward_model

# Training draws from 1,000,000 and 2,000,000 on; reasoning-gym draws entry i from seed + i.
EVALUATION_SEED = 9_000_000
CHUNK = 32
BEST_OF = 8
MAX_NEW_TOKENS = 48


def main(
    output: Annotated[Path, typer.Option(help="JSON file to write")],
    work: Annotated[Path, typer.Option(help="folder that keeps the sampled answers")],
    reward: Annotated[Path | None, typer.Option(help="reward model or adapter; default: the shipped one")] = None,
    products: Annotated[int, typer.Option(help="problems of products, the Best-of-8 task")] = 100,
    others: Annotated[int, typer.Option(help="problems of each other task")] = 48,
    temperature: Annotated[float, typer.Option(help="sampling temperature")] = 0.6,
    threads: Annotated[int, typer.Option(help="CPU threads")] = 2,
) -> None:
    """Samples, scores, writes OUTPUT and prints a table."""
    torch.set_num_threads(threads)
    sizes = {task: products if task == "products" else others for task in TASKS}
    samples = {task: BEST_OF if task == "products" else 4 for task in TASKS}
    answers = {task: _answers(work, task, sizes[task], samples[task], temperature) for task in TASKS}
    greedy = _answers(work, "products", products, 1, 0.0)
    model, tokenizer = load_smollm2_reward(dtype="float32") if reward is None else _loaded(reward)
    for records in answers.values():
        for record in records:
            chat = task_chat(record["entry"])
            record["scores"] = score_answers(model, tokenizer, chat, [answer["ids"] for answer in record["answers"]])
    result = {
        **summary(answers, greedy),
        "temperature": temperature,
        "max_new_tokens": MAX_NEW_TOKENS,
        "evaluation_seed": EVALUATION_SEED,
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=2) + "\n")
    _print_table(result)


def summary(answers: dict[str, list[dict[str, Any]]], greedy: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures: AUROC per task, their mean, pooled over all answers, and Best-of-8 against greedy on products."""
    tasks, all_scores, all_rights = {}, [], []
    for task, records in answers.items():
        scores = [score for record in records for score in record["scores"]]
        rights = [bool(answer["right"]) for record in records for answer in record["answers"]]
        all_scores += scores
        all_rights += rights
        distinct = len({record["entry"]["question"] for record in records})
        tasks[task] = {
            "auroc": auroc(scores, rights),
            "problems": len(records),
            "distinct_questions": distinct,
            "answers": len(rights),
            "right": sum(rights),
            "mean_score_right": _mean([s for s, r in zip(scores, rights, strict=True) if r]),
            "mean_score_wrong": _mean([s for s, r in zip(scores, rights, strict=True) if not r]),
        }
    records = answers["products"]
    best = [max(zip(r["scores"], r["answers"], strict=True), key=lambda pair: pair[0])[1]["right"] for r in records]
    return {
        "auroc_mean": _mean([figures["auroc"] for figures in tasks.values()]),
        "auroc_pooled": auroc(all_scores, all_rights),
        "tasks": tasks,
        "products": {
            "problems": len(records),
            "greedy": _mean([record["answers"][0]["right"] for record in greedy]),
            "single_sample": _mean([answer["right"] for record in records for answer in record["answers"]]),
            f"best_of_{BEST_OF}": _mean(best),
            f"pass_at_{BEST_OF}": _mean([any(answer["right"] for answer in r["answers"]) for r in records]),
        },
    }


def auroc(scores: Sequence[float], rights: Sequence[bool]) -> float:
    """The share of right-wrong pairs in which the right answer scores higher, ties counting half."""
    values = torch.tensor(scores, dtype=torch.float64)
    labels = torch.tensor(rights, dtype=torch.bool)
    above = values[labels][:, None] - values[~labels][None]
    return float(((above > 0).double() + 0.5 * (above == 0).double()).mean())


def _answers(work: Path, task: str, size: int, samples: int, temperature: float) -> list[dict[str, Any]]:
    """Held-out problems with SmolLM2's labelled answers, sampled in chunks that are kept in ``work``."""
    records: list[dict[str, Any]] = []
    pair: tuple[Any, Any] | None = None
    for chunk in range(0, size, CHUNK):
        file = work / "evaluation" / f"{task}-{samples}x-t{temperature}-{chunk:04d}-{min(CHUNK, size - chunk)}.json"
        if not file.exists():
            pair = pair or load_smollm2(dtype="bfloat16")
            made = _sample_chunk(*pair, task, chunk, min(CHUNK, size - chunk), samples, temperature)
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(".part")
            partial.write_text(json.dumps(made))
            os.replace(partial, file)
            print(f"sampled {file.name}", flush=True)
        records += json.loads(file.read_text())
    return records


def _sample_chunk(
    model: Any, tokenizer: Any, task: str, start: int, size: int, samples: int, temperature: float
) -> list[dict[str, Any]]:
    seed = EVALUATION_SEED + start
    dataset = load_task(task, seed=seed, size=size)
    entries = [dataset[i] for i in range(size)]
    groups = sample_answers(
        model,
        tokenizer,
        [task_chat(entry) for entry in entries],
        samples=samples,
        temperature=temperature,
        max_new_tokens=MAX_NEW_TOKENS,
        seed=seed,
    )
    records = []
    for entry, group in zip(entries, groups, strict=True):
        texts = [answer_text(tokenizer, ids) for ids in group]
        labelled = [
            {"ids": ids, "text": text, "right": is_right(dataset, entry, text)}
            for ids, text in zip(group, texts, strict=True)
        ]
        records.append({"entry": entry, "answers": labelled})
    return records


def _loaded(reward: Path) -> tuple[Any, Any]:
    from nabla_fast.demo import smollm2_path

    return load_reward_model(reward, base=smollm2_path(), dtype="float32")


def _mean(values: Sequence[float]) -> float:
    return float(sum(values) / len(values)) if values else float("nan")


def _print_table(result: dict[str, Any]) -> None:
    table = Table(title=f"Reward model on held-out problems, answers sampled at temperature {result['temperature']}")
    for name in ("task", "AUROC", "problems", "answers", "right", "score right", "score wrong"):
        table.add_column(name, justify="left" if name == "task" else "right")
    for task, figures in result["tasks"].items():
        table.add_row(
            task,
            f"{figures['auroc']:.3f}",
            str(figures["problems"]),
            str(figures["answers"]),
            str(figures["right"]),
            f"{figures['mean_score_right']:+.2f}",
            f"{figures['mean_score_wrong']:+.2f}",
        )
    table.add_row("mean of tasks", f"{result['auroc_mean']:.3f}")
    table.add_row("pooled", f"{result['auroc_pooled']:.3f}")
    Console().print(table)
    figures = result["products"]
    Console().print(
        f"products: greedy {figures['greedy']:.1%}, one sample {figures['single_sample']:.1%}, "
        f"Best-of-{BEST_OF} {figures[f'best_of_{BEST_OF}']:.1%}, pass@{BEST_OF} {figures[f'pass_at_{BEST_OF}']:.1%}"
    )


if __name__ == "__main__":
    typer.run(main)
