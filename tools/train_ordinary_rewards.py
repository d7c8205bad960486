"""Makes reward models for the bundled arithmetic task as people have them: taught to judge, by nothing that points.

    python tools/train_ordinary_rewards.py --work DIR                    all of them
    python tools/train_ordinary_rewards.py --work DIR --names judge-0    some of them

A name is a kind and a seed:

    judge    labels of every prefix and of the end, as the bundled reward model, without the loss of its gradient
    outcome  the end alone, right or wrong
    prefix   at every prefix, whether the answer that it is from ends right
    judge-long  as judge, four times as many steps on twice as many answers: it judges like the bundled reward model
    steps    a process reward model: a value at every token, and above all at the line break behind a step, of whether
             all that is there is right. It goes on from judge-long of its seed, and it is the one that ships
    gated    as judge; the token that came stands in a gate that saturates, which leaves the gradient next to nothing.
             Made on purpose, no sample of what people have

They share the bundled reward model's embeddings and first four layers, which are frozen; its last two layers and its
score are trained anew. What is done is kept in DIR, one folder a reward model, and not made twice.
"""

from __future__ import annotations

import copy
import json
import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from demo_pair_data import reward_batch
from demo_pair_verifier import SMOOTHING, WRONG_WEIGHT, Verifier
from torch import Tensor, nn
from torch.nn import functional as F
from train_demo_pair import sample_policy, save
from transformers import AutoModelForTokenClassification

from nabla_fast.demo.arithmetic import load_policy, load_reward
from nabla_fast.evaluation.arithmetic import Arithmetic
from nabla_fast.models.loading import load_reward_model

KINDS = ("judge", "judge-long", "outcome", "prefix", "gated", "steps")
NAMES = ("judge-long-0", "judge-0", "gated-0", "judge-1", "outcome-0", "prefix-0", "steps-0")
LEARNING_RATE = 1e-3
GOING_ON = 3e-4  # from a model that is trained already
WARMUP_STEPS = 30
BATCH_SIZE = 32
# Their frozen features are kept, so that a later pass over them costs the last two layers alone.
BATCHES = 100
SATURATION = 3.0
STEPS_PER_CHECK = 50
LONG = "-long"


class Features(NamedTuple):
    """A batch behind the frozen layers.

    Attributes:
        hidden: (B, T, d) what the frozen layers make of it.
        mask: (B, 1, T, T) bool, what attends to what.
        rotary: cosines and sines of the positions.
        labels: (B, T) float32, see `demo_pair_data.Conversations`.
        end: (B, T) bool, True at the last token; for steps, at every line break of the answer.
    """

    hidden: Tensor
    mask: Tensor
    rotary: tuple[Tensor, Tensor]
    labels: Tensor
    end: Tensor


def train(
    work: Annotated[Path, typer.Option(help="Directory that keeps samples and reward models.")],
    names: Annotated[str, typer.Option(help="Some of them, separated by commas.")] = ",".join(NAMES),
    samples: Annotated[
        int, typer.Option(help="Answers of the policy that they learn from; twice as many where it is long.")
    ] = 3072,
    steps: Annotated[int, typer.Option(help="Steps of each; four times as many where it is long.")] = 400,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
) -> None:
    """Trains reward models, or what is left of them."""
    torch.set_num_threads(threads)
    for name in names.split(","):
        kind, _, seed = name.rpartition("-")
        if kind not in KINDS or not seed.isdecimal():
            raise typer.BadParameter(f"--names has {name!r}; a name is one of {', '.join(KINDS)}, '-' and a seed")
    work.mkdir(parents=True, exist_ok=True)
    policy, tokenizer = load_policy(device="cpu", dtype="float32")
    for name in names.split(","):
        if (work / name / "config.json").exists():
            continue
        kind, _, seed = name.rpartition("-")
        times = 4 if kind.endswith(LONG) else 1
        kind = kind.removesuffix(LONG)
        recipe = {"steps": times * steps, "samples": (2 if times > 1 else 1) * samples}
        sampled = sample_policy(work, policy, tokenizer, recipe["samples"], 0)
        batches = BATCHES * recipe["samples"] // samples
        verifier = _start(policy, kind, int(seed))
        if kind == "steps":
            _go_on(verifier, work / f"judge{LONG}-{seed}")
        seconds = _train(verifier, tokenizer, sampled, kind, int(seed), recipe["steps"], batches)
        model = verifier.classifier.eval()
        save(as_process_model(model) if kind == "steps" else model, tokenizer, work / name)
        (work / f"{name}.json").write_text(json.dumps({**recipe, "seconds": seconds}))


