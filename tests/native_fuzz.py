"""Calls every operator of the native back end with right and wrong arguments, each behind a page nobody may touch.

    python tests/native_fuzz.py SEED CALLS

Every operator runs in a process of its own, forked from this one; prints a JSON list of what went wrong.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import sys
from typing import Any

import torch
from torch import Tensor

from nabla_fast.ops import native, reference
from nabla_fast.ops.types import Head, Tables, TokenGradient

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
OTHERS = (torch.uint8, torch.bool, torch.int8, torch.int32, torch.int64, torch.float8_e4m3fn, torch.complex64)
_PAGE = 4096
_LIBC = ctypes.CDLL(None)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *([ctypes.c_int] * 3), ctypes.c_long]
_LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

# Shapes by the names that schemas use: N rows, V entries, d and r widths, S steps, m positions.
SHAPES = {
    "z": "NV", "h": "Nd", "weight": "Vd", "table": "Vr", "lse": "N", "hidden": "Nd", "embedding": "Nd",
    "reward_embedding": "Nr", "embedding_table": "Vd", "reward_table": "Vr", "gradient": "NV", "soft_noise": "NV",
    "hard_noise": "NV", "learning_rates": "S", "old": "Nm", "new": "Nm", "tokens": "N", "step": "N", "group": "N",
    "parameters": "NP", "exp_avg": "NP", "exp_avg_sq": "NP",
}  # fmt: skip
SIZES = {
    "N": (1, 2, 3, 5, 17),
    "V": (1, 2, 7, 33, 65, 257, 515),
    "d": (1, 3, 8, 17, 33),
    "r": (1, 5, 16),
    "S": (1, 4),
    "m": (1, 5, 9),
}
INTEGERS = ("old", "new", "tokens", "step", "group")
STATE = ("parameters", "exp_avg", "exp_avg_sq")


def operators() -> list[str]:
    """All of them, as the dispatcher knows them."""
    names = torch._C._dispatch_get_all_op_names()
    return sorted(name.removeprefix("nabla_fast::") for name in names if name.startswith("nabla_fast::native_"))


def guarded(tensor: Tensor) -> Tensor:
    """A copy with the same strides whose memory ends where a forbidden page begins."""
    if tensor.numel() == 0:
        return tensor.clone()
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    count = extent * tensor.element_size()
    pages = -(-count // _PAGE)
    base = _LIBC.mmap(None, (pages + 1) * _PAGE, 3, 0x22, -1, 0)
    assert _LIBC.mprotect(base + pages * _PAGE, _PAGE, 0) == 0
    memory = (ctypes.c_ubyte * count).from_address(base + pages * _PAGE - count)
    flat = torch.frombuffer(memory, dtype=torch.uint8).view(tensor.dtype)
    return flat.as_strided(tensor.shape, tensor.stride()).copy_(tensor)


class Case:
    """Right arguments of one operator, by name."""

    def __init__(self, name: str, rng: random.Random) -> None:
        self.rng, self.name = rng, name
        self.generator = torch.Generator().manual_seed(rng.getrandbits(32))
        self.sizes = {letter: rng.choice(sizes) for letter, sizes in SIZES.items()}
        self.latents, self.dense = rng.random() < 0.5, rng.random() < 0.5
        self.sizes["P"] = self.sizes["d" if self.latents else "V"]
        self.state_dtype = rng.choice(FLOATS[:2])
        schema = getattr(torch.ops.nabla_fast, name).default._schema
        self.arguments = {argument.name: self.draw(argument.name) for argument in schema.arguments}
        self.arguments.update(self.lists())

    def draw(self, name: str) -> Any:
        scalars = {
            "scale": 1.5,
            "softcap": self.rng.choice((0.0, 5.0)),
            "tau": self.rng.choice((0.5, 1.0, 2.0)),
            "nll_coeff": self.rng.choice((0.0, 0.1)),
            "need_grad": self.rng.random() < 0.5,
            "latents": self.latents,
            "weight_decay": 0.01,
            "max_steps": self.rng.choice((0, 1, 3)),
            "tables": None,
            "vectors": None,
        }
        if name in scalars:
            return scalars[name]
        factor = self.name == "native_dto_step" and name in ("hidden", "embedding", "reward_embedding")
        if (factor and self.dense) or (name == "gradient" and not self.dense):
            return None
        if name in ("soft_noise", "hard_noise", "group") and self.rng.random() < 0.5:
            return None
        shape = [self.sizes[letter] for letter in SHAPES[name]]
        if name in INTEGERS:
            if name == "group":
                return guarded(torch.arange(shape[0]) // 2)
            if name == "step":
                return guarded(torch.zeros(shape, dtype=torch.long))
            return guarded(torch.randint(self.sizes["V"], shape, generator=self.generator))
        x = self.floats(shape, self.state_dtype if name in STATE else None)
        return x.abs_() if name in ("exp_avg_sq", "learning_rates") else x

    def floats(self, shape: list[int], dtype: torch.dtype | None = None) -> Tensor:
        x = torch.randn(shape, generator=self.generator).to(dtype or self.rng.choice(FLOATS))
        layout = self.rng.randrange(3)
        if len(shape) == 2 and layout == 1:
            x = x.T.contiguous().T
        elif len(shape) == 2 and layout == 2:
            x = torch.cat([x, x], -1)[:, ::2] if shape[1] > 1 else x
            x = x[:, : shape[1]]
        return guarded(x)

    def lists(self) -> dict[str, list[Tensor]]:
        n, v, widths = self.sizes["N"], self.sizes["V"], [self.sizes["d"], self.sizes["r"]][: self.rng.choice((1, 2))]
        lists = {"tables": [self.floats([v, w]) for w in widths], "vectors": [self.floats([n, w]) for w in widths]}
        return {name: value for name, value in lists.items() if name in self.arguments}

    def call(self) -> Any:
        return getattr(torch.ops.nabla_fast, self.name)(*self.arguments.values())


def meant(case: Case) -> list[Tensor] | None:
    """What the operator's meaning gives in float64; None for `dto_step`, whose own tests compare it."""
    a: dict[str, Any] = dict(case.arguments)
    a |= {k: v.double() for k, v in a.items() if isinstance(v, Tensor) and v.is_floating_point()}
    a |= {k: [x.double() for x in v] for k, v in case.arguments.items() if isinstance(v, list)}
    name = case.name.removeprefix("native_")
    if name == "dto_step":
        return None
    head: Any = Head(a["weight"], a["scale"], a["softcap"]) if "weight" in a else None
    rows: Any = (a["h"], head) if name.startswith("linear") else (a.get("z"),)
    function = getattr(reference, name)
    if name == "token_diff":
        return list(function(a["old"], a["new"]))
    if name == "log_likelihood_gradient":
        return list(function(a["h"], head, a["tokens"], a["need_grad"]))
    if name == "gradient_norm":
        factors = TokenGradient(a["hidden"], a["embedding"], a["reward_embedding"])
        return [function(factors, Tables(head, a["embedding_table"], a["reward_table"], a["nll_coeff"]))]
    if name.endswith("relaxed_stats"):
        return list(function(*rows, a["tau"]))[:4]
    if name.endswith("relaxed_backward"):
        z = reference.linear_logits(*rows) if head else rows[0]
        return [function(*rows, torch.logsumexp(z / a["tau"], -1), a["vectors"], a["tables"], a["tau"])]
    table = a["tables"] if "tables" in a else a["table"]
    embeddings, *rest = function(*rows, table, a["tau"])
    return [*embeddings, *rest] if isinstance(embeddings, list) else [embeddings, *rest]


