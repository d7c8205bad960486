"""Decodes and operators on a GPU. What each kernel computes is tested in tests/ops, by the back ends "-gpu".

Without a GPU nothing here can run; the same code runs on the CPU in test_decoder.py, test_dto.py and test_operators.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import test_attention
import test_decoder
import torch
from test_operators import DIFFERENTIABLE, NAMES, calls
from torch import Tensor

import nabla_fast as nf
from nabla_fast import ops
from nabla_fast.models import loading
from nabla_fast.models.fused_layers import find
from nabla_fast.models.numerics import is_close
from nabla_fast.ops import backends
from nabla_fast.testing import operators as operator_inputs
from nabla_fast.testing.models import save_pair, tiny_language_model, tiny_reward_model, tiny_tokenizer

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BACKENDS = ("reference", "triton", "cuda")
PROMPTS = test_decoder.PROMPTS
VARIANTS = [*test_decoder.VARIANTS, {"checkpoint_activations": True}, {"draft_tokens": 0}, {"max_batch_size": 2}]

pytestmark = pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU: torch sees none")


def on_the_gpu(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.detach().to(DEVICE)
    return type(x)(map(on_the_gpu, x)) if isinstance(x, (list, tuple)) else x


def models(dtype: torch.dtype = torch.float32, family: str = "llama", device: torch.device = DEVICE) -> tuple[Any, ...]:
    tokenizer = tiny_tokenizer()
    language_model, reward_model = tiny_language_model(family, dtype=dtype), tiny_reward_model("qwen3", dtype=dtype)
    return language_model.to(device), tokenizer, reward_model.to(device), tokenizer


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_graphs_decode_what_is_decoded_without(dtype: torch.dtype, family: str) -> None:
    """Gradients, rewards and rollouts as CUDA graphs: the same tokens and counters."""
    config = test_decoder.BASE.replace(max_rollouts=6)
    pair = models(dtype, family)
    ours, plain = (nf.generate(*pair, PROMPTS, config.replace(graphs=on)) for on in (True, False))
    assert ours.stats.graphs["captures"] > 0
    assert plain.stats.graphs == {}
    assert tokens(ours) == tokens(plain)
    assert ours.rewards == pytest.approx(plain.rewards, abs=1e-8 if dtype == torch.float64 else 1e-3)
    assert ours.stats.totals.counters() == plain.stats.totals.counters()


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_later_calls_use_graphs_again(family: str) -> None:
    """Also after weights have changed in place, of which Gemma's norms keep something."""
    pair = models(torch.float32, family)
    config = test_decoder.BASE
    for _ in range(2):
        nf.generate(*pair, PROMPTS, config)
    third = nf.generate(*pair, PROMPTS, config)
    assert third.stats.graphs["captures"] == 0
    assert tokens(third) == tokens(nf.generate(*pair, PROMPTS, config.replace(graphs=False)))
    with torch.no_grad():
        for model in (pair[0], pair[2]):
            for weight in model.parameters():
                weight.mul_(1.5)
    again = nf.generate(*pair, PROMPTS, config)
    assert tokens(again) == tokens(nf.generate(*pair, PROMPTS, config.replace(graphs=False)))
    before = torch.cuda.memory_reserved()
    del third, again
    nf.clear_graphs()
    assert torch.cuda.memory_reserved() < before


