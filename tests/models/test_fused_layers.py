"""Norms and rotary embeddings as one kernel each: what they compute, when they are exchanged, what is launched."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForSequenceClassification

import nabla_fast as nf
from nabla_fast.generate import make_pair
from nabla_fast.models import fused_layers, torch_kernels
from nabla_fast.models.fused_layers import FusedLayers, find
from nabla_fast.objective import Objective, Request
from nabla_fast.ops.rotary import reference
from nabla_fast.rollout import HFRollout, StopRule
from nabla_fast.sequence import Sequence
from nabla_fast.testing.models import FAMILIES, prompt_ids, tiny_language_model, tiny_tokenizer

# By family: how many norms, and whether its rotary embedding is known.
_FOUND = {
    "llama": (5, True),
    "qwen2": (5, True),
    "qwen3": (9, True),
    "gemma2": (9, True),
    "gemma3": (13, True),
    "phi3": (5, True),
    "gpt_neox": (0, True),
    "gpt2": (0, False),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_computes_the_same(family: str) -> None:
    model = tiny_language_model(family, dtype=torch.float32).requires_grad_(False)
    fused = find(model)
    assert (len(fused.norms), len(fused.rotary) == 1) == _FOUND[family]
    ids = torch.arange(4, 12).unsqueeze(0)

    def run() -> tuple[Tensor, Tensor]:
        embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
        logits = model(inputs_embeds=embeds).logits
        (gradient,) = torch.autograd.grad(logits.log_softmax(-1)[..., 3].sum(), embeds)
        return logits.detach(), gradient

    plain = run()
    with fused.active():
        assert any("forward" in vars(module) for module in model.modules()) == bool(fused.norms)
        ours = run()
    assert not any("forward" in vars(module) for module in model.modules())
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for a, b in zip(run(), plain, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_in_bfloat16_a_model_is_as_exact(family: str) -> None:
    wide = tiny_language_model(family, dtype=torch.float32)
    model = tiny_language_model(family, dtype=torch.float32).to(torch.bfloat16).requires_grad_(False)
    wide.load_state_dict({name: x.float() for name, x in model.state_dict().items()})
    ids = torch.arange(4, 40).unsqueeze(0)
    with torch.no_grad():
        exact = wide(ids).logits
        plain = model(ids).logits.float()
        with find(model).active():
            ours = model(ids).logits.float()
    assert (ours - exact).norm() < 1.3 * (plain - exact).norm()


class _Norm(torch.nn.Module):
    """An RMS norm that a test may spoil."""

    def __init__(self, scale: Callable[[Tensor], Tensor] = lambda weight: weight, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.rand(8) + 0.5)
        self.eps, self.scale = eps, scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale(self.weight) * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


class _Model(torch.nn.Module):
    def __init__(self, *norms: torch.nn.Module) -> None:
        super().__init__()
        self.norms = torch.nn.ModuleList(norms)


class _WrongEpsilon(_Norm):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 10 * self.eps)


class _DetachedNorm(_Norm):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps).detach()


class _MeanFreeNorm(_Norm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(-1, keepdim=True))


def test_other_layers_stay() -> None:
    usual, offset = _Norm(), _Norm(lambda weight: 1 + weight)
    doubled = _Norm(lambda weight: 2 * weight)
    hooked = _Norm()
    hooked.forward = hooked.forward  # as accelerate does
    others = [doubled, hooked, _WrongEpsilon(), _DetachedNorm(), _MeanFreeNorm(), torch.nn.LayerNorm(8, bias=False)]
    found = find(_Model(usual, *others, offset))
    assert [module for module, _ in found.norms] == [usual, offset]


def test_a_norm_follows_its_weight() -> None:
    norm = _Norm(lambda weight: 1 + weight).requires_grad_(False)
    fused = find(_Model(norm))
    x = torch.randn(3, 8)
    for _ in range(2):
        with fused.active():
            ours = norm(x)
        torch.testing.assert_close(ours, norm(x))
        norm.weight.mul_(3)


def test_a_weight_that_asks_for_a_gradient_gets_it() -> None:
    norm = _Norm()
    with find(_Model(norm)).active():
        norm(torch.randn(3, 8)).sum().backward()
    assert norm.weight.grad is not None
    assert norm.weight.requires_grad


def test_a_rotary_embedding_of_another_kind_stays() -> None:
    def interleaved(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        return tuple(x.flip(-1) for x in reference(q, k, cos, sin))  # type: ignore[return-value]

    like = torch.randn(1)
    assert not fused_layers._is_rotary(interleaved, like)
    assert fused_layers._is_rotary(lambda q, k, cos, sin: reference(q, k, cos, sin), like)
    assert not fused_layers._is_rotary(lambda q, k, sin, cos: reference(q, k, cos, sin), like)


@pytest.mark.parametrize("case", ["float64", "cos needs a gradient", "position argument", "partial", "unsqueeze_dim"])
def test_a_rotary_call_that_was_not_tried_is_the_models_own(case: str) -> None:
    called = []

    def own(*args: Any, **kwargs: Any) -> str:
        called.append(case)
        return "own"

    dtype = torch.float64 if case == "float64" else torch.float32
    q, k = torch.randn(2, 4, 3, 8, dtype=dtype), torch.randn(2, 2, 3, 8, dtype=dtype)
    cos = torch.randn(2, 3, 4 if case == "partial" else 8, dtype=dtype, requires_grad=case == "cos needs a gradient")
    more = ("x",) if case == "position argument" else ()
    options = {"unsqueeze_dim": 2} if case == "unsqueeze_dim" else {}
    assert fused_layers._rotated(own, q, k, cos, cos.detach(), *more, **options) == "own"
    assert called == [case]


def test_threads_share_the_exchange() -> None:
    model = tiny_language_model("qwen2", dtype=torch.float32)
    fused, page = find(model), __import__("sys").modules[type(model).__module__]
    own = page.apply_rotary_pos_emb
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with fused.active():
            inside.set()
            leave.wait(10)

    def fail() -> None:
        with fused.active():
            thread.start()
            assert inside.wait(10)
            raise KeyError

    thread = threading.Thread(target=other)
    with pytest.raises(KeyError):
        fail()
    assert page.apply_rotary_pos_emb is not own
    leave.set()
    thread.join()
    assert page.apply_rotary_pos_emb is own


# --- what a gradient and a step of a rollout launch -------------------------------------------------------------------

# They launch nothing.
_FREE = {
    *("aten.empty", "aten.new_empty", "aten.empty_like", "aten._unsafe_view", "aten.lift_fresh", "aten.detach_"),
    *("aten.empty_strided", "aten.new_empty_strided", "aten.is_same_size", "aten._local_scalar_dense", "aten.set_"),
    *("aten.alias", "aten._reshape_alias", "prim.device", "aten.sym_size"),
}


class _Counts(TorchDispatchMode):
    """Counts operators that are no views."""

    def __init__(self) -> None:
        super().__init__()
        self.by_name: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).rsplit(".", 1)[0]
        if not func.is_view and name not in _FREE:
            self.by_name[name] += 1
        return func(*args, **(kwargs or {}))


@torch.library.custom_op("nabla_fast_tests::rms_norm", mutates_args=())
def _one_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """An RMS norm as it is on a GPU: one operator forward, and one backward."""
    return functional.rms_norm(x, x.shape[-1:], weight, eps)


@torch.library.custom_op("nabla_fast_tests::rms_norm_backward", mutates_args=())
def _one_rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x32, scaled = x.float(), grad.float() * weight.float()
    r = torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    return (r * scaled - x32 * r.pow(3) * (scaled * x32).mean(-1, keepdim=True)).to(x.dtype)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.eps = inputs[2]


_one_rms_norm.register_autograd(
    lambda ctx, grad: (_one_rms_norm_backward(grad, *ctx.saved_tensors, ctx.eps), None, None), setup_context=_save
)


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU takes the ways that a GPU takes, as far as they are a matter of which operators are called."""
    monkeypatch.setattr(torch_kernels, "_mkl_is_slow", lambda: False)
    monkeypatch.setattr("nabla_fast.models.sequence_cache.TOKENS_PER_PASS", {"cpu": 256})
    monkeypatch.setattr("nabla_fast.models.backbone.fused_layers", lambda model, name: find(model))

    @contextmanager
    def fast(device: torch.device, *fused: FusedLayers) -> Iterator[None]:
        with torch_kernels._on_gpu(fused):
            yield

    for page in ("nabla_fast.objective", "nabla_fast.rollout.hf"):
        monkeypatch.setattr(f"{page}.fast_kernels", fast)
    own = functional.rms_norm

    def one(x: Tensor, shape: Any, weight: Any = None, eps: Any = None) -> Tensor:
        return _one_rms_norm(x, weight, eps) if weight is not None else own(x, shape, weight, eps)

    monkeypatch.setattr(fused_layers, "functional", type("functional", (), {"rms_norm": staticmethod(one)}))


