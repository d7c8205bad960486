"""The benchmark of gradients between two tokenizers."""

from __future__ import annotations

import cross_tokenizer
import pytest
import torch

from nabla_fast.demo import arithmetic
from nabla_fast.models.cross_tokenizer import MOST_SLOTS, CrossTokenizer
from nabla_fast.models.language_model import LanguageModel
from nabla_fast.models.reward_model import RewardModel

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def reward() -> RewardModel:
    model, tokenizer = arithmetic.load_policy(device="cpu", dtype="float32")
    judge, _ = arithmetic.load_reward(device="cpu", dtype="float32")
    return RewardModel(judge, None, LanguageModel(model, tokenizer), tokenizer)


def test_rows_have_what_the_table_shows(reward: RewardModel) -> None:
    row = cross_tokenizer.measured(reward, reward.tokenizer, 2, 6)
    assert (row["vocabulary"], row["swaps"], row["candidates"]) == (124, 6, 99)
    assert row["right_first"]["rewards"] >= row["right_first"]["slots"] > 0.5


def test_grouped_digits_have_the_exact_gradient_of_all_digits(reward: RewardModel) -> None:
    """In slots; the right candidate is the first one, and the wrong one is not among them."""
    own = reward.tokenizer
    tokenizer = cross_tokenizer.grouping(own, 2)
    end = [tokenizer.eos_token_id]
    cross = CrossTokenizer(tokenizer, own, len(tokenizer), reward.reading_table, end, own.eos_token_id, MOST_SLOTS)
    for swap in cross_tokenizer.swaps(reward, tokenizer, 2, 3):
        assert swap.candidates[0] == swap.right != int(swap.tokens[swap.position])
        assert int(swap.tokens[swap.position]) not in swap.candidates
        text = tokenizer.decode(swap.tokens[:-1])
        digits = torch.tensor([*own(text, add_special_tokens=False)["input_ids"], own.eos_token_id])
        conversation = reward.conversation(swap.frame, digits).differentiable()
        (gradient,) = torch.autograd.grad(reward.rewards([conversation])[0].sum(), conversation.embeds)
        before = len(own(tokenizer.decode(swap.tokens[: swap.position]), add_special_tokens=False)["input_ids"])
        two = gradient[len(swap.frame.opening) + before :][:2]
        names = [tokenizer.convert_ids_to_tokens(token) for token in swap.candidates]
        ids = torch.tensor([[own.get_vocab()[digit] for digit in name] for name in names])
        exact = (reward.reading_table.weight[ids] * two).sum((1, 2))
        torch.testing.assert_close(cross_tokenizer.gains(reward, cross, swap), exact, rtol=1e-4, atol=1e-5)
