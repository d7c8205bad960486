"""What transformers loads: where it comes from, and the model and tokenizer as they are used here."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from nabla_fast.models.checkpoint import check_config, hub_source, in_short, quiet_transformers, reading
from nabla_fast.models.gguf import converted_gguf
from nabla_fast.models.placement import Place, choose_attention
from nabla_fast.models.quantization import quantization_config, stored_quantization

_SHOWN = 3  # names of a long list


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
                    raise _attention_error(attention, source, error) from error
                raise
            if not isinstance(error, ValueError) or "attention" not in str(error).lower():
                raise
            model, info = auto_class.from_pretrained(source, attn_implementation="eager", **options)
    model = model if quantised else model.to(place.device)
    return model.eval().requires_grad_(False), set(info["missing_keys"])


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


def _attention_error(attention: str, source: str, error: Exception) -> Exception:
    """An error that names the attention; an ImportError where a package is missing."""
    kind = ImportError if isinstance(error, ImportError) else ValueError
    return kind(
        f"attn_implementation is {attention!r}, with which transformers does not load {source} ({in_short(error)}); "
        "use auto, or install what it names"
    )


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
