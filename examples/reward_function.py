"""Any differentiable function of embeddings can be the reward: here, one that keeps a word out of the answer."""

import torch

import nabla_fast as nf
from nabla_fast import baselines
from nabla_fast.demo import load_smollm2

model, tokenizer = load_smollm2()
(token,) = tokenizer(" sky", add_special_tokens=False)["input_ids"]
word = model.get_input_embeddings().weight[token]


def does_not_say_sky(inputs_embeds: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """(B, T, d) embeddings and their (B, T) mask to rewards (B,): 1, less one for every token that is the word."""
    closeness = inputs_embeds @ word / word.dot(word)
    # 1 for the word, 0 for most others, and linear in between: the gradient at the word points away from it.
    said = torch.relu(closeness - 0.75) / 0.25
    return 1 - (said * attention_mask).sum(-1)


prompt = "Name one thing that is blue."
greedy = nf.Sampling(temperature=0.0)
config = nf.NablaConfig(max_new_tokens=20, max_rollouts=4, rollout=greedy, resample=greedy)

plain = baselines.greedy(model, tokenizer, does_not_say_sky, None, prompt, config)
print(f"greedy       {plain.rewards[0]:.2f}  {plain.texts[0]}")
out = nf.generate(model, tokenizer, does_not_say_sky, None, prompt, config)
print(f"∇-Reasoner   {out.rewards[0]:.2f}  {out.texts[0]}")
for revision in out.stats.totals.revisions:
    print(f"  {tokenizer.decode([revision.old_token])!r} -> {tokenizer.decode([revision.new_token])!r}", end="")
    print(f", reward {revision.old_reward:.2f} -> {revision.new_reward:.2f}, accepted: {revision.accepted}")
