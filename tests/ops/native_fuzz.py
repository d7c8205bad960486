"""Calls every operator with right and wrong arguments, each behind a page nobody may touch.

    python tests/ops/native_fuzz.py SEED CALLS

The operators of the native back end, and the public ones by "native" and by "reference". What an operator does not
write to is read-only memory; where it writes into a view, what lies between must stay. Every operator runs in a process
of its own, forked from this one; prints a JSON list of what went wrong.
"""

from __future__ import annotations

import json
import math
import os
import random
import sys
from collections.abc import Iterator
from typing import Any

import torch
from guard_pages import FILL, between, guarded
from torch import Tensor

from nabla_fast import ops
from nabla_fast.ops import native, reference
from nabla_fast.ops.types import Head

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
OTHERS = (torch.uint8, torch.bool, torch.int8, torch.int32, torch.int64, torch.float8_e4m3fn, torch.complex64)
# Arguments by the last part of their names in a schema, where they have no name of their own here.
NAMES = {
    "factors_embedding": "embedding_grad", "factors_reward_embedding": "reward_grad", "tables_1": "second",
    "vectors_1": "second_grad", "inputs_gradient_1": "gradient_1", "inputs_gradient_2": "gradient_2",
}  # fmt: skip
PREFIXES = ("tables_head_", "head_", "tables_", "factors_", "state_", "inputs_", "options_")
# Shapes by those names: N rows, V entries, d, e and r widths, S steps, m positions.
SHAPES = {
    "z": "NV", "h": "Nd", "weight": "Vd", "table": "Vr", "hidden": "Nd", "embedding": "Ve",
    "reward_embedding": "Vr", "gradient": "NV",
    "soft_noise": "NV", "hard_noise": "NV", "learning_rates": "S", "old": "Nm", "new": "Nm", "tokens": "N",
    "low": "N", "high": "N", "step": "N", "group": "N", "parameters": "NP",
    "exp_avg": "NP", "exp_avg_sq": "NP", "first": "Ve", "second": "Vr",
    "first_grad": "Ne", "second_grad": "Nr", "embedding_grad": "Ne", "reward_grad": "Nr",
    "gradient_1": "Ne", "gradient_2": "Nr",
}  # fmt: skip
SIZES = {
    "N": (1, 2, 3, 5, 17),
    "V": (1, 2, 7, 33, 65, 257, 515),
    "d": (1, 3, 8, 17, 33),
    "e": (1, 4, 9, 17),
    "r": (1, 5, 16),
    "S": (1, 4),
    "m": (1, 5, 9),
}
INTEGERS = ("old", "new", "tokens", "step", "group", "low", "high")
STATE = ("parameters", "exp_avg", "exp_avg_sq")
WRITTEN = (*STATE, "step")
SOURCES = ("z", "h", "parameters", "soft_noise", "hard_noise")  # of which a row may be without meaning
PAIRS = ("second", "second_grad")  # both or none
FLOAT32, ROUNDED = 2e-5, 1e-2  # relative to the largest summand; where weights are one bfloat16 number


def operators() -> list[str]:
    """All of them, as the dispatcher knows them; public ones with the back end that runs them."""
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("nabla_fast::")]
    names = sorted(name.removeprefix("nabla_fast::") for name in names)
    alone = [f"native_{name}" for name in sorted(ops.OPERATORS) if f"native_{name}" in names]
    return alone + [f"{name} {back}" for name in ops.OPERATORS for back in ("native", "reference")]


