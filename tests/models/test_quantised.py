"""Quantised models: loaded by name and by path, their gradients, whole decodes, and what is refused."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
)

import nabla_fast as nf
from nabla_fast import graphs
from nabla_fast.generate import make_pair
from nabla_fast.models import linear_layers, quantised_layers
from nabla_fast.models.language_model import LanguageModel
from nabla_fast.models.loading import load_language_model, load_reward_model
from nabla_fast.objective import Objective, Request
from nabla_fast.sequence import Sequence
from nabla_fast.testing.models import CLOSING, prompt_ids, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENIZER = tiny_tokenizer()
V = len(TOKENIZER)
CHAT = [{"role": "user", "content": "what is 3 times 4"}]
PROMPTS = ["what is 3 times 4", "is it on"]
CONFIG = nf.NablaConfig(
    max_new_tokens=6,
    max_rollouts=2,
    max_iters=2,
    learning_rate=0.3,
    nll_coeff=0.4,
    reward_coeff=-1.3,
    confidence_threshold=None,
    gradient_threshold=None,
    rollout=nf.Sampling(temperature=1.0, top_p=0.95),
)
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


def torchao(kind: str) -> Any:
    from torchao.quantization import Float8WeightOnlyConfig, IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup
    from transformers import TorchAoConfig

    # torchao's own 4-bit layouts need a GPU; here the same numbers are held in bytes.
    int4 = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
    return TorchAoConfig(int4 if kind == "int4" else Float8WeightOnlyConfig())


def nested() -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True)


KINDS: dict[str, Callable[[], Any]] = {
    "int8": lambda: "int8",
    "int4": lambda: torchao("int4"),
    "float8": lambda: torchao("float8"),
    "bnb-8bit": lambda: "bnb-8bit",
    "bnb-4bit": lambda: "bnb-4bit",
    "bnb-4bit nested": nested,
}


def kinds(*names: str) -> list[Any]:
    """Values of a parameter; all of `KINDS` if none is named."""
    return [pytest.param(kind, marks=needs_bitsandbytes if "bnb" in kind else ()) for kind in names or KINDS]


def config_of(tied: bool) -> LlamaConfig:
    # Blocks of 64 numbers are what 4-bit layers quantise.
    return LlamaConfig(
        vocab_size=V,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        initializer_range=0.15,
        pad_token_id=TOKENIZER.pad_token_id,
        eos_token_id=TOKENIZER.eos_token_id,
        bos_token_id=None,
        tie_word_embeddings=tied,
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    made = {}
    for name, model_class, labels, tied in (
        ("language", LlamaForCausalLM, 1, False),
        ("tied", LlamaForCausalLM, 1, True),
        ("reward", LlamaForSequenceClassification, 1, True),
        ("process", LlamaForTokenClassification, 2, True),
    ):
        torch.manual_seed(len(made))
        config = config_of(tied)
        config.num_labels = labels
        made[name] = root / name
        model_class(config).save_pretrained(made[name])
        TOKENIZER.save_pretrained(made[name])
    return made


def loaded(folders: dict[str, Path], kind: str, **options: Any) -> tuple[Any, Any]:
    options = {"device": "cpu", "dtype": "float32", "quantization": KINDS[kind](), **options}
    return load_language_model(folders["language"], **options)[0], load_reward_model(folders["reward"], **options)[0]


def quantised(model: nn.Module) -> dict[str, Any]:
    """The layers whose weights are no plain numbers."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {name: x for name, x in layers.items() if not quantised_layers.is_plain(x.weight)}


def numbers(model: Any, model_class: Any) -> Any:
    """The same model in float64, with plain layers that multiply by the numbers that the quantised ones stand for.

    Read from products with the identity, which even a layer that rounds its inputs to 8 bits leaves as it is.
    """
    own = model_class(copy.deepcopy(model.config)).double().eval()
    own.config.quantization_config = None
    layers = quantised(model)
    weights = {name: value for name, value in model.state_dict().items() if name.rpartition(".")[0] not in layers}
    for name, layer in layers.items():
        with torch.no_grad():
            weights[f"{name}.weight"] = layer(torch.eye(layer.in_features, dtype=model.dtype)).T
    missing, _ = own.load_state_dict({name: x.double() for name, x in weights.items() if x.is_floating_point()}, False)
    assert not missing
    return own.requires_grad_(False)


