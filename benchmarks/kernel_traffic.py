"""Counts what a call of each Triton operator launches, allocates, reads and writes, at the benchmark's sizes on a GPU.

python benchmarks/kernel_traffic.py COMMIT    # writes results/kernel_traffic.json: that commit, and this tree

It needs no GPU and measures nothing: the operators run on tensors without memory, as on an H200 (132 multiprocessors),
and every launch is recorded with its operands. An operand counts once a launch, which is what reaches memory if what
programs share stays in the cache. A gather counts the rows that it takes.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from shapes import GEMMA2_2B, LLAMA31_8B, QWEN3_4B, QWEN25_7B, Shape
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).parent.parent
OUTPUT = ROOT / "benchmarks" / "results" / "kernel_traffic.json"
SIZES = ((QWEN25_7B, 1024), (GEMMA2_2B, 256), (LLAMA31_8B, 256))
# Parameters that a launch writes, and does not read. What is written and read again by the same launch is small.
WRITTEN = {
    "OUT", "STATE", "TOKENS", "MAX_PROB", "LSE", "ENTROPY", "TOP", "Q", "TOKEN", "MASK", "HIGH", "LOW", "ORIGIN",
    "LOG_PI", "PARTS", "SUMS", "OFFSET", "ROUNDED", "WEIGHTS", "BASES",
}  # fmt: skip
READ = {  # by a kernel that only takes them
    "stats": {"STATE", "TOKENS"},
    "gather": {"TOKEN"},
    "others": {"TOP", "TOKEN", "BASES"},
    "likelihood": {"TOP", "MAX_PROB", "Q", "LOG_PI", "BASES"},
    "linear_relaxed": {"TOP", "TOKEN", "ORIGIN", "Q"},
    "mixture": {"TOKEN", "SUMS"},
    "mean": {"TOKEN", "OFFSET"},
    "relaxed": {"TOP", "MAX_PROB", "TOKEN", "ORIGIN", "Q"},
    "relaxed_product": {"TOP", "TOKEN", "ORIGIN", "Q"},
    "weights": {"TOP", "MAX_PROB", "Q", "ORIGIN"},
}
# Fields of a softmax that a launch is given, and leaves alone.
UNUSED = {
    "others": {"MAX_PROB"},
    "mean": {"TOP", "MAX_PROB"},
    "weights": {"TOKEN"},
}
GATHERS = {"gather", "mixture", "mean"}
IN_PLACE = {"likelihood": "WEIGHTS"}


def size(x: Tensor) -> int:
    """Bytes of what is in memory."""
    count = 1
    for length, stride in zip(x.shape, x.stride(), strict=True):
        count *= length if stride else 1
    return count * x.element_size()


class Record(TorchDispatchMode):
    """What was launched, allocated, read and written."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.allocations = self.read = self.written = 0

    def launched(self, name: str, read: list[Tensor], written: list[Tensor]) -> None:
        self.launches[name] += 1
        self.read += sum(map(size, read))
        self.written += sum(map(size, written))

    def kernel(self, function: Any, *args: Any, **named: Any) -> None:
        """In place of ``JITFunction.run``."""
        named |= {parameter.name: value for parameter, value in zip(function.params, args, strict=False)}
        name = function.fn.__name__.strip("_").removesuffix("_kernel")
        for key, value in [*named.items()]:
            if isinstance(value, tuple):  # a matrix, or tensors by name
                named |= {key if field == "data" else field.upper(): x for field, x in value._asdict().items()}
        unused = UNUSED.get(name, ())
        operands = {key: value for key, value in named.items() if isinstance(value, Tensor) and key not in unused}
        written = {key for key in operands if key in WRITTEN and key not in READ.get(name, ())}
        unread = written - {IN_PLACE.get(name)} | {"TABLE", "COUNTER"} | ({"G"} if name == "mean" else set())
        read = [value for key, value in operands.items() if key not in unread]
        if "TABLE" in operands:
            table = operands["TABLE"]
            read.append(table[: len(operands["TOKEN"])] if name in GATHERS else table)
        self.launched(name, read, [operands[key] for key in written])

    def product(self, out: Tensor, a: Tensor, b: Tensor, alpha: float, add: bool) -> Tensor:
        """In place of a product by the matrix library."""
        self.launched("product", [a, b, *[out] * add], [out])
        return out

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if "empty" in func.__name__:
            self.allocations += 1
        elif not any(one.alias_info and not one.alias_info.is_write for one in func._schema.returns):
            inputs = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            outputs = [x for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, Tensor)]
            if outputs:
                self.launched(str(func).removeprefix("aten."), inputs, outputs)
        return result


@contextlib.contextmanager
def recorded() -> Iterator[Record]:
    from triton.runtime.jit import JITFunction

    from nabla_fast.ops import table_matmul

    record = Record()
    with contextlib.ExitStack() as stack:
        stack.enter_context(
            patch.object(JITFunction, "run", lambda f, *a, grid, warmup, **k: record.kernel(f, *a, **k))
        )
        stack.enter_context(patch.object(table_matmul, "_multiply", record.product))
        yield record