class Case:
    """Right arguments of one operator, by name."""

    def __init__(self, label: str, rng: random.Random) -> None:
        self.rng = rng
        self.name, _, self.backend = label.partition(" ")
        self.public = not self.name.startswith("native_")
        self.generator = torch.Generator().manual_seed(rng.getrandbits(32))
        self.sizes = {letter: rng.choice(sizes) for letter, sizes in SIZES.items()}
        self.latents, self.dense, self.two = (rng.random() < 0.5 for _ in range(3))
        self.without_meaning = rng.random() < 0.2
        self.state_dtype = rng.choice(FLOATS[:2])
        self.letters: dict[tuple[str, int | None], str] = {}
        schema = getattr(torch.ops.nabla_fast, self.name).default._schema
        names = [self.short(argument.name) for argument in schema.arguments]
        self.arguments = {name: self.draw(name) for name in names}
        if self.steps and rng.random() < 0.8:
            a = self.arguments
            noises = (None if a[name] is None else a[name].double() for name in ("hard_noise", "soft_noise"))
            head = Head(a["weight"].double(), a["scale"], a["softcap"])
            tokens = reference.hard_tokens(a["parameters"].double(), head, self.latents, *noises)
            a["tokens"] = guarded(tokens.clamp(min=0))

    def short(self, name: str) -> str:
        if self.public and name in ("tables", "vectors"):  # the first of what native operators have in a list
            return "first" if name == "tables" else "first_grad"
        prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), "")
        return NAMES.get(name, name.removeprefix(prefix))

    @property
    def steps(self) -> bool:
        return self.name.endswith("dto_step")

    def draw(self, name: str) -> Any:
        scalars = {
            "scale": 1.5,
            "softcap": self.rng.choice((0.0, 5.0)),
            "tau": self.rng.choice((0.5, 1.0, 2.0)),
            "nll_coeff": self.rng.choice((0.0, 0.1)),
            "need_grad": self.rng.random() < 0.5,
            "latents": self.latents,
            "weight_decay": self.rng.choice((0.0, 0.01)),
            "max_steps": self.rng.choice((0, 1, 3)),
            "entropy_threshold": self.rng.choice((None, 0.5)),
            "confidence_threshold": self.rng.choice((None, 0.3)),
            "temperature": self.rng.choice((0.0, 0.6, 1.0)),
            "top_k": self.rng.choice((None, 1, 20)),
            "top_p": self.rng.choice((None, 0.9, 1 - 1e-5)),
            "backend": self.backend,
        }
        if name in scalars:
            return scalars[name]
        widths = "er" if self.two else "e"
        if name in ("tables", "vectors"):
            return [self.tensor(name, i, ("V" if name == "tables" else "N") + w) for i, w in enumerate(widths)]
        if name == "gradient" and self.steps and not self.public:
            return [self.tensor(name, i, s) for i, s in enumerate(["NV"] if self.dense else ["Nd", "Ne", "Nr"])]
        if name in ("gradient_1", "gradient_2") and self.dense:
            return None
        if name in PAIRS and not self.two:
            return None
        if name in ("soft_noise", "hard_noise", "group") and self.rng.random() < 0.5:
            return None
        letters = SHAPES[name].replace("P", "d" if self.latents else "V")
        if name == "gradient" and not self.dense:
            letters = "Nd"
        return self.tensor(name, None, letters)

    def tensor(self, name: str, index: int | None, letters: str) -> Tensor:
        shape = [self.sizes[letter] for letter in letters]
        if not (self.steps and self.dense and letters in ("Ve", "Vr")):  # tables that nobody reads
            self.letters[name, index] = letters
        at_start, written = self.rng.random() < 0.3, name in WRITTEN
        if name in INTEGERS:
            if name == "group":
                x = torch.arange(shape[0]) // 2
            elif name == "step":
                x = torch.zeros(shape, dtype=torch.long)
            else:
                x = torch.randint(self.sizes["V"], shape, generator=self.generator)
            if written and self.rng.random() < 0.5:
                x = torch.stack([x, x], -1)[:, 0]
            return guarded(x, written=written, at_start=at_start)
        masters = name in STATE or (name == "learning_rates" and self.public)
        x = torch.randn(shape, generator=self.generator).to(self.state_dtype if masters else self.rng.choice(FLOATS))
        if name == "exp_avg_sq":
            x.abs_().add_(0.1)
        if name == "learning_rates":
            x.abs_().mul_(0.02)
        if self.without_meaning and name in SOURCES and self.rng.random() < 0.5:
            x[self.rng.randrange(shape[0]), self.rng.randrange(shape[1])] = self.rng.choice((math.nan, math.inf))
            if self.rng.random() < 0.3 and name != "h" and not self.latents:
                x[self.rng.randrange(shape[0])] = -math.inf
        # An expanded head would make every token a tie, which the reference's products may break by rounding.
        layout = self.rng.randrange(3 if written or name == "weight" else 4)
        if len(shape) == 2 and layout == 1:
            x = x.T.contiguous().T
        elif len(shape) == 2 and layout == 2:
            x = torch.cat([x, x], -1)[:, ::2] if shape[1] > 1 else x
            x = x[:, : shape[1]]
        elif len(shape) == 2 and layout == 3:
            x = x[:1].expand(shape)
        return guarded(x, written=written, at_start=at_start)

    def tensors(self) -> Iterator[tuple[str, int | None, Tensor]]:
        """What the operator reads."""
        for name, index in self.letters:
            value = self.arguments[name] if index is None else self.arguments[name][index]
            yield name, index, value

    def call(self) -> Any:
        return getattr(torch.ops.nabla_fast, self.name)(*self.arguments.values())


