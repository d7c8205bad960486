"""Trains a LoRA adapter and a score head over a language model, or over a reward model that is there."""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nabla_fast.config import require_int, require_number
from nabla_fast.models.chat import ConversationFrame, conversation_frame
from nabla_fast.reward_training.examples import Example, require_same
from nabla_fast.reward_training.losses import Loss, Pointer, Row, accumulate

STATE, SETTINGS, ADAPTER = "training.pt", "settings.json", "adapter"
CHECKPOINT_SECONDS = 120
_SHARPNESS = 2.3


@dataclass(frozen=True)
class Recipe:
    """How a reward model is trained.

    Attributes:
        steps: of the optimizer (AdamW, a warm-up of a twentieth, then a cosine).
        batch_size: problems a step; each brings up to ``answers`` conversations.
        answers: most answers of a problem in a step, right and wrong ones in turn.
        learning_rate: peak.
        rank: of the LoRA adapter on every linear layer.
        prefix: weight of the loss that teaches the score of a prefix what its answer comes to.
        point: weight of the loss that makes the reward's gradient point at the better token.
        seed: of the adapter and of the order of the data.
    """

    steps: int = 400
    batch_size: int = 8
    answers: int = 4
    learning_rate: float = 5e-4
    rank: int = 16
    prefix: float = 0.5
    point: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "answers", "rank"):
            require_int(name, getattr(self, name), minimum=1)
        require_number("learning_rate", self.learning_rate, minimum=0.0, open_minimum=True)
        for name in ("prefix", "point"):
            require_number(name, getattr(self, name), minimum=0.0)


def train(
    base: str,
    tokenizer: Any,
    examples: Sequence[Example],
    folder: Path,
    recipe: Recipe,
    *,
    device: str | torch.device = "cpu",
    on_step: Callable[[int, Loss], None] = lambda *_: None,
) -> Path:
    """Trains an adapter, or goes on where an earlier call in ``folder`` was stopped.

    Every step draws its data by its own seed, so that a training that was stopped comes to the same weights.

    Args:
        base: folder or hub id of a causal language model, or of a sequence classifier with one label.
        tokenizer: of the policy that wrote the examples; the base must have the same vocabulary.
        examples: with right and wrong answers.
        folder: keeps the state, and gets the adapter.
        on_step: hears of every step's number, from 1, and of its loss.

    Returns:
        The adapter's folder, which `nabla_fast.models.loading.load_reward_model` reads.

    Raises:
        ValueError: if all answers are right or all wrong, the base's vocabulary is another one, or ``folder`` holds a
            training with other settings.
        ImportError: if peft is not installed.
    """
    labels = {answer.right for example in examples for answer in example.answers}
    if len(labels) < 2:
        which = "right" if True in labels else "wrong"
        raise ValueError(f"all answers are {which}: there is nothing to tell apart; use easier or harder problems")
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"base": base, "examples": len(examples), **asdict(recipe)}
    require_same(folder / SETTINGS, "a training", settings)
    torch.manual_seed(recipe.seed)
    model, own = _adapted(base, recipe, device)
    if own.get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"base is {base}, whose tokenizer has another vocabulary than the policy's; use one with the same"
        )
    sharpness = torch.nn.Parameter(torch.tensor(_SHARPNESS, device=device))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([*parameters, sharpness], lr=recipe.learning_rate, weight_decay=0.01)
    state = _State(folder / STATE, [*parameters, sharpness], optimizer)
    first = state.load()
    frames = {example.problem: conversation_frame(own, example.chat) for example in examples}
    saved = time.monotonic()
    model.train()
    for step in range(first, recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * _schedule(step, recipe.steps)
        rows = draw_rows(examples, frames, recipe, step)
        loss = accumulate(model, rows, sharpness=sharpness, prefix=recipe.prefix, point=recipe.point)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        on_step(step + 1, loss)
        if time.monotonic() - saved > CHECKPOINT_SECONDS:
            state.save(step + 1)
            saved = time.monotonic()
    if first < recipe.steps:
        state.save(recipe.steps)
    model.eval()
    model.save_pretrained(folder / ADAPTER)
    own.save_pretrained(folder / ADAPTER)
    return folder / ADAPTER


def draw_rows(
    examples: Sequence[Example], frames: Mapping[str, ConversationFrame], recipe: Recipe, step: int
) -> list[Row]:
    """The conversations of a step."""
    draw = random.Random(recipe.seed * 1_000_003 + step)
    rows = []
    for example in draw.sample(list(examples), min(recipe.batch_size, len(examples))):
        frame = frames[example.problem]
        opening = len(frame.opening)
        pointers = tuple(Pointer(opening + s.position, s.better, s.worse) for s in example.swaps)
        # The answer with the forks always; of the others right and wrong ones in turn.
        first, *others = example.answers
        sides = {right: [answer for answer in others if answer.right is right] for right in (True, False)}
        for own in sides.values():
            draw.shuffle(own)
        chosen = [first]
        while len(chosen) < recipe.answers and (sides[True] or sides[False]):
            right = chosen[-1].right
            chosen.append((sides[not right] or sides[right]).pop())
        for answer in chosen:
            at = None if answer.fork is None else opening + answer.fork
            ids = (*frame.opening, *_closed(answer.tokens, frame.closing))
            rows.append(Row(ids, answer.right, at, pointers if answer is first else ()))
    return rows


def _closed(tokens: Sequence[int], closing: Sequence[int]) -> tuple[int, ...]:
    """A response and what the template writes after it, the end-of-turn token not doubled."""
    return (*tokens, *(closing[1:] if tokens and closing and tokens[-1] == closing[0] else closing))


def _adapted(base: str, recipe: Recipe, device: str | torch.device) -> tuple[Any, Any]:
    try:
        from peft import LoraConfig, TaskType, get_peft_model
    except ImportError as error:
        raise ImportError('training a reward model needs peft; run pip install "nabla_fast[gguf]"') from error
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    # Attention whose derivative has a derivative.
    model = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=1, dtype=torch.float32, attn_implementation="eager"
    ).to(device)
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS, r=recipe.rank, lora_alpha=2 * recipe.rank, target_modules="all-linear"
    )
    return get_peft_model(model, config), AutoTokenizer.from_pretrained(base)


@dataclass
class _State:
    """What a training needs to go on, in a file that is written whole or not at all."""

    file: Path
    parameters: list[Tensor]
    optimizer: torch.optim.Optimizer

    def save(self, step: int) -> None:
        part = self.file.with_suffix(".part")
        state = {"parameters": self.parameters, "optimizer": self.optimizer.state_dict(), "step": step}
        torch.save(state, part)
        os.replace(part, self.file)

    def load(self) -> int:
        """The number of steps that were taken."""
        if not self.file.exists():
            return 0
        state = torch.load(self.file, weights_only=True, map_location=self.parameters[0].device)
        with torch.no_grad():
            for parameter, value in zip(self.parameters, state["parameters"], strict=True):
                parameter.copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        return int(state["step"])


def _schedule(step: int, steps: int) -> float:
    warm_up = max(1, steps // 20)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))
