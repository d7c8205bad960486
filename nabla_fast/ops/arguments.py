"""The types of operators' arguments and results: their schemas and checks.

PyTorch's dispatcher knows tensors and numbers. What an operator takes may also be a named tuple of them or a short list
of tensors: each of the classes below says how one kind of argument is taken apart, put together, spelled in a schema,
and what is to be checked in it. ``slots`` has what each argument of the schema is: an `Array`, or None for a number.

A tensor is annotated as ``Annotated[Tensor, "float N V"]``: its kind, one of `KINDS` or `RESULTS`, and its shape.
Letters are sizes, the same wherever they stand in one call. ``d_k`` is a size that every tensor of a list has for
itself, and ``N*need_grad`` is N where the argument ``need_grad`` is true, else 0.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from nabla_fast.ops import checks


class Kind(NamedTuple):
    """A kind of tensor among the arguments.

    Attributes:
        dtypes: what it may have.
        wide: whether the operator computes in float64 where this argument is float64.
        values: checks what is in it, where it is on the CPU.
        written: whether the operator writes into it.
    """

    dtypes: tuple[torch.dtype, ...]
    wide: bool = False
    values: Callable[[str, Tensor, int], None] | None = None
    written: bool = False


_INT64 = (torch.int64,)
KINDS = {
    "float": Kind(checks.FLOATS, wide=True),
    "noise": Kind(checks.FLOATS),
    "rates": Kind(checks.MASTERS, values=checks.numbers),
    "parameters": Kind(checks.MASTERS, wide=True, written=True),
    "int64": Kind(_INT64),
    "ids": Kind(_INT64, values=checks.ids),
    "counts": Kind(_INT64, values=checks.numbers, written=True),
    "ascending": Kind(_INT64, values=checks.ascending),
}
_OF_A_RESULT = Kind(())
# Of results; None is float64 where a wide argument is, else float32. "constant" is one without a derivative; "first"
# has the dtype of the operator's first argument as it was given.
RESULTS = {"sum": None, "constant": None, "int64": torch.int64, "bool": torch.bool, "first": None}
_NUMBERS = {float: "float", int: "SymInt", bool: "bool"}


class Leaf(NamedTuple):
    """A tensor or a number in a call.

    Attributes:
        field: as which it was declared.
        name: what errors call it.
        value: the tensor or number.
        place: of a tensor in its list, "" where it is in none.
    """

    field: Number | Array
    name: str
    value: Any
    place: str = ""


class Number:
    """A number, or None where that is allowed, with what checks it."""

    def __init__(self, name: str, kind: type, optional: bool, check: Callable[[str, Any], None] | None) -> None:
        self.name, self.check = name, check
        self.slots: list[Array | None] = [None]
        self._type = _NUMBERS[kind] + ("?" if optional else "")

    def flat(self, value: Any, lists: bool) -> Iterator[Any]:
        yield value

    def whole(self, values: list[Any], lists: bool) -> Any:
        return values.pop(0)

    def schema(self, letters: Iterator[str], lists: bool) -> Iterator[str]:
        yield f"{self._type} {_flat_name(self.name)}"

    def leaves(self, value: Any) -> Iterator[Leaf]:
        yield Leaf(self, self.name, value)


class Array:
    """A tensor of one kind and shape, or None where that is allowed."""

    def __init__(self, name: str, optional: bool, annotation: str) -> None:
        self.name, self._optional = name, optional
        self.kind, *sizes = annotation.split()
        self.sizes = tuple(sizes)
        self.rule = KINDS.get(self.kind, _OF_A_RESULT)
        self.slots: list[Array | None] = [self]

    def flat(self, value: Any, lists: bool) -> Iterator[Any]:
        if not isinstance(value, Tensor) and not (value is None and self._optional):
            raise TypeError(f"{self.name} must be a tensor{' or None' * self._optional}, got {type(value).__name__}")
        yield value

    def whole(self, values: list[Any], lists: bool) -> Any:
        return values.pop(0)

    def schema(self, letters: Iterator[str], lists: bool) -> Iterator[str]:
        written = f"({next(letters)}!)" if self.rule.written else ""
        yield f"Tensor{written}{'?' if self._optional else ''} {_flat_name(self.name)}"

    def leaves(self, value: Any) -> Iterator[Leaf]:
        if value is not None:
            yield Leaf(self, self.name, value)


class Arrays:
    """Up to ``most`` tensors: a list of like ones, or one tensor in whose place there may be a named tuple of others.

    In a schema they are numbered and may be missing, because torch.vmap takes no lists; ``lists`` asks for lists.
    """

    def __init__(self, name: str, one: Array, most: int, group: Group | None) -> None:
        self.name, self.one, self.most, self._group = name, one, most, group
        self.slots: list[Array | None] = [one] * most if group is None else group.slots

    def flat(self, value: Any, lists: bool) -> Iterator[Any]:
        other = "a list of tensors" if self._group is None else f"a {self._group.type.__name__}"
        if not isinstance(value, (Tensor, list, tuple) if self._group is None else (Tensor, self._group.type)):
            raise TypeError(f"{self.name} must be a tensor or {other}, got {type(value).__name__}")
        parts = [value] if isinstance(value, Tensor) else [*value]
        if not 1 <= len(parts) <= self.most:
            raise ValueError(f"{self.name} must hold from 1 to {self.most} tensors, got {len(parts)}")
        if wrong := [part for part in parts if not isinstance(part, Tensor)]:
            raise TypeError(f"{self.name} must hold tensors, got {type(wrong[0]).__name__}")
        if lists:
            yield parts
        else:
            yield from parts
            yield from [None] * (self.most - len(parts))

    def whole(self, values: list[Any], lists: bool) -> Any:
        taken = values.pop(0) if lists else [values.pop(0) for _ in range(self.most)]
        parts = [x for x in taken if x is not None]
        if self._group is None:
            return parts
        return parts[0] if len(parts) == 1 else self._group.type(*parts)

    def schema(self, letters: Iterator[str], lists: bool) -> Iterator[str]:
        name = _flat_name(self.name)
        if lists:
            yield f"Tensor[] {name}"
        else:
            yield f"Tensor {name}"
            yield from (f"Tensor? {name}_{i}" for i in range(1, self.most))

    def leaves(self, value: Any) -> Iterator[Leaf]:
        if isinstance(value, Tensor):
            yield Leaf(self.one, self.name, value)
        elif self._group is not None:
            yield from self._group.leaves(value)
        else:
            yield from (Leaf(self.one, f"{self.name}[{i}]", x, str(i)) for i, x in enumerate(value))


class Group:
    """A named tuple."""

    def __init__(self, name: str, kind: Any) -> None:
        self.name, self.type = name, kind
        hints = get_type_hints(kind, include_extras=True)
        self.fields = [field(f"{name}.{n}" if name else n, hints[n]) for n in kind._fields]
        self.slots: list[Array | None] = [slot for one in self.fields for slot in one.slots]

    def flat(self, value: Any, lists: bool) -> Iterator[Any]:
        if not isinstance(value, self.type):
            raise TypeError(f"{self.name} must be a {self.type.__name__}, got {type(value).__name__}")
        for one, part in zip(self.fields, value, strict=True):
            yield from one.flat(part, lists)

    def whole(self, values: list[Any], lists: bool) -> Any:
        return self.type(*[one.whole(values, lists) for one in self.fields])

    def schema(self, letters: Iterator[str], lists: bool) -> Iterator[str]:
        for one in self.fields:
            yield from one.schema(letters, lists)

    def leaves(self, value: Any) -> Iterator[Leaf]:
        for one, part in zip(self.fields, value, strict=True):
            yield from one.leaves(part)


Field = Number | Array | Arrays | Group


def field(name: str, annotation: Any) -> Field:
    """The field that an annotation declares."""
    variants = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    first, *others = (v for v in variants if v is not type(None))
    optional = type(None) in variants
    kind, *details = get_args(first) if get_origin(first) is Annotated else (first,)
    if kind in _NUMBERS:
        return Number(name, kind, optional, details[0] if details else None)
    if hasattr(kind, "_fields"):
        return Group(name, kind)
    one = Array(name, optional, details[0])
    if others:
        group = Group(name, others[0])
        return Arrays(name, one, len(group.fields), group)
    return Arrays(name, one, details[1], None) if len(details) > 1 else one


def check(leaves: Sequence[Leaf]) -> dict[str, int]:
    """Checks dtypes, shapes, devices and numbers of a call, without reading a tensor; returns the sizes by letter.

    Raises:
        TypeError: for another dtype.
        ValueError: for another shape or device, a number that is out of range, or memory that is written to twice.
    """
    sizes: dict[str, Any] = {}
    first: Leaf | None = None
    for leaf in leaves:
        if isinstance(leaf.field, Number):
            sizes[leaf.field.name] = leaf.value
            if leaf.field.check is not None:
                leaf.field.check(leaf.name, leaf.value)
            continue
        array, name, value, place = leaf.field, leaf.name, leaf.value, leaf.place
        checks.dtype(name, value, array.rule.dtypes)
        letters = [_letter(size, place) for size in array.sizes] if place else array.sizes
        checks.shape(name, value, [sizes.get(letter, letter) for letter in letters])
        sizes.update(zip(letters, value.shape, strict=True))
        if "V" in letters:
            checks.vocabulary(name, value, sizes["V"])
        if array.rule.written:
            checks.separate(name, value)
        if first is None:
            first = leaf
        else:
            checks.device(name, value, first.name, first.value)
    return sizes


def check_values(leaves: Sequence[Leaf], sizes: dict[str, int]) -> None:
    """Checks what is in the tensors of a call, where they are on the CPU, and that none is written to twice.

    Raises:
        IndexError, ValueError: as the kinds of the tensors say.
    """
    written: dict[int, str] = {}
    for leaf in leaves:
        if not isinstance(leaf.field, Array):
            continue
        rule = leaf.field.rule
        if rule.values is not None and leaf.value.device.type == "cpu":
            rule.values(leaf.name, leaf.value, sizes.get("V", 0))
        if rule.written and leaf.value.numel():
            other = written.setdefault(leaf.value.data_ptr(), leaf.name)
            if other != leaf.name:
                raise ValueError(f"{leaf.name} must not share memory with {other}, since both are written to")


def empty(result: Field, sizes: dict[str, int], wide: torch.dtype, like: Tensor) -> Iterator[Tensor]:
    """Tensors of a result's shapes and dtypes, as they are without their values."""
    if isinstance(result, Group):
        for one in result.fields:
            yield from empty(one, sizes, wide, like)
    elif isinstance(result, Array):
        yield _empty(result, "", sizes, wide, like)
    elif isinstance(result, Arrays):
        for i in range(result.most):
            own = [_letter(size, str(i)) for size in result.one.sizes]
            missing = any(letter.endswith(f"_k{i}") and letter not in sizes for letter in own)
            yield like.new_empty(0, dtype=wide) if missing else _empty(result.one, str(i), sizes, wide, like)


def _empty(array: Array, place: str, sizes: dict[str, int], wide: torch.dtype, like: Tensor) -> Tensor:
    shape = []
    for size in array.sizes:
        letter, _, wanted = size.partition("*")
        shape.append(sizes[_letter(letter, place)] if sizes.get(wanted, True) else 0)
    return like.new_empty(shape, dtype=like.dtype if array.kind == "first" else RESULTS[array.kind] or wide)


def _letter(size: str, place: str) -> str:
    return f"{size}{place}" if size.endswith("_k") else size


def _flat_name(name: str) -> str:
    return name.replace(".", "_")