def gradients(language: Any, reward: Any, request: Request) -> tuple[Tensor, Tensor]:
    """Those of the objective with respect to both models' embeddings of the response (m, d), by autograd."""
    prompt, response = torch.tensor(request.sequence.prompt_ids), request.response
    embed = language.get_input_embeddings()
    ahead = embed(response).requires_grad_()
    logits = language(inputs_embeds=torch.cat([embed(prompt), ahead])[None]).logits[0, len(prompt) - 1 : -1]
    log_pi = logits.log_softmax(-1).gather(1, response[:, None]).sum()
    (first,) = torch.autograd.grad(-CONFIG.nll_coeff * log_pi, ahead)
    embed = reward.get_input_embeddings()
    ahead = embed(response).requires_grad_()
    closing = torch.tensor(TOKENIZER(CLOSING)["input_ids"])
    score = reward(inputs_embeds=torch.cat([embed(prompt), ahead, embed(closing)])[None]).logits[0, 0]
    (second,) = torch.autograd.grad(-CONFIG.reward_coeff * score, ahead)
    return first, second


def apart(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs).norm() / theirs.norm())


def decode(models: tuple[Any, Any], prompts: Any = PROMPTS, **changes: Any) -> list[list[int]]:
    out = nf.generate(models[0], TOKENIZER, models[1], TOKENIZER, prompts, CONFIG.replace(**changes))
    return [tokens.tolist() for tokens in out.sequences]


def computes_in_bfloat16() -> bool:
    """Whether bitsandbytes multiplies 4-bit weights in bfloat16 whatever the model's dtype is, as its kernel for
    processors with AVX512-BF16 does."""
    from bitsandbytes.functional import has_avx512bf16

    return bool(has_avx512bf16())


@pytest.mark.parametrize("kind", kinds())
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_are_those_of_the_numbers_that_weights_stand_for(
    kind: str, dtype: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_layers, "_LEAST", 0)  # as with layers of the usual size
    language, reward = loaded(folders, kind, dtype=dtype)
    assert len(quantised(language)) == len(quantised(reward)) == 14
    pair = make_pair(language, TOKENIZER, reward, TOKENIZER, CONFIG)
    assert pair.language_model.backbone.cache_kind == pair.reward_model.backbone.cache_kind == "prefix"
    frame = pair.reward_model.chat_frame(CHAT)
    response = torch.tensor(TOKENIZER("the ans is 12", add_special_tokens=False)["input_ids"])
    request = Request(Sequence(tuple(prompt_ids(TOKENIZER, CHAT)), (), 0, 64, frame), response, 0)
    (ours,) = Objective(pair.language_model, pair.reward_model, CONFIG).evaluate([request])
    exact = numbers(language, LlamaForCausalLM), numbers(reward, LlamaForSequenceClassification)
    found = [apart(a, b) for a, b in zip(ours.factors[1:], gradients(*exact, request), strict=True)]
    rounded = dtype == "bfloat16" or (kind.startswith("bnb-4bit") and computes_in_bfloat16())
    assert max(found) < (0.1 if rounded else 1e-4)


@pytest.mark.parametrize("kind", kinds("int8", "int4", "bnb-8bit", "bnb-4bit"))
def test_a_decode_is_the_same_again_and_alone(kind: str, folders: dict[str, Path]) -> None:
    models = loaded(folders, kind)
    first = decode(models)
    assert decode(models) == first
    assert [decode(models, [prompt])[0] for prompt in PROMPTS] == first
    assert decode(models, gradient_cache=False, checkpoint_activations=True) == first
    # Outside of a call, the model is its owner's.
    assert not any("forward" in vars(layer) for layer in quantised(models[0]).values())


@needs_bitsandbytes
def test_graphs_hold_exact_products(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_layers, "_mkl_is_slow", lambda: False)  # oneDNN's products cannot be traced
    monkeypatch.setattr(graphs, "TRACE_ON_CPU", True)
    models = loaded(folders, "bnb-8bit")
    config = CONFIG.replace(backend="reference")
    out = nf.generate(models[0], TOKENIZER, models[1], TOKENIZER, PROMPTS[0], config)
    nf.clear_graphs()
    assert out.stats.graphs["captures"] > 0
    assert [y.tolist() for y in out.sequences] == decode(models, PROMPTS[:1], backend="reference", graphs=False)


