"""The pairs of small models by name, as ``--pair`` takes them, with what belongs to each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from nabla_fast.config import NablaConfig
from nabla_fast.demo import arithmetic, example, load_smollm2, load_smollm2_reward

Chat = Sequence[Mapping[str, str]]
Load = Callable[..., tuple[Any, Any, Any, Any]]


@dataclass(frozen=True)
class DemoPair:
    """A language model and a reward model.

    Attributes:
        load: both, each with its tokenizer; takes ``device``, ``dtype``, ``attn_implementation`` and
            ``quantization``, and ``reward_device`` where the reward model is to be on another device.
        config: settings that belong to them.
        question: what they are asked where nothing is asked.
        task: the evaluation's task where none is named.
        task_options: reasoning-gym task → parameters for problems of the size that they are made for.
        refusal: says why a chat is none for them; None for one that is.
    """

    load: Load
    config: NablaConfig
    question: str
    task: str | None = None
    task_options: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    refusal: Callable[[Chat], str | None] = lambda chat: None

    def require(self, prompts: Sequence[str | Chat]) -> None:
        """Raises ValueError for the first prompt, a string or a chat, that is none for this pair."""
        # Here, because it imports transformers, which takes seconds.
        from nabla_fast.models.chat import as_chats

        why = next(filter(None, map(self.refusal, as_chats(list(prompts)) if prompts else [])), None)
        if why is not None:
            raise ValueError(why)


def _not_arithmetic(chat: Chat) -> str | None:
    from nabla_fast.evaluation.arithmetic import read_problem

    text = chat[-1]["content"]
    if len(chat) == 1 and chat[0]["role"] == "user" and read_problem(text) is not None:
        return None
    return (
        f"--pair arithmetic was not trained for {text[:80]!r}; ask it for two products and one or two more numbers, "
        f"with every value between 0 and 999, as in {arithmetic.QUESTION!r}, or use --pair smollm2"
    )


def _both(load_policy: Callable[..., tuple[Any, Any]], load_reward: Callable[..., tuple[Any, Any]]) -> Load:
    def load(*, reward_device: str | None = None, **where: Any) -> tuple[Any, Any, Any, Any]:
        reward = where if reward_device is None else {**where, "device": reward_device}
        return *load_policy(**where), *load_reward(**reward)

    return load


_ARITHMETIC = DemoPair(
    _both(arithmetic.load_policy, arithmetic.load_reward),
    arithmetic.CONFIG,
    arithmetic.QUESTION,
    task="arithmetic",
    refusal=_not_arithmetic,
)
PAIRS = {
    "smollm2": DemoPair(
        _both(load_smollm2, load_smollm2_reward),
        example.CONFIG,
        example.QUESTION,
        task_options=example.TASKS,
    ),
    "arithmetic": _ARITHMETIC,
    "arithmetic-steps": replace(
        _ARITHMETIC,
        load=_both(arithmetic.load_policy, arithmetic.load_process_reward),
        config=arithmetic.PROCESS_CONFIG,
    ),
}
