"""Compiles the Triton kernels for GPUs that are not there, and prints what each takes; run by test_triton_compile.py.

The operators run on meta tensors of real sizes, with the launch replaced by a recorder, so what is compiled is what
would be launched: the same specialisation, tile shapes and options. One JSON line per kernel variant and architecture.

    python triton_resources.py ARCHITECTURE SHARD SHARDS
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils._pytree import tree_leaves
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, KernelParam

from nabla_fast.ops import triton as ops
from nabla_fast.ops.triton import _matmul
from nabla_fast.ops.triton.rotary import rotary
from nabla_fast.ops.types import DTOInputs, DTOOptions, DTOState, Head, Tables, TokenGradient

V, D, D_R = 151936, 3584, 2560
TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64", torch.int32: "i32",
    torch.int8: "i8", torch.bool: "i1",
}  # fmt: skip

recorded: dict[str, tuple[str, JITFunction, dict[str, Any], dict[Any, Any], dict[Any, Any], dict[str, Any]]] = {}
label = ""


def record(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    """In place of ``JITFunction.run``: the signature that Triton would specialise on."""
    kwargs |= {parameter.name: value for parameter, value in zip(self.params, args, strict=False)}
    assert all(0 < n < (65536 if axis else 2**31) for axis, n in enumerate(grid)), (self.__name__, grid)
    options = {
        name: kwargs.pop(name) for name in ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg") if name in kwargs
    }
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    assert set(kwargs) == {p.name for p in self.params}, set(kwargs) ^ {p.name for p in self.params}

    def specialise(parameter: KernelParam, path: tuple[int, ...], value: Any) -> Any:
        if isinstance(value, tuple):
            return type(value)(*(specialise(parameter, (*path, i), x) for i, x in enumerate(value)))
        specialised = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and specialised):
            constants[path] = value
            return "constexpr"
        if isinstance(value, Tensor):
            assert value.device.type == "meta"
            kind, aligned = f"*{TYPES[value.dtype]}", value.storage_offset() * value.element_size() % 16 == 0
        elif isinstance(value, int):
            kind = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = value % 16 == 0 and specialised
        else:
            assert isinstance(value, float), (parameter.name, value)
            kind, aligned = "fp32", False
        if aligned:
            attributes[path] = [["tt.divisibility", 16]]
        return kind

    signature = {p.name: specialise(p, (i,), kwargs[p.name]) for i, p in enumerate(self.params)}
    name = self.fn.__name__.strip("_").removesuffix("_kernel")
    # One of those that differ in integers alone (their divisibility, or being 1) stands for all.
    kinds = [kind for kind in tree_leaves(signature) if kind != "constexpr" and not kind.startswith("i")]
    static = {p.name: kwargs[p.name] for p in self.params if p.is_constexpr}
    absent = [path for path, value in constants.items() if value is None]
    key = repr((name, kinds, static, absent, options))
    recorded.setdefault(key, (f"{name} [{label}]", self, signature, constants, attributes, options))


def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without memory."""
    return torch.empty(*shape, dtype=dtype, device="meta")


