"""The example of docs/theory.md: its parts against autograd, and what the page says of its methods."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def theory() -> Any:
    file = Path(__file__).resolve().parent.parent / "examples" / "theory.py"
    spec = importlib.util.spec_from_file_location("example_theory", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_optimum_maximises_the_regularised_reward(theory: Any) -> None:
    problem = theory.make_problem()
    assert float(problem.log_policy.exp().sum()) == pytest.approx(1)

    def regularised(p: torch.Tensor) -> float:
        return float((p * (problem.reward - theory.BETA * (p.log() - problem.log_policy))).sum())

    best = regularised(problem.optimum)
    for seed in range(20):
        noise = torch.randn(theory.COUNT, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert regularised((problem.optimum.log() + 0.1 * noise).softmax(0)) < best


def test_the_token_gradient_is_that_of_the_multilinear_extension(theory: Any) -> None:
    problem = theory.make_problem()
    objective = -(theory.BETA * problem.log_policy + problem.reward)
    for tokens in (problem.sequences[7], problem.sequences[50]):
        rows = torch.nn.functional.one_hot(tokens, theory.TOKENS).double().requires_grad_()
        weight = torch.einsum("a,b,c->abc", *rows).flatten()
        (gradient,) = torch.autograd.grad((weight * objective).sum(), rows)
        torch.testing.assert_close(theory.token_gradient(tokens[None], problem)[0], gradient)


def test_the_drift_is_the_gradient_of_the_smoothed_optimum(theory: Any) -> None:
    problem = theory.make_problem()
    table, weight = problem.one_hot, problem.log_policy + problem.reward / theory.BETA
    x = torch.randn(5, table.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x.requires_grad_()
    log_density = (weight - torch.cdist(x, table).square() / (2 * theory.WIDTH**2)).logsumexp(1)
    (gradient,) = torch.autograd.grad(log_density.sum(), x)
    torch.testing.assert_close(theory.drift(x.detach(), table, weight), gradient, rtol=1e-9, atol=1e-9)


def test_redrawn_tokens_come_closer_in_every_step(theory: Any) -> None:
    divergence = theory.redraw_exactly(theory.make_problem(), 60)
    assert divergence[0] > 1
    assert all(later < earlier for earlier, later in itertools.pairwise(divergence))
    assert divergence[-1] < 1e-3


def test_noise_reaches_the_optimum_and_what_has_none_does_not(theory: Any, tmp_path: Path) -> None:
    results = theory.measure(particles=2000, flow_steps=1500)
    apart = {name: values[0] for name, values in results.table.items()}
    start = apart["policy, exactly"]
    assert apart["flow with noise"] < 0.15 < start / 4
    assert apart["tokens redrawn by the gradient"] < 0.08
    for name in ("flow without noise", "DTO", "DTO, kept if the reward is higher"):
        assert apart[name] > 0.5
    # It is the objective that DTO raises.
    value = {name: values[1] for name, values in results.table.items()}
    assert value["DTO"] > value["policy, exactly"] + 0.5
    # Best-of-n comes nearer, and goes away again.
    assert 0.2 < min(results.bests.values()) < min(results.bests[2], results.bests[1024])
    theory.draw(results, tmp_path / "theory.png")
    assert (tmp_path / "theory.png").read_bytes().startswith(b"\x89PNG")
