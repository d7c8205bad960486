"""The operators as PyTorch's dispatcher knows them: one library, one way to register.

Every operator has a schema, a kernel that hands over to the back end its last argument names, and a fake kernel that
gives shapes and dtypes, so that `torch.compile(fullgraph=True)` goes through and `torch.library.opcheck` passes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LIBRARY = torch.library.Library("nabla_fast", "FRAGMENT")

HEAD = "Tensor weight, float scale, float softcap"
"""How a `Head` is spelled in a schema."""


def register(
    schema: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
) -> Any:
    """Defines an operator and returns it.

    Args:
        schema: name, arguments (``str backend`` last) and results; float results before integer ones.
        kernel: runs on tensors of any device.
        fake: gives empty results of the right shapes and dtypes.
        backward, setup_context: as for ``torch.library.register_autograd``.
    """
    name = schema.split("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"nabla_fast::{name}", fake, lib=LIBRARY)
    if backward is not None:
        torch.library.register_autograd(f"nabla_fast::{name}", backward, setup_context=setup_context, lib=LIBRARY)
    return getattr(torch.ops.nabla_fast, name).default


def statistic_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64 input, else float32: what sums and logits are kept in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