def load(work: Path, name: str) -> tuple[Any, Any]:
    """A reward model that was made, or the bundled one ("taught"), and its tokenizer."""
    if name == "taught":
        return load_reward(dtype="float32")
    if not name.startswith("steps"):
        return load_reward_model(work / name, dtype="float32")
    process, tokenizer = load_reward_model(work / name, step_separator="\n", step_aggregation="last", dtype="float32")
    return replace(process, values_prefixes=True), tokenizer


def as_process_model(classifier: Any) -> Any:
    """A sequence classifier with one label as a token classifier: its score at every token."""
    config = copy.deepcopy(classifier.config)
    model = AutoModelForTokenClassification.from_config(config, dtype=torch.float32)
    getattr(model, model.base_model_prefix).load_state_dict(classifier.model.state_dict())
    with torch.no_grad():
        model.score.weight.copy_(classifier.score.weight)
        model.score.bias.zero_()
    return model.eval()


def _go_on(verifier: Verifier, folder: Path) -> None:
    if not (folder / "config.json").exists():
        raise typer.BadParameter(f"--names has steps, which goes on from {folder.name}; train that first")
    trained, _ = load_reward_model(folder, device="cpu", dtype="float32")
    verifier.classifier.load_state_dict(trained.state_dict())


def _start(policy: Any, kind: str, seed: int) -> Verifier:
    torch.manual_seed(seed)
    verifier = Verifier(policy, compass=0)
    body, taught = verifier.classifier.model, load_reward(device="cpu", dtype="float32")[0].model
    body.embed_tokens.load_state_dict(taught.embed_tokens.state_dict())
    for layer, source in zip(body.layers[: verifier.depth], taught.layers, strict=False):
        layer.load_state_dict(source.state_dict())
    compares = body.layers[verifier.depth]
    if kind == "gated":
        with torch.no_grad():
            size = min(policy.config.vocab_size, compares.self_attn.head_dim)
            gate, up = compares.mlp.gate_proj.weight[:size].clone(), compares.mlp.up_proj.weight[:size].clone()
            compares.mlp.gate_proj.weight[:size] = SATURATION * up
            compares.mlp.up_proj.weight[:size] = gate / 2
    else:  # nothing is built in but that the first head looks at the token before
        fresh = type(verifier.classifier)(verifier.classifier.config).model.layers[verifier.depth]
        compares.mlp.load_state_dict(fresh.mlp.state_dict())
        for projection in ("v_proj", "o_proj"):
            weight = getattr(fresh.self_attn, projection).weight
            getattr(compares.self_attn, projection).weight.data.copy_(weight)
    verifier.requires_grad_(False)
    for part in _trained(verifier):
        part.requires_grad_(True)
    for layer in body.layers:
        layer.self_attn.o_proj.bias.requires_grad_(False)
    verifier.classifier.set_attn_implementation("sdpa")
    return verifier


def _trained(verifier: Verifier) -> tuple[nn.Module, ...]:
    body = verifier.classifier.model
    return (*body.layers[verifier.depth :], body.norm, verifier.classifier.score, verifier.local)


