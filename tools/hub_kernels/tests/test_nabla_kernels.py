"""The operators against formulas in float64: by Triton on a GPU, or in its interpreter (TRITON_INTERPRET=1)."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from kernels import get_local_kernel

nabla = get_local_kernel(Path(__file__).resolve().parent.parent)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
BACKENDS = ["reference", "triton"] if INTERPRETED or DEVICE == "cuda" else ["reference"]
N, V, D, E, R = 3, 517, 32, 32, 24

by_backend = pytest.mark.parametrize("backend", BACKENDS)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator("cpu").manual_seed(seed)).to(DEVICE)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected.double(), rtol=2e-5, atol=2e-5)


def states(requires_grad: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    return randn(N, D).requires_grad_(requires_grad), randn(V, D, seed=1)


def test_nothing_is_imported_but_torch_and_triton() -> None:
    assert "nabla_fast" not in sys.modules
    assert not [name for name in dir(torch.ops) if name == "nabla_fast"]


@by_backend
def test_stats(backend: str) -> None:
    h, weight = states()
    z = 1.5 * h.double() @ weight.double().T
    p = torch.softmax(z / 0.7, -1)
    for stats in (
        nabla.linear_relaxed_stats(h, nabla.Head(weight, 1.5), 0.7, backend=backend),
        nabla.relaxed_stats(z.float(), 0.7, backend=backend),
    ):
        close(stats.max_prob, p.amax(-1))
        close(stats.lse, torch.logsumexp(z / 0.7, -1))
        close(stats.entropy, torch.special.entr(p).sum(-1))
        assert torch.equal(stats.token, z.argmax(-1))


@by_backend
def test_log_likelihood_and_its_gradient(backend: str) -> None:
    h, weight = states(requires_grad=True)
    tokens = torch.tensor([0, 40, V - 1], device=DEVICE)
    log_pi = nabla.linear_log_likelihood(h, nabla.Head(weight, 1.0, 5.0), tokens, backend=backend)
    (gradient,) = torch.autograd.grad(log_pi.sum(), h)
    exact = h.detach().double().requires_grad_()
    capped = 5 * torch.tanh(exact @ weight.double().T / 5)
    expected = torch.log_softmax(capped, -1)[torch.arange(N, device=DEVICE), tokens]
    close(log_pi.detach(), expected.detach())
    close(gradient, torch.autograd.grad(expected.sum(), exact)[0])


@by_backend
def test_embeddings_and_their_gradients(backend: str) -> None:
    h, weight = states(requires_grad=True)
    table, sent = randn(V, E, seed=2), randn(N, E, seed=3)
    head = nabla.Head(weight)
    mixture = nabla.linear_soft_embedding(h, head, table, 0.8, backend=backend)
    hard = nabla.linear_straight_through_embedding(h, head, [table], 0.8, backend=backend)
    exact = h.detach().double().requires_grad_()
    p = torch.softmax(exact @ weight.double().T / 0.8, -1)
    expected = p @ table.double()
    close(mixture.detach(), expected.detach())
    close(hard.embeddings[0].detach(), table[p.argmax(-1)])
    gradient = torch.autograd.grad((expected * sent).sum(), exact)[0]
    for result in (mixture, hard.embeddings[0]):
        close(torch.autograd.grad((result * sent).sum(), h)[0], gradient)


@by_backend
def test_gradient_norm(backend: str) -> None:
    h, weight = states()
    factors = nabla.TokenGradient(h, randn(N, E, seed=4), randn(N, R, seed=5))
    tables = nabla.Tables(nabla.Head(weight), randn(V, E, seed=6), randn(V, R, seed=7), 0.1)
    likelihood = torch.log_softmax(h.double() @ weight.double().T, -1)
    dense = -0.1 * likelihood + factors.embedding.double() @ tables.embedding.double().T
    dense += factors.reward_embedding.double() @ tables.reward_embedding.double().T
    close(nabla.gradient_norm(factors, tables, backend=backend), dense.norm(dim=-1))


@by_backend
def test_a_step_is_adams(backend: str) -> None:
    h, weight = states()
    gradient, table = randn(N, V, seed=8), randn(V, E, seed=9)
    parameter = torch.nn.Parameter(h.double())
    adam = torch.optim.Adam([parameter], lr=0.05)
    p = torch.softmax(parameter @ weight.double().T, -1)
    (p * gradient.double()).sum().backward()
    adam.step()
    state = nabla.DTOState(
        h.clone(),
        torch.zeros_like(h),
        torch.zeros_like(h),
        torch.zeros(N, dtype=torch.long, device=DEVICE),
        (h @ weight.T).argmax(-1),
    )
    inputs = nabla.DTOInputs(torch.tensor([0.05], device=DEVICE), gradient)
    tables = nabla.Tables(nabla.Head(weight), table, table, 0.0)
    step = nabla.dto_step(state, inputs, tables, nabla.DTOOptions(latents=True), backend=backend)
    close(state.parameters, parameter.detach())
    assert torch.equal(step.token, (parameter @ weight.double().T).argmax(-1))


@by_backend
def test_token_diff(backend: str) -> None:
    old = torch.arange(8, device=DEVICE).view(2, 4)
    new = old.clone()
    new[1, 2] = -7
    diff = nabla.token_diff(old, new, backend=backend)
    assert diff.first.tolist() == [4, 2]
    assert diff.changes.tolist() == [0, 1]


def test_rotary() -> None:
    q, k, cos, sin = randn(2, 4, 3, 8), randn(2, 2, 3, 8, seed=1), randn(1, 3, 8, seed=2), randn(1, 3, 8, seed=3)
    turned = nabla.rotary(q.requires_grad_(), k, cos, sin)
    for x, y in zip((q, k), turned, strict=True):
        half = torch.cat([-x[..., 4:], x[..., :4]], -1)
        close(y.detach(), (x * cos.unsqueeze(1) + half * sin.unsqueeze(1)).detach())
    assert torch.autograd.grad(turned[0].sum(), q)[0].shape == q.shape


def test_the_compiler_goes_through_whole() -> None:
    h, weight = states(requires_grad=True)
    tokens = torch.tensor([1, 2, 3], device=DEVICE)

    def loss(h: torch.Tensor) -> torch.Tensor:
        return nabla.linear_log_likelihood(h, nabla.Head(weight), tokens).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (gradient,) = torch.autograd.grad(compiled(h), h)
    close(gradient, torch.autograd.grad(loss(h), h)[0])