def _deep_pair() -> Any:
    """A pair as deep as Qwen2.5-7B and Qwen3-4B, and narrow."""
    tokenizer = tiny_tokenizer()
    size = len(tokenizer)
    common = {
        "vocab_size": size, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
        "num_key_value_heads": 2, "pad_token_id": 0, "max_position_embeddings": 1024,
    }  # fmt: skip
    torch.manual_seed(0)
    language = Qwen2ForCausalLM(Qwen2Config(num_hidden_layers=28, **common)).to(torch.bfloat16).eval()
    reward_config = Qwen3Config(num_hidden_layers=36, head_dim=8, num_labels=1, **common)
    reward = Qwen3ForSequenceClassification(reward_config).to(torch.bfloat16).eval()
    return make_pair(language, tokenizer, reward, tokenizer, nf.NablaConfig())


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_gradient_at_real_depth_launches_few_operators() -> None:
    pair = _deep_pair()
    config = nf.NablaConfig(max_new_tokens=256, eos_token_ids=(), backend="reference")
    chat = ({"role": "user", "content": "hello"},)
    ids, frames = pair.prompts([chat], config)
    (sequence,) = pair.sequences(ids, frames, config)
    response = torch.randint(4, 40, (200,), generator=torch.Generator().manual_seed(0))
    objective = Objective(pair.language_model, pair.reward_model, config)
    with torch.no_grad():
        objective.evaluate([Request(sequence, response, 0)])  # the prompts
        response[20] = 5
        response[30] = 7
        with _Counts() as counts:
            objective.evaluate([Request(sequence, response, 10)])
    print(sum(counts.by_name.values()), counts.by_name.most_common(20))
    # 8,682 with the layers as transformers has them.
    assert counts.by_name["nabla_fast_tests.rms_norm"] == 57 + 36 * 4 + 1
    assert sum(counts.by_name.values()) <= 4700


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_step_of_a_rollout_at_real_depth_launches_few_operators() -> None:
    pair = _deep_pair()
    model = pair.language_model
    sampling = nf.Sampling(temperature=0.6, top_p=0.95)
    prompt = tuple(prompt_ids(pair.tokenizer))

    def rollout(limit: int) -> int:
        stream = HFRollout(model).open(sampling, StopRule(frozenset(), (), pair.tokenizer))
        stream.submit(Sequence(prompt, (), 17, limit, None))
        with torch.no_grad(), _Counts() as counts:
            stream.collect()
        return sum(counts.by_name.values())

    rollout(4)
    # The first steps and the last hand over caches.
    a_step = (rollout(24) - rollout(4)) / 20
    print(a_step)
    assert a_step <= 820  # 1,220 with the layers as transformers has them
