"""A transformers causal language model: its backbone, output head and input embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nabla_fast.models import checks
from nabla_fast.models.backbone import Backbone, Inputs
from nabla_fast.models.linear_layers import linear
from nabla_fast.models.numerics import is_close, relative_error
from nabla_fast.models.sequence_cache import SequenceCache
from nabla_fast.models.tokenizer_facts import vocabulary_size
from nabla_fast.ops import Head, linear_logits, scaled_and_capped
from nabla_fast.ops import linear as native_linear

# Names under which families keep a cap or a constant factor on the logits; the first one found is used.
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap")
_LOGIT_FACTORS = (("logits_scaling", True), ("logit_scale", False), ("lm_head_multiplier", False))


# What stands behind the hidden states for a bias to be a factor of. So large that steps of an optimizer, which are
# absolute, are lost in the rounding of float32; a power of two, so that nothing else is.
_BIAS_UNIT = 2.0**20


@dataclass(frozen=True)
class EmbeddingTable:
    """Input embeddings: the module returns ``scale * weight[ids]``.

    Attributes:
        weight: (V, d).
        scale: 1 for most models, sqrt(d) for Gemma.
        own_ids: (V,) int64, the ids that the model itself has for the rows, -1 for none; None if they are the same.
    """

    weight: Tensor
    scale: float
    own_ids: Tensor | None = None

    def __call__(self, ids: Tensor) -> Tensor:
        return torch.nn.functional.embedding(ids, self.weight) * self.scale

    @property
    def device(self) -> torch.device:
        """Where the model takes its inputs."""
        return self.weight.device

    def own_id(self, row: int | Tensor) -> int:
        """The id that the model itself has for a row."""
        return int(row if self.own_ids is None else self.own_ids[row])

    def inputs(self, ids: Tensor | Sequence[int]) -> Inputs:
        """The model's inputs for tokens (n,) int64 on any device; they are on `device`."""
        ids = torch.as_tensor(ids, dtype=torch.long, device=self.device)
        return Inputs(ids if self.own_ids is None else self.own_ids[ids], self(ids))


class LanguageModel:
    """Wraps a causal language model in ``eval()``.

    Args:
        model: a transformers causal language model.
        tokenizer: its tokenizer; ids past its vocabulary (padded head rows) can never be produced.

    Attributes:
        vocab_size: V, the ids that both the tokenizer and the model know.
        head: output head over V tokens. The bias of a head that has one is a column of its weight, which then has eight
            columns more than the model's.
        width: d, the size of the model's hidden states.
        embedding: input embedding table over V tokens.
        name: what errors call the model.
        eos_token_ids: the end tokens of the model's generation config, else the tokenizer's.
        context_length: most positions the model takes, None if it does not say.
        backbone: the model without its head, for gradients.

    Raises:
        TypeError: if ``model`` has no output head.
        ValueError: if its head is of a kind the operators do not compute.
    """

    def __init__(self, model: Any, tokenizer: Any, argument: str = "model") -> None:
        own, model = checks.unwrapped(model)
        path = getattr(getattr(model, "config", None), "name_or_path", "")
        self.name = f"{argument} ({path or type(model).__name__})"
        get_head = getattr(model, "get_output_embeddings", None)
        lm_head = get_head() if get_head is not None else None
        if lm_head is None:
            raise TypeError(f"{self.name} has no output head; {argument} must be a causal language model")
        checks.require_eval(model, self.name)
        checks.leave_inference_mode(model)
        weight = checks.dense_weight(model, lm_head, self.name, "output head")
        self.model = model
        self.vocab_size = min(vocabulary_size(tokenizer), weight.shape[0])
        self.width: int = weight.shape[1]
        weight = _head_weight(weight, getattr(lm_head, "bias", None), self.vocab_size, self.name)
        self.head = Head(weight, _logit_factor(model), _softcap(model))
        self._rough_head: tuple[Any, tuple[Tensor, Tensor]] | None = None
        self.embedding = embedding_table(model, self.name, self.vocab_size)
        self.context_length: int | None = context_length(model)
        self.eos_token_ids = _eos_token_ids(model, tokenizer, self.vocab_size)
        checks.require_sound_layers(model, self.name)
        ids = checks.probe_ids(model, tokenizer)
        self.backbone = Backbone(model, self.name, ids)
        self.backbone.output = self.widened
        checks.remembered(own, self.name, "head", lambda: self._check_head(own, ids))

    @property
    def device(self) -> torch.device:
        """Where the output head is, and DTO computes. A model on several devices takes its inputs at
        ``embedding.device``; the hidden states that its backbone gives are here."""
        return self.head.weight.device

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (N, V), float32 or float64, of hidden states (N, d)."""
        weight = self.head.weight
        if native_linear.fits(hidden, weight) and not (torch.is_grad_enabled() and hidden.requires_grad):
            return scaled_and_capped(native_linear.linear(hidden, weight, dtype=torch.float32), self.head)
        if not hidden.is_cuda and hidden.dtype == weight.dtype == torch.float32:
            return scaled_and_capped(linear(hidden, weight), self.head)
        return linear_logits(hidden, self.head)

    def rough_logits(self, hidden: Tensor) -> Tensor:
        """About what `logits` gives, by a copy of the head in 8 bits, made by the first call."""
        weight = self.head.weight
        if not native_linear.fits(hidden, weight):
            return self.logits(hidden)
        state = native_linear.state(weight)
        if self._rough_head is None or self._rough_head[0] != state:
            self._rough_head = state, native_linear.rounded(weight)
        values, scale = self._rough_head[1]
        return scaled_and_capped(native_linear.linear(hidden, values, dtype=torch.float32, scale=scale), self.head)

    def widened(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., width) on the head's device, padded to the width of `head`, whose bias is a column of
        its weight."""
        hidden = hidden.to(self.device)
        more = self.head.weight.shape[1] - self.width
        if not more:
            return hidden
        bias = hidden.new_zeros(*hidden.shape[:-1], more)
        bias[..., 0] = _BIAS_UNIT
        return torch.cat([hidden, bias], dim=-1)

    def new_cache(self, prompt_ids: Sequence[int]) -> SequenceCache:
        """An empty cache for a response to a prompt."""
        return SequenceCache(self.embedding.inputs(prompt_ids))

    @torch.no_grad()
    def _check_head(self, own: Any, ids: Tensor) -> None:
        """Raises ValueError if the logits of ``own``, the model or a wrapper of it, are not ours, or not causal."""
        theirs = own(input_ids=ids.unsqueeze(0), use_cache=False).logits[0, :, : self.vocab_size]
        ours = self.logits(self.widened(self.backbone.tried)).to(theirs.dtype)
        # Where sequences run behind prefixes, that is known.
        if self.backbone.cache_kind != "prefix":
            half = len(ids) // 2
            alone = self.backbone.whole(self.embedding.inputs(ids[:half]))[:, : self.width]
            among = self.backbone.tried[:half]
            if not is_close(alone, among):
                raise ValueError(
                    f"{self.name} is no causal language model: hidden states of {half} tokens are "
                    f"{relative_error(alone, among):.2g} apart, relatively, from those with others behind them"
                )
        if theirs.shape == ours.shape and is_close(ours, theirs):
            return
        if theirs.shape != ours.shape:
            differs = f"for {len(ids)} tokens they have shape {tuple(theirs.shape)}, expected {tuple(ours.shape)}"
        else:
            differs = f"they are {relative_error(ours, theirs):.2g} apart, relatively, from what its head gives"
        adapter = "" if own is self.model else f", and {type(own).__name__} around it changes its input"
        raise ValueError(
            f"{self.name} computes its logits in a way that nabla_fast does not know{adapter}: {differs}; gradients "
            "would be wrong, so it cannot be used"
        )


