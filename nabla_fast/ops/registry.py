"""Declares operators. A typed signature gives schema, checks, fake kernel, dispatch and documentation.

    @operator()
    def relaxed_stats(z: Annotated[Tensor, "float N V"], tau: float = 1.0, backend: str = "auto") -> RelaxedStats:
        '''What it does.'''
        return reference.relaxed_stats(z, tau)

The body is the meaning and runs as back end "reference"; every other back end has a function of the same name and
arguments, or, in C++, a kernel. `nabla_fast.ops.arguments` says what the types may be. `torch.compile(fullgraph=True)`
goes through such an operator, and `torch.library.opcheck` passes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from functools import update_wrapper
from typing import Annotated, Any, ParamSpec, TypeVar, cast, get_origin, get_type_hints

import torch
from torch import Tensor
from torch.autograd import forward_ad

from nabla_fast.ops import arguments, backends, native
from nabla_fast.ops.arguments import Array, Leaf, field
from nabla_fast.ops.namespace import NAMESPACE

P = ParamSpec("P")
R = TypeVar("R")

LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


def operator(**options: Any) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Declares the decorated function as an `Operator` with these options, which takes its place."""

    def declare(function: Callable[P, R]) -> Callable[P, R]:
        return cast("Callable[P, R]", update_wrapper(Operator(function, **options), function))

    return declare


