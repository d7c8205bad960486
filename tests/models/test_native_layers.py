"""All layers of a model as one native call: which models have it, and what of them it must not miss."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from nabla_fast.models import native_layers
from nabla_fast.models.backbone import Backbone, embedded
from nabla_fast.models.decode_batch import DecodeBatch
from nabla_fast.models.fused_layers import fast_kernels
from nabla_fast.models.kv_cache import KVCache
from nabla_fast.ops import native

pytestmark = [
    pytest.mark.skipif(native.why_missing() is not None, reason=str(native.why_missing())),
    pytest.mark.usefixtures("one_thread"),
]
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 60}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256}
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12, 13], [20, 21, 22]]


def model_of(family: str, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """With widths whose rows the native product takes."""
    config = AutoConfig.for_model(family, **SIZES, **HEADS, pad_token_id=0, **settings)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
    for parameter in model.parameters():  # biases and weights of norms start without effect
        parameter.data += 0.2 * torch.randn_like(parameter) if parameter.ndim == 1 else 0
    return model


def backbone_of(model: Any) -> Backbone:
    return Backbone(model, "it")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The dtype of the weights that each native call of all layers read."""
    made: list[torch.dtype] = []
    own = native_layers.decoder_layers

    def counted(x: Tensor, layers: Any, *more: Any) -> Tensor:
        made.append(layers.weights[0].dtype)
        return own(x, layers, *more)

    monkeypatch.setattr(native_layers, "decoder_layers", counted)
    return made


def caches_of(backbone: Backbone, prompts: list[list[int]]) -> list[KVCache]:
    inputs = [embedded(backbone.embedding, torch.tensor(prompt)) for prompt in prompts]
    with torch.no_grad():
        _, caches = backbone.extend([None] * len(prompts), inputs)
    return caches  # type: ignore[return-value]


def run(
    backbone: Backbone, *, fast: bool, prompts: list[list[int]] = PROMPTS, rough: bool = False
) -> tuple[list[Tensor], list[KVCache]]:
    """Steps of a batch with wrong drafts, and its caches."""
    batch = DecodeBatch(backbone, caches_of(backbone, prompts))
    out: list[Tensor] = []
    with fast_kernels(backbone.device, *([backbone.fused] if fast else [])):
        for step in range(4):
            # Rows of different lengths, at most 15 tokens together; of some, tokens do not stay.
            tokens = [
                [(5 * step + 3 * row + i) % 50 for i in range(1 + (row + step) % 3)] for row in range(len(prompts))
            ]
            out += batch.step(tokens, rough=rough)
            batch.keep([max(1, len(new) - step % 2) for new in tokens])
    return out, [batch.row_cache(row) for row in range(len(prompts))]


