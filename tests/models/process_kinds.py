"""Process reward models of every kind, and plain readings of their own forward passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import nabla_fast as nf
from nabla_fast.models.language_model import LanguageModel
from nabla_fast.models.process_reward import ProcessRewardModel
from nabla_fast.objective import Objective
from nabla_fast.sequence import Sequence
from nabla_fast.testing.models import (
    MESSAGES,
    prompt_ids,
    shared_language_model,
    tiny_process_model,
    tiny_tokenizer,
)

TOKENIZER = tiny_tokenizer()
V = len(TOKENIZER)
MARK = "<extra_0>"
CONFIG = nf.NablaConfig(nll_coeff=0.3, reward_coeff=-1.7)
END = TOKENIZER.eos_token_id


def marked_tokenizer(shuffle: int | None = None) -> Any:
    """One that knows Qwen's separator."""
    tokenizer = tiny_tokenizer(shuffle=shuffle)
    tokenizer.add_special_tokens({"additional_special_tokens": [MARK]})
    return tokenizer


MARKED = marked_tokenizer(shuffle=6)


def ids(text: str) -> list[int]:
    return list(TOKENIZER(text, add_special_tokens=False)["input_ids"])


@dataclass
class Kind:
    """A model, how it is read, and a plain reading of the same."""

    process: nf.ProcessReward
    tokenizer: Any
    marker: str
    inserted: bool

    def __post_init__(self) -> None:
        self.model = self.process.model
        theirs = self.tokenizer.get_vocab()
        self.table = self.model.get_input_embeddings().weight[
            torch.tensor([theirs[t] for t in TOKENIZER.convert_ids_to_tokens(list(range(V)))])
        ]
        self.separator = self.tokenizer(self.process.separator, add_special_tokens=False)["input_ids"]

    def ends(self, response: list[int]) -> list[bool]:
        """Whether a step ends at each token; by the text so far, cut again for every token."""
        found, steps = [], 0
        for i in range(len(response)):
            text = "".join(TOKENIZER.decode([t]) for t in response[: i + 1])
            now = len([step for step in text.split(self.marker)[:-1] if step.strip()])
            found.append(now > steps)
            steps = now
        return found

    def reward(self, opening: list[int], response: list[int], rows: Tensor, *, ended: bool = True) -> Tensor:
        """The reward of a response whose tokens have the embeddings ``rows`` (n, d)."""
        embed = self.model.get_input_embeddings()
        if response and response[-1] == END:
            response, rows, ended = response[:-1], rows[:-1], True
        parts, reads = [embed(torch.tensor(opening))], []
        length, ends = len(opening), self.ends(response)
        text = "".join(TOKENIZER.decode([t]) for t in response)
        unfinished = bool(text.rsplit(self.marker, 1)[-1].strip()) or not any(ends)
        # The separator stands behind a whole token, whatever of it belongs to the next step.
        unfinished = unfinished and not (self.inserted and ends and ends[-1])
        for i, end in enumerate(ends):
            parts.append(rows[i : i + 1])
            length += 1
            if end and self.inserted:
                parts.append(embed(torch.tensor(self.separator)))
                length += 1
            if end:
                reads.append(length - 1)
        if unfinished and self.process.values_prefixes and not ended:
            reads.append(length - 1)
        elif unfinished:
            parts.append(embed(torch.tensor(self.separator)))
            reads.append(length + len(self.separator) - 1)
        logits = self.model(inputs_embeds=torch.cat(parts).unsqueeze(0), use_cache=False).logits[0, reads]
        scores = logits.sigmoid()[:, 0] if logits.shape[1] == 1 else logits.softmax(-1)[:, 1]
        return {"min": scores.min(), "product": scores.prod(), "last": scores[-1], "mean": scores.mean()}[
            self.process.aggregation
        ]


def trl(aggregation: str = "min", family: str = "llama", separator: str = "\n", labels: int = 2) -> Kind:
    model = tiny_process_model(family, labels=labels)
    return Kind(nf.ProcessReward(model, separator, aggregation), TOKENIZER, separator, False)


def qwen(aggregation: str = "min", family: str = "qwen2", after: str | None = None) -> Kind:
    model = tiny_process_model(family, two_layers=True, vocab_rows=len(MARKED))
    return Kind(nf.ProcessReward(model, MARK, aggregation, after), MARKED, after or "\n\n", True)


KINDS: dict[str, Callable[..., Kind]] = {
    "trl": trl,
    "value head": lambda aggregation="min", **_: trl(aggregation, "qwen3", labels=1),
    "Qwen": qwen,
}
RESPONSES = [
    "the ans is 12",
    "it is 3\n\n\nthen 4\n\nthe ans is 12\n\n",
    "at 12\n\n24\n36",
    "\n\nthe\n",
    "10 + 2 is\n\n 12\n\nthe time<|end|>",
    "ans\n<|end|>",
    "<|end|>",
]


def objective_of(kind: Kind, **changes: Any) -> Objective:
    language_model = LanguageModel(shared_language_model("llama"), TOKENIZER)
    reward = ProcessRewardModel(kind.process, kind.tokenizer, language_model, TOKENIZER, [END])
    return Objective(language_model, reward, CONFIG.replace(**changes))


def new_sequence(objective: Objective) -> Sequence:
    frame = objective.reward_model.chat_frame(MESSAGES)
    return Sequence(tuple(prompt_ids(TOKENIZER)), (), 0, 64, frame)
