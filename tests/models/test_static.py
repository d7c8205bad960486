"""Passes of constant shapes: what they give, for which models, and whole decodes by them."""

from __future__ import annotations

import functools
import sys
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import nabla_fast as nf
from nabla_fast import graphs
from nabla_fast.demo import arithmetic
from nabla_fast.generate import NablaOutput, make_pair
from nabla_fast.models import checks, kept, linear_layers, static
from nabla_fast.models.decoder_layers import CompiledLayers, compiled_graphs
from nabla_fast.models.fused_layers import find
from nabla_fast.models.language_model import LanguageModel
from nabla_fast.objective import Objective, Request
from nabla_fast.testing.models import (
    FAMILIES,
    shared_language_model,
    shared_reward_model,
    tiny_language_model,
    tiny_reward_model,
    tiny_tokenizer,
)

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = nf.NablaConfig(
    max_new_tokens=10,
    max_rollouts=3,
    max_iters=3,
    learning_rate=0.3,
    nll_coeff=0.1,
    confidence_threshold=None,
    gradient_threshold=None,
    rollout=nf.Sampling(temperature=1.0, top_p=0.95),
    backend="reference",
)
PROMPTS = ["what is 3 times 4 and 12 + 24", "the user", "12 + 24 = is it on"]


@pytest.fixture(autouse=True)
def plain_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN's linear layer, which a CPU may take, cannot be traced; a GPU has none."""
    monkeypatch.setattr(linear_layers, "_mkl_is_slow", lambda: False)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "TRACE_ON_CPU", True)


@pytest.fixture
def objectives(monkeypatch: pytest.MonkeyPatch) -> list[Objective]:
    """Every objective that is made."""
    made: list[Objective] = []
    own = Objective.__init__

    def init(self: Objective, *args: Any, **kwargs: Any) -> None:
        own(self, *args, **kwargs)
        made.append(self)

    monkeypatch.setattr(Objective, "__init__", init)
    return made


@functools.cache
def decode(family: str, dtype: torch.dtype, traces: bool, prompts: int = 2, **settings: Any) -> NablaOutput:
    tokenizer = tiny_tokenizer()
    reward_family = FAMILIES[(FAMILIES.index(family) + 2) % len(FAMILIES)]
    models = tiny_language_model(family, dtype=dtype), tiny_reward_model(reward_family, dtype=dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "TRACE_ON_CPU", traces)
        patch.setattr(
            sys.modules[make_pair.__module__], "usable", lambda device: False
        )  # rollouts are tested by themselves
        return nf.generate(models[0], tokenizer, models[1], tokenizer, PROMPTS[:prompts], CONFIG.replace(**settings))


def left(model: Any) -> list[Any]:
    """The graphs that decodes have left for the next one with this model."""
    return [graphs for _, graphs in kept._SHELVES[model].idle]


def same(one: NablaOutput, other: NablaOutput, tolerance: float) -> None:
    assert [s.tolist() for s in one.sequences] == [s.tolist() for s in other.sequences]
    assert one.rewards == pytest.approx(other.rewards, abs=tolerance)
    assert one.stats.totals.gradient_evaluations == other.stats.totals.gradient_evaluations
    assert one.stats.totals.reward_calls == other.stats.totals.reward_calls


@pytest.mark.parametrize("family", FAMILIES)
def test_a_decode_by_traces(family: str, objectives: list[Objective]) -> None:
    """Batches of two, ragged: tokens and counters are those without graphs, and each graph is captured once."""
    same(decode(family, torch.float64, True), decode(family, torch.float64, False), 1e-10)
    for part in (objectives[0].likelihood_graphs, objectives[0].reward_graphs):
        (graphs,) = left(part._backbone.model)
        assert 0 < part.stats()["captures"] <= len(graphs)


def test_a_decode_by_traces_in_float32() -> None:
    same(decode("qwen3", torch.float32, True), decode("qwen3", torch.float32, False), 1e-4)