def calls() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Every operator at the sizes of Qwen2.5-7B with a 4B reward model, so that every tile shape is taken."""
    yield "B=8", partial(ops.token_diff, new(8, 1024, dtype=torch.int64), new(8, 1024, dtype=torch.int64))
    for dtype in (torch.bfloat16, torch.float32):
        q, k, cos, sin = (
            new(*shape, dtype=dtype) for shape in ((1, 28, 64, 128), (1, 4, 64, 128), *2 * [(1, 64, 128)])
        )
        for inverse in (False, True):
            yield f"{TYPES[dtype]} inverse={inverse}", partial(rotary, q, k, cos, sin, inverse)
    yield from _calls("bf16", torch.bfloat16, (1, 64, 128, 1024))
    yield from _calls("f32", torch.float32, (1, 64))


def _calls(name: str, dtype: torch.dtype, many: tuple[int, ...]) -> Iterator[tuple[str, Callable[[], Any]]]:
    W, E, R = (new(V, d, dtype=dtype) for d in (D, D, D_R))
    for n in many:
        h, tokens = new(n, D, dtype=dtype), new(n, dtype=torch.int64)
        yield f"{name} N={n}", partial(ops.relaxed_stats, new(n, V, dtype=dtype))
        yield f"{name} N={n}", partial(ops.linear_relaxed_stats, h, Head(W))
        yield f"{name} N={n}", partial(soft_embedding, new(n, V, dtype=dtype), E)
        yield f"{name} N={n}", partial(ops.log_likelihood_gradient, h, Head(W), tokens, True)
        yield f"{name} N={n}", partial(linear_soft_embedding, h, Head(W), E)
        yield f"{name} N={n} alone", partial(ops.log_likelihood_gradient, h, Head(W), tokens, False)
        own = TokenGradient(h, new(n, D, dtype=dtype), new(n, D_R, dtype=dtype))
        yield f"{name} N={n} own", partial(ops.gradient_norm, own, Tables(Head(W), E, R, 1e-3))
    for n in (1, 64):
        z, h, vectors = new(n, V, dtype=dtype), new(n, D, dtype=dtype), [new(n, D), new(n, D_R)]
        factors, tables = TokenGradient(h, *vectors), Tables(Head(W), E, R, 1e-3)
        yield f"{name} N={n}", partial(ops.gradient_norm, factors, tables)
        yield f"{name} N={n} latents, factors", partial(dto, n, True, factors, tables)
        yield f"{name} N={n} latents, dense", partial(dto, n, True, new(n, V), tables)
        if dtype == torch.float32:
            continue
        yield f"{name} N={n} f32 logits", partial(soft_embedding, new(n, V), E)
        yield f"{name} N={n} logits, dense", partial(dto, n, False, new(n, V), tables)
        yield f"{name} N={n} logits, factors", partial(dto, n, False, factors, tables)
        yield f"{name} N={n}", partial(ops.straight_through_embedding, z, [E])
        yield f"{name} N={n}", partial(ops.relaxed_backward, z, vectors, [E, R])
        yield f"{name} N={n} f32 rows, softcap", partial(ops.linear_relaxed_stats, new(n, D), Head(W, 1.0, 30.0))
        capped = Head(W, 1.0, 30.0)
        yield f"{name} N={n} softcap", partial(ops.log_likelihood_gradient, h, capped, new(n, dtype=torch.int64), True)
        yield f"{name} N={n} softcap", partial(linear_soft_embedding, h, capped, E)
        yield f"{name} N={n} tied", partial(ops.linear_relaxed_backward, h, Head(W), vectors, [W, R])
        yield f"{name} N={n} tied latents, factors", partial(dto, n, True, factors, tables._replace(embedding=W))


def soft_embedding(z: Tensor, table: Tensor) -> None:
    """Forward and backward."""
    recorded = ops.soft_embedding_recorded(z, table)
    ops.soft_embedding_backward(z, new(len(z), table.shape[1]), table, *recorded[1:])


def linear_soft_embedding(h: Tensor, head: Head, table: Tensor) -> None:
    """Forward and backward."""
    recorded = ops.linear_soft_embedding_recorded(h, head, table)
    ops.linear_soft_embedding_backward(h, head, new(len(h), table.shape[1]), table, *recorded[1:])


def dto(n: int, latents: bool, gradient: Any, tables: Any) -> None:
    """A DTO step with both noises and groups."""
    width = D if latents else V
    integers = new(n, dtype=torch.int64)
    state = DTOState(new(n, width), new(n, width), new(n, width), integers, integers)
    inputs = DTOInputs(new(20), gradient, new(n, V), new(n, V), integers)
    ops.dto_step(state, inputs, tables, DTOOptions(latents))


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers per thread and bytes of stack, where spills go."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", text.stdout)
    assert found, text.stdout
    return int(found[1]), int(found[2])


def main() -> None:
    global label
    architecture, shard, shards = (int(a) for a in sys.argv[1:4])
    only = sys.argv[4] if len(sys.argv) > 4 else ""
    JITFunction.run = record
    _matmul.architecture = lambda device: architecture
    for label, call in calls():  # noqa: B007
        call()
    if os.environ.get("LIST"):
        for name, *_ in recorded.values():
            print(name)
        return
    for name, fn, signature, constants, attributes, options in list(recorded.values())[shard::shards]:
        if only not in name:
            continue
        line: dict[str, Any] = {"kernel": name, "architecture": architecture}
        started = time.perf_counter()
        try:
            source = ASTSource(fn, signature, constants, attributes)
            compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
            registers, stack = resources(compiled.asm["cubin"])
            line |= {"registers": registers, "stack": stack, "shared": compiled.metadata.shared}
            line["warps"] = compiled.metadata.num_warps
        except BaseException as error:
            while error.__cause__ is not None:
                error = error.__cause__
            line["error"] = f"{type(error).__name__}: {error}"[-1000:]
        line["seconds"] = round(time.perf_counter() - started, 1)
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
