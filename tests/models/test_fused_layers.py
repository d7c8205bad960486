"""Norms and rotary embeddings as one kernel each: what they compute, when they are exchanged, what is launched."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from nabla_fast.models import gpu_layers, layer_trials, token_layers
from nabla_fast.models.fused_layers import find
from nabla_fast.ops.rotary import reference
from nabla_fast.testing import launches
from nabla_fast.testing.models import FAMILIES, tiny_language_model

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


class _NormWithoutWeight(torch.nn.Module):
    eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


@pytest.mark.parametrize(
    "first",
    [torch.ones(4, dtype=torch.int8), torch.ones(4, device="meta"), torch.ones(4).to(torch.float8_e4m3fn)],
    ids=["int8", "off-loaded", "float8"],
)
def test_the_numbers_to_try_with_are_like_a_weight_that_is_there(first: Tensor) -> None:
    norm = _NormWithoutWeight()
    model = _Model(torch.nn.Identity(), norm, torch.nn.Linear(4, 4))
    model.norms[0].weight = torch.nn.Parameter(first, requires_grad=False)
    assert next(model.parameters()) is model.norms[0].weight
    assert [module for module, _ in find(model).norms] == [norm]
    del model.norms[2]
    assert find(model).norms == ()


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
    for kernel, gradient in ((gpu_layers.rotated, True), (token_layers.rotated, False)):
        is_rotary = partial(layer_trials.is_rotary, like=like, kernel=kernel, gradient=gradient)
        assert not is_rotary(interleaved)
        assert is_rotary(lambda q, k, cos, sin: reference(q, k, cos, sin))
        assert not is_rotary(lambda q, k, sin, cos: reference(q, k, cos, sin))


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
    assert gpu_layers.rotated(own, q, k, cos, cos.detach(), *more, **options) == "own"
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


def test_a_gradient_at_real_depth_launches_few_operators() -> None:
    """8,693 once, and 3,145 now; the graphs of a GPU come on top."""
    with launches.as_on_a_gpu(fused=True):
        counts = launches.of_a_gradient()
    assert counts["nabla_fast.rms_norm_of_a_gpu"] == 57 + 36 * 4 + 1
    assert counts["nabla_fast.rms_norm_backward_of_a_gpu"] == counts["nabla_fast.rms_norm_of_a_gpu"]
    assert counts["nabla_fast.rotary"] == 2 * (28 + 36)
    assert counts.total() <= 4700


def test_a_step_of_a_rollout_at_real_depth_launches_few_operators() -> None:
    """1,219 once, and 568 now."""
    with launches.as_on_a_gpu(fused=True):
        assert launches.of_a_rollout_step() <= 820


def test_without_the_exchange_there_are_twice_as_many() -> None:
    with launches.as_on_a_gpu(fused=False):
        counts = launches.of_a_gradient()
    assert counts["nabla_fast.rotary"] == 0
    assert counts.total() > 6300