def test_the_bundled_pair_by_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients, rewards and rollouts."""
    models = (*arithmetic.load_policy(dtype="float32"), *arithmetic.load_reward(dtype="float32"))
    question = "Compute 64 * 4 + 505 - 34 * 7 - 15."
    plain = nf.generate(*models, question, arithmetic.CONFIG)
    monkeypatch.setattr(graphs, "TRACE_ON_CPU", True)
    traced = nf.generate(*models, question, arithmetic.CONFIG)
    assert traced.stats.graphs["captures"] > 0
    same(traced, plain, 1e-4)


@pytest.mark.parametrize(
    "settings",
    [{"parameterization": "logits", "update_postfix": True}, {"anchor": "argmax", "gradient_cache": False}],
    ids=["logits, postfix", "argmax, no cache"],
)
def test_a_decode_with_other_settings(settings: dict[str, Any]) -> None:
    same(decode("qwen2", torch.float64, True, **settings), decode("qwen2", torch.float64, False, **settings), 1e-10)


def pair(family: str = "qwen2", reward: str = "qwen3") -> Any:
    tokenizer = tiny_tokenizer()
    return make_pair(shared_language_model(family), tokenizer, shared_reward_model(reward), tokenizer, CONFIG)


def requests(pair: Any, starts: list[int], length: int = 10, seed: int = 0) -> list[Request]:
    chats = [({"role": "user", "content": text},) for text in PROMPTS]
    ids, frames = pair.prompts(chats, CONFIG)
    sequences = pair.sequences(ids, frames, CONFIG)[: len(starts)]
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i, (sequence, start) in enumerate(zip(sequences, starts, strict=True)):
        response = torch.randint(4, 40, (length - i,), generator=generator)
        made.append(Request(sequence, response, start))
    return made


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("starts", [[0], [0, 3, 7], [9, 8, 7], [9, 0]], ids=str)
def test_an_evaluation(starts: list[int]) -> None:
    """At the first token, at the last one, and both in one batch; three times, so that graphs are replayed."""
    models = pair()
    ours = Objective(models.language_model, models.reward_model, CONFIG.replace(gradient_cache=False))
    plain = Objective(models.language_model, models.reward_model, CONFIG.replace(gradient_cache=False, graphs=False))
    assert plain.likelihood_graphs.graphs is plain.reward_graphs.graphs is None
    for seed in range(3):
        with torch.no_grad():
            one = ours.evaluate(requests(models, starts, seed=seed))
            other = plain.evaluate(requests(models, starts, seed=seed))
        for a, b in zip(one, other, strict=True):
            assert a.reward == pytest.approx(b.reward, abs=1e-10)
            torch.testing.assert_close(a.log_likelihoods, b.log_likelihoods, rtol=0, atol=1e-10)
            for x, y in zip(a.factors, b.factors, strict=True):
                torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-10)
    assert ours.likelihood_graphs.graphs is not None


@pytest.mark.usefixtures("traced")
def test_what_an_evaluation_keeps_is_its_own() -> None:
    """No result is in the memory of a graph, which the next replay writes to."""
    models = pair()
    objective = Objective(models.language_model, models.reward_model, CONFIG.replace(gradient_cache=False))
    kept, copies = [], []
    for seed in range(4):
        asked = requests(models, [2, 2], seed=seed)
        with torch.no_grad():
            for evaluation in objective.evaluate(asked):
                kept += [*evaluation.factors, evaluation.log_likelihoods]
            objective.rewards([r.sequence for r in asked], [r.response.flip(0) for r in asked])
        for request in asked:
            for cache in (request.sequence.language_cache, request.sequence.reward_cache):
                assert cache is not None
                kept += [*cache.cache.keys, *cache.cache.values, cache.cache.hidden]
        copies += [x.clone() for x in kept[len(copies) :]]
    for x, copy in zip(kept, copies, strict=True):
        assert torch.equal(x, copy)
        assert bool(x.isfinite().all())


@pytest.mark.usefixtures("traced")
def test_a_prefix_that_outgrows_its_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(static, "_COLUMNS", 16)
    models = pair()
    ours, plain = (
        Objective(models.language_model, models.reward_model, CONFIG.replace(gradient_cache=False, graphs=on))
        for on in (True, False)
    )
    for start in (0, 0, 20, 20, 60, 60):
        with torch.no_grad():
            (a,), (b,) = (o.evaluate(requests(models, [start], length=70)) for o in (ours, plain))
        torch.testing.assert_close(a.factors.embedding, b.factors.embedding, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(a.factors.reward_embedding, b.factors.reward_embedding, rtol=1e-9, atol=1e-10)


@pytest.mark.usefixtures("traced")
def test_a_pooled_token_that_is_not_the_last_one() -> None:
    """The padding token ends conversations, and the model pools the one before it."""
    tokenizer = tiny_tokenizer()
    reward = tiny_reward_model("qwen2")
    models = make_pair(shared_language_model("qwen2"), tokenizer, reward, tokenizer, CONFIG)
    skipped = models.reward_model._closing[-1]
    assert models.reward_model.head is not None
    object.__setattr__(models.reward_model.head, "skips", skipped)
    ours, plain = (
        Objective(models.language_model, models.reward_model, CONFIG.replace(gradient_cache=False, graphs=on))
        for on in (True, False)
    )
    for seed in range(3):
        with torch.no_grad():
            one, other = (o.evaluate(requests(models, [0, 4], seed=seed)) for o in (ours, plain))
        for a, b in zip(one, other, strict=True):
            assert a.reward == pytest.approx(b.reward, abs=1e-10)
            torch.testing.assert_close(a.factors.reward_embedding, b.factors.reward_embedding, rtol=1e-9, atol=1e-10)


# Which models run so


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_passes_the_check(family: str) -> None:
    model = LanguageModel(shared_language_model(family), tiny_tokenizer())
    assert static.why_not(model.backbone) is None


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_the_check_sees_windows(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = LanguageModel(tiny_language_model(family), tiny_tokenizer())
    monkeypatch.setattr(
        static, "_windows", lambda config: dict.fromkeys(dict.fromkeys(config.layer_types))
    )  # as if no layer had one
    reason = static.why_not(model.backbone)
    assert reason is not None
    assert "apart" in reason


def test_the_check_sees_a_wrong_first_column(monkeypatch: pytest.MonkeyPatch) -> None:
    model = LanguageModel(tiny_language_model("llama"), tiny_tokenizer())
    own = static.attention_masks
    monkeypatch.setattr(static, "attention_masks", lambda config, first, *rest: own(config, first + 1, *rest))
    reason = static.why_not(model.backbone)
    assert reason is not None
    assert "apart" in reason


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"cache_kind": "state"}, "in batches"),
        ({"supports_prefix_cache": False}, "in batches"),
        ({"needs_ids": True}, "token ids"),
    ],
)
def test_other_models_are_left_alone(change: dict[str, Any], reason: str) -> None:
    backbone = LanguageModel(tiny_language_model("llama"), tiny_tokenizer()).backbone
    vars(backbone).update(change)
    found = static.why_not(backbone)
    assert found is not None
    assert reason in found


def test_a_model_that_reads_positions_from_columns_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = LanguageModel(tiny_language_model("llama"), tiny_tokenizer()).backbone
    own = backbone.module.forward

    def forward(*args: Any, cache_position: Any = None, **kwargs: Any) -> Any:
        return own(*args, **kwargs)

    monkeypatch.setattr(backbone.module, "forward", forward)
    reason = static.why_not(backbone)
    assert reason is not None
    assert "cache position" in reason


def test_a_head_with_a_bias() -> None:
    """Its hidden states are wider than the model's."""
    model = tiny_language_model("llama")
    model.lm_head = torch.nn.Linear(model.lm_head.in_features, model.lm_head.out_features).double()
    backbone = LanguageModel(model.eval().requires_grad_(False), tiny_tokenizer()).backbone
    assert static.why_not(backbone) is None


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_compiled_layers_with_fused_ones_inside(family: str) -> None:
    """As on a GPU."""
    torch._dynamo.reset()
    model = tiny_language_model(family, dtype=torch.float32).requires_grad_(False)
    language = LanguageModel(model, tiny_tokenizer())
    layers = CompiledLayers(model, "model", backend="aot_eager")
    own = graphs.Graphs(torch.device("cpu"), capture=False)
    compiled = static.StaticBackbone(language.backbone, squares, own, layers)
    suffix = [language.embedding.inputs(torch.arange(5, 25))]
    meant = compiled([None], suffix, [], gradient=True)
    with find(model).active():
        ours = compiled([None], suffix, [], gradient=True)
    for a, b in ((ours.states, meant.states), (ours.gradient, meant.gradient)):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().mean()))