def assert_same(ours: tuple[list[Tensor], list[KVCache]], theirs: tuple[list[Tensor], list[KVCache]]) -> None:
    for one, other in zip(ours[0], theirs[0], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    for a, b in zip(ours[1], theirs[1], strict=True):
        for one, other in zip((*a.keys, *a.values, a.hidden), (*b.keys, *b.values, b.hidden), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "rope_theta": 1e4, "low_freq_factor": 1.0,
                                       "high_freq_factor": 4.0, "original_max_position_embeddings": 64}}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("mistral", {"sliding_window": None}),
    ],
)  # fmt: skip
def test_common_families_decode_natively(family: str, settings: dict[str, Any], calls: list[torch.dtype]) -> None:
    backbone = backbone_of(model_of(family, **settings))
    assert backbone.native is not None
    calls.clear()
    plain = run(backbone, fast=False)
    assert not calls, "outside of the block, the model is its own"
    assert_same(run(backbone, fast=True), plain)
    assert calls == [torch.float32] * 4
    alone = run(backbone, fast=True, prompts=PROMPTS[1:2])
    assert_same(alone, run(backbone, fast=False, prompts=PROMPTS[1:2]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_decodes_natively(dtype: torch.dtype, calls: list[torch.dtype]) -> None:
    backbone = backbone_of(model_of("llama", dtype))
    calls.clear()
    ours, theirs = run(backbone, fast=True), run(backbone, fast=False)
    assert calls == [dtype] * 4
    for one, other in zip(ours[0], theirs[0], strict=True):
        assert (one.double() - other.double()).norm() <= 0.05 * other.double().norm()
    run(backbone, fast=True, rough=True)
    assert set(calls) == {dtype}, "their weights are read as they are"


def _multiplied(model: Any) -> None:
    """A layer that multiplies what it adds, as some families do."""
    layer = model.model.layers[1]
    own = type(layer)
    layer.__class__ = type(
        "Other", (own,), {"forward": lambda self, x, *a, **k: x + 1.01 * (own.forward(self, x, *a, **k) - x)}
    )


def _far_scaled(model: Any) -> None:
    """Embeddings of positions that are others far on."""
    rotary = model.model.rotary_emb
    own = type(rotary)

    def forward(self: Any, x: Tensor, position_ids: Tensor) -> Any:
        cos, sin = own.forward(self, x, position_ids)
        return (cos * (1 + (position_ids[..., None] > 200)), sin)

    rotary.__class__ = type("Other", (own,), {"forward": forward})


def _scaled_embeddings(model: Any) -> None:
    backbone = model.model
    own = type(backbone)

    def forward(self: Any, input_ids: Any = None, inputs_embeds: Any = None, **more: Any) -> Any:
        embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        return own.forward(self, inputs_embeds=2 * embeds, **more)

    backbone.__class__ = type("Other", (own,), {"forward": forward})


def _another_layer(model: Any) -> None:
    model.model.layers[1].self_attn.layer_idx = 0


def _another_epsilon(model: Any) -> None:
    model.model.layers[1].post_attention_layernorm.variance_epsilon = 0.1


def _own_forward(model: Any) -> None:
    layer = model.model.layers[0].self_attn
    layer.forward = layer.forward


@pytest.mark.parametrize("change", [_multiplied, _scaled_embeddings, _another_epsilon, _own_forward])
def test_models_that_compute_something_else_go_their_own_way(change: Callable[[Any], None]) -> None:
    model = model_of("llama")
    change(model)
    backbone = backbone_of(model)
    assert backbone.native is None
    assert_same(run(backbone, fast=True), run(backbone, fast=False))


def test_positions_far_on_are_the_models_own() -> None:
    """Tables come from the model, whatever it makes of a position."""
    model = model_of("llama")
    _far_scaled(model)
    backbone = backbone_of(model)
    assert backbone.native is not None


@pytest.mark.parametrize(
    ("family", "settings"),
    [("gemma3_text", {}), ("mistral", {"sliding_window": 8}), ("olmo2", {}), ("granite", {"residual_multiplier": 0.9})],
)
def test_families_with_other_layers_or_windows_go_their_own_way(family: str, settings: dict[str, Any]) -> None:
    backbone = backbone_of(model_of(family, **settings))
    assert backbone.native is None
    assert_same(run(backbone, fast=True), run(backbone, fast=False))


def test_autocast_goes_the_models_own_way(calls: list[torch.dtype]) -> None:
    backbone = backbone_of(model_of("llama"))
    calls.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        run(backbone, fast=True)
    assert not calls


def test_a_trial_that_raises_leaves_the_model_its_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    own = native_layers.decoder_layers

    def raising(x: Tensor, layers: Any, *more: Any) -> Tensor:
        if len(layers.weights) > 7:
            raise TypeError("another dtype")
        return own(x, layers, *more)

    monkeypatch.setattr(native_layers, "decoder_layers", raising)
    backbone = backbone_of(model_of("llama"))
    assert backbone.native is None
    run(backbone, fast=True)


def test_float64_goes_its_own_way(calls: list[torch.dtype]) -> None:
    backbone = backbone_of(model_of("llama", torch.float64))
    assert backbone.native is None
    run(backbone, fast=True)
    assert not calls


def _hook(part: Callable[[Any], Any], kind: str) -> Callable[[Any, list[Any]], Any]:
    def register(model: Any, seen: list[Any]) -> Any:
        return getattr(part(model), kind)(lambda module, *_: seen.append(module))

    return register


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
@pytest.mark.parametrize(
    "part",
    [
        lambda model: model.model,
        lambda model: model.model.layers[1],
        lambda model: model.model.layers[0].self_attn,
        lambda model: model.model.layers[1].mlp,
        lambda model: model.model.layers[0].input_layernorm,
        lambda model: model.model.layers[1].mlp.down_proj,
        lambda model: model.model.layers[1].self_attn.o_proj,
        lambda model: model.model.norm,
        lambda model: model.model.rotary_emb,
        lambda model: model.model.embed_tokens,
    ],
)
def test_whoever_waits_for_a_module_is_called(part: Callable[[Any], Any], kind: str) -> None:
    model = model_of("llama")
    backbone = backbone_of(model)
    plain = run(backbone, fast=True)
    seen: list[Any] = []
    handle = _hook(part, kind)(model, seen)
    try:
        again = run(backbone, fast=True)
    finally:
        handle.remove()
    assert len(seen) >= 4
    assert_same(again, plain)


def _replaced(model: Any) -> None:
    model.model.layers[1].mlp.up_proj = torch.nn.Linear(64, 96, bias=False)


def _other_layer(model: Any) -> None:
    model.model.layers[1] = type(model.model.layers[0])(model.config, 1).eval()


def _fewer_layers(model: Any) -> None:
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1


def _reordered(model: Any) -> None:
    model.model.layers = torch.nn.ModuleList([*model.model.layers][::-1])
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = index


def _other_class(model: Any) -> None:
    layer = model.model.layers[1]
    own = type(layer)
    layer.__class__ = type("Other", (own,), {"forward": lambda self, x, *a, **k: 1.5 * own.forward(self, x, *a, **k)})


def _other_implementation(model: Any) -> None:
    model.set_attn_implementation("eager")


def _other_scaling(model: Any) -> None:
    model.model.layers[0].self_attn.scaling *= 2


def _wrapped(model: Any) -> None:
    layer = model.model.layers[0]
    own = layer.forward
    layer.forward = lambda *arguments, **named: 1.1 * own(*arguments, **named)


def _other_weight(model: Any) -> None:
    torch.manual_seed(1)
    layer = model.model.layers[0].self_attn.q_proj
    layer.weight = torch.nn.Parameter(torch.randn_like(layer.weight))


def _changed_weight(model: Any) -> None:
    model.model.layers[0].self_attn.q_proj.weight.data.mul_(1.5)


@pytest.mark.parametrize("native_too", [False, True])
@pytest.mark.parametrize(
    ("change", "stays"),
    [
        (_replaced, False), (_other_layer, False), (_fewer_layers, False), (_reordered, False),
        (_other_class, False), (_other_implementation, False), (_other_scaling, False), (_wrapped, False),
        (_other_weight, True), (_changed_weight, True),
    ],
)  # fmt: skip
def test_a_model_that_has_changed_is_asked(
    change: Callable[[Any], None], stays: bool, native_too: bool, calls: list[torch.dtype]
) -> None:
    """After it was tried; and after it has decoded."""
    model = model_of("llama")
    backbone = backbone_of(model)
    if native_too:
        run(backbone, fast=True)
    change(model)
    calls.clear()
    ours = run(backbone, fast=True)
    assert bool(calls) == stays
    assert_same(ours, run(backbone, fast=False))


@pytest.mark.parametrize("whole", [True, False])
def test_what_is_remembered_of_a_model_does_not_keep_it(whole: bool) -> None:
    model = model_of("llama")
    model = model if whole else model.model
    backbone = backbone_of(model)
    run(backbone, fast=True, rough=True)
    assert backbone.native is not None
    left = weakref.ref(model)
    del model, backbone
    gc.collect()
    assert left() is None


def test_more_tokens_than_the_kernels_are_for(calls: list[torch.dtype]) -> None:
    backbone = backbone_of(model_of("llama"))
    calls.clear()
    batch = DecodeBatch(backbone, caches_of(backbone, PROMPTS))
    plain = DecodeBatch(backbone, caches_of(backbone, PROMPTS))
    new = [[i % 50 for i in range(6)]] * 3
    with fast_kernels(backbone.device, backbone.fused):
        ours = batch.step(new)
        assert not calls
        batch.keep([6] * 3)
        ours += batch.step([[1], [2], [3]])
        assert calls
    theirs = plain.step(new)
    plain.keep([6] * 3)
    theirs += plain.step([[1], [2], [3]])
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_rough_steps_read_weights_of_eight_bits(calls: list[torch.dtype]) -> None:
    model = model_of("llama")
    backbone = backbone_of(model)
    calls.clear()
    exact, rough = run(backbone, fast=True), run(backbone, fast=True, rough=True)
    assert calls == [torch.float32] * 4 + [torch.int8] * 4
    apart = [float((a - b).norm() / b.norm()) for a, b in zip(rough[0], exact[0], strict=True)]
    assert min(apart) > 0
    assert max(apart) < 0.05
    # When weights have changed, they are rounded anew.
    model.model.layers[0].self_attn.v_proj.weight.data.mul_(-1)
    exact, rough = run(backbone, fast=True), run(backbone, fast=True, rough=True)
    assert max(float((a - b).norm() / b.norm()) for a, b in zip(rough[0], exact[0], strict=True)) < 0.05
    model.model.layers[1].mlp.up_proj.weight = torch.nn.Parameter(torch.randn(96, 64))
    exact, rough = run(backbone, fast=True), run(backbone, fast=True, rough=True)
    assert max(float((a - b).norm() / b.norm()) for a, b in zip(rough[0], exact[0], strict=True)) < 0.05


def test_what_is_forgotten_leaves_no_trace() -> None:
    backbone = backbone_of(model_of("llama"))
    batch, plain = (DecodeBatch(backbone, caches_of(backbone, PROMPTS)) for _ in range(2))
    with fast_kernels(backbone.device, backbone.fused):
        for one in (batch, plain):
            one.step([[1, 2], [3, 4, 5], [6]])
            one.keep([1, 3, 1])
        for step in range(3):
            batch.step([[step + 7]] * 3, rough=True)
            batch.keep([1, 1, 1])
        batch.forget(3)
        assert (batch.width, batch.lengths) == (plain.width, plain.lengths)
        assert torch.equal(batch.mask[:, : plain.mask.shape[1]], plain.mask)
        for one, other in zip(batch.step([[7], [8], [9]]), plain.step([[7], [8], [9]]), strict=True):
            assert torch.equal(one, other)
        for one in (batch, plain):
            one.keep([1, 1, 1])
    for row in range(3):
        ours, theirs = batch.row_cache(row), plain.row_cache(row)
        for a, b in zip(
            (*ours.keys, *ours.values, ours.hidden), (*theirs.keys, *theirs.values, theirs.hidden), strict=True
        ):
            assert torch.equal(a, b)
