"""Sampling answers from a language model and scoring them with a reward model, in plain batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from nabla_fast.models.chat import Chat, ConversationFrame, conversation_frame, generation_prompt_ids

_MAX_ROWS = 128


@torch.inference_mode()
def sample_answers(
    model: Any,
    tokenizer: Any,
    chats: Sequence[Chat],
    *,
    samples: int = 1,
    temperature: float = 0.6,
    max_new_tokens: int = 48,
    seed: int = 0,
) -> list[list[list[int]]]:
    """Token ids of ``samples`` answers to every chat, a closing EOS included where the model wrote one.

    Args:
        temperature: 0 means greedy decoding (``samples`` must then be 1).
        seed: seeds torch's global generators, so equal arguments give equal answers on one machine.

    Returns:
        One list per chat of ``samples`` lists of token ids.

    Raises:
        ValueError: if several samples are asked for at temperature 0.
    """
    if temperature == 0 and samples != 1:
        raise ValueError(f"samples must be 1 at temperature 0, got {samples}")
    # The model's own generation defaults (top-k, repetition penalty) must not colour the samples.
    drawing: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        drawing = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    drawing |= {"num_return_sequences": samples, "max_new_tokens": max_new_tokens, "repetition_penalty": 1.0}
    torch.manual_seed(seed)
    # The key/value cache grows by reallocation at every token, and with many rows the heap fragments into gigabytes.
    group = max(1, _MAX_ROWS // samples)
    answers: list[list[list[int]]] = []
    for first in range(0, len(chats), group):
        answers += _sample_group(model, tokenizer, chats[first : first + group], samples, drawing)
    return answers


def _sample_group(
    model: Any, tokenizer: Any, chats: Sequence[Chat], samples: int, drawing: dict[str, Any]
) -> list[list[list[int]]]:
    prompts = [generation_prompt_ids(tokenizer, chat) for chat in chats]
    width = max(map(len, prompts))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    tokens = model.generate(input_ids=ids, attention_mask=mask, pad_token_id=pad, **drawing)
    answers = [_until_eos(row, tokenizer.eos_token_id) for row in tokens[:, width:].tolist()]
    return [answers[i : i + samples] for i in range(0, len(answers), samples)]


def answer_text(tokenizer: Any, answer: Sequence[int]) -> str:
    """The text of an answer's token ids, without special tokens."""
    return str(tokenizer.decode(list(answer), skip_special_tokens=True))


def scored_tail(frame: ConversationFrame, answer: Sequence[int]) -> list[int]:
    """``answer`` and what the template writes after it, the end-of-turn token not doubled."""
    closing = list(frame.closing)
    if answer and closing and answer[-1] == closing[0]:
        closing = closing[1:]
    return [*answer, *closing]


@torch.inference_mode()
def score_answers(
    reward_model: Any, reward_tokenizer: Any, chat: Chat, answers: Sequence[Sequence[int]], *, batch_size: int = 32
) -> list[float]:
    """The reward of every answer to ``chat``: the raw score at the conversation's last token.

    Args:
        answers: token ids in the reward model's vocabulary.

    Returns:
        One float per answer, in the order given.
    """
    frame = conversation_frame(reward_tokenizer, chat)
    rows = [[*frame.opening, *scored_tail(frame, answer)] for answer in answers]
    scores: list[float] = []
    for first in range(0, len(rows), batch_size):
        scores += _last_scores(reward_model, rows[first : first + batch_size])
    return scores


def _last_scores(reward_model: Any, rows: list[list[int]]) -> list[float]:
    lengths = torch.tensor([len(row) for row in rows], device=reward_model.device)
    width = int(lengths.max())
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=reward_model.device)
    mask = torch.arange(width, device=ids.device) < lengths[:, None]
    # Not through the classifier's forward: it looks for the last non-padding token, and here EOS may be padding.
    hidden = reward_model.base_model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    last = hidden[torch.arange(len(rows), device=ids.device), lengths - 1]
    return [float(score) for score in reward_model.score(last)[:, 0].float()]


def _until_eos(row: list[int], eos: int) -> list[int]:
    return row[: row.index(eos) + 1] if eos in row else row
