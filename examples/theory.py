"""Which methods reach the optimum of KL-regularised RL? Theorem 4.1 of ∇-Reasoner where everything can be enumerated.

    python examples/theory.py

64 sequences of 3 tokens, a policy pi and a reward r. The optimum p*(y) ~ pi(y) exp(r(y) / beta) is known exactly, and
so is how far each method's answers are from it. Prints a table, draws docs/assets/theory.png; docs/theory.md explains.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import torch
from torch import Tensor

import nabla_fast as nf
from nabla_fast import ops
from nabla_fast.dto import learning_rates
from nabla_fast.whole_files import write_file

TOKENS, LENGTH = 4, 3
COUNT = TOKENS**LENGTH
BETA = 0.5
"""nll_coeff / reward_coeff of the objective."""
WIDTH = 0.3
"""Standard deviation of the noise that smooths the one-hot sequences into a density."""
STEP = 0.1 * WIDTH**2
CONFIG = nf.NablaConfig(parameterization="logits", nll_coeff=BETA, learning_rate=0.1, max_iters=100)
OUTPUT = Path(__file__).resolve().parent.parent / "docs" / "assets" / "theory.png"


@dataclass(frozen=True)
class Problem:
    """The policy and reward of every sequence; ``sequences`` (COUNT, LENGTH) int64 are in lexical order.

    Attributes:
        log_policy, reward: (COUNT,) float64.
        next_token: per position, log pi(token | tokens before it), (TOKENS**position, TOKENS).
    """

    sequences: Tensor
    log_policy: Tensor
    reward: Tensor
    next_token: list[Tensor]

    @property
    def optimum(self) -> Tensor:
        """p* (COUNT,)."""
        return (self.log_policy + self.reward / BETA).softmax(0)

    @property
    def one_hot(self) -> Tensor:
        """(COUNT, LENGTH * TOKENS)."""
        return torch.nn.functional.one_hot(self.sequences, TOKENS).double().flatten(1)


def make_problem(seed: int = 0) -> Problem:
    """A random autoregressive policy, and a reward that prefers what the policy seldom says."""
    generator = torch.Generator().manual_seed(seed)
    sequences = torch.cartesian_prod(*[torch.arange(TOKENS)] * LENGTH)
    next_token = [
        (1.2 * torch.randn(TOKENS**t, TOKENS, generator=generator, dtype=torch.float64)).log_softmax(1)
        for t in range(LENGTH)
    ]
    log_policy = torch.zeros(COUNT, dtype=torch.float64)
    for t, table in enumerate(next_token):
        log_policy += table[index_of(sequences[:, :t]), sequences[:, t]]
    reward = torch.randn(COUNT, generator=generator, dtype=torch.float64) - 0.2 * log_policy
    return Problem(sequences, log_policy, reward, next_token)


def index_of(tokens: Tensor) -> Tensor:
    """Which sequence each row (N, t) is, among those of its length."""
    places = TOKENS ** torch.arange(tokens.shape[1] - 1, -1, -1)
    return (tokens * places).sum(1)


def distance(tokens: Tensor, problem: Problem) -> float:
    """Total variation between the distribution of answers (N, LENGTH) and p*."""
    found = torch.bincount(index_of(tokens), minlength=COUNT).double() / len(tokens)
    return total_variation(found, problem.optimum)


def total_variation(p: Tensor, q: Tensor) -> float:
    return float((p - q).abs().sum() / 2)


def sample_policy(problem: Problem, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Answers (N, LENGTH) of the policy, their logits, and the Gumbel noise that drew them (N, LENGTH, TOKENS)."""
    uniform = torch.rand(count, LENGTH, TOKENS, generator=generator, dtype=torch.float64)
    noise = -(-uniform.clamp(min=1e-300).log()).log()
    tokens, logits = torch.zeros(count, 0, dtype=torch.long), []
    for t, table in enumerate(problem.next_token):
        logits.append(table[index_of(tokens)])
        tokens = torch.cat([tokens, (logits[-1] + noise[:, t]).argmax(1, keepdim=True)], dim=1)
    return tokens, torch.stack(logits, 1), noise


