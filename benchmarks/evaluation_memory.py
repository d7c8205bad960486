"""Peak extra memory of one gradient evaluation over 512 tokens ahead: nabla_fast's and the published schedule's.

    python benchmarks/evaluation_memory.py --output benchmarks/results/evaluation_memory.json

On SmolLM2-135M and its reward model (V = 49,152) in float32. Every figure comes from a process of its own: the highest
resident memory during the evaluation, less what was resident before it, after a short evaluation has loaded the code.

    nabla_fast              `Objective.evaluate`: the gradient of every token ahead, as factors
    nabla_fast_checkpointed the same with ``checkpoint_activations=True``
    published_criterion     the same gradient as a dense (m, V) tensor, for the gradient-norm criterion
    published_optimisation  an optimisation's first step: relaxation, both models, down to the parameters
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from end_to_end import PROMPTS
from machine import machine, resident, write
from published_schedule import Models, PublishedSchedule, Trajectory

import nabla_fast as nf
from nabla_fast.demo import load_smollm2, load_smollm2_reward
from nabla_fast.generate import make_pair, stop_rule
from nabla_fast.models.chat import generation_prompt_ids
from nabla_fast.objective import Conversation, Objective, Request
from nabla_fast.rollout import HFRollout

CHAT = [{"role": "user", "content": PROMPTS[0]}]
Evaluate = Callable[[int], object]
Loaded = tuple[Any, Any, Any, Any]


def ours(loaded: Loaded, config: nf.NablaConfig) -> Evaluate:
    """Evaluates our objective at so many random tokens ahead."""
    pair = make_pair(*loaded, config)
    objective = Objective(pair.language_model, pair.reward_model, config)
    prompt = tuple(generation_prompt_ids(pair.tokenizer, CHAT))
    frame = pair.reward_model.chat_frame(CHAT)

    def evaluate(ahead: int) -> object:
        conversation = Conversation(prompt, frame, ahead)
        return objective.evaluate([request(conversation, random_tokens(ahead, pair.language_model.vocab_size))])

    return evaluate


def request(conversation: Conversation, response: torch.Tensor) -> Request:
    """Asks for the gradient at all of ``response`` (m,) int64."""
    return Request(conversation, response, 0)


def published(loaded: Loaded, config: nf.NablaConfig, criterion: bool) -> Evaluate:
    """The same of the published schedule, either of the two places where it takes a gradient."""
    models, pair = Models(*loaded), make_pair(*loaded, config)
    schedule = PublishedSchedule(models, HFRollout(pair.language_model), config, stop_rule(pair, config))

    def evaluate(ahead: int) -> object:
        state = schedule.start(CHAT)
        tokens = random_tokens(ahead, models.vocab_size)
        latents = torch.randn(ahead, models.language_model.config.hidden_size)
        state.trajectory = Trajectory(tokens, latents, 0.0)
        return schedule.gradient(state, tokens[:0], tokens) if criterion else schedule.optimise(state)

    return evaluate


def random_tokens(ahead: int, vocab_size: int) -> torch.Tensor:
    return torch.randint(0, vocab_size, (ahead,), generator=torch.Generator().manual_seed(0))


SIDES: dict[str, Callable[[Loaded, nf.NablaConfig], Evaluate]] = {
    "nabla_fast": ours,
    "nabla_fast_checkpointed": lambda loaded, config: ours(loaded, config.replace(checkpoint_activations=True)),
    "published_criterion": lambda loaded, config: published(loaded, config, criterion=True),
    "published_optimisation": lambda loaded, config: published(loaded, config, criterion=False),
}


def peak_growth(name: str, ahead: int, threads: int) -> int:
    """Bytes by which one evaluation raises this process's resident memory at its highest; Linux only."""
    torch.set_num_threads(threads)
    loaded = (*load_smollm2(device="cpu", dtype="float32"), *load_smollm2_reward(device="cpu", dtype="float32"))
    for model in loaded[::2]:  # weights mapped from a file become resident when they are first read
        for weight in model.parameters():
            weight.sum()
    # One step, and no gradient cache, whose entries would count as growth only in the side that has one.
    evaluate = SIDES[name](loaded, nf.NablaConfig(max_iters=1, max_new_tokens=ahead, gradient_cache=False))
    with torch.no_grad():
        evaluate(8)
        release()
        Path("/proc/self/clear_refs").write_text("5")  # the highest mark starts anew
        before = resident("VmRSS")
        evaluate(ahead)
    return resident("VmHWM") - before


def release() -> None:
    """Gives back what the allocator keeps of earlier calls, which would hide what the next one needs (glibc)."""
    ctypes.CDLL(None).malloc_trim(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--ahead", type=int, default=512, help="m, the tokens ahead")
    parser.add_argument("--repeats", type=int, default=3, help="processes per side")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    # glibc otherwise keeps what is freed, the more the longer a process runs; so resident memory is what is in use.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    context = multiprocessing.get_context("spawn")
    samples: dict[str, list[int]] = {name: [] for name in SIDES}
    before = os.getloadavg()
    for _ in range(arguments.repeats):
        for name, sizes in samples.items():
            with context.Pool(1) as pool:
                sizes.append(pool.apply(peak_growth, (name, arguments.ahead, arguments.threads)))
            print(f"{name}: {sizes[-1] / 2**20:.0f} MiB", flush=True)
    medians = {name: statistics.median(sizes) for name, sizes in samples.items()}
    result = {
        "machine": machine(),
        "versions": {"torch": torch.__version__},
        "threads": arguments.threads,
        "shape": {"m": arguments.ahead, "V": 49152, "d": 576, "dtype": "float32"},
        "peak_bytes": samples,
        "median_bytes": medians,
        "ours_over": {
            side: {name: medians[side] / size for name, size in medians.items() if name.startswith("published")}
            for side in SIDES
            if side.startswith("nabla_fast")
        },
        "load_average": {"before": before, "after": os.getloadavg()},
    }
    for side, ratios in result["ours_over"].items():
        print(side, {name: round(ratio, 3) for name, ratio in ratios.items()})
    if arguments.output:
        write(arguments.output, result)


if __name__ == "__main__":
    main()
