"""Norms, rotary embeddings and attention on a CPU: what models compute, and which calls stay their own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import tiny_model
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from nabla_fast.models import token_layers
from nabla_fast.models.backbone import cache_argument
from nabla_fast.models.fused_layers import FusedLayers, find, find_on_cpu
from nabla_fast.ops import native
from nabla_fast.ops import token_layers as kernels
from nabla_fast.testing.models import FAMILIES, tiny_language_model

pytestmark = pytest.mark.skipif(native.why_missing() is not None, reason=str(native.why_missing()))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which kernels have run, as often as they did."""
    made: list[str] = []

    def counted(name: str) -> Callable[..., Any]:
        own = getattr(kernels, name)
        return lambda *arguments, **named: made.append(name) or own(*arguments, **named)

    for name in ("rms_norm", "rotary", "attention", "attention_with_gradient"):
        monkeypatch.setattr(kernels, name, counted(name))
    return made


def behind_a_cache(model: Any) -> Tensor:
    """Logits of two rows of two tokens, one of them with padding."""
    ids = torch.tensor([[4, 5, 6, 7, 8], [0, 0, 9, 10, 11]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1]])
    cache = DynamicCache()
    given = {cache_argument(model): cache}
    model(ids, attention_mask=mask[:, :5], **given)
    positions = torch.tensor([[5, 6], [3, 4]])
    new = torch.tensor([[12, 13], [14, 15]])
    logits: Tensor = model(new, attention_mask=mask, position_ids=positions, **given).logits
    return logits


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_model_computes_the_same(family: str, asked: list[str]) -> None:
    model = tiny_language_model(family, dtype=torch.float32)
    fused, on_gpu = find_on_cpu(model), find(model)
    assert [module for module, _ in fused.norms] == [module for module, _ in on_gpu.norms]
    assert [page for page, _ in fused.rotary] == [page for page, _ in on_gpu.rotary]
    plain, table = behind_a_cache(model), dict(ALL_ATTENTION_FUNCTIONS)
    assert token_layers.is_known(table["sdpa"])
    asked.clear()
    with fused.active():
        ours = behind_a_cache(model)
    assert dict(ALL_ATTENTION_FUNCTIONS) == table
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
    calls = 2 * model.config.num_hidden_layers
    assert asked.count("rms_norm") == 2 * len(fused.norms)
    # GPT-NeoX turns a part of its features.
    assert asked.count("rotary") == (0 if family == "gpt_neox" else calls * len(fused.rotary))
    # Gemma 2 has no "sdpa".
    assert asked.count("attention") == (calls if model.config._attn_implementation == "sdpa" else 0)
    assert torch.equal(behind_a_cache(model), plain)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_in_bfloat16_a_model_is_as_exact(family: str) -> None:
    wide = tiny_language_model(family, dtype=torch.float32)
    model = tiny_language_model(family, dtype=torch.float32).to(torch.bfloat16)
    wide.load_state_dict({name: x.float() for name, x in model.state_dict().items()})
    exact, plain = behind_a_cache(wide), behind_a_cache(model).float()
    with find_on_cpu(model).active():
        ours = behind_a_cache(model).float()
    assert (ours - exact).norm() < 1.5 * (plain - exact).norm()


class _Norm(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.rand(8) + 0.5)
        self.eps = 1e-6

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return scale * self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


class _Shifted(_Norm):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return super().forward(x, scale) + 1e-2


def _exchanged(*norms: torch.nn.Module) -> Any:
    model = torch.nn.Module()
    model.norms = torch.nn.ModuleList(norms)
    return find_on_cpu(model)


def test_calls_of_norms_that_the_kernel_does_not_have(asked: list[str]) -> None:
    norm, other = _Norm(), _Shifted()
    fused = _exchanged(norm, other)
    assert [module for module, _ in fused.norms] == [norm]
    x = torch.randn(2, 8, 8)
    asked.clear()
    with fused.active(), torch.no_grad():
        for given, named in ((x, {"scale": 2.0}), (x.double(), {}), (x.bfloat16(), {})):
            assert norm(given, **named).shape == given.shape
        with torch.autocast("cpu", dtype=torch.bfloat16):
            norm(x)
        with torch.enable_grad():
            assert norm(x).requires_grad
        assert not asked
        torch.testing.assert_close(norm(x), _Norm.forward(norm, x))
        norm(x[:0])
        assert asked == ["rms_norm"] * 2
        norm.weight.mul_(3)
        torch.testing.assert_close(norm(x), _Norm.forward(norm, x))


