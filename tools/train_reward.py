"""Makes the demo's reward model: a LoRA adapter and score head over SmolLM2, taught to tell right answers from wrong.

    python tools/train_reward.py sample --work DIR     SmolLM2's own answers, labelled by reasoning-gym
    python tools/train_reward.py train --work DIR --output nabla_fast/demo/smollm2_reward

Both stages can be interrupted and started again: what is in DIR is not made twice.
"""

from __future__ import annotations

import json
import math
import os
import random
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from demo_answers import answer_text, sample_answers
from demo_tasks import TASKS, is_right, load_task, task_chat
from reward_data import Group, sampled_groups, synthetic_group

from nabla_fast.demo import load_smollm2, smollm2_path
from nabla_fast.models.gguf import converted_gguf

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)

# reasoning-gym draws entry i from seed + i: these, and the evaluation's, are further apart than any run is long.
SAMPLING_SEED = 1_000_000
SYNTHETIC_SEED = 2_000_000
PROBLEMS_PER_CHUNK = 32
SAMPLES_PER_PROBLEM = 4
TEMPERATURES = (0.6, 0.8, 1.0)
CHECKPOINT_SECONDS = 120
MICRO_BATCH = 4
# Products and sums have to be known; for the other two most is won by learning which numbers are plausible.
TASK_WEIGHTS = {"products": 0.45, "chain_sum": 0.3, "gcd": 0.1, "letter_counting": 0.15}
BASE_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


@app.command()
def sample(
    work: Annotated[Path, typer.Option(help="folder that keeps the samples")],
    chunks: Annotated[int, typer.Option(help="chunks of 32 problems x 4 answers per task")] = 6,
    threads: Annotated[int, typer.Option(help="CPU threads")] = 2,
) -> None:
    """Samples SmolLM2's answers to the training problems and labels them."""
    torch.set_num_threads(threads)
    folder = work / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_smollm2(dtype="bfloat16")
    for chunk in range(chunks):
        for task in TASKS:
            target = folder / f"{task}-{chunk:03d}.json"
            if target.exists():
                continue
            start = time.perf_counter()
            records = _sample_chunk(model, tokenizer, task, chunk)
            partial = target.with_suffix(".part")
            partial.write_text(json.dumps(records))
            os.replace(partial, target)
            right = sum(answer["right"] for record in records for answer in record["answers"])
            total = len(records) * SAMPLES_PER_PROBLEM
            print(f"{target.name}: {right} of {total} right, {time.perf_counter() - start:.0f} s", flush=True)


def _sample_chunk(model: Any, tokenizer: Any, task: str, chunk: int) -> list[dict[str, Any]]:
    seed = SAMPLING_SEED + chunk * PROBLEMS_PER_CHUNK
    dataset = load_task(task, seed=seed, size=PROBLEMS_PER_CHUNK)
    entries = [dataset[i] for i in range(PROBLEMS_PER_CHUNK)]
    answers = sample_answers(
        model,
        tokenizer,
        [task_chat(entry) for entry in entries],
        samples=SAMPLES_PER_PROBLEM,
        temperature=TEMPERATURES[chunk % len(TEMPERATURES)],
        seed=seed,
    )
    return [
        {
            "task": task,
            "entry": entry,
            "answers": [
                {"ids": ids, "text": text, "right": is_right(dataset, entry, text)}
                for ids, text in ((ids, answer_text(tokenizer, ids)) for ids in group)
            ],
        }
        for entry, group in zip(entries, answers, strict=True)
    ]


