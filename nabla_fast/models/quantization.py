"""Quantisation of a model when it is loaded: by a name of ours, or by a configuration of transformers."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# Known to the command line, which has not loaded torch. transformers puts a model on a device by accelerate.
_PACKAGES = {
    "none": (),
    "int8": ("torchao", "accelerate"),
    "bnb-8bit": ("bitsandbytes", "accelerate"),
    "bnb-4bit": ("bitsandbytes", "accelerate"),
}
QUANTIZATIONS = tuple(_PACKAGES)
"""What ``quantization`` may be: "int8" is torchao's `Int8WeightOnlyConfig`, "bnb-8bit" and "bnb-4bit" (NF4) are
bitsandbytes'."""


def require_quantization(quantization: Any, argument: str = "quantization") -> None:
    """Checks what ``load_language_model`` takes as ``quantization``; messages call it ``argument``.

    Raises:
        ValueError: if it is neither None, one of `QUANTIZATIONS` nor a quantization config of transformers.
        ImportError: if a package is not installed that it needs.
    """
    if quantization is None or hasattr(quantization, "quant_method"):
        return
    packages = _PACKAGES.get(quantization) if isinstance(quantization, str) else None
    if packages is None:
        raise ValueError(
            f"{argument} is {quantization!r}; use one of {', '.join(QUANTIZATIONS)}, or in Python a quantization "
            "config of transformers such as BitsAndBytesConfig"
        )
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"{argument} is {quantization!r}, which needs {' and '.join(missing)}; run "
            'pip install "nabla_fast[quantized]"'
        )


def quantization_config(quantization: Any, dtype: torch.dtype, heads: Sequence[str] = ()) -> Any:
    """The configuration for ``from_pretrained``, where layers compute in ``dtype``; None for none.

    Args:
        heads: names of modules that stay as they are; none leaves the choice to transformers, which finds output heads.
    """
    if quantization in (None, "none"):
        return None
    if not isinstance(quantization, str):
        return quantization
    from transformers import BitsAndBytesConfig, TorchAoConfig

    skipped = list(heads) or None
    if quantization == "int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=skipped)
    if quantization == "bnb-8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=skipped
    )


def stored_quantization(source: str) -> str | None:
    """How a checkpoint was quantised before it was saved, by its config.json; None if it was not."""
    from transformers import PreTrainedConfig

    values, _ = PreTrainedConfig.get_config_dict(source)
    stored = values.get("quantization_config")
    return None if stored is None else str(stored.get("quant_method", "unknown"))
