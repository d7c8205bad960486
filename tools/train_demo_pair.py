"""Trains the pair of models that ships in nabla_fast/demo: an arithmetic policy and a reward model for it.

    python tools/train_demo_pair.py --work DIR

The stages are policy, samples (its own answers) and reward. DIR keeps what is done, and ``training.json`` there the
seconds that it took: started again, the command goes on where it was stopped. ``tools/evaluate_demo_pair.py`` measures
the result.
"""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from demo_answers import sample_answers
from demo_pair_data import chat, make_tokenizer, policy_batch, reward_batch, training_problem
from demo_pair_verifier import COMPASS_WEIGHT, Verifier
from torch import Tensor
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import LlamaConfig, LlamaForCausalLM

from nabla_fast.demo.arithmetic import CONFIG, POLICY_PATH, REWARD_PATH
from nabla_fast.evaluation.arithmetic import Arithmetic, problems

SIZES = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 768,
    "max_position_embeddings": 256,
}
LEARNING_RATE = 1e-3
WARMUP_STEPS = 100
BATCH_SIZE = 128
EMA_DECAY = 0.99
# A policy that is never sure: a saturated one has no gradient.
LABEL_SMOOTHING = 0.1
REWARD_BATCH_SIZE = 64
VALIDATION_PROBLEMS = 256
STEPS_PER_CHECK = 25
CHECKPOINT_SECONDS = 60
SAMPLES_PER_CHUNK = 512
TEMPERATURES = (0.3, 0.45, 0.6)
TIMES = "training.json"