@pytest.mark.parametrize("kind", kinds("int8", "bnb-8bit", "bnb-4bit nested"))
def test_checkpoints_that_were_saved_quantised(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    models = loaded(folders, kind)
    for model, name in zip(models, ("language", "reward"), strict=True):
        model.save_pretrained(tmp_path / name)
        TOKENIZER.save_pretrained(tmp_path / name)
    again = [load(tmp_path / name, device="cpu")[0] for load, name in LOADERS]
    assert [len(quantised(model)) for model in again] == [14, 14]
    assert decode((again[0], again[1])) == decode(models)
    with pytest.raises(
        ValueError, match=r"path is .*, which cannot be loaded: .* quantised already, by .* leave that out"
    ):
        load_language_model(tmp_path / "language", quantization="int8")


LOADERS = ((load_language_model, "language"), (load_reward_model, "reward"))


@pytest.mark.parametrize("kind", kinds("int8", "float8", "bnb-4bit"))
def test_process_reward_models(kind: str, folders: dict[str, Path]) -> None:
    options = {"device": "cpu", "dtype": "float32", "quantization": KINDS[kind](), "step_separator": "\n"}
    process, _ = load_reward_model(folders["process"], **options)
    # transformers would quantise the head of a token classifier.
    assert len(quantised(process.model)) == (14 if isinstance(options["quantization"], str) else 15)
    assert decode((loaded(folders, kind)[0], process)) == decode((loaded(folders, kind)[0], process))


@needs_bitsandbytes
def test_inputs_of_8_bit_layers_are_not_rounded(folders: dict[str, Path]) -> None:
    """As bitsandbytes does: rows would depend on their last bits, and their gradients be those of something else."""
    language, _ = loaded(folders, "bnb-8bit")
    layer = language.model.layers[0].mlp.up_proj
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    exact = x.double() @ numbers(language, LlamaForCausalLM).model.layers[0].mlp.up_proj.weight.T
    own = layer(x)
    with quantised_layers.exact(language):
        for rows in (x, x.clone().requires_grad_(), x.expand(9, 3, 64)):
            assert apart(layer(rows).detach().reshape(-1, 3, 128)[0], exact) < 1e-4
    assert torch.equal(layer(x), own)
    assert apart(own, exact) > 1e-3


@needs_bitsandbytes
def test_4_bit_layers_are_not_packed_for_kernels_without_a_gradient(folders: dict[str, Path]) -> None:
    """As they are on processors with AVX512-BF16, in their first pass without a gradient."""
    models = loaded(folders, "bnb-4bit")
    expected = decode(models)
    for layer in (*quantised(models[0]).values(), *quantised(models[1]).values()):
        layer.support_avx512bf16_for_cpu = True
    assert decode(models) == expected
    for layer in quantised(models[0]).values():
        assert not getattr(layer.weight.quant_state, "packing_format_for_cpu", False)
        assert layer.support_avx512bf16_for_cpu


@needs_bitsandbytes
def test_half_precision_inside_a_float32_model_is_compared_as_such(folders: dict[str, Path]) -> None:
    from transformers import BitsAndBytesConfig

    inside = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    language, _ = load_language_model(folders["language"], device="cpu", dtype="float32", quantization=inside)
    assert language.dtype == torch.float32
    assert quantised_layers.computes_in(language) == torch.bfloat16
    assert LanguageModel(language, TOKENIZER).backbone.cache_kind == "prefix"


@pytest.mark.parametrize("back_end", ["torchao", pytest.param("bnb-4bit", marks=needs_bitsandbytes)])
def test_a_quantised_output_head_is_copied_once(back_end: str, folders: dict[str, Path]) -> None:
    if back_end == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        model, _ = load_language_model(folders["language"], device="cpu", dtype="float32")
        quantize_(model, Int8WeightOnlyConfig())
    else:
        from transformers import BitsAndBytesConfig

        if computes_in_bfloat16():
            pytest.skip(
                "bitsandbytes' kernel for AVX512-BF16 refuses a vocabulary that is no multiple of 32; torchao's "
                "head is tested, and this one on other processors"
            )
        everything = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=[])
        model = AutoModelForCausalLM.from_pretrained(folders["language"], quantization_config=everything).eval()
    with torch.no_grad():
        expected = model.lm_head(torch.eye(64)).T
    with pytest.warns(UserWarning, match=r"its output head is quantised, .* a copy in float32 takes 0 MB"):
        ours = LanguageModel(model, TOKENIZER)
    torch.testing.assert_close(ours.head.weight, expected, rtol=1e-5, atol=1e-6)
    assert LanguageModel(model, TOKENIZER).head.weight.data_ptr() == ours.head.weight.data_ptr()
    reward, _ = load_reward_model(folders["reward"], device="cpu", dtype="float32")
    assert decode((model, reward)) == decode((model, reward), graphs=False)


