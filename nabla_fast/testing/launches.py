"""What a gradient and a token of a rollout launch on a GPU, counted on a CPU.

Operators that are no views, of a pair as deep as Qwen2.5-7B (28 layers) and Qwen3-4B (36), in bfloat16 and narrow:
widths do not change the number. The CPU takes the ways of a GPU as far as they are a matter of which operators are
called; an RMS norm counts as one operator, as it is there.
"""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import nabla_fast as nf
from nabla_fast.generate import make_pair
from nabla_fast.models import fused_layers, linear_layers, sequence_cache
from nabla_fast.models.fused_layers import FusedLayers
from nabla_fast.objective import Objective, Request
from nabla_fast.rollout import HFRollout, StopRule
from nabla_fast.sequence import Sequence
from nabla_fast.testing.models import prompt_ids, tiny_tokenizer

LAYERS = (28, 36)
# They launch nothing.
_FREE = {
    *("aten.empty", "aten.new_empty", "aten.empty_like", "aten._unsafe_view", "aten.lift_fresh", "aten.detach_"),
    *("aten.empty_strided", "aten.new_empty_strided", "aten.is_same_size", "aten._local_scalar_dense", "aten.set_"),
    *("aten.alias", "aten._reshape_alias", "prim.device", "aten.sym_size"),
}


class Counts(TorchDispatchMode):
    """Counts operators by name in its block."""

    def __init__(self) -> None:
        super().__init__()
        self.by_name: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).rsplit(".", 1)[0]
        if not func.is_view and name not in _FREE:
            self.by_name[name] += 1
        return func(*args, **(kwargs or {}))


@torch.library.custom_op("nabla_fast::rms_norm_of_a_gpu", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return functional.rms_norm(x, x.shape[-1:], weight, eps)


@torch.library.custom_op("nabla_fast::rms_norm_backward_of_a_gpu", mutates_args=())
def _rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide, scaled = x.float(), grad.float() * weight.float()
    r = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (r * scaled - wide * r.pow(3) * (scaled * wide).mean(-1, keepdim=True)).to(x.dtype)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.eps = inputs[2]


_rms_norm.register_autograd(
    lambda ctx, grad: (_rms_norm_backward(grad, *ctx.saved_tensors, ctx.eps), None, None), setup_context=_setup
)


class _Functional:
    """In place of ``torch.nn.functional``."""

    @staticmethod
    def rms_norm(x: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
        if weight is None or eps is None:
            return functional.rms_norm(x, shape, weight, eps)
        return _rms_norm(x, weight, eps)


@contextmanager
def as_on_a_gpu(*, fused: bool) -> Iterator[None]:
    """In this block, operators are those of a GPU without graphs; ``fused`` exchanges norms and rotary embeddings."""

    def fast(device: torch.device, *layers: FusedLayers) -> Any:
        return fused_layers.fast_kernels(torch.device("cuda"), *layers)

    def found(model: Any, name: str) -> FusedLayers:
        return fused_layers.find(model) if fused else FusedLayers()

    def at(page: str, name: str, value: Any) -> Any:
        return patch.object(sys.modules[f"nabla_fast.{page}"], name, value)

    with (
        patch.object(linear_layers, "_mkl_is_slow", lambda: False),
        patch.dict(sequence_cache.TOKENS_PER_PASS, {"cpu": sequence_cache.TOKENS_PER_PASS["cuda"]}),
        at("models.backbone", "fused_layers", found),
        at("models.gpu_layers", "functional", _Functional),
        at("objective", "fast_kernels", fast),
        at("rollout.hf", "fast_kernels", fast),
    ):
        deep_pair.cache_clear()
        try:
            yield
        finally:
            deep_pair.cache_clear()


@functools.cache
def deep_pair() -> Any:
    """Both models, with random weights."""
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForSequenceClassification

    tokenizer = tiny_tokenizer()
    common: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "max_position_embeddings": 1024,
    }
    torch.manual_seed(0)
    language: Any = Qwen2ForCausalLM(Qwen2Config(num_hidden_layers=LAYERS[0], **common))
    config: Any = Qwen3Config(num_hidden_layers=LAYERS[1], head_dim=8, **common)
    config.num_labels = 1
    reward: Any = Qwen3ForSequenceClassification(config)
    models = [model.to(torch.bfloat16).eval() for model in (language, reward)]
    return make_pair(models[0], tokenizer, models[1], tokenizer, nf.NablaConfig())


@torch.no_grad()
def of_a_gradient() -> Counter[str]:
    """Operators of one gradient of both models behind a cached prompt, by name."""
    pair = deep_pair()
    config = nf.NablaConfig(max_new_tokens=256, eos_token_ids=(), backend="reference", graphs=False)
    ids, frames = pair.prompts([({"role": "user", "content": "hello"},)], config)
    (sequence,) = pair.sequences(ids, frames, config)
    response = torch.randint(4, 40, (200,), generator=torch.Generator().manual_seed(0))
    objective = Objective(pair.language_model, pair.reward_model, config)
    objective.evaluate([Request(sequence, response, 0)])  # the prompts
    response[20], response[30] = 5, 7
    with Counts() as counts:
        objective.evaluate([Request(sequence, response, 10)])
    return counts.by_name


@torch.no_grad()
def of_a_rollout_step() -> float:
    """Operators of one token of a rollout."""
    pair = deep_pair()
    sampling = nf.Sampling(temperature=0.6, top_p=0.95)
    prompt = tuple(prompt_ids(pair.tokenizer))

    def rollout(limit: int) -> int:
        stream = HFRollout(pair.language_model).open(sampling, StopRule(frozenset(), (), pair.tokenizer))
        stream.submit(Sequence(prompt, (), 17, limit, None))
        with Counts() as counts:
            stream.collect()
        return counts.by_name.total()

    rollout(4)
    # What begins and ends a rollout is in both.
    return (rollout(24) - rollout(4)) / 20
