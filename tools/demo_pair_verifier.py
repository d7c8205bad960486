"""The bundled reward model in training."""

from __future__ import annotations

import copy
from typing import Any

import torch
from demo_pair_data import Conversations
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForSequenceClassification

# Two layers more than the policy; narrower, so that both models together stay under 16 MB.
SIZES = {"num_hidden_layers": 6, "intermediate_size": 576}
SMOOTHING = 0.02
# One token in sixty is the first wrong one.
WRONG_WEIGHT = 20.0
OWN_WEIGHT = 0.3
COMPASS_WEIGHT = 0.5


class Verifier(nn.Module):
    """A classifier whose first layers are the policy's, with the heads and losses that teach it.

    The policy's layers go on learning to predict the solution, and to keep in mind the token they stand on. The next
    layer compares what was expected with what came: its first head looks at the token before, which attention with
    biases can be made to do from the start, and its first neurons multiply the two. The last layer gathers what was
    found. Each of the three is taught by a loss of its own; from the score alone, the comparison was not found in 800
    steps.

    A score that judges well need not have a gradient that points anywhere: without a loss of its own, it put the right
    token above the wrong one at 68 % of the first mistakes, where a coin gives 50 %. So the gradient of the reward with
    respect to the embeddings is taught too, by a second backward pass.

    Args:
        compass: weight of that loss; 0 teaches the judgement alone.
    """

    def __init__(self, policy: Any, compass: float = COMPASS_WEIGHT) -> None:
        super().__init__()
        self.compass = compass
        # Scores over the vocabulary are as sharp as the gradient is large, which the loss shall not decide.
        self.sharpness = nn.Parameter(torch.tensor(2.3))
        own = policy.config
        taken = ("vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "rms_norm_eps")
        taken += ("max_position_embeddings", "rope_parameters", "pad_token_id", "eos_token_id", "bos_token_id")
        kept = {name: getattr(own, name) for name in taken}
        # Not Qwen2, whose attention has these biases, too: AutoTokenizer would put Qwen2's own pre-tokenizer into ours.
        config = LlamaConfig(**kept, **SIZES, attention_bias=True, tie_word_embeddings=False, id2label={0: "reward"})
        self.depth = own.num_hidden_layers
        self.classifier = LlamaForSequenceClassification(config)
        self.prediction = nn.Sequential(copy.deepcopy(policy.model.norm), copy.deepcopy(policy.lm_head))
        self.own = nn.Sequential(nn.RMSNorm(own.hidden_size), nn.Linear(own.hidden_size, own.vocab_size))
        self.local = nn.Sequential(nn.RMSNorm(own.hidden_size), nn.Linear(own.hidden_size, 1))
        body = self.classifier.model
        body.embed_tokens.load_state_dict(policy.model.embed_tokens.state_dict())
        for layer, source in zip(body.layers, policy.model.layers, strict=False):
            layer.load_state_dict(_narrowed(source, SIZES["intermediate_size"]), strict=False)
        for layer in body.layers:
            # Only keys, queries and values have a use for a bias.
            layer.self_attn.o_proj.bias.requires_grad_(False)
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                nn.init.zeros_(getattr(layer.self_attn, name).bias)
        _look_back(body.layers[self.depth].self_attn, body.rotary_emb.inv_freq)
        _multiply(body.layers[self.depth], policy)
        # The kernels of the fused attention have no second derivative.
        self.classifier.set_attn_implementation("eager")

    def forward(self, batch: Conversations) -> Tensor:
        """The loss of a batch."""
        assert batch.labels is not None
        embeds = self.classifier.model.embed_tokens(batch.ids)
        out = self.classifier.model(inputs_embeds=embeds, attention_mask=batch.mask, output_hidden_states=True)
        expected, compared = out.hidden_states[self.depth], out.hidden_states[self.depth + 1]
        labels = batch.labels
        inside = labels >= 0
        last = batch.mask.sum(1) - 1
        rows = torch.arange(len(last), device=last.device)
        end = torch.zeros_like(inside)
        end[rows, last] = True
        score = self.classifier.score(out.last_hidden_state)[..., 0].float()
        each = F.binary_cross_entropy_with_logits(score, labels.clamp(SMOOTHING, 1 - SMOOTHING), reduction="none")
        # What came before the first mistake, and the mistake; behind it nobody can say what was to be expected.
        wrong = (labels == 0) & ~end
        known = inside & ~end & (wrong.cumsum(1) - wrong.long() == 0)
        local = self.local(compared)[..., 0].float()
        found = F.binary_cross_entropy_with_logits(local, labels.clamp(0, 1), reduction="none")
        found = found * torch.where(wrong, WRONG_WEIGHT, 1.0)
        predicted = F.cross_entropy(self.prediction(expected).float().flatten(0, 1), batch.following.flatten())
        own = F.cross_entropy(self.own(expected).float()[inside], batch.ids[inside])
        loss = (each[end].mean() + each[inside].mean()) / 2 + found[known].mean() + predicted + OWN_WEIGHT * own
        return loss + self.compass * self._compass(score[end].sum(), embeds, batch) if self.compass else loss

    def _compass(self, rewards: Tensor, embeds: Tensor, batch: Conversations) -> Tensor:
        """How badly the reward's gradient points at the solution's token, up to the first mistake and there.

        Cross-entropy of the first-order change of the reward for every token in its place; what is right and what is
        to be mended count the same.
        """
        (gradient,) = torch.autograd.grad(rewards, embeds, create_graph=True)
        solution = batch.following[:, :-1]
        with torch.autocast(embeds.device.type, enabled=False):
            table = self.classifier.model.embed_tokens.weight.float()
            scores = gradient[:, 1:].float() @ table.T * self.sharpness.exp()
            each = F.cross_entropy(scores.transpose(1, 2), solution, reduction="none")
        known, came = solution != -100, batch.ids[:, 1:] == solution
        return each[known & came].mean() + each[known & ~came].sum() / (known & ~came).sum().clamp(min=1)


def _narrowed(layer: Any, width: int) -> dict[str, Tensor]:
    """The weights of a policy's layer with its ``width`` strongest neurons."""
    state = dict(layer.state_dict())
    strength = state["mlp.down_proj.weight"].norm(dim=0) * state["mlp.up_proj.weight"].norm(dim=1)
    kept = strength.topk(min(width, len(strength))).indices.sort().values
    for name in ("mlp.gate_proj.weight", "mlp.up_proj.weight"):
        state[name] = state[name][kept]
    state["mlp.down_proj.weight"] = state["mlp.down_proj.weight"][:, kept]
    return state


@torch.no_grad()
def _multiply(layer: Any, policy: Any) -> None:
    """Makes the first head fetch what the policy expected, and the first neurons multiply it with what came.

    One neuron a token: its gate reads how likely the token was, its other input whether it is the one that came. The
    sum of these products is linear in the token that came, with a gradient that points at the one that was expected.
    """
    attention, mlp = layer.self_attn, layer.mlp
    expected = policy.lm_head.weight * policy.model.norm.weight
    # As many tokens as there is room for, which is all of them at the sizes above.
    size = min(len(expected), attention.head_dim, len(mlp.gate_proj.weight))
    expected = (expected - expected.mean(0))[:size]
    came = (policy.model.embed_tokens.weight - policy.model.embed_tokens.weight.mean(0))[:size]
    directions, _ = torch.linalg.qr(torch.randn(expected.shape[1], size))
    attention.v_proj.weight[:size] = expected / expected.norm(dim=1).mean()
    attention.o_proj.weight[:, : attention.head_dim] = 0
    attention.o_proj.weight[:, :size] = directions
    mlp.gate_proj.weight[:size] = 2 * directions.T
    mlp.up_proj.weight[:size] = F.normalize(came)
    mlp.down_proj.weight[:, :size] = 0.05 * torch.randn(expected.shape[1], 1)


@torch.no_grad()
def _look_back(attention: Any, frequencies: Tensor, *, strength: float = 7.0, pairs: int = 9) -> None:
    """Makes the first head attend to the token before, whatever the tokens are.

    Key and query are constants in the rotary pairs that turn fastest; the query is turned back by one position, so that
    their product is largest where the key stands one position earlier.
    """
    size = attention.head_dim
    pairs = min(pairs, size // 2)
    turned = frequencies[:pairs]
    for projection in (attention.q_proj, attention.k_proj):
        projection.weight[:size] = 0
        projection.bias[:size] = 0
    attention.k_proj.bias[:pairs] = strength
    attention.q_proj.bias[:pairs] = strength * torch.cos(turned)
    attention.q_proj.bias[size // 2 : size // 2 + pairs] = -strength * torch.sin(turned)