def token_gradient(tokens: Tensor, problem: Problem) -> Tensor:
    """G (N, LENGTH, TOKENS): the objective with each token in each place of the answers (N, LENGTH), the others as they
    are. It is the gradient with respect to one-hot tokens of the objective's multilinear extension."""
    objective = -(CONFIG.nll_coeff * problem.log_policy + CONFIG.reward_coeff * problem.reward)
    changed = tokens[:, None, None].repeat(1, LENGTH, TOKENS, 1)
    for t in range(LENGTH):
        changed[:, t, :, t] = torch.arange(TOKENS)
    return objective[index_of(changed.flatten(0, 2))].view(len(tokens), LENGTH, TOKENS)


def drift(x: Tensor, table: Tensor, weight: Tensor) -> Tensor:
    """The gradient of log p* at points x (N, LENGTH * TOKENS) of the smoothed space: (r + beta log pi) / beta there.

    The smoothed p* is a mixture of Gaussians around the rows of ``table``, with logits ``weight``, and the gradient
    points to the mean of those that x may belong to. All rows are equally long.
    """
    return (ops.soft_embedding(x @ table.T / WIDTH**2 + weight, table) - x) / WIDTH**2


def flow(
    problem: Problem, start: Tensor, steps: int, generator: torch.Generator, *, noise: bool
) -> tuple[list[tuple[int, float]], Tensor]:
    """Particles on the smoothed space that follow dx = grad(r + beta log pi)(x) dt [+ sqrt(2 beta) dW].

    They start at answers (N, LENGTH) of the policy. Time is in units of 1 / beta, so that a step is one of ``STEP``.

    Returns:
        (steps made, distance of their hard tokens from p*), and their hard tokens (N, LENGTH) at the end.
    """
    table = problem.one_hot.float()
    shape = (len(start), table.shape[1])
    x = table[index_of(start)] + WIDTH * torch.randn(shape, generator=generator)
    weight = (problem.log_policy + problem.reward / BETA).float()
    shown = {round(steps ** (i / 24)) for i in range(25)}
    found = [(0, distance(hard(x), problem))]
    for made in range(1, steps + 1):
        x = x + STEP * drift(x, table, weight)
        if noise:
            x = x + (2 * STEP) ** 0.5 * torch.randn(shape, generator=generator)
        if made in shown:
            found.append((made, distance(hard(x), problem)))
    return found, hard(x)


def hard(x: Tensor) -> Tensor:
    """The tokens (N, LENGTH) of points of the smoothed space: the largest entry of each row, as in DTO."""
    return x.view(-1, LENGTH, TOKENS).argmax(-1)


def smoothed_optimum(problem: Problem, count: int, generator: torch.Generator) -> Tensor:
    """The hard tokens (N, LENGTH) of exact draws of the smoothed p*: what the flow with noise tends to."""
    drawn = torch.multinomial(problem.optimum, count, replacement=True, generator=generator)
    x = problem.one_hot[drawn]
    return hard(x + WIDTH * torch.randn(x.shape, generator=generator, dtype=torch.float64))


def redraw(
    problem: Problem, start: Tensor, steps: int, generator: torch.Generator
) -> tuple[list[tuple[int, float]], Tensor]:
    """The flow's counterpart on the discrete space: the token in a random place is drawn anew from softmax(-G / beta),
    and kept whatever the reward says. Returns what `flow` does."""
    tokens = start.clone()
    rows = torch.arange(len(tokens))
    found = [(0, distance(tokens, problem))]
    for made in range(1, steps + 1):
        place = torch.randint(LENGTH, (len(tokens),), generator=generator)
        low, high = torch.randint(2**32, (2, len(tokens)), generator=generator)
        gradient = token_gradient(tokens, problem)[rows, place]
        tokens[rows, place] = ops.draw_token(-gradient, low, high, temperature=BETA)
        found.append((made, distance(tokens, problem)))
    return found, tokens