class _NormOfNothing(torch.nn.Module):
    """A norm of that name that is none, and has no weight to say in what it computes."""

    eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return x + 1


def test_a_layer_is_not_compared_with_itself() -> None:
    """Where the kernel would go back to the layer's own way: under autocast, and in float64."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert len(_exchanged(_Norm(), _Shifted()).norms) == 1
        token_layers.is_known.cache_clear()
        assert token_layers.is_known(ALL_ATTENTION_FUNCTIONS["sdpa"])
    linear = torch.nn.Linear(2, 2)
    assert not _exchanged(_NormOfNothing(), linear).norms
    assert not _exchanged(_NormOfNothing(), linear.double()).norms
    assert not _exchanged(_Norm().double()).norms


def test_calls_of_rotary_embeddings_that_the_kernel_does_not_have(asked: list[str]) -> None:
    def own(*args: Any, **kwargs: Any) -> str:
        return "own"

    q, k, cos = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 3, 8), torch.randn(2, 3, 8)
    with torch.no_grad():
        for arguments, named in [
            ((q.double(), k.double(), cos.double(), cos.double()), {}),
            ((q, k, cos[..., :4], cos[..., :4]), {}),
            ((q, k, cos, cos), {"unsqueeze_dim": 2}),
            ((q, k, cos, cos, "more"), {}),
        ]:
            assert token_layers.rotated(own, *arguments, **named) == "own"
        assert token_layers.rotated(own, q, k, cos, cos)[0].shape == q.shape
    assert token_layers.rotated(own, q, k, cos.clone().requires_grad_(), cos) == "own"
    assert asked == ["rotary"]
    leaf = q.clone().requires_grad_()
    assert token_layers.rotated(own, leaf, k, cos, cos)[0].requires_grad
    assert asked == ["rotary"] * 2


CASES = (
    "gradient of 8 features",
    "dropout",
    "many tokens",
    "float mask",
    "causal",
    "float64",
    "heads",
    "dtypes",
    "mask's width",
    "batch",
)
OTHERS = ("softcap", "position_bias", "s_aux")


@pytest.mark.parametrize("case", [*CASES, *OTHERS])
def test_calls_of_attention_that_the_kernel_does_not_have(case: str, asked: list[str]) -> None:
    given: list[Any] = []

    def own(*arguments: Any, **named: Any) -> str:
        given.append((arguments, named))
        return "own"

    dtype = torch.float64 if case == "float64" else torch.float32
    tokens = 17 if case == "many tokens" else 2
    q, k, v = torch.randn(1, 4, tokens, 8, dtype=dtype), torch.randn(1, 2, 9, 8, dtype=dtype), torch.randn(1, 2, 9, 8)
    v = v.to(torch.bfloat16 if case == "dtypes" else dtype)
    if case == "batch":
        k, v = k.expand(2, -1, -1, -1), v.expand(2, -1, -1, -1)
    mask: Tensor | None = torch.ones(1, 1, tokens, 9, dtype=torch.bool)
    mask = {"causal": None, "float mask": torch.zeros(1, 1, tokens, 9), "mask's width": mask[..., :8]}.get(case, mask)
    module: Any = torch.nn.Module()
    module.num_key_value_groups = 1 if case == "heads" else 2
    named: dict[str, Any] = {"dropout": 0.1 if case == "dropout" else 0.0, "scaling": 0.5}
    if case in OTHERS:
        named[case] = torch.ones(1)
    with torch.set_grad_enabled(case.startswith("gradient")):
        assert token_layers.attention(own, module, q, k, v, mask, **named) == "own"
    assert not asked
    ((arguments, more),) = given
    assert arguments[1] is q
    assert more == {"is_causal": None, **named}


@pytest.mark.parametrize(
    ("dtype", "tokens", "taken"),
    [(torch.float32, 3, True), (torch.float32, 200, True), (torch.bfloat16, 128, True), (torch.bfloat16, 129, False)],
)
def test_attention_with_a_gradient(dtype: torch.dtype, tokens: int, taken: bool, asked: list[str]) -> None:
    """In half precision PyTorch's own is faster for many queries."""
    own = ALL_ATTENTION_FUNCTIONS["sdpa"]
    q, k, v = (torch.randn(2, heads, tokens, 16).to(dtype).requires_grad_() for heads in (4, 2, 2))
    mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool).tril()
    module: Any = torch.nn.Module()
    module.num_key_value_groups = 2
    results = []
    for function in (own, functools.partial(token_layers.attention, own)):
        out, _ = function(module, q, k, v, mask)
        results.append([out, *torch.autograd.grad(out.square().sum(), [q, k, v])])
    assert asked == ["attention_with_gradient"] * (taken and kernels.fast_with_gradient())
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=1e-5 if dtype is torch.float32 else 0.05)


