"""Adapters of peft: where they are found, and the models that they and their base models make."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from nabla_fast.models.checkpoint import file_of, quiet_transformers, reading
from nabla_fast.models.pretrained import Place, is_quantised, listed, load, load_tokenizer, resolve

_CONFIG = "adapter_config.json"
_WRAPPED = "base_model.model."  # what peft puts before a weight's name
# Of an adapter on the hub: itself and, if it has one, its tokenizer.
_FILES = ("adapter_*", "*token*", "*.jinja", "vocab*", "merges.txt", "*.model")


def find_adapter(source: str, name: str | None, argument: str) -> str | None:
    """The folder of the adapter that a folder or hub id holds, from the hub's copy here; None where it holds a model.

    Args:
        name: of the sub-folder that holds the adapter; None takes the one beside the tokenizer.
        argument: what named ``source``.

    Raises:
        ValueError: if there is no adapter of that name, or several are there and none is named.
    """
    from huggingface_hub import snapshot_download

    with reading(argument, source):
        local = Path(source).is_dir()
        found = file_of(source, _CONFIG, name or "")
        if found is not None and local:
            return str(found.parent)
        if found is not None:
            prefix = f"{name}/" if name else ""
            snapshot = snapshot_download(source, allow_patterns=[prefix + pattern for pattern in _FILES])
            return str(Path(snapshot) / (name or ""))
        names = _names(source) if name is not None or (local and not (Path(source) / "config.json").is_file()) else []
    if name is not None:
        has = f"it has {', '.join(names)}" if names else "it has no adapters in sub-folders"
        raise ValueError(f"adapter is {name!r}, and {argument} is {source}, which has no {name}/{_CONFIG}; {has}")
    if names:
        raise ValueError(
            f"{argument} is {source}, which holds adapters in sub-folders; give one of {', '.join(names)} as adapter"
        )
    return None


def _names(source: str) -> list[str]:
    """Sub-folders with an adapter."""
    if Path(source).is_dir():
        return sorted(file.parent.name for file in Path(source).glob(f"*/{_CONFIG}"))
    from huggingface_hub import list_repo_files

    return sorted(os.path.dirname(file) for file in list_repo_files(source) if file.endswith(f"/{_CONFIG}"))


def adapter_config(folder: str, argument: str, *, language_model: bool) -> Any:
    """The configuration of an adapter; ValueError for one of another kind of model, or that changes a model's input."""
    try:
        from peft import PeftConfig
    except ImportError as error:
        raise ImportError(f'{folder} holds a peft adapter; run pip install "nabla_fast[gguf]"') from error
    with reading(argument, folder):
        own = PeftConfig.from_pretrained(folder)
    if own.task_type == "TOKEN_CLS":
        raise ValueError(
            f"{argument} is {folder}, a peft adapter of a token classifier; merge it into its base model "
            "(merge_and_unload, save_pretrained) and give that folder"
        )
    if language_model and own.task_type not in (None, "CAUSAL_LM"):
        raise ValueError(
            f"{argument} is {folder}, a peft adapter for {own.task_type}; give one for CAUSAL_LM, a language model"
        )
    if own.is_prompt_learning:
        raise ValueError(
            f"{argument} is {folder}, a peft adapter of type {own.peft_type.value}, which changes what a model reads; "
            "give one of its layers, such as LORA"
        )
    return own


def load_adapter(
    folder: str, base: str | os.PathLike[str] | None, place: Place, argument: str, *, language_model: bool
) -> tuple[Any, Any]:
    """The model that an adapter makes of its base model, and its tokenizer.

    The adapter is merged in float32. Into a quantised base it is not merged, which would round it away: it stays beside
    the layers, as it was trained.

    Args:
        base: the base model, where it is not what the adapter itself names.
        language_model: or else a classifier with one label.

    Raises:
        ImportError, ValueError: as `adapter_config` does, and if either cannot be loaded.
    """
    own = adapter_config(folder, argument, language_model=language_model)
    from peft import PeftModel, load_peft_weights
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    named = own.base_model_name_or_path if base is None else base
    if not named:
        raise ValueError(f"{argument} is {folder}, whose {_CONFIG} does not name a base model; add one")
    what = f"{argument}: the adapter's base model"
    source = resolve(named, what)
    with reading(what, source):
        quantised = is_quantised(source, place)
        # Merged in float32 whatever the dtype: added to bfloat16 weights, a small update would round away.
        at = place if quantised else place._replace(dtype=torch.float32)
        if language_model:
            model, missing = load(AutoModelForCausalLM, source, at)
        else:
            model, missing = load(AutoModelForSequenceClassification, source, at, num_labels=1)
    with reading(argument, folder), quiet_transformers():
        adapted = PeftModel.from_pretrained(model, folder)
        # What the adapter's file lacks, peft only warns of. Loaded again, it says so in its result.
        missing -= {name.removeprefix(_WRAPPED) for name in load_peft_weights(folder, device="cpu")}
        missing |= set(adapted.load_adapter(folder, "default").missing_keys)
        made = adapted if quantised else adapted.merge_and_unload().to(place.dtype)
    if missing:
        raise ValueError(f"{argument} is {folder}; neither it nor its base model {source} has {listed(missing)}")
    with_tokenizer = folder if (Path(folder) / "tokenizer_config.json").is_file() else source
    with reading(argument, with_tokenizer):
        tokenizer = load_tokenizer(with_tokenizer)
    return made.eval().requires_grad_(False), tokenizer
