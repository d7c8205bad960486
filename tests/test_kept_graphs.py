"""Captured graphs outlast a call: what later ones use of them, and what gives them up."""

from __future__ import annotations

import functools
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import nabla_fast as nf
from nabla_fast import baselines, graphs
from nabla_fast.generate import make_pair
from nabla_fast.models import kept, linear_layers
from nabla_fast.models.fused_layers import FusedLayers, find
from nabla_fast.models.graphed import Graphed, head_settings
from nabla_fast.testing.models import FAMILIES, tiny_language_model, tiny_reward_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = nf.NablaConfig(
    max_new_tokens=8,
    max_rollouts=3,
    max_iters=3,
    learning_rate=0.3,
    nll_coeff=0.1,
    confidence_threshold=None,
    gradient_threshold=None,
    rollout=nf.Sampling(temperature=1.0, top_p=0.95),
    backend="reference",
)
PROMPTS = ["what is 3 times 4 and 12 + 24", "the user"]


@pytest.fixture(autouse=True)
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # oneDNN's linear layer, which a CPU may take, cannot be traced; a GPU has none.
    monkeypatch.setattr(linear_layers, "_mkl_is_slow", lambda: False)
    monkeypatch.setattr(graphs, "TRACE_ON_CPU", True)
    yield
    nf.clear_graphs()


def pair() -> tuple[Any, Any, Any, Any]:
    tokenizer = tiny_tokenizer()
    return tiny_language_model("llama"), tokenizer, tiny_reward_model("qwen3"), tokenizer


def decode(models: Any, config: nf.NablaConfig = CONFIG, prompts: Any = PROMPTS[:1], **options: Any) -> nf.NablaOutput:
    return nf.generate(*models, prompts, config, **options)


def tokens(output: nf.NablaOutput) -> list[list[int]]:
    return [x.tolist() for x in output.sequences]


def require_same(one: nf.NablaOutput, other: nf.NablaOutput) -> None:
    assert tokens(one) == tokens(other)
    assert one.rewards == pytest.approx(other.rewards, abs=1e-9)


def plain(models: Any, config: nf.NablaConfig = CONFIG, prompts: Any = PROMPTS[:1]) -> nf.NablaOutput:
    output = decode(models, config.replace(graphs=False), prompts)
    assert output.stats.graphs == {}
    return output


def left(model: Any) -> list[Any]:
    """The sets of graphs that wait for the next decode with a model."""
    shelf = kept._SHELVES.get(model)
    return [] if shelf is None else [one for _, one in shelf.idle]


def warm(models: Any, config: nf.NablaConfig = CONFIG) -> None:
    """Decodes until nothing is left to capture: what is used once in a decode is captured by the second one."""
    assert decode(models, config).stats.graphs["captures"] > 0
    decode(models, config)


def test_a_later_call_captures_nothing_and_gives_the_same() -> None:
    models = pair()
    meant = plain(models, prompts=PROMPTS)
    first, second, third = (decode(models, prompts=PROMPTS) for _ in range(3))
    assert first.stats.graphs["captures"] > second.stats.graphs["captures"]
    assert third.stats.graphs["captures"] == third.stats.graphs["capture_seconds"] == 0
    for output in (first, second, third):
        require_same(output, meant)
    # Gradients and rollouts of the one, rewards of the other.
    assert (len(left(models[0])), len(left(models[2]))) == (2, 1)


def test_captures_of_rollouts_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    models, config = pair(), CONFIG.replace(max_rollouts=1)
    monkeypatch.setattr(Graphed, "run", lambda *_, **__: None)  # rollouts alone
    assert decode(models, config).stats.graphs["captures"] > 0


def test_baselines_use_graphs_again_too() -> None:
    models = pair()
    meant = baselines.best_of_n(*models, PROMPTS, 2, CONFIG.replace(graphs=False))
    for _ in range(2):
        output = baselines.best_of_n(*models, PROMPTS, 2, CONFIG)
        require_same(output, meant)
    before = left(models[0]) + left(models[2])
    baselines.best_of_n(*models, PROMPTS, 2, CONFIG)
    assert {*left(models[0]), *left(models[2])} == {*before}
    assert len(before) == 3


# What changes between calls


def test_weights_changed_in_place() -> None:
    models = pair()
    before = [decode(models) for _ in range(2)][-1]
    with torch.no_grad():
        for model in (models[0], models[2]):
            for weight in model.parameters():
                weight.mul_(1.5)
    after = decode(models)
    require_same(after, plain(models))
    assert after.rewards != pytest.approx(before.rewards, abs=1e-3)