class Operator:
    """A declared operator; a call chooses a back end and goes through PyTorch's dispatcher.

    A call that nothing but the native kernel has to see goes to it at once, behind the same checks: the dispatcher with
    kernels in Python takes longer than most calls of one row.

    Args:
        derivative: the gradient of the first argument: takes the operator's arguments, and the results as keyword
            ``result`` with their gradients in the place of those that have one. It has no derivative itself: a second
            derivative, or one in forward mode, is an error.
        check: takes the operator's arguments, and raises for those that no back end takes although their types do.
        called: what errors about derivatives call it, where users call it by another function.
        case: takes the operator's arguments, and returns what `nabla_fast.ops.measured` calls them; its name without.
        recorded: an internal operator with the same arguments and first result, whose other results are what the
            derivative would otherwise compute again. A call that will be differentiated takes it in its place, if the
            chosen back end has it.
        internal: whether it is not called by its own name, and may be missing in any back end but the reference.

    Attributes:
        name: of the operator, and of its function in every back end.
        body: the meaning, which takes the arguments without a back end.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        derivative: Callable[..., Tensor] | None = None,
        check: Callable[..., None] | None = None,
        called: str | None = None,
        case: Callable[..., str] | None = None,
        recorded: Operator | None = None,
        internal: bool = False,
    ) -> None:
        self.name, self.body = function.__name__, function
        self._recorded, self._called = recorded, called or self.name
        self._derivative, self._check, self._case = derivative, check, case
        hints = get_type_hints(function, include_extras=True)
        parameters = list(inspect.signature(function).parameters.values())
        self._names = [p.name for p in parameters]
        self._defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        self._fields = [field(p.name, hints[p.name]) for p in parameters[:-1]]
        self._single = get_origin(hints["return"]) is Annotated
        self._result = field("result" if self._single else "", hints["return"])
        self._as_first = isinstance(self._result, Array) and self._result.kind == "first"
        self._define()
        if not internal:
            backends.OPERATORS[self.name] = self

    def __call__(self, *given: Any, **named: Any) -> Any:
        *values, backend = self._bound(given, named)
        flat = self.flat(values)
        if self._derivative is not None:
            _require_reverse_mode(self._called, flat)
        elif not self._written and torch.is_grad_enabled():
            flat = [x.detach() if isinstance(x, Tensor) and x.requires_grad else x for x in flat]
        # Every operator's first argument is a tensor, or begins with one.
        dtype = self._sum_dtype(flat)
        case = self._case(*values) if self._case is not None and flat[0].is_cuda else None
        chosen = backends.resolve(self.name, backend, flat[0].device, dtype, case)
        if chosen == "native" and (self._written or dtype == torch.float32) and self._only_kernel(flat):
            return self._at_once(values, flat)
        if self._recorded is not None and torch.is_grad_enabled() and flat[0].requires_grad:  # noqa: SIM102
            if backends.has(self._recorded.name, chosen):
                return self._recorded(*values, chosen)[0]
        return self._results(self._overload(*flat, chosen))

    def _only_kernel(self, flat: Sequence[Any]) -> bool:
        """Whether no derivative, trace, mode or subclass of tensors takes part in a call."""
        if _observed():
            return False
        differentiable = torch.is_grad_enabled() and (self._derivative is not None or bool(self._written))
        for x in flat:
            if isinstance(x, Tensor) and (
                type(x) not in _PLAIN or (differentiable and x.requires_grad) or (self._written and x.is_inference())
            ):
                return False
        return True

    def _at_once(self, values: Sequence[Any], flat: Sequence[Any]) -> Any:
        """The call by the native kernel, without the dispatcher."""
        leaves = self._leaves(values)
        sizes = arguments.check(leaves)
        if self._check is not None:
            self._check(*values)
        arguments.check_values(leaves, sizes)
        if self._written:
            torch.autograd.graph.increment_version([flat[i] for i in self._written])
        result = self.native(*values)
        return result.to(flat[0].dtype) if self._as_first else result

    def native(self, *given: Any, **named: Any) -> Any:
        """The operator by the native library."""
        values = given if len(given) == len(self._fields) else self._bound(given, named)[:-1]
        flat = [x for one, value in zip(self._fields, values, strict=True) for x in one.flat(value, True)]
        results = self._native(*flat)
        return results if self._single else self._result.whole([*results], True)

    def _define(self) -> None:
        def schema(fields: Iterable[Any], lists: bool) -> list[str]:
            letters = iter("abcd")
            return [spelled for one in fields for spelled in one.schema(letters, lists)]

        taken, given = schema(self._fields, False), schema([self._result], False)
        slots = [slot for one in self._fields for slot in one.slots]
        self._written = [i for i, slot in enumerate(slots) if slot is not None and slot.rule.written]
        self._wide = [i for i, slot in enumerate(slots) if slot is not None and slot.rule.wide]
        # A result cannot be None: what is missing there is an empty tensor.
        self._may_miss = [spelled.startswith("Tensor?") for spelled in given]
        results = ", ".join(given).replace("?", "")
        LIBRARY.define(f"{self.name}({', '.join([*taken, 'str backend'])}) -> ({results})")
        self._overload = getattr(getattr(torch.ops, NAMESPACE), self.name).default
        LIBRARY.impl(self.name, self._kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{self.name}", self._fake, lib=LIBRARY)
        if self._derivative is not None:
            self._constant = [i for i, slot in enumerate(self._result.slots) if slot is None or slot.kind != "sum"]
            torch.library.register_autograd(
                f"{NAMESPACE}::{self.name}", self._backward, setup_context=self._setup, lib=LIBRARY
            )
        if self._written:
            LIBRARY.impl(self.name, self._announce, "ADInplaceOrView", with_keyset=True)
        arguments_, results_ = (", ".join(schema(fields, True)) for fields in (self._fields, [self._result]))
        self._native = native.define(f"native_{self.name}({arguments_}) -> ({results_})")

    def _bound(self, given: tuple[Any, ...], named: dict[str, Any]) -> list[Any]:
        """The arguments in order, with defaults.

        Raises:
            TypeError: for one too many, or too few.
        """
        if len(given) == len(self._names) and not named:
            return [*given]
        rest = self._names[len(given) :]
        wrong = [n for n in named if n not in rest] or [n for n in rest if n not in named and n not in self._defaults]
        if wrong or len(given) > len(self._names):
            what = f"{wrong[0]!r} is missing, given twice or unknown" if wrong else f"got {len(given)}"
            raise TypeError(f"{self.name}() takes ({', '.join(self._names)}); {what}")
        return [*given, *(named[n] if n in named else self._defaults[n] for n in rest)]

    def flat(self, values: Iterable[Any]) -> list[Any]:
        """Its arguments, but for the back end, as the dispatcher takes them."""
        return [x for one, value in zip(self._fields, values, strict=True) for x in one.flat(value, False)]

    def _whole(self, flat: Iterable[Any]) -> list[Any]:
        rest = [*flat]
        return [one.whole(rest, False) for one in self._fields]

    def _results(self, results: Any) -> Any:
        if self._single:
            return results
        if not any(self._may_miss):
            return self._result.whole([*results], False)
        empty = ((may and x is not None and x.ndim == 1) for may, x in zip(self._may_miss, results, strict=True))
        return self._result.whole([None if e else x for e, x in zip(empty, results, strict=True)], False)

    def _leaves(self, values: Iterable[Any]) -> list[Leaf]:
        return [leaf for one, value in zip(self._fields, values, strict=True) for leaf in one.leaves(value)]

    def _checked(self, flat: tuple[Any, ...]) -> tuple[list[Any], list[Leaf], dict[str, Any]]:
        values = self._whole(flat[:-1])
        leaves = self._leaves(values)
        sizes = arguments.check(leaves)
        if self._check is not None:
            self._check(*values)
        _refuse_forward_mode(self._called, flat)
        return values, leaves, sizes

    def _kernel(self, *flat: Any) -> Any:
        values, leaves, sizes = self._checked(flat)
        arguments.check_values(leaves, sizes)
        wide = self._sum_dtype(flat)
        if not self._written and wide == torch.float64:
            values[0] = _doubled(values[0])
        results = backends.implementation(self, flat[-1])(*values)
        if self._single:
            return (results.to(flat[0].dtype) if self._as_first else results).contiguous()
        parts = self._result.flat(results, False)
        return tuple(flat[0].new_empty(0, dtype=wide) if x is None else x.contiguous() for x in parts)

    def _fake(self, *flat: Any) -> Any:
        _, _, sizes = self._checked(flat)
        results = tuple(arguments.empty(self._result, sizes, self._sum_dtype(flat), flat[0]))
        return results[0] if self._single else results

    def _sum_dtype(self, flat: Sequence[Any]) -> torch.dtype:
        """The dtype of sums and logits: float64 if one of the arguments that decide it is float64, else float32."""
        for i in self._wide:
            if flat[i] is not None and flat[i].dtype == torch.float64:
                return torch.float64
        return torch.float32

    def _announce(self, keyset: Any, *flat: Any) -> Any:
        """Increments the version counters of the tensors that are written to."""
        changed = [flat[i] for i in self._written]
        if torch.is_grad_enabled() and any(x.requires_grad for x in changed):
            names = ", ".join(self._overload._schema.arguments[i].name for i in self._written)
            raise RuntimeError(
                f"{self.name} writes into {names}: pass tensors that require no gradient, or detach them"
            )
        torch.autograd.graph.increment_version(changed)
        return self._overload.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *flat)

    def _setup(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        outputs = (output,) if self._single else output
        constants = [outputs[i] for i in self._constant]
        ctx.mark_non_differentiable(*constants)
        tensors = [i for i, x in enumerate(inputs) if isinstance(x, Tensor)]
        ctx.save_for_backward(*(inputs[i] for i in tensors), *constants)
        ctx.tensors, ctx.others = tensors, [None if isinstance(x, Tensor) else x for x in inputs]

    def _backward(self, ctx: Any, *grads: Any) -> Any:
        assert self._derivative is not None
        saved = list(ctx.saved_tensors)
        flat, results = list(ctx.others), list(grads)
        for i in ctx.tensors:
            flat[i] = saved.pop(0)
        for i in self._constant:
            results[i] = saved.pop(0)
        with torch.no_grad():
            values, result = self._whole(flat[:-1]), self._results(results[0] if self._single else results)
            gradient = self._derivative(*values, flat[-1], result=result).to(flat[0].dtype)
        if torch.is_grad_enabled():  # create_graph=True
            gradient = Once.apply(self._called, gradient, flat[0], *grads)
        return gradient, *[None] * (len(flat) - 1)


_PLAIN = (Tensor, torch.nn.Parameter)


def _observed() -> bool:
    """Whether a compiler, tracer, mode or transform of PyTorch sees calls of operators, and must see this one."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )


def _doubled(value: Any) -> Any:
    """A tensor, or a named tuple of tensors, in float64."""
    return value.double() if isinstance(value, Tensor) else type(value)(*(x.double() for x in value))


class Once(torch.autograd.Function):
    """A gradient that depends on an operator's first argument and on what is sent back, by a derivative that raises.

    ``apply(name of the operator, gradient, what it depends on...)``.
    """

    @staticmethod
    def forward(ctx: Any, name: str, gradient: Tensor, *_: Tensor) -> Tensor:
        ctx.name = name
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(
            f"nabla_fast has no second derivative of {ctx.name}: take the gradient without create_graph=True, or "
            "compute with plain PyTorch (nabla_fast.ops.linear_logits and torch.softmax) where you need one"
        )


_FORWARD_MODE = (
    "nabla_fast differentiates {0} once and in reverse mode, by torch.autograd or backward(), not in forward mode or "
    "by torch.func; compute with plain PyTorch (nabla_fast.ops.linear_logits and torch.softmax) there"
)


def _require_reverse_mode(name: str, flat: Iterable[Any]) -> None:
    """Raises RuntimeError for any other derivative, which only the caller sees: torch.func wraps its tensors."""
    if not torch.compiler.is_compiling():
        _refuse_forward_mode(name, flat)
    elif forward_ad._current_level >= 0:
        raise RuntimeError(_FORWARD_MODE.format(name))


def _refuse_forward_mode(name: str, flat: Iterable[Any]) -> None:
    """Raises RuntimeError for a tensor with a tangent, which would be lost, or one that torch.func differentiates."""
    functorch, dual = torch._C._functorch, forward_ad._current_level >= 0
    for inner in flat:
        if not isinstance(inner, Tensor):
            continue
        while functorch.is_functorch_wrapped_tensor(inner) and not functorch.is_gradtrackingtensor(inner):
            inner = functorch.get_unwrapped(inner)
        if functorch.is_gradtrackingtensor(inner) or (dual and forward_ad.unpack_dual(inner).tangent is not None):
            raise RuntimeError(_FORWARD_MODE.format(name))
