"""Which back end runs an operator."""

from __future__ import annotations

import pytest
import torch

from nabla_fast import ops
from nabla_fast.ops import backends, cuda, measured
from nabla_fast.testing.operators import dto_arguments


def test_the_environment_chooses_where_the_setting_is_auto(monkeypatch):
    assert backends.resolve("relaxed_stats", "auto", "cpu") == "native"
    monkeypatch.setenv("NABLA_FAST_BACKEND", "reference")
    assert backends.resolve("relaxed_stats", "auto", "cpu") == "reference"
    assert backends.resolve("relaxed_stats", "native", "cpu") == "native"
    monkeypatch.setenv("NABLA_FAST_BACKEND", "tpu")
    with pytest.raises(ValueError, match=r"backend must be one of .* got 'tpu'"):
        backends.resolve("relaxed_stats", "auto", "cpu")


def test_a_back_end_that_cannot_run_is_refused_with_the_reason(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"'triton' cannot be used on cpu: it runs on CUDA, or .* TRITON_INTERPRET"):
        backends.resolve("relaxed_stats", "triton", "cpu")
    with pytest.raises(ValueError, match=r"'cuda' cannot be used on cpu: it does not run on cpu"):
        backends.resolve("relaxed_stats", "cuda", "cpu")


def on_a_gpu(monkeypatch, *, missing=()):
    """As if there were a GPU; ``missing`` back ends say that they are broken."""

    def why_not(operator, backend, device_type):
        if backend in missing:
            return "it is broken"
        return f"it has no {operator}" if backend == "cuda" and operator not in ("dto_step", "token_diff") else None

    monkeypatch.setattr(backends, "why_not", why_not)
    monkeypatch.setattr(measured, "_name", lambda device: "a GPU that nobody measured")
    backends._warn.cache_clear()
    return lambda operator, *more: backends.resolve(operator, "auto", "cuda", *more)


def test_auto_on_a_gpu(monkeypatch, recwarn):
    resolve = on_a_gpu(monkeypatch)
    chosen = {operator: resolve(operator) for operator in backends.OPERATORS}
    assert {operator for operator, name in chosen.items() if name == "cuda"} == {"dto_step", "token_diff"}
    assert set(chosen.values()) == {"cuda", "triton"}
    assert resolve("dto_step", torch.float64) == resolve("relaxed_stats", torch.float64) == "reference"
    assert not recwarn.list


CASES = {
    "dto_step, one latents row": {"fastest": "triton", "kernels": {"cuda": 5, "triton": 7}},
    "dto_step, one logits row": {"fastest": "triton", "kernels": {"cuda": 4, "triton": 7}},
    "token_diff": {"fastest": "reference", "kernels": {"cuda": 1, "triton": 1}},
}


def test_auto_on_a_gpu_begins_with_what_was_measured_to_be_the_fastest(monkeypatch):
    """On such a GPU, in that case, by kernels that have not changed since; it has to be there, too."""
    resolve = on_a_gpu(monkeypatch)
    name = ["GPU A"]
    monkeypatch.setattr(measured, "table", lambda: {"GPU A": CASES})
    monkeypatch.setattr(measured, "_name", lambda device: name[0])
    monkeypatch.setattr(
        measured, "KERNELS", {"dto_step": {"cuda": 5, "triton": 7}, "token_diff": {"cuda": 1, "triton": 1}}
    )
    assert resolve("dto_step", torch.float32, "dto_step, one latents row") == "triton"
    assert resolve("dto_step", torch.float64, "dto_step, one latents row") == "reference"
    assert resolve("dto_step", torch.float32, "dto_step, one logits row") == "cuda"  # an older kernel
    assert resolve("dto_step", torch.float32, "dto_step, all latents rows") == resolve("dto_step") == "cuda"
    assert resolve("token_diff") == "reference"
    assert resolve("relaxed_stats") == "triton"
    assert backends.resolve("dto_step", "cuda", "cuda", torch.float32, "dto_step, one latents row") == "cuda"
    on_a_gpu(monkeypatch, missing=("triton",))
    monkeypatch.setattr(measured, "_name", lambda device: name[0])
    with pytest.warns(UserWarning, match="goes without its triton back end"):
        assert resolve("dto_step", torch.float32, "dto_step, one latents row") == "cuda"
    name[0] = "GPU B"
    assert resolve("token_diff") == "cuda"


def test_cases_are_those_of_the_benchmarks(monkeypatch):
    def case(latents, rows, gradient):
        weight = torch.zeros(3, 2)
        tables = ops.Tables(ops.Head(weight), weight, weight, 0.1)
        state = [torch.zeros(rows, 2 if latents else 3)] * 3
        arguments = dto_arguments(
            *state, torch.zeros(rows), torch.zeros(rows), torch.ones(1), gradient, tables, latents=latents
        )
        return ops.OPERATORS["dto_step"]._case(*arguments)

    factors = ops.TokenGradient(*[torch.zeros(2, 2)] * 3)
    assert case(True, 1, torch.zeros(1, 3)) == "dto_step, one latents row"
    assert case(False, 1, torch.zeros(1, 3)) == "dto_step, one logits row"
    assert case(True, 2, factors) == "dto_step, all latents rows"
    assert case(True, 2, torch.zeros(2, 3)) == "dto_step"
    known = {entry["case"] for entry in measured.report()}
    assert {"dto_step, one latents row", "dto_step, one logits row", "dto_step, all latents rows"} <= known


def test_auto_on_a_gpu_falls_back_with_one_warning_a_back_end(monkeypatch):
    resolve = on_a_gpu(monkeypatch, missing=("cuda", "triton"))
    with pytest.warns(UserWarning, match="goes without its .* back end, and is slower: it is broken") as told:
        chosen = {resolve(operator) for operator in 3 * list(backends.OPERATORS)}
    assert chosen == {"reference"}
    assert len(told) == 2


def test_the_cuda_back_end_is_judged_by_the_gpu_asked_for(monkeypatch):
    """The current GPU is number 0; the kernels run on number 1 alone."""
    monkeypatch.setattr(cuda, "_why_not_built", lambda: None)
    monkeypatch.setattr(cuda, "_why_not_on", lambda index: None if index == 1 else f"not on {index}")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(measured, "_name", lambda device: "a GPU that nobody measured")
    backends._warn.cache_clear()
    assert backends.why_not("token_diff", "cuda", torch.device("cuda", 1)) is None
    assert backends.resolve("token_diff", "auto", torch.device("cuda:1")) == "cuda"
    for current in ("cuda", torch.device("cuda", 0)):
        assert backends.why_not("token_diff", "cuda", current) == "not on 0"
        with pytest.warns(UserWarning, match="goes without its cuda back end"):
            assert backends.resolve("token_diff", "auto", current) == "triton"
        backends._warn.cache_clear()


def test_every_operator_has_a_reference_and_availability_is_told_for_each():
    table = backends.availability()
    assert set(table) == set(backends.OPERATORS)
    for reasons in table.values():
        assert set(reasons) == {"reference", "native", "triton", "cuda"}
        assert reasons["reference"] is None
        assert reasons["native"] is None


@pytest.mark.parametrize("backend", ["auto", "numpy"])
def test_a_back_end_that_is_none_is_refused_by_the_operators_themselves(backend):
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=rf"^backend must be one of reference, .* got '{backend}'"):
        torch.ops.nabla_fast.token_diff(tokens, tokens, backend)
