"""The operators as PyTorch's dispatcher knows them: one library, one way to register.

Every operator has a schema, a kernel that hands over to the back end its last argument names, and a fake kernel that
gives shapes and dtypes, so that `torch.compile(fullgraph=True)` goes through and `torch.library.opcheck` passes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

LIBRARY = torch.library.Library("nabla_fast", "FRAGMENT")

HEAD = "Tensor weight, float scale, float softcap"
"""How a `Head` is spelled in a schema."""


def register(
    schema: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    check: Callable[..., None],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
) -> Any:
    """Defines an operator and returns it.

    What it writes into (``Tensor(a!)``) is known to autograd as changed, and a second derivative or one in forward mode
    is an error, for such operators have first derivatives in reverse mode alone.

    Args:
        schema: name, arguments (``str backend`` last, where back ends have it) and results; float results before
            integer ones.
        kernel: runs on tensors of any device.
        fake: gives empty results of the right shapes and dtypes.
        check: raises for arguments that no back end takes, by what is known of them without reading a tensor.
        backward, setup_context: as for ``torch.library.register_autograd``. A result that is not differentiated has
            the gradient None.
    """
    name = schema.split("(")[0]
    LIBRARY.define(schema)
    operator = getattr(torch.ops.nabla_fast, name).default
    written = [i for i, a in enumerate(operator._schema.arguments) if a.alias_info and a.alias_info.is_write]

    def checked(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            check(*arguments)
            forward_mode_refused(name, *arguments)
            return function(*arguments)

        return run

    LIBRARY.impl(name, checked(kernel), "CompositeExplicitAutograd")
    torch.library.register_fake(f"nabla_fast::{name}", checked(fake), lib=LIBRARY)
    if backward is not None:
        torch.library.register_autograd(f"nabla_fast::{name}", backward, setup_context=setup_context, lib=LIBRARY)
    if written:
        names = ", ".join(operator._schema.arguments[i].name for i in written)

        def announced(keyset: Any, *arguments: Any) -> Any:
            changed = [arguments[i] for i in written]
            if torch.is_grad_enabled() and any(x.requires_grad for x in changed):
                raise RuntimeError(f"{name} writes into {names}: pass tensors that require no gradient, or detach them")
            torch.autograd.graph.increment_version(changed)
            return operator.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *arguments)

        LIBRARY.impl(name, announced, "ADInplaceOrView", with_keyset=True)
    return operator


def statistic_dtype(*tensors: Tensor | None) -> torch.dtype:
    """What sums and logits of an operator are kept in: float64 if one of its float operands is, else float32."""
    wide = any(x is not None and x.dtype == torch.float64 for x in tensors)
    return torch.float64 if wide else torch.float32


def widened(x: Tensor, *others: Tensor | None) -> Tensor:
    """``x`` as its operator takes it beside ``others``: in float64 where one of them is, else as it is."""
    return x.double() if statistic_dtype(*others) == torch.float64 else x


def second_refused(name: str) -> Callable[..., Any]:
    """The derivative of a derivative."""

    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            f"nabla_fast has no second derivative of {name}: take the gradient without create_graph=True, or compute "
            "with plain PyTorch (nabla_fast.ops.linear_logits and torch.softmax) where you need one"
        )

    return backward


def differentiable(name: str, *tensors: Tensor | None) -> None:
    """Raises RuntimeError where the caller's derivative is none that operator ``name`` has.

    For Python wrappers: an operator itself does not see what torch.func has wrapped.
    """
    if not torch.compiler.is_compiling():
        forward_mode_refused(name, *tensors)
    elif forward_ad._current_level >= 0:
        raise RuntimeError(_FORWARD_MODE.format(name))


_FORWARD_MODE = (
    "nabla_fast differentiates {0} once and in reverse mode, by torch.autograd or backward(), not in forward mode or "
    "by torch.func; compute with plain PyTorch (nabla_fast.ops.linear_logits and torch.softmax) there"
)


def forward_mode_refused(name: str, *tensors: Any) -> None:
    """Raises RuntimeError for a tensor with a tangent, which would be lost, or one that torch.func differentiates."""
    functorch = torch._C._functorch
    for x in tensors:
        if not isinstance(x, Tensor):
            continue
        while functorch.is_functorch_wrapped_tensor(x) and not functorch.is_gradtrackingtensor(x):
            x = functorch.get_unwrapped(x)
        if functorch.is_gradtrackingtensor(x) or forward_ad.unpack_dual(x).tangent is not None:
            raise RuntimeError(_FORWARD_MODE.format(name))
