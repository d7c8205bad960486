"""What transformers loads: where it comes from, where it is put, and the model and tokenizer as they are used here."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nabla_fast.models.checkpoint import check_config, hub_source, in_short, quiet_transformers, reading
from nabla_fast.models.gguf import converted_gguf
from nabla_fast.models.quantization import quantization_config, require_quantization, stored_quantization

_SHOWN = 3  # names of a long list
_DTYPES = {
    str(kind).removeprefix("torch."): kind for kind in (torch.bfloat16, torch.float16, torch.float32, torch.float64)
}
_ATTENTIONS = ("auto", "flash_attention_2", "sdpa", "eager")  # known without loading transformers
# As transformers recognises one: owner/name, and perhaps a revision and a function.
_HUB_KERNEL = re.compile(r"[^/:@\s]+/[^/:@\s]+(@[^/:\s]+)?(:[^/:\s]+)?")


def choose_device(device: str | torch.device, argument: str = "device") -> torch.device:
    """The device that ``device`` names, "auto" being CUDA where there is one. ValueError for one that there is not;
    messages call it ``argument``."""
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


def multiplies_bfloat16() -> bool:
    """Whether the CPU has instructions for products of bfloat16, AVX512-BF16 or AMX; it emulates them otherwise."""
    asked = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(ask is not None and ask() for ask in asked)


def choose_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype that ``dtype`` names, "auto" being bfloat16 where the device multiplies it (CUDA, and CPUs of
    `multiplies_bfloat16`) and float32 elsewhere; ValueError for others."""
    if dtype == "auto":
        fast = device.type == "cuda" or (device.type == "cpu" and multiplies_bfloat16())
        return torch.bfloat16 if fast else torch.float32
    chosen = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if chosen is None or chosen not in _DTYPES.values():
        raise ValueError(f'dtype is {dtype!r}; use "auto" or one of {", ".join(_DTYPES)} (or the torch dtype)')
    return chosen


def choose_attention(attn_implementation: str, device: torch.device, dtype: torch.dtype) -> str:
    """The attention that is named, "auto" being the fastest this device and dtype can run; ValueError for others."""
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


def resolve(path: str | os.PathLike[str], argument: str) -> str:
    """A folder or hub id that ``from_pretrained`` takes."""
    text = os.fspath(path)
    found = Path(text).expanduser()
    if found.is_file():
        if found.suffix.lower() != ".gguf":
            raise ValueError(f"{argument} is the file {text}; give a .gguf file, a model folder or a hub id")
        with reading(argument, text):
            return str(converted_gguf(found))
    if found.is_dir():
        return str(found)
    if _looks_like_path(text):
        raise FileNotFoundError(f"{argument} is {text}, and there is no such file or folder")
    return hub_source(text, argument)


def _looks_like_path(text: str) -> bool:
    # A hub id is "name" or "owner/name"; everything else can only have been meant as a path.
    return text.startswith((".", "~", os.sep)) or os.path.isabs(text) or text.count("/") > 1 or text.endswith(".gguf")


def load(
    auto_class: Any, source: str, place: Place, *, heads: Sequence[str] = (), **options: Any
) -> tuple[Any, set[str]]:
    """The model, ready for inference, and the names of the weights that the checkpoint does not hold.

    Args:
        heads: as of `quantization_config`.

    Raises:
        ValueError: if a quantisation is asked for and the checkpoint has one; and whatever transformers raises.
    """
    check_config(source)
    options |= {"dtype": place.dtype, "output_loading_info": True, "trust_remote_code": False}
    quantised = is_quantised(source, place)
    if quantised:
        # On its device from the first: some kernels want weights packed where they run, and not all can be moved.
        options["device_map"] = {"": place.device}
        recipe = quantization_config(place.quantization, place.dtype, heads)
        if recipe is not None:  # given as None, it would hide that of the checkpoint
            options["quantization_config"] = recipe
    attention = choose_attention(place.attention, place.device, place.dtype)
    with quiet_transformers():
        try:
            model, info = auto_class.from_pretrained(source, attn_implementation=attention, **options)
        except Exception as error:
            # Some families have no sdpa. Eager is our choice only where the caller left the choice to us.
            if place.attention != "auto":
                if not _builds(auto_class, source, attention) and _builds(auto_class, source, "eager"):
                    kind = ImportError if isinstance(error, ImportError) else ValueError
                    raise kind(
                        f"attn_implementation is {attention!r}, with which transformers does not load {source} "
                        f"({in_short(error)}); use auto, or install what it names"
                    ) from error
                raise
            if not isinstance(error, ValueError) or "attention" not in str(error).lower():
                raise
            model, info = auto_class.from_pretrained(source, attn_implementation="eager", **options)
    model = model if quantised else model.to(place.device)
    return model.eval().requires_grad_(False), set(info["missing_keys"])


def loaded(auto_class: Any, source: str, place: Place, argument: str, wanted: str, **options: Any) -> tuple[Any, Any]:
    """The model and its tokenizer. ``options`` are those of `load`.

    Raises:
        ValueError: if they cannot be loaded, or weights are missing: it names ``argument``, and asks for ``wanted``.
    """
    with reading(argument, source):
        model, missing = load(auto_class, source, place, **options)
        tokenizer = load_tokenizer(source)
    if missing:
        raise ValueError(f"{argument} is {source}, which has no weights for {listed(missing)}; give {wanted}")
    return model, tokenizer


def is_quantised(source: str, place: Place) -> bool:
    """Whether a model is or is to be quantised when it is loaded.

    Raises:
        ValueError: if both.
    """
    asked = place.quantization not in (None, "none")
    stored = stored_quantization(source)
    if asked and stored is not None:
        raise ValueError(
            f"its config.json says that it is quantised already, by {stored}, and quantization is "
            f"{place.quantization!r}; leave that out"
        )
    return asked or stored is not None


def _builds(auto_class: Any, source: str, attention: str) -> bool:
    """Whether transformers makes the model of a configuration, without its weights, with this attention."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        with torch.device("meta"):
            auto_class.from_config(config, attn_implementation=attention, trust_remote_code=False)
    except Exception:  # whatever transformers or a kernel raises
        return False
    return True


def load_tokenizer(source: str) -> Any:
    from transformers import AutoTokenizer

    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    # Where the files are missing, some families get a tokenizer that knows its special tokens alone.
    if not set(tokenizer.get_vocab().values()) - set(tokenizer.added_tokens_decoder):
        raise ValueError("its tokenizer has no vocabulary; tokenizer.json, or what stands for it, is missing")
    return tokenizer


def listed(names: set[str]) -> str:
    shown = sorted(names)
    return ", ".join(shown[:_SHOWN]) + (f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else "")
