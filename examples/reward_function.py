"""Any differentiable function of embeddings can be the reward: here, closeness of the answer to one word."""

import torch

import nabla_fast as nf
from nabla_fast.demo import load_smollm2

model, tokenizer = load_smollm2()
word = tokenizer(" ocean", add_special_tokens=False)["input_ids"]
target = model.get_input_embeddings().weight[word].mean(0)


def mentions_the_ocean(inputs_embeds: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """(B, T, d) embeddings and their (B, T) mask to rewards (B,): the best match of any token with the word."""
    similarity = torch.cosine_similarity(inputs_embeds, target, dim=-1)
    return similarity.masked_fill(attention_mask == 0, -1).logsumexp(-1)


config = nf.NablaConfig(max_new_tokens=32, max_rollouts=6, reward_coeff=10.0, gradient_threshold=None)
out = nf.generate(model, tokenizer, mentions_the_ocean, None, "Name one thing that is blue.", config)
print(out.texts[0])
print(out.rewards[0], out.stats.totals.revisions)