def test_a_model_that_moves_is_captured_anew() -> None:
    pair = models(torch.float64)
    before = nf.generate(*pair, PROMPTS, test_decoder.BASE)
    for model in (pair[0], pair[2]):
        model.cpu()
        model.to(DEVICE)
    assert tokens(nf.generate(*pair, PROMPTS, test_decoder.BASE)) == tokens(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_fused_layers(family: str, dtype: torch.dtype) -> None:
    """By PyTorch's and our own kernels: as exact as the model's own layers are."""
    exact = tiny_language_model(family, dtype=torch.float64).to(DEVICE)
    model = models(dtype, family)[0].requires_grad_(False)
    exact.load_state_dict({name: x.double() for name, x in model.state_dict().items()})
    fused = find(model)
    assert fused.norms
    assert fused.rotary
    ids = torch.arange(4, 40, device=DEVICE).unsqueeze(0)
    with torch.no_grad():
        meant, plain = exact(ids).logits, model(ids).logits
        with fused.active():
            ours = model(ids).logits
    errors = [(x.double() - meant).norm() for x in (ours, plain)]
    assert errors[0] < 1.3 * errors[1] + 1e-9


def test_layers_that_are_compiled() -> None:
    pair, config = models(torch.float32, "qwen3"), test_decoder.BASE.replace(max_new_tokens=6, max_rollouts=2)
    ours, plain = (nf.generate(*pair, PROMPTS[:1], config.replace(compile=on)) for on in (True, False))
    assert ours.stats.graphs["compile_seconds"] > 0
    assert ours.stats.graphs["captures"] > 0
    assert tokens(ours) == tokens(plain)


def tokens(output: nf.NablaOutput) -> list[list[int]]:
    return [sequence.tolist() for sequence in output.sequences]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_all_back_ends_decode_the_same_tokens(variant: dict[str, Any]) -> None:
    require_same_decodes(BACKENDS, DEVICE, test_decoder.BASE.replace(**variant))


def require_same_decodes(back_ends: tuple[str, ...], device: torch.device, config: nf.NablaConfig) -> None:
    """Tokens, rewards and rollouts; the first of ``back_ends`` is what the others are held against."""
    pair = models(device=device)
    outputs = {backend: nf.generate(*pair, PROMPTS, config.replace(backend=backend)) for backend in back_ends}
    expected = outputs[back_ends[0]]
    assert expected.stats.totals.revisions
    for backend, output in outputs.items():
        assert tokens(output) == tokens(expected), backend
        assert output.rewards == pytest.approx(expected.rewards, abs=1e-4)
        counters, meant = output.stats.totals.counters(), expected.stats.totals.counters()
        assert counters["rollouts"] == meant["rollouts"]


@pytest.mark.parametrize("variant", VARIANTS[:8], ids=str)
def test_float64_decodes_what_the_cpu_decodes(variant: dict[str, Any]) -> None:
    config = test_decoder.BASE.replace(**variant)
    places = (DEVICE, torch.device("cpu"))
    here, there = (nf.generate(*models(torch.float64, device=place), PROMPTS, config) for place in places)
    assert tokens(here) == tokens(there)
    assert here.rewards == pytest.approx(there.rewards, abs=1e-8)
    assert here.stats.totals.counters() == there.stats.totals.counters()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_half_precision_decodes(family: str, dtype: torch.dtype) -> None:
    output = nf.generate(*models(dtype, family), PROMPTS, test_decoder.BASE)
    assert all(0 < len(sequence) <= test_decoder.BASE.max_new_tokens for sequence in output.sequences)
    assert all(map(torch.isfinite, map(torch.tensor, output.rewards)))
    assert output.stats.totals.dto_iterations > 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("update_postfix", [False, True])
@pytest.mark.parametrize("parameterization", ["latents", "logits"])
def test_an_optimization_ends_where_it_does_in_float64(
    parameterization: str, update_postfix: bool, backend: str
) -> None:
    config = nf.NablaConfig(
        max_iters=12, learning_rate=0.1, nll_coeff=0.4, parameterization=parameterization, update_postfix=update_postfix
    )
    width = 24 if parameterization == "latents" else len(tiny_tokenizer())
    start = operator_inputs.randn(5, width, seed=3)
    messages = [{"role": "user", "content": "what is 3 times 4"}]

    def optimize(dtype: torch.dtype, device: torch.device, backend: str) -> Any:
        pair, own = models(dtype, device=device), start.to(device, dtype)
        return nf.dto.optimize(*pair, messages, [5, 9], own, config.replace(backend=backend))

    meant = optimize(torch.float64, torch.device("cpu"), "reference")
    got = optimize(torch.float32, DEVICE, backend)
    assert got.tokens.tolist() == meant.tokens.tolist()
    assert got.gradient_evaluations == meant.gradient_evaluations
    torch.testing.assert_close(got.parameters.double().cpu(), meant.parameters, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize(
    ("name", "package"), [("flash_attention_2", "flash_attn"), ("flash_attention_3", "flash_attn_interface")]
)
def test_flash_attention_gives_the_gradients_of_sdpa(name: str, package: str, family: str, tmp_path: Path) -> None:
    """Of responses of several lengths behind left-padded caches of several lengths, up to the rounding of bfloat16."""
    pytest.importorskip(package, reason=f"{package} is not installed, so only SDPA can be tested")
    folders = save_pair(tmp_path, family, dtype=torch.bfloat16)
    found = []
    for attention in (name, "sdpa"):
        how: dict[str, Any] = {"device": DEVICE, "dtype": "bfloat16", "attn_implementation": attention}
        pair = *loading.load_language_model(folders[0], **how), *loading.load_reward_model(folders[1], **how)
        assert pair[0].config._attn_implementation == attention
        found.append(test_attention.evaluations(pair))
    for ours, theirs in zip(*found, strict=True):
        assert ours.reward == pytest.approx(theirs.reward, rel=0.1, abs=0.3)
        for mine, other in zip(ours.factors, theirs.factors, strict=True):
            # The last token has no gradient of its embedding.
            moving = other.float().norm(dim=-1) > 0
            assert is_close(mine[moving], other[moving])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("variant", VARIANTS[:2], ids=str)
def test_the_reward_model_on_a_second_gpu_changes_nothing(variant: dict[str, Any]) -> None:
    config = test_decoder.BASE.replace(**variant)
    here, there = models(torch.float64), models(torch.float64)
    there[2].to("cuda:1")
    expected, output = nf.generate(*here, PROMPTS, config), nf.generate(*there, PROMPTS, config)
    assert tokens(output) == tokens(expected)
    assert output.rewards == pytest.approx(expected.rewards, abs=1e-9)


def test_the_drop_in_takes_what_transformers_gives_it() -> None:
    language_model, tokenizer, *rest = models()
    tokenizer.padding_side = "left"
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    batch = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True
    ).to(DEVICE)
    drop_in = nf.custom_generate(tokenizer, *rest, test_decoder.BASE, messages=chats)
    rows = language_model.generate(**batch, custom_generate=drop_in)
    expected = nf.generate(language_model, tokenizer, *rest, PROMPTS, test_decoder.BASE)
    width = batch["input_ids"].shape[1]
    for row, sequence in zip(rows, expected.sequences, strict=True):
        assert row.device.type == DEVICE.type
        assert row[width : width + len(sequence)].tolist() == sequence.tolist()


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_operators_and_their_gradients(name: str, dtype: torch.dtype, backend: str) -> None:
    """Through the dispatcher, against the reference on the CPU."""
    if backend == "cuda" and backends.why_not(name.split("_factors")[0], "cuda", "cuda") is not None:
        backend = backends.resolve("relaxed_stats", "cuda", "cuda")
    operator, arguments = calls(5, dtype, "reference")[name]
    if name.startswith("dto_step"):  # parameters and moments are float32
        arguments = (*(x.float() for x in arguments[:3]), *arguments[3:])
    own = (*on_the_gpu(arguments[:-1]), backend)
    differentiable = name in DIFFERENTIABLE
    for chosen in (arguments, own) if differentiable else ():
        chosen[0].requires_grad_()
    expected, got = operator(*arguments), operator(*own)
    expected, got = ((x,) if isinstance(x, Tensor) else x for x in (expected, got))
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    for one, other in zip(got, expected, strict=True):
        assert one.device.type == DEVICE.type
        torch.testing.assert_close(one.cpu(), other, rtol=tolerance, atol=tolerance)
    if differentiable:
        for chosen, results in ((arguments, expected), (own, got)):
            sum(x.float().sum() for x in results if x.requires_grad).backward()
            assert chosen[0].grad is not None
        torch.testing.assert_close(own[0].grad.cpu(), arguments[0].grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_opcheck_passes(name: str) -> None:
    operator, arguments = calls(3, torch.float32, "triton")[name]
    arguments = on_the_gpu(arguments)
    if name in DIFFERENTIABLE:
        arguments = (arguments[0].requires_grad_(), *arguments[1:])
    torch.library.opcheck(operator.default, arguments)


def test_operators_compile_in_one_graph() -> None:
    head = operator_inputs.head(1000, 64, scale=1 / 8, device=DEVICE)
    table = operator_inputs.randn(1000, 48, seed=3, device=DEVICE)

    def everything(h: Tensor) -> Tensor:
        stats = ops.linear_relaxed_stats(h, head)
        (hard,), token = ops.linear_straight_through_embedding(h, head, [table])
        likelihood = ops.linear_log_likelihood(h, head, token)
        return (hard.sum(-1) + likelihood + ops.linear_soft_embedding(h, head, table).sum(-1)) * stats.max_prob

    compiled = torch.compile(everything, fullgraph=True, dynamic=True)
    for rows in (3, 5):
        h = operator_inputs.randn(rows, 64, seed=rows, device=DEVICE).requires_grad_()
        expected, got = everything(h), compiled(h)
        torch.testing.assert_close(got, expected)
        pair = torch.autograd.grad(got.sum(), h), torch.autograd.grad(expected.sum(), h)
        torch.testing.assert_close(*pair)


def test_auto_is_the_fast_back_end_and_float64_the_reference() -> None:
    chosen = {operator: backends.resolve(operator, "auto", "cuda") for operator in backends.OPERATORS}
    assert {operator for operator, backend in chosen.items() if backend == "cuda"} == {"dto_step", "token_diff"}
    assert set(chosen.values()) == {"cuda", "triton"}
    assert backends.resolve("relaxed_stats", "auto", "cuda", torch.float64) == "reference"