@dataclass
class Training:
    """What a stage needs to go on: the model, its running mean, the optimizer and the number of steps taken."""

    model: Any
    file: Path
    device: torch.device
    mean: AveragedModel = field(init=False)
    optimizer: torch.optim.Optimizer = field(init=False)
    step: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.model.to(self.device)
        self.mean = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, weight_decay=0.01, fused=True)
        if self.file.exists():
            state = torch.load(self.file, map_location=self.device, weights_only=True)
            self.model.load_state_dict(state["model"])
            self.mean.load_state_dict(state["mean"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.seconds = state["step"], state["seconds"]

    def save(self) -> None:
        """Keeps everything in ``file``, whole or not at all."""
        state = {
            "model": self.model.state_dict(),
            "mean": self.mean.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
        }
        part = self.file.with_suffix(".part")
        torch.save(state, part)
        os.replace(part, self.file)

    def run(self, steps: int, loss: Callable[[int], Tensor], learning_rate: Callable[[int], float]) -> None:
        """Takes steps until there are ``steps`` of them; ``loss`` makes its batch from the number of the step."""
        saved = start = time.perf_counter()
        before = self.seconds
        self.model.train()
        while self.step < steps:
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(self.step)
            value = loss(self.step)
            value.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.mean.update_parameters(self.model)
            self.step += 1
            self.seconds = before + time.perf_counter() - start
            if self.step % STEPS_PER_CHECK == 0:
                print(f"step {self.step}: loss {value.item():.4f}, {self.seconds:.0f} s", flush=True)
            if time.perf_counter() - saved > CHECKPOINT_SECONDS:
                self.save()
                saved = time.perf_counter()
        self.save()


def train(
    work: Annotated[Path, typer.Option(help="Directory that keeps what is done.")],
    policy_output: Annotated[Path, typer.Option(help="Where the policy goes.")] = POLICY_PATH,
    reward_output: Annotated[Path, typer.Option(help="Where the reward model goes.")] = REWARD_PATH,
    target: Annotated[float, typer.Option(help="Greedy validation accuracy at which the policy stops.")] = 0.57,
    policy_steps: Annotated[int, typer.Option(help="Steps after which it stops at the latest.")] = 3000,
    samples: Annotated[int, typer.Option(help="Answers of the policy that the reward model learns from.")] = 12_288,
    reward_steps: Annotated[int, typer.Option(help="Steps of the reward model.")] = 1200,
    compass: Annotated[
        float, typer.Option(help="Weight of the loss that makes the reward's gradient point at the right token.")
    ] = COMPASS_WEIGHT,
    seed: Annotated[int, typer.Option(help="Of everything.")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Trains both models."""
    torch.set_num_threads(threads)
    work.mkdir(parents=True, exist_ok=True)
    _require_same_run(work, seed=seed, target=target, samples=samples, reward_steps=reward_steps, compass=compass)
    tokenizer = make_tokenizer()
    where = torch.device(device)
    with timed(work, "policy"):
        policy = train_policy(work, tokenizer, policy_steps, target, seed, where)
        save(policy, tokenizer, policy_output)
    with timed(work, "samples"):
        sampled = sample_policy(work, policy, tokenizer, samples, seed)
    with timed(work, "reward"):
        torch.manual_seed(seed)
        reward = train_reward(work, tokenizer, sampled, reward_steps, seed, where, Verifier(policy, compass))
        save(reward, tokenizer, reward_output)


@contextmanager
def timed(work: Path, stage: str) -> Iterator[None]:
    """Adds the seconds that a stage took, in this call and in those before it, to a file in ``work``."""
    file = work / TIMES
    start = time.perf_counter()
    try:
        yield
    finally:
        told = json.loads(file.read_text()) if file.exists() else {"seconds": {}}
        seconds = told["seconds"] | {stage: round(told["seconds"].get(stage, 0.0) + time.perf_counter() - start, 3)}
        machine = {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__}
        file.write_text(json.dumps({"seconds": seconds, "total": round(sum(seconds.values()), 3), **machine}, indent=2))


def train_policy(work: Path, tokenizer: Any, most: int, target: float, seed: int, device: torch.device) -> Any:
    """A policy that is right on ``target`` of the validation problems."""
    torch.manual_seed(seed)
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=False, **SIZES, **ends)
    training = Training(LlamaForCausalLM(config), work / "policy.pt", device)

    def loss(step: int) -> Tensor:
        batch = policy_batch(tokenizer, random.Random(f"policy {seed} {step}"), BATCH_SIZE).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            logits = training.model(input_ids=batch.ids, attention_mask=batch.mask).logits
        following = batch.following.flatten()
        return F.cross_entropy(logits.float().flatten(0, 1), following, label_smoothing=LABEL_SMOOTHING)

    reached = 0.0
    while training.step < most:
        if training.step:
            reached = accuracy(training.mean.module, tokenizer)
            print(f"policy, step {training.step}: {reached:.1%} of the validation problems", flush=True)
        if reached >= target:
            break
        training.run(min(training.step + STEPS_PER_CHECK, most), loss, _constant)
    return training.mean.module.eval()


def sample_policy(work: Path, policy: Any, tokenizer: Any, count: int, seed: int) -> list[tuple[Arithmetic, list[int]]]:
    """The policy's answers to training problems, chunk by chunk in ``work``."""
    sampled = []
    for chunk in range(-(-count // SAMPLES_PER_CHUNK)):
        rng = random.Random(f"samples {seed} {chunk}")
        asked = [training_problem(rng) for _ in range(SAMPLES_PER_CHUNK)]
        file = work / f"samples-{chunk:03d}.json"
        if not file.exists():
            temperature = TEMPERATURES[chunk % len(TEMPERATURES)]
            drawing = {"temperature": temperature, "max_new_tokens": CONFIG.max_new_tokens, "seed": seed + chunk}
            answers = [rows[0] for rows in sample_answers(policy, tokenizer, [chat(p) for p in asked], **drawing)]
            part = file.with_suffix(".part")
            part.write_text(json.dumps(answers))
            os.replace(part, file)
            print(f"{file.name} written", flush=True)
        sampled += list(zip(asked, json.loads(file.read_text()), strict=True))
    return sampled[:count]


def train_reward(
    work: Path,
    tokenizer: Any,
    sampled: list[tuple[Arithmetic, list[int]]],
    steps: int,
    seed: int,
    device: torch.device,
    verifier: Verifier,
) -> Any:
    """The reward model that ``verifier`` becomes."""
    training = Training(verifier, work / "reward.pt", device)

    def loss(step: int) -> Tensor:
        batch = reward_batch(tokenizer, random.Random(f"reward {seed} {step}"), REWARD_BATCH_SIZE, sampled)
        with torch.autocast(device.type, torch.bfloat16):
            value: Tensor = training.model(batch.to(device))
        return value

    training.run(steps, loss, lambda step: _constant(step) * max(0.05, 1 - step / steps))
    return training.mean.module.classifier.eval()


@torch.inference_mode()
def accuracy(policy: Any, tokenizer: Any) -> float:
    """Share of the validation problems that greedy decoding solves as the solution does."""
    policy.eval()
    asked = list(islice(problems("validation"), VALIDATION_PROBLEMS))
    drawing = {"temperature": 0.0, "max_new_tokens": CONFIG.max_new_tokens}
    answers = sample_answers(policy, tokenizer, [chat(p) for p in asked], **drawing)
    texts = [tokenizer.decode(rows[0], skip_special_tokens=True) for rows in answers]
    return sum(text == p.solution for text, p in zip(texts, asked, strict=True)) / len(asked)


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Writes a model in half precision, and its tokenizer, where ``from_pretrained`` finds them."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    # A copy with its own configuration: models made from that of a half-precision model are in half precision, too.
    half = copy.deepcopy(model).half()
    half.save_pretrained(part)
    tokenizer.save_pretrained(part)
    for file in folder.glob("*.md"):
        shutil.copy(file, part)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)


def _constant(step: int) -> float:
    return LEARNING_RATE * min(1.0, (step + 1) / WARMUP_STEPS)


def _require_same_run(work: Path, **settings: Any) -> None:
    file = work / "settings.json"
    if file.exists() and json.loads(file.read_text()) != settings:
        raise SystemExit(f"{work} holds a training with {file.read_text()}, not {json.dumps(settings)}; use another")
    file.write_text(json.dumps(settings))


if __name__ == "__main__":
    typer.run(train)
