"""Steps of DTO: straight-through gradient, Adam, next hard token."""

from __future__ import annotations

from torch import Tensor

from nabla_fast.ops import checks, reference
from nabla_fast.ops.registry import operator
from nabla_fast.ops.types import DTOInputs, DTOOptions, DTOState, DTOStep, Tables


def _check(state: DTOState, inputs: DTOInputs, tables: Tables, options: DTOOptions) -> None:
    weight, parameters = tables.head.weight, state.parameters
    for name, moment in (("state.exp_avg", state.exp_avg), ("state.exp_avg_sq", state.exp_avg_sq)):
        checks.dtype(name, moment, (parameters.dtype,))
    width = weight.shape[1] if options.latents else weight.shape[0]
    checks.shape("state.parameters", parameters, (len(parameters), width))


def _case(state: DTOState, inputs: DTOInputs, _: Tables, options: DTOOptions) -> str:
    """As benchmarks/test_bench_dto_step.py names it; what is not measured there is the operator alone."""
    kind = "latents" if options.latents else "logits"
    if not isinstance(inputs.gradient, Tensor):
        return f"dto_step, all {kind} rows"
    return f"dto_step, one {kind} row" if len(state.parameters) == 1 else "dto_step"


@operator(check=_check, case=_case)
def dto_step(state: DTOState, inputs: DTOInputs, tables: Tables, options: DTOOptions, backend: str = "auto") -> DTOStep:
    """Steps of DTO for as long as the gradient holds; see `reference.dto_step` for their meaning.

    Updates ``parameters``, ``exp_avg``, ``exp_avg_sq`` and ``step`` of the state in place. Where another operand is
    float64, the gradient is computed in float64, and rounded to the parameters' dtype.

    Args:
        state: of the rows; updated.
        inputs: gradient, learning rates, noise.
        tables: head and embedding tables.
        options: settings.
        backend: "auto" or a back end's name.

    Raises:
        IndexError: for a token that is not in the vocabulary, on the CPU.
        ValueError: for a negative step or a learning rate that is negative or not finite, on the CPU. On a GPU a row
            with such a token or step makes no step, and counts as changed.

    Source: Alg. 2 of ∇-Reasoner.
    """
    return reference.dto_step(state, inputs, tables, options)