def redraw_exactly(problem: Problem, steps: int) -> list[float]:
    """Kullback-Leibler divergence from p* of the distribution after each step of `redraw`, without sampling."""
    likelihood = (-token_gradient(problem.sequences, problem) / BETA).softmax(-1) / LENGTH
    moves = torch.zeros(COUNT, COUNT, dtype=torch.float64)
    for t in range(LENGTH):
        for token in range(TOKENS):
            after = problem.sequences.clone()
            after[:, t] = token
            moves[torch.arange(COUNT), index_of(after)] += likelihood[:, t, token]
    q, found = problem.log_policy.exp(), []
    for _ in range(steps + 1):
        found.append(float((q * (q / problem.optimum).log()).sum()))
        q = q @ moves
    return found


def dto(problem: Problem, tokens: Tensor, logits: Tensor, noise: Tensor) -> tuple[Tensor, float]:
    """DTO of whole answers, anchored to the rollout: the answers (N, LENGTH), and gradient evaluations per answer."""
    rows = logits.flatten(0, 1).clone()
    empty = torch.zeros(TOKENS, 1, dtype=torch.float64)
    tables = ops.Tables(ops.Head(torch.eye(TOKENS, dtype=torch.float64)), empty, empty, CONFIG.nll_coeff)
    rates = torch.tensor(learning_rates(CONFIG), dtype=torch.float64)
    step = torch.zeros(len(rows), dtype=torch.long)
    moments = torch.zeros_like(rows), torch.zeros_like(rows)
    group = torch.arange(len(tokens)).repeat_interleave(LENGTH)
    now, evaluations = tokens.flatten(), 0
    while int(step.min()) < len(rates):
        evaluations += int((step < len(rates)).sum()) // LENGTH
        gradient = token_gradient(now.view(-1, LENGTH), problem).flatten(0, 1)
        state = ops.DTOState(rows, *moments, step, now)
        inputs = ops.DTOInputs(rates, gradient, None, noise.flatten(0, 1), group)
        now = ops.dto_step(state, inputs, tables, ops.DTOOptions(latents=False, max_steps=len(rates))).token
    return now.view(-1, LENGTH), evaluations / len(tokens)


def best_of(problem: Problem, n: int) -> Tensor:
    """What Best-of-n answers (COUNT,), exactly: the best of n draws is y if none is better, and y is among them."""
    order = problem.reward.argsort()
    below = problem.log_policy.exp()[order].cumsum(0)
    chosen = torch.zeros(COUNT, dtype=torch.float64)
    chosen[order] = below**n - torch.cat([below.new_zeros(1), below[:-1]]) ** n
    return chosen


@dataclass(frozen=True)
class Results:
    """Distances from p* in total variation.

    Attributes:
        table: of each method; and the mean of r + beta log pi, which DTO raises.
        curves: (gradient evaluations, distance) along both flows and the redrawing.
        evaluations: gradient evaluations per answer of DTO.
        bests: of Best-of-n, by n.
    """

    table: dict[str, tuple[float, float]]
    curves: dict[str, list[tuple[int, float]]]
    evaluations: float
    bests: dict[int, float]