def test_windows_of_other_kinds() -> None:
    class Config:
        def __init__(self, **values: Any) -> None:
            vars(self).update(values)

    assert checks.window_is_known(Config(sliding_window=8))
    assert checks.window_is_known(Config(sliding_window=8, num_local_experts=4))
    assert checks.window_is_known(Config(sliding_window=8, layer_types=["sliding_attention"], window_pattern=6))
    assert not checks.window_is_known(Config(sliding_window=8, window_pattern=6))
    assert not checks.window_is_known(Config(sliding_window=None, attention_chunk_size=8))
    assert not checks.window_is_known(Config(window_size=8))


# What cannot be captured


def read_on_the_host(states: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    total = states.sum() * float(states.sum())
    return total, states.sum(-1)


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("error", ["capture", "memory"])
def test_a_model_that_cannot_be_captured_runs_without_graphs(error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny_tokenizer()
    models = make_pair(tiny_language_model("qwen2"), tokenizer, tiny_reward_model("qwen3"), tokenizer, CONFIG)
    config = CONFIG.replace(gradient_cache=False)
    ours = Objective(models.language_model, models.reward_model, config)
    plain = Objective(models.language_model, models.reward_model, config.replace(graphs=False))
    if error == "capture":
        assert ours.likelihood_graphs._static is not None
        ours.likelihood_graphs._static.value = read_on_the_host
    else:

        def full(self: Any, *_: Any) -> None:
            raise torch.OutOfMemoryError("no memory")

        monkeypatch.setattr(graphs.Graph, "_traced", full)
    with warnings.catch_warnings(record=True) as told, torch.no_grad():
        warnings.simplefilter("always")
        for seed in range(4):
            one, other = (o.evaluate(requests(models, [0, 3], seed=seed)) for o in (ours, plain))
            if seed or error == "memory":
                for a, b in zip(one, other, strict=True):
                    torch.testing.assert_close(a.factors.embedding, b.factors.embedding, rtol=1e-9, atol=1e-10)
    assert ours.likelihood_graphs.graphs is None
    messages = [str(w.message) for w in told if "without graphs" in str(w.message)]
    assert len(messages) == (1 if error == "capture" else 2)
    assert "DataDependent" in messages[0] or "no memory" in messages[0]


@pytest.mark.usefixtures("traced")
def test_no_graphs_beside_checkpoints() -> None:
    models = pair()
    objective = Objective(models.language_model, models.reward_model, CONFIG.replace(checkpoint_activations=True))
    assert objective.likelihood_graphs.graphs is objective.reward_graphs.graphs is None


def test_no_graphs_on_a_cpu() -> None:
    models = pair()
    objective = Objective(models.language_model, models.reward_model, CONFIG)
    assert objective.likelihood_graphs.graphs is None


def test_masks_by_hand() -> None:
    class Config:
        sliding_window = 2
        layer_types = ("full_attention", "sliding_attention")

    masks = static.attention_masks(Config, torch.tensor([1, 3]), torch.tensor([[3, 4]]), 6, torch.float32)
    seen = {kind: [[row.nonzero()[:, 0].tolist() for row in m[0] == 0] for m in mask] for kind, mask in masks.items()}
    assert seen == {
        "full_attention": [[[1, 2, 3], [1, 2, 3, 4]], [[3], [3, 4]]],
        "sliding_attention": [[[2, 3], [3, 4]], [[3], [3, 4]]],
    }


# Compiled layers


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3", "gpt_neox"])
def test_compiled_layers(family: str) -> None:
    """All layers run one graph, and a second length is the last that compiles."""
    torch._dynamo.reset()
    model = tiny_language_model(family, dtype=torch.float32).requires_grad_(False)
    language = LanguageModel(model, tiny_tokenizer())
    plain, compiled = (
        static.StaticBackbone(language.backbone, squares, graphs.Graphs(torch.device("cpu"), capture=False), layers)
        for layers in (None, CompiledLayers(model, "model", backend="aot_eager"))
    )
    ids = torch.randint(4, 40, (2, 60), generator=torch.Generator().manual_seed(0))
    before, made = compiled_graphs(), []
    for length in (20, 30, 60):
        with torch.no_grad():
            _, caches = language.backbone.extend([None], [language.embedding.inputs(ids[0, :7])])
        suffix = [language.embedding.inputs(ids[0, 7:length])]
        one, other = (s(caches, suffix, [], gradient=True) for s in (plain, compiled))  # type: ignore[arg-type]
        for a, b in ((one.states, other.states), (one.gradient, other.gradient), (one.new, other.new)):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        made.append(compiled_graphs() - before)
    assert made == [1, 2, 2]
    assert compiled.compile_seconds > 0
    assert not any("forward" in vars(module) for module in model.modules())


def squares(states: Tensor) -> tuple[Tensor, Tensor]:
    total = states.tanh().pow(2).sum()
    return total, total.reshape(1)


def test_by_inductor() -> None:
    torch._dynamo.reset()
    model = tiny_language_model("qwen3", dtype=torch.float32).requires_grad_(False)
    language = LanguageModel(model, tiny_tokenizer())
    suffix = [language.embedding.inputs(torch.arange(5, 25))]
    one, other = (
        static.StaticBackbone(language.backbone, squares, graphs.Graphs(torch.device("cpu"), capture=False), layers)(
            [None], suffix, [], gradient=True
        )
        for layers in (None, CompiledLayers(model, "model"))
    )
    for a, b in ((one.states, other.states), (one.gradient, other.gradient), (one.new, other.new)):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().mean()))


def test_a_decode_with_compiled_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(CompiledLayers.__init__, "__defaults__", ("aot_eager",))  # inductor takes minutes
    ours, plain = (
        decode("qwen3", torch.float32, False, 1, compile=on, max_new_tokens=6, max_rollouts=2) for on in (True, False)
    )
    same(ours, plain, 1e-4)
    assert ours.stats.graphs["compile_seconds"] > 0
    assert ours.stats.graphs["captures"] == 0
    assert plain.stats.graphs == {}


def test_layers_that_are_called_in_another_way_are_told_of() -> None:
    tokenizer = tiny_tokenizer()
    models = tiny_language_model("gpt2"), tokenizer, tiny_reward_model("gpt2"), tokenizer
    config = CONFIG.replace(compile=True, max_new_tokens=3)
    with pytest.warns(UserWarning, match="compile has no effect on model"):
        nf.generate(*models, PROMPTS[:1], config)


def test_compilation_beside_checkpoints_is_refused() -> None:
    with pytest.raises(ValueError, match="checkpoint_activations"):
        CONFIG.replace(compile=True, checkpoint_activations=True)
