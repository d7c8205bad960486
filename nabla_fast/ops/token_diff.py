"""Where token ids differ."""

from __future__ import annotations

from typing import Annotated

from torch import Tensor

from nabla_fast.ops import reference
from nabla_fast.ops.registry import operator
from nabla_fast.ops.types import TokenDiff


@operator()
def token_diff(
    old: Annotated[Tensor, "int64 B m"], new: Annotated[Tensor, "int64 B m"], backend: str = "auto"
) -> TokenDiff:
    """The first changed position (m where nothing changed) and the number of changes per row of token ids (B, m)."""
    return reference.token_diff(old, new)