def _train(
    verifier: Verifier,
    tokenizer: Any,
    sampled: list[tuple[Arithmetic, list[int]]],
    kind: str,
    seed: int,
    steps: int,
    batches: int,
) -> float:
    parameters = [p for part in _trained(verifier) for p in part.parameters() if p.requires_grad]
    mean = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.01, fused=True)
    known: dict[int, Features] = {}
    line_break = tokenizer.convert_tokens_to_ids("\n") if kind == "steps" else None
    rate = LEARNING_RATE if line_break is None else GOING_ON
    start = time.perf_counter()
    for step in range(steps):
        number = step % batches
        if number not in known:
            known[number] = _features(verifier, tokenizer, sampled, seed, number, line_break)
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / WARMUP_STEPS) * max(0.05, 1 - step / steps)
        loss, score = _loss(verifier, known[number], kind)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for old, new in zip(mean, parameters, strict=True):
                old.lerp_(new, 1 - min(0.98, step / (step + 10)))
        if (step + 1) % STEPS_PER_CHECK == 0:
            told = f"loss {loss.item():.3f}, AUROC of the batch {_auroc(score, known[number]):.3f}"
            print(f"{kind}-{seed}, step {step + 1}: {told}, {time.perf_counter() - start:.0f} s", flush=True)
    with torch.no_grad():
        for weight, value in zip(parameters, mean, strict=True):
            weight.copy_(value)
    return round(time.perf_counter() - start, 1)


@torch.no_grad()
def _features(
    verifier: Verifier,
    tokenizer: Any,
    sampled: list[tuple[Arithmetic, list[int]]],
    seed: int,
    number: int,
    line_break: int | None,
) -> Features:
    """Features of a batch of answers; with a ``line_break``, these end in one, which says whether all is right."""
    batch = reward_batch(tokenizer, random.Random(f"reward {seed} {number}"), BATCH_SIZE, sampled)
    assert batch.labels is not None
    last = torch.arange(len(batch.ids)), batch.mask.sum(1) - 1
    if line_break is not None:
        batch.ids[last] = line_break
        batch.labels[last] = (batch.labels[last] > 0.99).float()
    body, length = verifier.classifier.model, batch.ids.shape[1]
    hidden = body.embed_tokens(batch.ids)
    rotary = body.rotary_emb(hidden, torch.arange(length)[None])
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    # A row of padding attends to itself: softmax of nothing is NaN.
    mask = (causal & batch.mask.bool()[:, None, None]) | torch.eye(length, dtype=torch.bool)
    for layer in body.layers[: verifier.depth]:
        hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary)
    end = torch.zeros_like(mask[:, 0, 0])
    end[last] = True
    if line_break is not None:
        end |= (batch.ids == line_break) & (batch.labels >= 0)
    return Features(hidden, mask, rotary, batch.labels, end)


def _loss(verifier: Verifier, batch: Features, kind: str) -> tuple[Tensor, Tensor]:
    """The loss of a batch, and the score (B, T) of every prefix."""
    body, hidden = verifier.classifier.model, batch.hidden
    compared = hidden
    for i, layer in enumerate(body.layers[verifier.depth :]):
        hidden = layer(hidden, attention_mask=batch.mask, position_embeddings=batch.rotary)
        compared = hidden if i == 0 else compared
    score = verifier.classifier.score(body.norm(hidden))[..., 0]
    labels, end, inside = batch.labels, batch.end, batch.labels >= 0
    if kind in ("outcome", "prefix"):
        labels = _outcome(batch).unsqueeze(1).expand_as(labels)
    each = F.binary_cross_entropy_with_logits(score, labels.clamp(SMOOTHING, 1 - SMOOTHING), reduction="none")
    if kind == "outcome":
        return each[end].mean(), score.detach()
    loss = (each[end].mean() + each[inside].mean()) / 2
    if kind in ("judge", "gated"):
        # Which token is the first mistake, as the bundled reward model learns it.
        wrong = (labels == 0) & ~end
        known = inside & ~end & (wrong.cumsum(1) - wrong.long() == 0)
        found = F.binary_cross_entropy_with_logits(
            verifier.local(compared)[..., 0], labels.clamp(0, 1), reduction="none"
        )
        loss = loss + (found * torch.where(wrong, WRONG_WEIGHT, 1.0))[known].mean()
    return loss, score.detach()


def _outcome(batch: Features) -> Tensor:
    """1 where an answer ends right, else 0."""
    return (batch.labels[batch.end] > 0.99).float()


def _auroc(score: Tensor, batch: Features) -> float:
    right = _outcome(batch) == 1
    ends = score[batch.end]
    return float((ends[right][:, None] > ends[~right][None]).float().mean())


if __name__ == "__main__":
    typer.run(train)