@pytest.mark.parametrize(
    "family", ["gemma3_text", "gpt2", "gpt_neox", "lfm2", "llama", "phi3", "qwen3", "recurrent_gemma"]
)
def test_gradients_of_models(family: str, asked: list[str]) -> None:
    """Of two rows, one of them with padding."""
    model = tiny_model(family, dtype=torch.float32).requires_grad_(False)
    ids = torch.arange(4, 46).view(2, 21)
    mask = torch.ones(2, 21, dtype=torch.long)
    mask[0, :5] = 0
    embedded = model.get_input_embeddings()(ids)

    def gradient() -> Tensor:
        leaf = embedded.clone().requires_grad_()
        logits = model(inputs_embeds=leaf, attention_mask=mask, use_cache=False).logits[:, 5:]
        likelihoods = logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 6:, None])
        (found,) = torch.autograd.grad(likelihoods.sum(), leaf)
        return found[:, 5:]

    plain = gradient()
    fused = find_on_cpu(model)
    asked.clear()
    with fused.active():
        ours = gradient()
    assert ("attention_with_gradient" in asked) == kernels.fast_with_gradient()
    torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-4 * float(plain.abs().max()))


def test_one_query_without_a_mask_reads_everything(asked: list[str]) -> None:
    own = ALL_ATTENTION_FUNCTIONS["sdpa"]
    q, k, v = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    module: Any = torch.nn.Module()
    module.num_key_value_groups = 2
    with torch.no_grad():
        ours, nothing = token_layers.attention(own, module, q, k, v, None)
        theirs, _ = own(module, q, k, v, None)
    torch.testing.assert_close(ours, theirs)
    assert nothing is None
    assert asked == ["attention"]


def test_what_somebody_else_has_put_into_the_table_is_put_back() -> None:
    def mine(*arguments: Any, **named: Any) -> str:
        return "mine"

    fused = find_on_cpu(tiny_language_model("llama", dtype=torch.float32))
    ALL_ATTENTION_FUNCTIONS["sdpa"] = mine
    try:
        with fused.active():
            assert ALL_ATTENTION_FUNCTIONS["sdpa"] is mine, "that is not the attention that is known"
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is mine
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]
    assert ALL_ATTENTION_FUNCTIONS["sdpa"].__module__.startswith("transformers.")


def test_attention_that_is_not_known_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    own = ALL_ATTENTION_FUNCTIONS["sdpa"]
    assert token_layers.is_known(own)

    def wider(
        module: Any, query: Any, key: Any, value: Any, attention_mask: Any, window: int = 3, **kwargs: Any
    ) -> Any:
        return own(module, query, key, value, attention_mask, **kwargs)

    def other(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
        out, nothing = own(module, query, key, value, attention_mask, **kwargs)
        return 1.01 * out, nothing

    for stranger in (wider, other, int):
        assert not token_layers.is_known(stranger)
        monkeypatch.setitem(type(ALL_ATTENTION_FUNCTIONS)._global_mapping, "sdpa", stranger)
        with FusedLayers(attention=True).active():
            assert ALL_ATTENTION_FUNCTIONS["sdpa"] is stranger


def test_without_the_native_library_nothing_is_exchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "has", lambda name: False)
    found = find_on_cpu(tiny_language_model("llama", dtype=torch.float32))
    assert (found.norms, found.rotary, found.attention) == ((), (), False)