def measure(particles: int = 4000, flow_steps: int = 2400, redraw_steps: int = 60, seed: int = 0) -> Results:
    """Every method from the same answers of the policy."""
    problem, generator = make_problem(seed), torch.Generator().manual_seed(seed + 1)
    objective = problem.reward + BETA * problem.log_policy

    def exactly(p: Tensor) -> tuple[float, float]:
        return total_variation(p, problem.optimum), float((p * objective).sum())

    def sampled(tokens: Tensor) -> tuple[float, float]:
        return distance(tokens, problem), float(objective[index_of(tokens)].mean())

    start, logits, noise = sample_policy(problem, particles, generator)
    runs = {
        "flow with noise": flow(problem, start, flow_steps, generator, noise=True),
        "flow without noise": flow(problem, start, flow_steps // 4, generator, noise=False),
        "tokens redrawn by the gradient": redraw(problem, start, redraw_steps, generator),
    }
    optimized, evaluations = dto(problem, start, logits, noise)
    better = problem.reward[index_of(optimized)] > problem.reward[index_of(start)]
    draws = torch.multinomial(problem.optimum, particles, replacement=True, generator=generator)
    bests = {n: exactly(best_of(problem, n)) for n in (2**k for k in range(1, 11))}
    best = min(bests, key=bests.__getitem__)
    table = {
        "policy, exactly": exactly(problem.log_policy.exp()),
        **{name: sampled(tokens) for name, (_, tokens) in runs.items()},
        "DTO": sampled(optimized),
        "DTO, kept if the reward is higher": sampled(torch.where(better[:, None], optimized, start)),
        f"best of {best}, exactly (the closest n)": bests[best],
        "p* smoothed": sampled(smoothed_optimum(problem, particles, generator)),
        "p* sampled": sampled(problem.sequences[draws]),
        "p*, exactly": exactly(problem.optimum),
    }
    curves = {name: curve for name, (curve, _) in runs.items()}
    return Results(table, curves, evaluations, {n: value for n, (value, _) in bests.items()})


def draw(results: Results, output: Path) -> None:
    """The distances over gradient evaluations, as a PNG."""
    from matplotlib.figure import Figure

    colours = ("#2E7D4F", "#DDA63A", "#6B4FA0")
    lines = {
        "policy, exactly": ("#8A8A8A", ":", "policy"),
        "DTO": ("#C2104B", "-", "DTO, at its end"),
        "DTO, kept if the reward is higher": ("#C2104B", "--", "the same, kept if the reward is higher"),
        "p* smoothed": ("#8A8A8A", "--", "a perfect sample of the smoothed p*"),
    }
    figure = Figure(figsize=(8.4, 4.4), layout="constrained")
    axes = figure.add_subplot()
    last = max(made for curve in results.curves.values() for made, _ in curve)
    for name, (colour, style, label) in lines.items():
        axes.axhline(results.table[name][0], color=colour, linestyle=style, linewidth=1.4, label=label)
    for (name, curve), colour in zip(results.curves.items(), colours, strict=True):
        axes.plot(*zip(*curve[1:], strict=True), color=colour, linewidth=2, marker="o", markersize=3, label=name)
    axes.plot(
        list(results.bests),
        list(results.bests.values()),
        color="#6E93C4",
        linewidth=1.2,
        marker="^",
        markersize=4,
        label="best of n (answers drawn, no gradient)",
    )
    axes.set_xscale("log")
    axes.set_xlim(1, last)
    axes.set_ylim(0, None)
    axes.set_xlabel("gradient evaluations per answer (Best-of-n: answers drawn)")
    axes.set_ylabel("total variation from p*")
    axes.grid(color="#E4E4E4", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", frameon=False, fontsize=8.5)
    data = BytesIO()
    figure.savefig(data, format="png", dpi=150, metadata={"Software": None})
    write_file(output, data.getvalue())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=OUTPUT, help="The PNG file.")
    output = parser.parse_args().output
    results = measure()
    print(f"{COUNT} sequences, beta {BETA}; DTO took {results.evaluations:.1f} gradient evaluations per answer\n")
    print(f"{'answers of':44}distance from p*  mean of r + beta log pi")
    for name, (apart, value) in results.table.items():
        print(f"{name:44}{apart:16.3f}{value:25.2f}")
    exactly = redraw_exactly(make_problem(), 60)
    steps = (0, 10, 20, 40, 60)
    print("\nKL(q, p*) as tokens are redrawn, exactly: " + ", ".join(f"{exactly[n]:.2g} after {n}" for n in steps))
    draw(results, output)
    print(output)


if __name__ == "__main__":
    main()