@app.command()
def train(
    work: Annotated[Path, typer.Option(help="folder with the samples; keeps the training state too")],
    output: Annotated[Path, typer.Option(help="folder the adapter is written to")],
    steps: Annotated[int, typer.Option(help="optimizer steps")] = 400,
    batch: Annotated[int, typer.Option(help="problems per step; each brings 6 to 8 answers")] = 8,
    learning_rate: Annotated[float, typer.Option(help="peak learning rate of AdamW")] = 1e-3,
    rank: Annotated[int, typer.Option(help="LoRA rank")] = 8,
    smoothing: Annotated[float, typer.Option(help="label smoothing of the cross-entropy")] = 0.05,
    pairwise: Annotated[float, typer.Option(help="weight of the Bradley-Terry loss within a problem")] = 0.0,
    synthetic: Annotated[float, typer.Option(help="share of problems with written answers only")] = 0.5,
    seed: Annotated[int, typer.Option(help="seed of initialisation and of the order of the data")] = 0,
    initial: Annotated[Path | None, typer.Option(help="training state of an earlier run to start from")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads")] = 2,
) -> None:
    """Trains the adapter on the samples and writes it to OUTPUT."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    model, tokenizer = _trainable_model(rank)
    sampled = {task: sampled_groups(sorted((work / "samples").glob(f"{task}-*.json")), tokenizer) for task in TASKS}
    if not all(sampled.values()):
        raise typer.BadParameter(f"{work} has no samples for every task; run the sample command first")
    datasets = {task: load_task(task, seed=SYNTHETIC_SEED, size=steps * batch) for task in TASKS}
    adapters = [p for p in model.parameters() if p.requires_grad]
    parameters = [p.detach().float() for p in adapters]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _warm_up_cosine(step, steps))
    # Named by the options, so that other options start afresh instead of going on from this run's state.
    state_file = work / f"training-{steps}-{batch}-{learning_rate}-{rank}-{smoothing}-{pairwise}-{synthetic}-{seed}.pt"
    if initial is not None:
        _copy(torch.load(initial, weights_only=True)["parameters"], parameters)
    first = _restore(state_file, parameters, optimizer, schedule)
    _copy(parameters, adapters)
    saved = time.monotonic()
    seen: list[tuple[float, float]] = []
    for step in range(first, steps):
        # Seeded per step, so that a resumed run sees the same data as an uninterrupted one.
        draw = random.Random(seed * 1_000_003 + step)
        groups = _draw_groups(step, batch, sampled, datasets, tokenizer, synthetic, draw)
        model.zero_grad()
        loss, accuracy = _backward(model, groups, smoothing, pairwise)
        for parameter, adapter in zip(parameters, adapters, strict=True):
            parameter.grad = adapter.grad.float()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        _copy(parameters, adapters)
        schedule.step()
        seen.append((loss, accuracy))
        if (step + 1) % 10 == 0:
            mean_loss, mean_accuracy = (sum(values) / len(values) for values in zip(*seen, strict=True))
            print(f"step {step + 1}: loss {mean_loss:.4f}, accuracy {mean_accuracy:.3f}", flush=True)
            seen = []
        if time.monotonic() - saved > CHECKPOINT_SECONDS or step + 1 == steps:
            _checkpoint(state_file, parameters, optimizer, schedule, step + 1)
            saved = time.monotonic()
    save_adapter(model, output)


def _copy(sources: list[torch.Tensor], targets: list[torch.Tensor]) -> None:
    with torch.no_grad():
        for source, target in zip(sources, targets, strict=True):
            target.copy_(source)


def _draw_groups(
    step: int, batch: int, sampled: Any, datasets: Any, tokenizer: Any, synthetic: float, draw: random.Random
) -> list[Group]:
    groups = []
    tasks = draw.choices(list(TASK_WEIGHTS), weights=list(TASK_WEIGHTS.values()), k=batch)
    for slot, task in enumerate(tasks):
        if draw.random() < synthetic:
            groups.append(synthetic_group(datasets[task], step * batch + slot, tokenizer, draw))
        else:
            groups.append(draw.choice(sampled[task])(draw))
    return groups


def _backward(model: Any, groups: list[Group], smoothing: float, pairwise: float) -> tuple[float, float]:
    """Adds the gradient of the mean loss, in parts of similar length so that little padding is computed."""
    groups = sorted(groups, key=lambda group: len(group.opening) + sum(len(tail) for tail, _ in group.answers))
    parts = [groups[i : i + MICRO_BATCH] for i in range(0, len(groups), MICRO_BATCH)]
    total, right, answers = 0.0, 0.0, 0
    for part in parts:
        scores, labels, owners = packed_scores(model, part)
        loss = reward_loss(scores, labels, owners, smoothing=smoothing, pairwise=pairwise) / len(parts)
        loss.backward()
        total += float(loss.detach())
        right += float(((scores > 0) == labels.bool()).sum())
        answers += len(labels)
    return total, right / answers


def _trainable_model(rank: int) -> tuple[Any, Any]:
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = converted_gguf(smollm2_path())
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = LoraConfig(task_type=TaskType.SEQ_CLS, r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    model = get_peft_model(base, config)
    # Adapters in float32 inside a bfloat16 model cost a third of the time in casts; the optimizer keeps float32 copies.
    return model.bfloat16(), tokenizer


def packed_scores(model: Any, groups: list[Group]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores of all answers of ``groups``, one row per problem.

    A row holds the problem once and its answers behind it; the attention mask lets an answer see the problem and
    itself alone, and its positions follow the problem's, so that every score is what the conversation alone gets.

    Returns:
        scores (n,) float32, labels (n,) float32 and the problem (n,) int64 that each answer belongs to.
    """
    lengths = [len(group.opening) + sum(len(tail) for tail, _ in group.answers) for group in groups]
    rows, width = len(groups), max(lengths)
    ids = torch.zeros(rows, width, dtype=torch.long)
    positions = torch.zeros(rows, width, dtype=torch.long)
    # Segment 0 is the problem, 1, 2, ... its answers, -1 padding.
    segment = torch.full((rows, width), -1)
    owners, ends, labels = [], [], []
    for row, group in enumerate(groups):
        at = len(group.opening)
        ids[row, :at], positions[row, :at], segment[row, :at] = torch.tensor(group.opening), torch.arange(at), 0
        for number, (tail, right) in enumerate(group.answers, 1):
            end = at + len(tail)
            ids[row, at:end], segment[row, at:end] = torch.tensor(tail), number
            positions[row, at:end] = len(group.opening) + torch.arange(len(tail))
            owners.append(row)
            ends.append(end - 1)
            labels.append(float(right))
            at = end
    own = segment[:, :, None] == segment[:, None, :]
    visible = (own | (segment[:, None, :] == 0)) & torch.ones(width, width, dtype=torch.bool).tril()
    base = model.get_base_model()
    hidden = base.base_model(
        input_ids=ids, attention_mask=visible[:, None], position_ids=positions, use_cache=False
    ).last_hidden_state
    last = hidden[torch.tensor(owners), torch.tensor(ends)]
    return base.score(last)[:, 0].float(), torch.tensor(labels), torch.tensor(owners)


def reward_loss(
    scores: torch.Tensor, labels: torch.Tensor, owners: torch.Tensor, *, smoothing: float, pairwise: float
) -> torch.Tensor:
    """Smoothed binary cross-entropy, plus ``pairwise`` times Bradley-Terry over right-wrong pairs of one problem."""
    targets = labels * (1 - 2 * smoothing) + smoothing
    loss = torch.nn.functional.binary_cross_entropy_with_logits(scores, targets)
    if pairwise > 0:
        pairs = (owners[:, None] == owners[None]) & (labels[:, None] > labels[None])
        margins = (scores[:, None] - scores[None])[pairs]
        loss = loss - pairwise * torch.nn.functional.logsigmoid(margins).mean()
    return loss


def save_adapter(model: Any, output: Path) -> None:
    """Writes the adapter in bfloat16, with a neutral base name in place of this machine's path."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    # Not by save_pretrained: it would write its own model card over ours.
    output.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.bfloat16().contiguous() for name, tensor in get_peft_model_state_dict(model).items()}
    weights = output / "adapter_model.safetensors"
    save_file(tensors, weights, metadata={"format": "pt"})
    weights.chmod(0o644)
    model.peft_config["default"].save_pretrained(output)
    config_file = output / "adapter_config.json"
    config = json.loads(config_file.read_text()) | {"base_model_name_or_path": BASE_NAME, "inference_mode": True}
    config["target_modules"] = sorted(config["target_modules"])
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _warm_up_cosine(step: int, steps: int) -> float:
    warm_up = max(1, steps // 20)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def _checkpoint(file: Path, parameters: list[Any], optimizer: Any, schedule: Any, step: int) -> None:
    partial = file.with_suffix(".part")
    state = {"parameters": parameters, "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
    torch.save({**state, "step": step}, partial)
    os.replace(partial, file)


def _restore(file: Path, parameters: list[Any], optimizer: Any, schedule: Any) -> int:
    if not file.exists():
        return 0
    state = torch.load(file, weights_only=True)
    _copy(state["parameters"], parameters)
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    return int(state["step"])


if __name__ == "__main__":
    app()
