"""Where a model is put, in which dtype and with which attention."""

from __future__ import annotations

import importlib.util
import re
from typing import Any, NamedTuple

import torch

from nabla_fast.models.quantization import require_quantization

_DTYPES: dict[str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}
_ATTENTIONS = ("auto", "flash_attention_2", "sdpa", "eager")  # known without loading transformers
# As transformers recognises one: owner/name, and perhaps a revision and a function.
_HUB_KERNEL = re.compile(r"[^/:@\s]+/[^/:@\s]+(@[^/:\s]+)?(:[^/:\s]+)?")


def choose_device(device: str | torch.device, argument: str = "device") -> torch.device:
    """The device that ``device`` names, "auto" being CUDA where there is one; messages call it ``argument``.

    Raises:
        ValueError: if ``device`` is unknown, or CUDA is asked for and absent.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    accepted = 'use "auto", "cpu", "cuda" or "cuda:N"'
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{argument} is {device!r}, which torch does not know; {accepted}") from error
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"{argument} is {str(device)!r}, but torch sees {torch.cuda.device_count()} CUDA devices; {accepted}"
        )
    return chosen


def choose_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype that ``dtype`` names, "auto" being bfloat16 on CUDA and float32 elsewhere.

    Raises:
        ValueError: if ``dtype`` is unknown.
    """
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    chosen = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if chosen is None or chosen not in _DTYPES.values():
        raise ValueError(f'dtype is {dtype!r}; use "auto" or one of {", ".join(_DTYPES)} (or the torch dtype)')
    return chosen


def choose_attention(attn_implementation: str, device: torch.device, dtype: torch.dtype) -> str:
    """The attention that ``attn_implementation`` names, "auto" being the fastest this device and dtype can run.

    Raises:
        ValueError: if ``attn_implementation`` is unknown.
    """
    if attn_implementation not in _ATTENTIONS:
        from transformers import AttentionInterface

        registered = sorted(set(AttentionInterface().valid_keys()) - set(_ATTENTIONS))
        if attn_implementation not in registered and not _HUB_KERNEL.fullmatch(attn_implementation):
            raise ValueError(
                f"attn_implementation is {attn_implementation!r}; use one of {', '.join([*_ATTENTIONS, *registered])}, "
                "or a kernel of the hub such as kernels-community/flash-attn3"
            )
    if attn_implementation != "auto":
        return attn_implementation
    half = dtype in (torch.float16, torch.bfloat16)
    flash = half and device.type == "cuda" and importlib.util.find_spec("flash_attn") is not None
    return "flash_attention_2" if flash else "sdpa"


class Place(NamedTuple):
    """Device, dtype, attention and quantisation of a model to be loaded; ``attention`` "auto" leaves the choice to us,
    ``quantization`` None to the checkpoint."""

    device: torch.device
    dtype: torch.dtype
    attention: str
    quantization: Any = None


def placed(
    device: str | torch.device, dtype: str | torch.dtype, attn_implementation: str, quantization: Any = None
) -> Place:
    """What the arguments of ``load_language_model`` say; raises ValueError for an unknown one."""
    require_quantization(quantization)
    chosen = choose_device(device)
    kind = choose_dtype(dtype, chosen)
    choose_attention(attn_implementation, chosen, kind)
    if kind == torch.float64 and quantization not in (None, "none"):
        raise ValueError(f"dtype is {dtype}, and quantization {quantization!r}; use float32, bfloat16 or float16")
    return Place(chosen, kind, attn_implementation, quantization)