def test_quantised_input_embeddings_are_copied(folders: dict[str, Path]) -> None:
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    model, _ = load_language_model(folders["language"], device="cpu", dtype="float32")
    reward, _ = load_reward_model(folders["reward"], device="cpu", dtype="float32")
    plain = copy.deepcopy(model), copy.deepcopy(reward)
    recipe = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
    for one, other in ((model, plain[0]), (reward, plain[1])):
        quantize_(one, recipe, lambda module, name: isinstance(module, nn.Embedding))
        table = one.get_input_embeddings()(torch.arange(V)).detach()
        other.get_input_embeddings().weight = nn.Parameter(table, requires_grad=False)
    with pytest.warns(UserWarning, match="its input embedding is quantised"):
        found = decode((model, reward))
    assert found == decode(plain)


@needs_bitsandbytes
def test_a_quantised_head_that_is_tied_is_refused(folders: dict[str, Path]) -> None:
    from transformers import BitsAndBytesConfig

    everything = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=[])
    model = AutoModelForCausalLM.from_pretrained(folders["tied"], quantization_config=everything).eval()
    with pytest.raises(ValueError, match=r"its output head is a Linear8bitLt tied to .* \(llm_int8_skip_modules"):
        LanguageModel(model, TOKENIZER)


class _Integers(nn.Linear):
    """A quantised layer whose gradient is a part of what it should be."""

    def __init__(self, layer: nn.Linear, part: float) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False)
        self.part = part
        scale = layer.weight.abs().max() / 127
        self.register_buffer("scale", scale)
        self.weight = nn.Parameter((layer.weight / scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        out = x @ (self.weight.to(x.dtype) * self.scale).T
        return self.part * out + (1 - self.part) * out.detach()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("part", "fault"), [(1.0, None), (0.5, "has a gradient that is not"), (0.0, "gradient")])
def test_a_quantised_layer_with_another_gradient_is_named(
    dtype: str, part: float, fault: str | None, folders: dict[str, Path]
) -> None:
    model, _ = load_language_model(folders["language"], device="cpu", dtype=dtype)
    model.model.layers[1].mlp.down_proj = _Integers(model.model.layers[1].mlp.down_proj, part)
    if fault is None:
        assert LanguageModel(model, TOKENIZER).backbone.cache_kind == "prefix"
        return
    with pytest.raises(
        ValueError, match=rf"^model \(.*\) cannot be used: its layer model.layers.1.mlp.down_proj .*{fault}"
    ):
        LanguageModel(model, TOKENIZER)


def test_layers_that_round_their_inputs_are_refused(folders: dict[str, Path]) -> None:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model, _ = load_language_model(folders["language"], device="cpu", dtype="float32")
    quantize_(model.model.layers, Int8DynamicActivationInt8WeightConfig())
    with pytest.raises(
        ValueError, match=r"its layer model.layers.0.self_attn.q_proj .* passes no gradient on; load it"
    ):
        LanguageModel(model, TOKENIZER)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantization": "4bit"}, "quantization is '4bit'; use one of none, int8, bnb-8bit, bnb-4bit, or in Python"),
        ({"quantization": 4}, "quantization is 4; use one of none, int8"),
        (
            {"quantization": "int8", "dtype": "float64"},
            "dtype is float64, and quantization 'int8'; use float32, bfloat16",
        ),
    ],
)
def test_refusals_name_what_is_accepted(options: dict[str, Any], message: str, folders: dict[str, Path]) -> None:
    for load, name in LOADERS:
        with pytest.raises(ValueError, match=message):
            load(folders[name], device="cpu", **options)


@pytest.mark.parametrize(
    ("name", "package"), [("int8", "torchao"), ("bnb-4bit", "bitsandbytes"), ("int8", "accelerate")]
)
def test_a_missing_package_is_named(
    name: str, package: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else there(name))
    with pytest.raises(ImportError, match=rf"quantization is '{name}', which needs {package}; run pip install \"nabla"):
        load_language_model(folders["language"], device="cpu", dtype="float32", quantization=name)
