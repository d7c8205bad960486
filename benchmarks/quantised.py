"""What quantisation of SmolLM2 and its reward model saves and costs on a CPU.

    python benchmarks/quantised.py

Of each: the bytes of the weights; the processor time, on one thread, of a token that is sampled and of one gradient of
the objective over a response of 32 tokens; and how far that gradient is from the float32 models'. Each takes turns with
float32 in one process. The figures go to results/quantised.json.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import statistics
import time
from datetime import datetime, timezone
from typing import Any

import torch
from machine import commit, machine, versions, write
from run import RESULTS, positive
from torch import Tensor

import nabla_fast as nf
from nabla_fast.demo import load_smollm2, load_smollm2_reward
from nabla_fast.generate import make_pair
from nabla_fast.models.quantization import QUANTIZATIONS
from nabla_fast.objective import Objective, Request
from nabla_fast.sequence import Sequence

PROMPT = "How many letters r are in the word strawberry?"
TOKENS = 32
CONFIG = nf.NablaConfig(max_new_tokens=TOKENS, max_rollouts=1, gradient_cache=False, draft_tokens=0, seed=0)


def held(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that a weight consists of."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return [part for name in names for part in held(getattr(tensor, name))]
    state = getattr(tensor, "quant_state", None)
    scales = [getattr(state, "absmax", None), getattr(tensor, "SCB", None)]
    return [tensor, *(scale for scale in scales if isinstance(scale, Tensor))]


def weight_bytes(*models: Any) -> int:
    """Bytes of all weights, tied ones once."""
    every = [x for model in models for tensor in (*model.parameters(), *model.buffers()) for x in held(tensor)]
    # The first pass of an 8-bit layer of bitsandbytes moves its scales.
    states = [getattr(module, "state", None) for model in models for module in model.modules()]
    every += [state.SCB for state in states if isinstance(getattr(state, "SCB", None), Tensor)]
    return sum({x.data_ptr(): x.numel() * x.element_size() for x in every}.values())


class Pair:
    """Both models, quantised, and the request whose gradient is taken."""

    def __init__(self, quantization: str) -> None:
        where = {"device": "cpu", "dtype": "float32", "quantization": quantization}
        self.models = (*load_smollm2(**where), *load_smollm2_reward(**where))
        pair = make_pair(*self.models, CONFIG)
        self.objective = Objective(pair.language_model, pair.reward_model, CONFIG)
        chat = [{"role": "user", "content": PROMPT}]
        tokenizer = self.models[1]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        frame = pair.reward_model.chat_frame(chat)
        response = torch.randint(1000, 40000, (TOKENS,), generator=torch.Generator().manual_seed(0))
        self.request = Request(Sequence(tuple(prompt), (), 0, TOKENS, frame), response, 0)

    def gradient(self) -> Tensor:
        """The factors of the gradient that are derivatives, (TOKENS, 2 d)."""
        (found,) = self.objective.evaluate([self.request])
        return torch.cat([x.double() for x in found.factors[1:]], dim=-1)

    def sample(self) -> int:
        """The number of tokens sampled."""
        return nf.generate(*self.models, PROMPT, CONFIG).stats.totals.generated_tokens


def spent(pair: Pair, what: str) -> float:
    """Processor seconds of a token, or of a gradient."""
    start = time.process_time()
    count = pair.sample() if what == "token" else len(pair.gradient()) // TOKENS
    return (time.process_time() - start) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=positive, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    plain = Pair("none")
    exact = plain.gradient()
    found = [{"quantization": "none", "weight_bytes": weight_bytes(plain.models[0], plain.models[2])}]
    for name in QUANTIZATIONS[1:]:
        pair = Pair(name)
        row: dict[str, Any] = {"quantization": name, "weight_bytes": weight_bytes(pair.models[0], pair.models[2])}
        row["gradient_relative_difference"] = float((pair.gradient() - exact).norm() / exact.norm())
        for what in ("token", "gradient"):
            # Each beside float32 at the same moment.
            turns = [(spent(plain, what), spent(pair, what)) for _ in range(options.repeats)]
            row[f"{what}_over_float32"] = statistics.median(own / base for base, own in turns)
            row[f"{what}_seconds"] = [own for _, own in turns]
            row[f"{what}_seconds_float32"] = [base for base, _ in turns]
        found.append(row)
        print({key: value for key, value in row.items() if not isinstance(value, list)}, flush=True)
    result = {
        "measured": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
        "versions": versions()
        | {name: importlib.metadata.version(name) for name in ("bitsandbytes", "peft", "torchao")},
        "pair": "smollm2",
        "threads": 1,
        "config": CONFIG.to_dict(),
        "quantizations": found,
    }
    write(RESULTS / "quantised.json", result)


if __name__ == "__main__":
    main()