def new(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def calls(shape: Shape, rows: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What a call does below autograd, with what autograd adds to it."""
    from nabla_fast.ops import triton as ops
    from nabla_fast.ops.types import Head, Tables, TokenGradient

    z, h = new(rows, shape.vocabulary), new(rows, shape.width)
    head = Head(new(shape.vocabulary, shape.width), 1.0, shape.softcap)
    table = head.weight if shape.tied else new(shape.vocabulary, shape.width)
    reward = new(shape.vocabulary, shape.reward_width)
    tokens, sent = new(rows, dtype=torch.int64), new(rows, shape.width, dtype=torch.float32)
    factors = TokenGradient(h, new(rows, shape.width), new(rows, shape.reward_width))

    def soft() -> None:
        if hasattr(ops, "soft_embedding_recorded"):
            ops.soft_embedding_backward(z, sent, table, *ops.soft_embedding_recorded(z, table)[1:]).to(z.dtype)
        else:
            ops.soft_embedding(z, table)
            ops.relaxed_backward(z, [sent], [table]).to(z.dtype)

    def linear_soft() -> None:
        if hasattr(ops, "linear_soft_embedding_recorded"):
            recorded = ops.linear_soft_embedding_recorded(h, head, table)[1:]
            ops.linear_soft_embedding_backward(h, head, sent, table, *recorded).to(h.dtype)
            return
        ops.linear_soft_embedding(h, head, table)
        ops.linear_relaxed_backward(h, head, [sent], [table]).to(h.dtype)

    def straight() -> None:
        ops.straight_through_embedding(z, [table, reward])
        ops.relaxed_backward(z, [sent, new(rows, shape.reward_width, dtype=torch.float32)], [table, reward]).to(z.dtype)

    yield "relaxed_stats", lambda: ops.relaxed_stats(z)
    yield "linear_relaxed_stats", lambda: ops.linear_relaxed_stats(h, head)
    yield "soft_embedding, forward and backward", soft
    yield "linear_soft_embedding, forward and backward", linear_soft
    yield "straight_through_embedding, forward and backward", straight
    yield "linear_log_likelihood", lambda: ops.log_likelihood_gradient(h, head, tokens, False)
    yield "linear_log_likelihood with its gradient", lambda: ops.log_likelihood_gradient(h, head, tokens, True)
    yield "gradient_norm", lambda: ops.gradient_norm(factors, Tables(head, table, reward, 1e-3))


def as_on_a_gpu() -> None:
    """Products of tensors without memory take the GPU's path; before anything has imported them."""
    from nabla_fast.ops import table_matmul

    source = Path(table_matmul.__file__).read_text()
    assert "is_cuda" in source
    exec(compile(source.replace("is_cuda", "is_meta"), table_matmul.__file__, "exec"), vars(table_matmul))


def count() -> dict[str, Any]:
    """Every operator at every size, by name."""
    as_on_a_gpu()
    found: dict[str, Any] = {}
    cases = [(shape, rows, name) for shape, rows in SIZES for name in NAMES]
    cases += [(QWEN3_4B, 8192, "relaxed_stats"), (QWEN25_7B, 8, "relaxed_stats")]
    for shape, rows, name in cases:
        run = dict(calls(shape, rows))[name]
        with recorded():  # once before, because what is kept between calls is made by the first
            run()
        with recorded() as record, record:
            run()
        found[f"{name}, {shape.name}, {rows} rows"] = {
            "launches": sum(record.launches.values()),
            "allocations": record.allocations,
            "read": record.read,
            "written": record.written,
            "kernels": dict(sorted(record.launches.items())),
        }
    return found


NAMES = (
    "relaxed_stats", "linear_relaxed_stats", "soft_embedding, forward and backward",
    "linear_soft_embedding, forward and backward", "straight_through_embedding, forward and backward",
    "linear_log_likelihood", "linear_log_likelihood with its gradient", "gradient_norm",
)  # fmt: skip


def of_tree(tree: Path) -> dict[str, Any]:
    """What `count` finds of the package in ``tree``."""
    environment = os.environ | {"PYTHONPATH": f"{tree}:{ROOT / 'benchmarks'}"}
    command = [sys.executable, "-W", "ignore", __file__]
    result: dict[str, Any] = json.loads(
        subprocess.run(command, env=environment, capture_output=True, check=True).stdout
    )
    return result


def main() -> None:
    if len(sys.argv) == 1:
        print(json.dumps(count()))
        return
    commit = sys.argv[1]
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(["git", "archive", commit, "nabla_fast"], cwd=ROOT, capture_output=True, check=True)
        subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
        before = of_tree(Path(folder))
    after = of_tree(ROOT)
    made = {"command": f"python benchmarks/kernel_traffic.py {commit}", "torch": torch.__version__}
    OUTPUT.write_text(json.dumps({**made, "before": before, "after": after}, indent=2) + "\n")
    for name in after:
        old, own = before[name], after[name]
        print(
            f"{name}: launches {old['launches']} -> {own['launches']}, allocations {old['allocations']} -> "
            f"{own['allocations']}, GB read {old['read'] / 1e9:.3f} -> {own['read'] / 1e9:.3f}, written "
            f"{old['written'] / 1e9:.3f} -> {own['written'] / 1e9:.3f}"
        )


if __name__ == "__main__":
    main()
