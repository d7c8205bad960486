"""What a gradient loses on its way between two tokenizers.

    python benchmarks/cross_tokenizer.py            # the bundled reward model, on the CPU

Right solutions of the bundled task get one wrong number, and each token with as many digits is asked after: which one
raises the reward most? The reward model reads digits one by one. A language model that does so too has its exact
gradient; one that reads two or three digits together, as many do, has the transferred one, with a slot for each of a
token's first pieces or with one for all of them. All are compared with the rewards of the swapped texts themselves. The
figures go to results/cross_tokenizer.json.
"""

from __future__ import annotations

import argparse
import random
import re
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import islice
from typing import Any

import torch
from machine import commit, machine, versions, write
from run import RESULTS, positive
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from nabla_fast.demo import arithmetic
from nabla_fast.evaluation.arithmetic import problems, write_solution
from nabla_fast.models.cross_tokenizer import MOST_SLOTS, CrossTokenizer
from nabla_fast.models.language_model import LanguageModel
from nabla_fast.models.reward_model import RewardFrame, RewardModel

DIGITS = (1, 2, 3)
CANDIDATES = 100  # numbers that are compared, where there are more


@dataclass(frozen=True)
class Swap:
    """A solution with one wrong token.

    Attributes:
        tokens: of the response.
        position: of the wrong one.
        right: what should be there.
        candidates: tokens with as many digits, the wrong one left out.
    """

    frame: RewardFrame
    tokens: Tensor
    position: int
    right: int
    candidates: tuple[int, ...]


def grouping(own: Any, digits: int) -> Any:
    """The tokenizer ``own`` with up to so many digits in a token, grouped from the left."""
    numbers = [f"{i:0{size}d}" for size in range(2, digits + 1) for i in range(10**size)]
    vocabulary = {**own.get_vocab(), **{number: len(own) + i for i, number in enumerate(numbers)}}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=own.unk_token))
    rule = rf" [-+*=] |\\boxed\{{|Compute |\n|[0-9]{{1,{digits}}}|."
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(rule), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token=own.unk_token,
        eos_token=own.eos_token,
        pad_token=own.pad_token,
        clean_up_tokenization_spaces=False,
    )


def swaps(reward: RewardModel, tokenizer: Any, digits: int, count: int) -> list[Swap]:
    """``count`` held-out solutions, each with a wrong number of ``digits`` digits."""
    rng = random.Random(digits)
    same = [i for text, i in sorted(tokenizer.get_vocab().items()) if re.fullmatch(f"[0-9]{{{digits}}}", text)]
    found = []
    for problem in islice(problems("test"), count):
        ids = tokenizer(write_solution(problem.steps), add_special_tokens=False)["input_ids"]
        places = [i for i, token in enumerate(ids) if token in set(same)]
        if not places:
            continue
        position = rng.choice(places)
        right = ids[position]
        others = [token for token in same if token != right]
        ids[position] = rng.choice(others)
        others.remove(ids[position])
        candidates = (right, *rng.sample(others, min(len(others), CANDIDATES - 1)))
        chat = [{"role": "user", "content": problem.question}]
        tokens = torch.tensor([*ids, tokenizer.eos_token_id])
        found.append(Swap(reward.chat_frame(chat), tokens, position, right, candidates))
    return found


def gains(reward: RewardModel, cross: CrossTokenizer, swap: Swap) -> Tensor:
    """What each candidate adds to the reward to first order, (C,), by the transferred gradient."""
    reading = cross.read(swap.tokens)
    conversation = reward.conversation(swap.frame, reading).differentiable()
    (value,), _ = reward.rewards([conversation])
    (gradient,) = torch.autograd.grad(value, conversation.embeds)
    first = len(swap.frame.opening)
    rows = reading.rows(gradient[first : first + len(reading.tokens)], swap.position, 0)
    return cross.table.weight[list(swap.candidates)] @ rows[0]


@torch.no_grad()
def rewards(reward: RewardModel, cross: CrossTokenizer, swap: Swap) -> Tensor:
    """The reward with each candidate in the wrong token's place, (C,)."""
    responses = [swap.tokens.index_fill(0, torch.tensor([swap.position]), token) for token in swap.candidates]
    return reward.rewards([reward.conversation(swap.frame, cross.read(y)) for y in responses])[0]


def first_share(scores: list[Tensor]) -> float:
    """How often the right candidate, which is the first, has the highest score."""
    return sum(int(score.argmax()) == 0 for score in scores) / len(scores)


def measured(reward: RewardModel, own: Any, digits: int, count: int) -> dict[str, Any]:
    """One tokenizer's row."""
    tokenizer = grouping(own, digits)
    asked = swaps(reward, tokenizer, digits, count)
    end = own.eos_token_id
    table = reward.reading_table

    def cross(slots: int) -> CrossTokenizer:
        return CrossTokenizer(tokenizer, own, len(tokenizer), table, [tokenizer.eos_token_id], end, slots)

    apart, pooled = cross(MOST_SLOTS), cross(1)
    return {
        "digits": digits,
        "vocabulary": len(tokenizer),
        "single": apart.single,
        "swaps": len(asked),
        "candidates": len(asked[0].candidates),
        "right_first": {
            "slots": first_share([gains(reward, apart, swap) for swap in asked]),
            "one_slot": first_share([gains(reward, pooled, swap) for swap in asked]),
            "rewards": first_share([rewards(reward, apart, swap) for swap in asked]),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=positive, default=100, help="problems of the test split")
    parser.add_argument("--threads", type=positive, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, tokenizer = arithmetic.load_policy(device="cpu", dtype="float32")
    reward = RewardModel(
        arithmetic.load_reward(device="cpu", dtype="float32")[0], None, LanguageModel(model, tokenizer), tokenizer
    )
    rows = [measured(reward, tokenizer, digits, options.problems) for digits in DIGITS]
    for row in rows:
        print(row)
    result = {
        "measured": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
        "versions": versions(),
        "pair": "arithmetic",
        "rows": rows,
    }
    write(RESULTS / "cross_tokenizer.json", result)


if __name__ == "__main__":
    main()
