"""Passes of constant shapes through a transformers decoder as it is, for capture in graphs.

What differs from call to call (where a sequence begins and ends, which tokens it has) is in tensors on the device, and
attention masks and positions are made from them there. The mask is additive and has four dimensions, one for each kind
of layer, which transformers takes as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def attention_masks(config: Any, first: Tensor, queries: Tensor, columns: int, dtype: torch.dtype) -> Any:
    """Additive causal masks (B, 1, S, ``columns``), 0 where a query sees a column and the dtype's minimum elsewhere.

    A query sees no column before its row's first, and none behind itself; in layers with a sliding window, only the
    nearest ones.

    Args:
        config: the model's text config.
        first: (B,) int64, the first column of each row.
        queries: (B or 1, S) int64, the columns that the queries are in.

    Returns:
        One mask, or a dict of them by kind of layer where kinds differ.
    """
    kinds = _windows(config)
    masks = {kind: _mask(first, queries, columns, window, dtype) for kind, window in kinds.items()}
    return masks if len(masks) > 1 else next(iter(masks.values()))


def _windows(config: Any) -> dict[str, int | None]:
    """Kind of layer → how many columns its attention reaches back, None for all."""
    kinds = list(dict.fromkeys(getattr(config, "layer_types", None) or ()))
    window = getattr(config, "sliding_window", None)
    if not kinds:
        return {"full_attention": window}
    return {kind: window if kind == "sliding_attention" else None for kind in kinds}


def _mask(first: Tensor, queries: Tensor, columns: int, window: int | None, dtype: torch.dtype) -> Tensor:
    column = torch.arange(columns, device=first.device)
    seen = (column <= queries.unsqueeze(-1)) & (column >= first.view(-1, 1, 1))
    if window is not None:
        seen = seen & (column > queries.unsqueeze(-1) - window)
    # Not -inf: a row that sees nothing (padding before the first column) would be NaN.
    lowest = torch.finfo(dtype).min
    return torch.zeros(seen.shape, dtype=dtype, device=first.device).masked_fill(~seen, lowest).unsqueeze(1)