def flat(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [x for part in result for x in (part if isinstance(part, (list, tuple)) else [part])]


def wrong_number(case: Case, result: Any) -> str | None:
    expected = meant(case)
    if expected is None:
        return None
    for i, (ours, theirs) in enumerate(zip(flat(result), expected, strict=True)):
        if ours.shape != theirs.shape:
            return f"result {i} has shape {tuple(ours.shape)}, meant is {tuple(theirs.shape)}"
        scale = max(1.0, float(theirs.double().abs().max())) if theirs.numel() else 1.0
        if ours.is_floating_point() and not torch.allclose(ours.double(), theirs, 0, 2e-2 * scale):
            return f"result {i} differs by {float((ours.double() - theirs).abs().max()):.1e} of {scale:.1e}"
    return None


def spoil(case: Case) -> str:
    """Makes one argument wrong; which and how."""
    a, rng = case.arguments, case.rng
    unused = ("embedding_table", "reward_table") if case.name == "native_dto_step" and case.dense else ()
    places: list[tuple[str, int | None]] = [
        (k, None) for k, v in a.items() if isinstance(v, Tensor) and k not in unused
    ]
    places += [(k, i) for k, v in a.items() if isinstance(v, list) for i in range(len(v))]
    name, index = rng.choice(places)
    tensor: Tensor = a[name] if index is None else a[name][index]
    kinds = ["dtype", "dimension", "layout", "meta", "storage"]
    kinds += (
        ["tau"] * ("tau" in a) + ["token"] * ("tokens" in a) + ["step"] * ("step" in a) + ["list"] * ("vectors" in a)
    )
    kind = rng.choice(kinds)
    if kind == "dtype":
        wrong = torch.int32 if name in INTEGERS else rng.choice(OTHERS)
        spoilt, kind = guarded(tensor.to(wrong)), f"dtype {wrong}"
    elif kind == "dimension":
        spoilt = guarded(tensor.unsqueeze(0)) if rng.random() < 0.5 else guarded(tensor.select(0, 0).clone())
    elif kind == "layout":
        spoilt = tensor.to_sparse()
    elif kind == "meta":
        spoilt = tensor.to("meta")
    elif kind == "storage":
        spoilt = tensor.clone()
        spoilt.untyped_storage().resize_(0)
    elif kind == "tau":
        a["tau"] = rng.choice((0.0, -1.0, float("nan"), float("inf"), 1e-300))
        return f"tau {a['tau']}"
    elif kind == "list":
        a["vectors"] = a["vectors"][:-1]
        return "one vector less"
    else:
        name, index = ("tokens", None) if kind == "token" else ("step", None)
        spoilt = guarded(a[name].clone().fill_(rng.choice((-1, case.sizes["V"], 2**40)) if kind == "token" else -1))
    if index is None:
        a[name] = spoilt
    else:
        a[name] = [spoilt if i == index else x for i, x in enumerate(a[name])]
    return f"{name}: {kind}"


def try_one(name: str, seed: str, say: Any) -> str | None:
    """What is wrong with one call, if anything."""
    case = Case(name, random.Random(seed))
    bad = spoil(case) if case.rng.random() < 0.6 else None
    say(f"{name} {seed}: {bad or 'right arguments'}")
    try:
        result = case.call()
    except Exception as error:
        text = str(error)
        if bad is None or isinstance(error, RecursionError) or "INTERNAL ASSERT" in text:
            return f"{type(error).__name__} {text}"
        return None if text and "\n" not in text.strip() else f"no single sentence: {text}"
    return wrong_number(case, result) if bad is None else "was accepted"


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
    print(json.dumps([failure for name in operators() for failure in run(name, int(sys.argv[1]), int(sys.argv[2]))]))