def test_weights_changed_behind_the_back_of_autograd() -> None:
    """``data`` has no version, so that graphs stay; they read what is there."""
    models = pair()
    warm(models)
    before = {*left(models[0]), *left(models[2])}
    for model in (models[0], models[2]):
        for weight in model.parameters():
            weight.data.mul_(1.5)
    require_same(decode(models), plain(models))
    assert {*left(models[0]), *left(models[2])} == before


@pytest.mark.parametrize("how", ["data", "parameter"])
def test_a_weight_that_is_replaced_is_captured_anew(how: str) -> None:
    models = pair()
    warm(models)
    norm = models[0].model.norm
    other = torch.linspace(0.2, 2.0, len(norm.weight), dtype=norm.weight.dtype)
    if how == "data":
        norm.weight.data = other
    else:
        norm.weight = torch.nn.Parameter(other, requires_grad=False)
    meant = plain(models)
    outputs = [decode(models) for _ in range(3)]
    for output in outputs:
        require_same(output, meant)
    assert outputs[0].stats.graphs["captures"] > 0
    assert outputs[-1].stats.graphs["captures"] == 0


def test_a_bias_of_the_head_is_read_anew_in_each_call() -> None:
    """Its place is in a copy of the head, which each call makes."""
    models = pair()
    models[0].lm_head = torch.nn.Linear(24, len(models[0].lm_head.weight)).double().eval()
    warm(models)
    before = decode(models)
    models[0].lm_head.bias.data.copy_(torch.linspace(2.0, -2.0, len(models[0].lm_head.bias)))
    meant = plain(models)
    assert tokens(before) != tokens(meant)
    for _ in range(2):
        require_same(decode(models), meant)


def test_another_dtype_is_captured_anew() -> None:
    models = pair()
    warm(models)
    for model in (models[0], models[2]):
        model.float()
    output = decode(models)
    assert output.stats.graphs["captures"] > 0
    assert tokens(output) == tokens(plain(models))


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model.model.layers[0].self_attn, "scaling", 3.0),
        lambda model: setattr(model.model.layers[0].mlp, "forward", lambda x: 0 * x),
        lambda model: model.model.layers[0].mlp.register_forward_hook(lambda *_: 0 * _[2]),
        lambda model: model.model.rotary_emb.inv_freq.copy_(model.model.rotary_emb.inv_freq * 3),
        lambda model: setattr(model.model.rotary_emb, "inv_freq", model.model.rotary_emb.inv_freq * 3),
        lambda model: setattr(model, "lm_head", torch.nn.Linear(24, len(model.lm_head.weight)).double().eval()),
    ],
    ids=["number", "forward", "hook", "buffer in place", "buffer replaced", "head with a bias"],
)
def test_a_model_that_computes_something_else(change: Callable[[Any], Any]) -> None:
    models = pair()
    before = [decode(models) for _ in range(2)][-1]
    torch.manual_seed(0)
    with torch.no_grad():
        change(models[0])
    meant = plain(models)
    for _ in range(3):
        require_same(decode(models), meant)
    assert tokens(before) != tokens(meant), "the change shows nowhere"


def test_an_adapter_that_is_weighed_anew() -> None:
    peft = pytest.importorskip("peft")
    models = list(pair())
    settings = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["down_proj"], init_lora_weights=False)
    models[0] = peft.get_peft_model(models[0], settings).double().eval().requires_grad_(False)
    before = [decode(models) for _ in range(2)][-1]
    for module in models[0].modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling["default"] *= 8
    meant = plain(models)
    for _ in range(2):
        require_same(decode(models), meant)
    assert tokens(before) != tokens(meant)


def test_sampling_settings_have_steps_of_their_own() -> None:
    models = pair()
    others = [
        CONFIG.replace(rollout=nf.Sampling(temperature=0.0)),
        CONFIG.replace(rollout=nf.Sampling(temperature=1.5, top_k=3)),
        CONFIG.replace(eos_token_ids=(5, 6, 7, 8, 9, 10, 11, 12)),
    ]
    for config in (CONFIG, *others, CONFIG, *others):
        require_same(decode(models, config), plain(models, config))
    (slots,) = [one for one in left(models[0]) if hasattr(one, "state")]
    assert len({key[3:] for key in slots.graphs._graphs}) == 4