def doubled(x: Any) -> Any:
    """With float tensors in float64, and all tensors copied."""
    if isinstance(x, list):
        return [doubled(one) for one in x]
    return (x.double() if x.is_floating_point() else x).clone() if isinstance(x, Tensor) else x


def meant(case: Case) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Results, and what is written into, as the operator's meaning gives them in float64."""
    a: dict[str, Any] = {name: doubled(x) for name, x in case.arguments.items()}
    if case.public:
        if "backend" in a:
            a["backend"] = "reference"
        results = flat(getattr(torch.ops.nabla_fast, case.name)(*a.values()))
        return results, {name: a[name] for name in WRITTEN if name in a}
    operator: Any = ops.OPERATORS[case.name.removeprefix("native_")]
    rest = list(a.values())
    results = operator.body(*[field.whole(rest, True) for field in operator._fields])
    return flat(results), {name: a[name] for name in WRITTEN if name in a}


def flat(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [x for part in result for x in (part if isinstance(part, (list, tuple)) else [part])]


def largest(x: Tensor) -> float:
    x = x.double().abs()
    x = x[x.isfinite()]
    return float(x.max()) if x.numel() else 0.0


def unit(case: Case) -> float:
    """The size of what is added up, whose rounding stays where a gradient p (G - <p, G>) cancels."""
    found = {(name, index): largest(x) for name, index, x in case.tensors()}
    a, products = case.arguments, 0.0
    for one, other in (
        *((("vectors", i), ("tables", i)) for i in range(2)), (("first_grad", None), ("first", None)),
        (("second_grad", None), ("second", None)), (("gradient", 1), ("embedding", None)),
        (("gradient", 2), ("reward_embedding", None)), (("gradient_1", None), ("embedding", None)),
        (("gradient_2", None), ("reward_embedding", None)), (("embedding_grad", None), ("embedding", None)),
        (("reward_grad", None), ("reward_embedding", None)),
    ):  # fmt: skip
        products += found.get(one, 0.0) * found.get(other, 0.0) * case.sizes["e"] ** 0.5
    if case.steps:
        products += found.get(("gradient", None if case.public else 0), 0.0)
    if not products:
        return 1.0
    return max(
        1.0, products / a.get("tau", 1.0) * (max(1.0, found["weight", None] * a["scale"]) if "weight" in a else 1.0)
    )


def tolerance(case: Case, dtype: torch.dtype) -> float:
    if dtype == torch.float64:
        return 1e-9
    if dtype != torch.float32:
        return ROUNDED if dtype == torch.bfloat16 else 1e-3
    half = {name for name, _, x in case.tensors() if x.dtype == torch.bfloat16}
    beside = half & {"table", "tables", "first", "second", "weight"}
    return ROUNDED if case.backend != "reference" and half & {"z", "h"} and beside else FLOAT32


def wrong_number(case: Case, arguments: dict[str, Any], result: Any) -> str | None:
    """Compares results, and what was written into. ``arguments`` are those before the call."""
    now, case.arguments = case.arguments, arguments
    expected, state = meant(case)
    pairs = [(f"result {i}", *pair) for i, pair in enumerate(zip(flat(result), expected, strict=True))]
    pairs += [(name, now[name], state[name]) for name in state]
    size = unit(case)
    for name, ours, theirs in pairs:
        if ours.shape != theirs.shape:
            return f"{name} has shape {tuple(ours.shape)}, meant is {tuple(theirs.shape)}"
        if not ours.is_floating_point():
            if not torch.equal(ours, theirs):
                return f"{name} is {ours.tolist()}, meant is {theirs.tolist()}"
            continue
        bound = tolerance(case, ours.dtype) * max(size, largest(theirs))
        if not torch.allclose(ours.double(), theirs.double(), 0, bound, equal_nan=True):
            return f"{name} differs by {largest(ours.double() - theirs):.1e}, more than {bound:.1e}"
    for name, _, x in case.tensors():
        if name in WRITTEN and not bool((between(now[name]) == FILL).all()):
            return f"{name} was written to between its entries, with strides {x.stride()}"
    return None


def spoil(case: Case) -> str:
    """Makes one argument wrong; which and how."""
    a, rng = case.arguments, case.rng
    name, index, tensor = rng.choice(list(case.tensors()))
    everywhere = "".join(case.letters.values())
    kinds = ["dtype", "dimension", "layout"] + ["tau"] * ("tau" in a) + ["backend"] * ("backend" in a)
    kinds += ["settings"] * ("top_p" in a)
    kinds += (
        ["token"] * ("tokens" in a)
        + ["step"] * case.steps
        + ["rates"] * (case.steps and case.public)
        + ["list"] * ("vectors" in a)
    )
    kinds += ["scale"] * ("scale" in a and case.public) + ["one of two"] * (a.get("second_grad") is not None)
    kinds += ["shape"] * any(everywhere.count(letter) > 1 for letter in case.letters[name, index])
    kinds += ["group"] * (a.get("group") is not None and case.sizes["N"] > 1)
    kinds += ["expanded"] * (name in WRITTEN and case.sizes["N"] > 1)
    kinds += ["storage"] * (not case.public) + ["meta"] * (not case.public or len(case.letters) > 1)
    kind = rng.choice(kinds)
    if kind == "tau":
        a["tau"] = rng.choice((0.0, -1.0, float("nan"), float("inf"), 1e-300))
        return f"tau {a['tau']}"
    if kind == "settings":
        place = rng.choice(("temperature", "top_k", "top_p"))
        a[place] = rng.choice((0, -1) if place == "top_k" else (-1.0, math.nan, math.inf))
        return f"{place} {a[place]}"
    if kind == "scale":
        place = rng.choice(("scale", "softcap"))
        a[place] = rng.choice((math.nan, math.inf)) if place == "scale" else rng.choice((math.nan, -1.0))
        return f"{place} {a[place]}"
    if kind == "backend":
        a["backend"] = rng.choice(("auto", "none", "", "triton "))
        return f"backend {a['backend']!r}"
    if kind == "list":
        a["vectors"] = a["vectors"][:-1]
        return "one vector less"
    if kind == "one of two":
        a[rng.choice(PAIRS)] = None
        return "second without second_grad, or the other way round"
    if kind in ("token", "step", "rates", "group"):
        name, index = {"token": "tokens", "rates": "learning_rates"}.get(kind, kind), None
        x = a[name].clone()
        if kind == "group":
            x = torch.arange(len(x)).flip(0)
        else:
            bad = {"token": (-1, case.sizes["V"], 2**40, -(2**63)), "step": (-1, -(2**40)), "rates": (-1.0, math.nan)}
            x[rng.randrange(len(x))] = rng.choice(bad[kind])
        spoilt = guarded(x, written=kind == "step")
    else:
        spoilt, kind = spoilt_tensor(case, kind, name, index, tensor, everywhere)
    if index is None:
        a[name] = spoilt
    else:
        a[name] = [spoilt if i == index else x for i, x in enumerate(a[name])]
    return f"{name}: {kind}"


def spoilt_tensor(
    case: Case, kind: str, name: str, index: int | None, tensor: Tensor, everywhere: str
) -> tuple[Tensor, str]:
    """``tensor`` in a way in which no operator takes it."""
    rng = case.rng
    if kind == "dtype":
        wrong = torch.int32 if name in INTEGERS else rng.choice(OTHERS)
        return guarded(tensor.nan_to_num(0.0, 0.0, 0.0).to(wrong)), f"dtype {wrong}"
    if kind == "dimension":
        return guarded(tensor.unsqueeze(0) if rng.random() < 0.5 else tensor.select(0, 0).clone()), kind
    if kind == "layout":
        return tensor.to_sparse(), kind
    if kind == "meta":
        return tensor.to("meta"), kind
    if kind == "expanded":
        return guarded(tensor[:1], written=True).expand(tensor.shape), kind
    if kind == "storage":
        spoilt = tensor.clone()
        spoilt.untyped_storage().resize_(0)
        return spoilt, kind
    letters = case.letters[name, index]
    axis = rng.choice([i for i, letter in enumerate(letters) if everywhere.count(letter) > 1])
    size = tensor.shape[axis]
    entries = torch.arange(size - 1 if size > 1 and rng.random() < 0.5 else size + 1).clamp(max=size - 1)
    return guarded(tensor.index_select(axis, entries)), f"{entries.numel()} in place of {size} at axis {axis}"


def try_one(label: str, seed: str, say: Any) -> str | None:
    """What is wrong with one call, if anything."""
    case = Case(label, random.Random(seed))
    bad = spoil(case) if case.rng.random() < 0.5 else None
    before = {name: x.clone() if name in WRITTEN and bad is None else x for name, x in case.arguments.items()}
    say(f"{label} {seed}: {bad or 'right arguments'}")
    try:
        result = case.call()
    except Exception as error:
        text = str(error)
        if bad is None or isinstance(error, RecursionError) or "INTERNAL ASSERT" in text:
            return f"{type(error).__name__} {text}"
        return None if text and "\n" not in text.strip() else f"no single sentence: {text}"
    return wrong_number(case, before, result) if bad is None else "was accepted"


def run(name: str, seed: int, calls: int) -> list[str]:
    """Failures of one operator. A call that kills its process is followed by the next one in a new process."""
    failures: list[str] = []
    first = 0
    while first < calls:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)

            def write(kind: str, text: str, writer: int = writer) -> None:
                os.write(writer, (json.dumps([kind, text]) + "\n").encode())

            try:
                for call in range(first, calls):
                    failure = try_one(name, f"{seed}/{call}", lambda text: write("call", text))
                    if failure:
                        write("failure", failure)
            except BaseException as error:  # the fuzz itself
                write("failure", repr(error))
                os._exit(1)
            os._exit(0)
        os.close(writer)
        label = ""
        with os.fdopen(reader) as stream:
            for line in stream:
                kind, text = json.loads(line)
                if kind == "call":
                    label, first = text, first + 1
                else:
                    failures.append(f"{label}: {text}")
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status == 0:
            break
        failures.append(f"{label}: ended with {status}")
        if status > 0:
            break
    return failures


if __name__ == "__main__":
    torch.set_num_threads(1)
    assert native.available()
    assert ops.OPERATORS
    print(json.dumps([failure for name in operators() for failure in run(name, int(sys.argv[1]), int(sys.argv[2]))]))