def embedding_table(model: Any, name: str, vocab_size: int | None = None) -> EmbeddingTable:
    """The input embeddings of a model, their scale measured, as it lives in different places in different families.

    Raises:
        ValueError: if the embedding module is not a scaled table look-up.
    """
    module = model.get_input_embeddings()
    weight = checks.dense_weight(model, module, name, "input embedding")
    measure = partial(_embedding_scale, module, weight, name)
    known = isinstance(model, torch.nn.Module) and hasattr(model, "config")
    return EmbeddingTable(weight[:vocab_size], checks.remembered(model, name, "scale", measure) if known else measure())


@torch.no_grad()
def _embedding_scale(module: Any, weight: Tensor, name: str) -> float:
    # The longest rows, because some (a padding token's) are zero and tell nothing.
    lengths = torch.linalg.vector_norm(weight, dim=1, dtype=torch.promote_types(weight.dtype, torch.float32))
    ids = lengths.topk(min(8, weight.shape[0])).indices
    rows, embedded = weight[ids].double(), module(ids).detach().double()
    scale = float((rows * embedded).sum() / (rows * rows).sum().clamp(min=1e-300))
    scale = 1.0 if abs(scale - 1.0) < 1e-6 else scale
    if not torch.allclose(embedded, rows * scale, rtol=1e-2, atol=1e-6):
        raise ValueError(f"{name} has input embeddings that are not a scaled table, which is not supported")
    return scale


def _head_weight(weight: Tensor, bias: Tensor | None, vocab_size: int, name: str) -> Tensor:
    """The weight of an output head, with its bias, where it has one, as a column of it."""
    weight = weight[:vocab_size]
    if bias is None:
        return weight
    if weight.dtype == torch.float16:
        raise ValueError(
            f"{name} has a bias in its output head, which float16 has no room for; use bfloat16 or float32"
        )
    # Eight columns, so that rows stay aligned.
    columns = weight.new_zeros(vocab_size, 8)
    columns[:, 0] = bias.detach()[:vocab_size] / _BIAS_UNIT
    return torch.cat([weight, columns], dim=1)


def context_length(model: Any) -> int | None:
    """Most positions a model takes, None if its configuration does not say."""
    config = model.config.get_text_config()
    # Beyond the second, Doge's choice of keys is one among later tokens, too.
    limits = (getattr(config, name, None) for name in ("max_position_embeddings", "keep_window_size"))
    return min((limit for limit in limits if limit), default=None)


def _eos_token_ids(model: Any, tokenizer: Any, vocab_size: int) -> frozenset[int]:
    ids = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if ids is None:
        ids = tokenizer.eos_token_id
    ids = [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
    return frozenset(token for token in ids if token < vocab_size)


def _logit_factor(model: Any) -> float:
    config = model.config.get_text_config()
    for name, divides in _LOGIT_FACTORS:
        value = getattr(config, name, None)
        if value is not None:
            return 1.0 / float(value) if divides else float(value)
    return 1.0


def _softcap(model: Any) -> float:
    config = model.config.get_text_config()
    return float(next((value for name in _SOFTCAPS if (value := getattr(config, name, None))), 0.0))