def test_other_prompts_and_batches_go_on_with_the_same_graphs() -> None:
    models = pair()
    prompts = [["12 + 24 = is it on", *PROMPTS], "is"]
    for asked in (*prompts, PROMPTS, *prompts):
        require_same(decode(models, prompts=asked), plain(models, prompts=asked))
    assert (len(left(models[0])), len(left(models[2]))) == (2, 1)


# Several users


def test_threads_have_graphs_of_their_own() -> None:
    models = pair()
    asked: list[Any] = [PROMPTS, "is it on"]
    meant = [plain(models, prompts=prompts) for prompts in asked]
    decode(models)
    found: dict[int, list[nf.NablaOutput]] = {0: [], 1: []}
    together = threading.Barrier(2)

    def use(i: int) -> None:
        for _ in range(2):
            together.wait()
            found[i].append(decode(models, prompts=asked[i]))

    threads = [threading.Thread(target=use, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in (0, 1):
        assert len(found[i]) == 2
        for output in found[i]:
            require_same(output, meant[i])
    assert len(left(models[0])) == kept._MOST
    assert len(left(models[2])) == 2


def test_a_decode_inside_another_one_has_graphs_of_its_own() -> None:
    models = pair()
    config = CONFIG.replace(max_batch_size=1)
    for _ in range(2):
        decode(models, config, PROMPTS)
    inner: list[nf.NablaOutput] = []
    during: list[int] = []

    def on_answer(index: int, output: nf.NablaOutput) -> None:
        during.append(len(left(models[2])))
        if not inner:
            inner.append(decode(models, config, "is it on"))

    outer = decode(models, config, PROMPTS, on_answer=on_answer)
    require_same(outer, plain(models, config, PROMPTS))
    require_same(inner[0], plain(models, config, "is it on"))
    assert during == [0, 1]
    assert len(left(models[2])) == 2


# Ends


def test_models_are_collected_with_their_graphs() -> None:
    models = pair()
    warm(models)
    kept_for = [weakref.ref(model) for model in (models[0], models[2])]
    made = [weakref.ref(one) for model in (models[0], models[2]) for one in left(model)]
    assert len(made) == 3
    del models
    gc.collect()
    assert [ref() for ref in (*kept_for, *made)] == [None] * 5


def test_a_model_alone_is_collected_without_the_other() -> None:
    models = list(pair())
    warm(models)
    reward = weakref.ref(models[2])
    models[2] = tiny_reward_model("qwen3")
    gc.collect()
    assert reward() is None
    require_same(decode(models), plain(models))


def test_an_error_gives_graphs_back() -> None:
    models = pair()
    warm(models)
    before = left(models[0]) + left(models[2])

    def fail(*_: Any) -> None:
        raise KeyError("on_answer")

    with pytest.raises(KeyError) as error:
        decode(models, on_answer=fail)
    assert error.value.__traceback__ is not None  # which holds the frames of the decode
    assert {*left(models[0]), *left(models[2])} == {*before}
    again = decode(models)
    assert again.stats.graphs["captures"] == 0
    require_same(again, plain(models))


def test_what_a_model_left_that_gave_nan_is_not_seen_again() -> None:
    """Where a mask hides it, too: zero times NaN is NaN."""
    models = pair()
    meant = plain(models)
    warm(models)
    for model in (models[0], models[2]):
        for one in left(model):
            buffers = [one.state.kv, one.state.hidden] if hasattr(one, "state") else [*one.memory.values()]
            assert buffers
            for buffer in buffers:
                buffer.fill_(torch.nan)
    output = decode(models)
    assert output.stats.graphs["captures"] == 0
    require_same(output, meant)


def test_an_error_of_the_model_gives_graphs_back() -> None:
    models = pair()
    meant = plain(models)
    warm(models)
    before = {*left(models[0]), *left(models[2])}
    weight = models[0].model.norm.weight
    saved = weight.clone()
    weight.data.fill_(torch.nan)
    with pytest.raises(FloatingPointError):
        decode(models)
    weight.data.copy_(saved)
    assert {*left(models[0]), *left(models[2])} == before
    require_same(decode(models), meant)


def test_what_runs_out_of_memory_gives_up_all_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    models = pair()
    warm(models)

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    with pytest.raises(torch.OutOfMemoryError):
        decode(models, on_answer=fail)
    assert left(models[0]) == left(models[2]) == []


def test_clear_graphs() -> None:
    models = pair()
    warm(models)
    made = [weakref.ref(one) for model in (models[0], models[2]) for one in left(model)]
    nf.clear_graphs()
    gc.collect()
    assert [ref() for ref in made] == [None] * 3
    assert decode(models).stats.graphs["captures"] > 0


def test_graphs_in_use_are_freed_when_their_decode_ends() -> None:
    models = pair()
    decode(models, on_answer=lambda *_: nf.clear_graphs())
    assert left(models[0]) == left(models[2]) == []


# What cannot be captured


@pytest.mark.filterwarnings("ignore:.*without graphs, slower")
@pytest.mark.parametrize(("error", "tries"), [(graphs.CaptureError, 1), (torch.OutOfMemoryError, 3)])
def test_what_cannot_be_captured_is_tried_once_unless_memory_was_the_reason(
    error: type[Exception], tries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = pair()
    tried = []

    def refuse(*_: Any) -> None:
        tried.append(1)
        raise error("not here")

    own = graphs.Graph._capture
    monkeypatch.setattr(graphs.Graph, "_capture", refuse)
    meant = plain(models)
    for _ in range(3):
        require_same(decode(models), meant)
    assert len(tried) == 3 * tries  # gradients, rewards, rollouts
    monkeypatch.setattr(graphs.Graph, "_capture", own)
    with torch.no_grad():
        for model in (models[0], models[2]):
            model.get_input_embeddings().weight.mul_(1.0)  # another state of the model, which may be captured
    assert decode(models).stats.graphs["captures"] > 0


def test_few_sets_are_kept_for_a_model() -> None:
    model = pair()[0]
    place = kept.Place(model, "test")
    sets = [functools.partial(print, i) for i in range(kept._MOST + 2)]
    for one in sets:
        place.leave(one)
    nothing = functools.partial(print)
    assert [place.take(lambda: nothing) for _ in sets] == [*reversed(sets[2:]), nothing, nothing]


def test_graphs_with_other_fused_layers_are_not_taken() -> None:
    """These have tensors of their own, made of the weights, whose addresses captures hold."""
    model, *others = pair()
    for module in model.modules():
        vars(module).pop("forward", None)  # a tiny model's norms have their own, which nobody exchanges
    models = (model, *others)
    warm(models)
    backbone = make_pair(*models, CONFIG).language_model.backbone
    before, own = left(model), backbone.fused
    norms = tuple((m, m.forward) for m in model.modules() if "Norm" in type(m).__name__)
    assert norms
    for fused in (own, FusedLayers(norms), FusedLayers(norms[1:])):
        backbone.fused = fused
        graphed = Graphed(backbone, lambda *_: _, gradient_settings(models), True)
        assert (graphed.graphs in before) == (fused is own)
        graphed.close()


def gradient_settings(models: Any) -> tuple[Any, ...]:
    """Of the likelihood, as `nabla_fast.models.graphed` has them."""
    return "likelihood", CONFIG.backend, *head_settings(make_pair(*models, CONFIG).language_model)


def test_streams_differ_while_they_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch gives out 32 in turn."""

    class Stream:
        made = 0

        def __init__(self, _: torch.device) -> None:
            self.number = Stream.made % 32
            Stream.made += 1

        def __eq__(self, other: object) -> bool:
            return isinstance(other, Stream) and self.number == other.number

        def __hash__(self) -> int:
            return hash(self.number)

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    device = torch.device("cuda")
    held = [graphs.separate_stream(device) for _ in range(3)]
    for _ in range(100):
        assert graphs.separate_stream(device) not in held
    del held[1]
    assert 1 in {graphs.separate_stream(device).number for _ in range(32)}  # type: ignore[attr-defined]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_decode_changes_nothing_of_a_models_state(family: str) -> None:
    """Or its graphs would never be used again."""
    tokenizer = tiny_tokenizer()
    models = tiny_language_model(family), tokenizer, tiny_reward_model(family), tokenizer
    plain(models, prompts="is it on")
    before = [kept._state(model) for model in (models[0], models[2])]
    plain(models)
    assert [kept._state(model) for model in (models[0], models[2])] == before


def test_the_state_of_a_model_is_that_outside_of_blocks() -> None:
    """Another thread may decode, and exchange layers for that time."""
    model = tiny_language_model("qwen3", dtype=torch.float32)
    before = kept._state(model)
    fused = find(model)
    assert fused.norms
    with fused.active():
        assert kept._state(model) == before
        model.model.norm.forward = model.model.norm.forward
    assert kept._state(model) == before
