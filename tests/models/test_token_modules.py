"""Attention and feed-forward modules on a CPU as native calls: which are exchanged, and which calls stay their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from nabla_fast.models.backbone import cache_argument
from nabla_fast.models.decoder_layers import decoder_layers
from nabla_fast.models.fused_layers import find_on_cpu
from nabla_fast.models.token_modules import Attention, GatedMLP
from nabla_fast.ops import native, token_layers

pytestmark = pytest.mark.skipif(native.why_missing() is not None, reason=str(native.why_missing()))
WHOLE = ("attention_inputs", "gated_mlp")
IDS = torch.tensor([[4, 5, 6, 7]])


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which of the kernels have run, as often as they did."""
    made: list[str] = []

    def counted(name: str) -> Callable[..., Any]:
        own = getattr(token_layers, name)
        return lambda *arguments, **named: made.append(name) or own(*arguments, **named)

    for name in WHOLE:
        monkeypatch.setattr(token_layers, name, counted(name))
    return made


def model_of(family: str) -> Any:
    """With widths whose rows the native product takes."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 20}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64}
    config = AutoConfig.for_model(family, **sizes, **heads, pad_token_id=0)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").eval()
    for parameter in model.parameters():  # biases and weights of norms start without effect
        parameter.data += 0.2 * torch.randn_like(parameter) if parameter.ndim == 1 else 0
    return model


def logits_of(model: Any, ids: Tensor = IDS, **given: Any) -> Tensor:
    logits: Tensor = model(ids, **{cache_argument(model): DynamicCache()}, **given).logits
    return logits


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma3_text"])
@torch.no_grad()
def test_modules_of_common_families_are_exchanged(family: str, asked: list[str]) -> None:
    model = model_of(family)
    fused = find_on_cpu(model)
    layers = model.config.num_hidden_layers
    assert [type(made) for _, made in fused.modules] == [Attention, GatedMLP] * layers
    plain = logits_of(model)
    asked.clear()
    with fused.active():
        torch.testing.assert_close(logits_of(model), plain, rtol=1e-4, atol=1e-5)
    assert asked == [*WHOLE] * layers
    assert torch.equal(logits_of(model), plain)
    assert len(asked) == 2 * layers


def exchanged() -> tuple[Any, Any, list[Any]]:
    model = model_of("llama")
    return model, find_on_cpu(model), decoder_layers(model)


@torch.no_grad()
def test_what_was_not_tried_goes_the_models_own_way(asked: list[str]) -> None:
    model, fused, (layer, *others) = exchanged()
    all_calls = 2 * (1 + len(others))

    def calls(*arguments: Any, **named: Any) -> int:
        asked.clear()
        plain = logits_of(model, *arguments, **named)
        assert not asked
        with fused.active():
            torch.testing.assert_close(logits_of(model, *arguments, **named), plain, rtol=1e-4, atol=1e-5)
        return len(asked)

    assert calls() == all_calls
    assert calls(torch.arange(16)[None] % 8) == all_calls
    assert calls(torch.arange(17)[None] % 8) == 0, "more rows than the kernels are for"
    assert calls(IDS.expand(5, -1)) == 0
    with torch.enable_grad():
        assert calls() == 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        asked.clear()
        with fused.active():
            logits_of(model)
        assert not asked
    # Attention alone: a setting of it, or of all of them.
    layer.self_attn.train()
    assert calls() == all_calls - 1
    layer.self_attn.eval()
    model.set_attn_implementation("eager")
    assert calls() == all_calls // 2
    model.set_attn_implementation("sdpa")
    assert calls() == all_calls


@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook"])
@torch.no_grad()
def test_whoever_waits_for_a_layer_inside_is_called(hook: str, asked: list[str]) -> None:
    model, fused, (layer, *_) = exchanged()
    for inside, name in (
        (layer.mlp.up_proj, "gated_mlp"),
        (layer.mlp.act_fn, "gated_mlp"),
        (layer.self_attn.k_proj, "attention_inputs"),
    ):
        seen: list[Any] = []
        handle = getattr(inside, hook)(lambda module, *_, seen=seen: seen.append(module))
        asked.clear()
        with fused.active():
            logits_of(model)
        assert seen == [inside]
        assert asked.count(name) == len(decoder_layers(model)) - 1
        handle.remove()
    everywhere: list[Any] = []
    handle = getattr(torch.nn.modules.module, hook.replace("forward", "module_forward"))(
        lambda module, *_: everywhere.append(module)
    )
    try:
        asked.clear()
        with fused.active():
            logits_of(model)
    finally:
        handle.remove()
    assert not asked
    assert layer.mlp.up_proj in everywhere


@torch.no_grad()
def test_layers_that_were_replaced_are_asked(asked: list[str]) -> None:
    model, fused, (layer, *others) = exchanged()
    torch.manual_seed(0)
    layer.mlp.up_proj = torch.nn.Linear(64, 96, bias=False)
    layer.self_attn.q_proj.weight = torch.nn.Parameter(torch.randn_like(layer.self_attn.q_proj.weight))
    plain = logits_of(model)
    asked.clear()
    with fused.active():
        torch.testing.assert_close(logits_of(model), plain, rtol=1e-4, atol=1e-5)
    assert len(asked) == 1 + 2 * len(others)
    others[0].mlp.act_fn = torch.nn.ReLU()
    plain = logits_of(model)
    with fused.active():
        torch.testing.assert_close(logits_of(model), plain, rtol=1e-4, atol=1e-5)
    half = model.to(torch.bfloat16)
    with fused.active():
        assert logits_of(half).dtype == torch.bfloat16


def _louder(module: Any, x: Tensor) -> Tensor:
    return 1.01 * type(module).forward(module, x)


def _cut(module: Any, x: Tensor) -> Tensor:
    """A network whose gate is cut off, as some families do, far from where numbers usually are."""
    gate = module.act_fn(module.gate_proj(x)).clamp(max=8)
    return module.down_proj(gate * module.up_proj(x))


@pytest.mark.parametrize("change", [_louder, _cut])
def test_a_network_that_does_more_is_not_exchanged(change: Callable[..., Tensor]) -> None:
    model, fused, (layer, *others) = exchanged()
    own = type(layer.mlp)
    layer.mlp.__class__ = type("Other", (own,), {"forward": lambda self, x: change(_as(own, self), x)})
    kinds = [type(made) for _, made in find_on_cpu(model).modules]
    assert kinds.count(GatedMLP) == len(others)
    assert kinds.count(Attention) == 1 + len(others)
    assert len(fused.modules) == 2 + 2 * len(others)


def _as(kind: type, module: Any) -> Any:
    twin = kind.__new__(kind)
    vars(twin).update(vars(module))
    return twin


@pytest.mark.parametrize("change", ["scaling", "config", "output", "weights"])
def test_attention_that_does_something_else_is_not_exchanged(change: str) -> None:
    model, _, (layer, *others) = exchanged()
    own = type(layer.self_attn)

    def forward(self: Any, hidden_states: Tensor, cache: Any = None, past_key_values: Any = None, **more: Any) -> Any:
        twin = _as(own, self)
        if change == "scaling":
            twin.scaling = 1.1 * self.scaling
        name = cache_argument(twin)
        out, weights = own.forward(twin, hidden_states, **{name: past_key_values or cache}, **more)
        return (1.01 * out if change == "output" else out), (out if change == "weights" else weights)

    if change == "config":
        layer.self_attn.config = type(model.config)(**model.config.to_dict())
        layer.self_attn.config._attn_implementation = "eager"
    else:
        layer.self_attn.__class__ = type("Other", (own,), {"forward": forward})
    kinds = [type(made) for _, made in find_on_cpu(model).modules]
    assert kinds.count(Attention) == len(others)
    assert kinds.count(GatedMLP) == 1 + len(others)


def test_a_network_whose_activation_is_no_module_is_not_exchanged() -> None:
    model, _, (layer, *others) = exchanged()
    del layer.mlp.act_fn
    layer.mlp.act_fn = torch.nn.functional.silu
    found = [module for module, _ in find_on_cpu(model).modules]
    assert layer.mlp not in found
    assert len(found) == 1 + 2 * len(others)


def test_layers_of_another_library_are_not_exchanged() -> None:
    model, _, (layer, *others) = exchanged()
    layer.mlp.down_proj.forward = layer.mlp.down_proj.forward
    layer.self_attn.forward = layer.self_attn.forward
    found = [module for module, _ in find_on_cpu(model).modules]
    assert layer.mlp not in found
    assert layer.self_attn not in found
    assert len(found) == 2 * len(others)


class _StaticCache(DynamicCache):
    """A cache of a class that may need more than keys, values and the layer."""


def _call(case: str) -> dict[str, Any]:
    x, cos = torch.randn(2, 3, 64), torch.randn(1, 3, 16)
    given: dict[str, Any] = {"hidden_states": x, "position_embeddings": (cos, cos), "attention_mask": None}
    given |= {"position_ids": torch.arange(3)[None], "use_cache": True, "output_attentions": False}
    changes: dict[str, dict[str, Any]] = {
        "an argument": {"sliding": True},
        "attention weights": {"output_attentions": True},
        "a cache of another class": {"past_key_values": _StaticCache()},
        "two caches": {"past_key_values": None, "cache": None},
        "no tables": {"position_embeddings": None},
        "tables of other rows": {"position_embeddings": (cos.expand(3, -1, -1), cos.expand(3, -1, -1))},
        "tables of other tokens": {"position_embeddings": (cos[:, :2], cos[:, :2])},
        "tables of another dtype": {"position_embeddings": (cos.double(), cos.double())},
        "a mask of numbers": {"attention_mask": torch.zeros(2, 1, 3, 3)},
        "two dimensions": {"hidden_states": x[0]},
        "another dtype": {"hidden_states": x.double()},
    }
    return given | changes.get(case, {})


# The mask is transformers' own function's to read.
USUAL = ("as usual", "a mask of numbers")
OTHERS = (
    "an argument", "attention weights", "a cache of another class", "two caches", "no tables", "tables of other rows",
    "tables of other tokens", "tables of another dtype", "two dimensions", "another dtype",
)  # fmt: skip


@pytest.mark.parametrize("case", [*USUAL, *OTHERS])
@torch.no_grad()
def test_calls_of_attention(case: str, asked: list[str]) -> None:
    _, fused, (layer, *_) = exchanged()
    (made,) = [made for module, made in fused.modules if module is layer.self_attn]
    own: list[Any] = []
    made.own = lambda *arguments, **named: own.append(named) or ("own", None)
    given = _call(case)
    asked.clear()
    out, weights = made(**given)
    assert weights is None
    if case in USUAL:
        assert asked == ["attention_inputs"]
        theirs = type(layer.self_attn).forward(layer.self_attn, **given)[0]
        torch.testing.assert_close(out, theirs, rtol=1e-4, atol=1e-5)
    else:
        assert (out, asked) == ("own", [])
        (named,) = own
        assert named == {name: value for name, value in given.items() if name != "hidden_states"}
