"""Where a model is loaded from, and what is wrong with it where it cannot be loaded."""

from __future__ import annotations

import contextlib
import json
import os
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

_HUB_SECONDS = 10.0
# A name takes 8 bytes at least, besides a tensor's type and place, or a value's type and itself.
_GGUF_HEADER, _GGUF_TENSOR_BYTES, _GGUF_VALUE_BYTES = "<4sIQQ", 24, 13
_MOST_CHARACTERS = 300  # of what a library has to say
_MOST_LAYERS = 10_000
_LAYERS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
_CONFIGS = ("config.json", "adapter_config.json")
_OBJECTS = (*_CONFIGS, "tokenizer.json", "tokenizer_config.json")
_PICKLES = ("pytorch_model*.bin", "adapter_model.bin")


@contextlib.contextmanager
def reading(argument: str, source: str) -> Iterator[None]:
    """Turns whatever a checkpoint raises when it is read into one sentence.

    Args:
        argument: what named it.
        source: its folder, file or hub id.

    Raises:
        ValueError: it names the argument, the source and, where it can be told, the file that is damaged or missing.
    """
    with warnings.catch_warnings():
        # torch says so of a pickle before it refuses it.
        warnings.filterwarnings("ignore", message="Detected pickle protocol")
        try:
            yield
        except (ImportError, MemoryError, torch.OutOfMemoryError):
            raise
        except BaseException as error:
            # What is written in Rust (tokenizers, safetensors) panics with an exception that is no Exception.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            folder = Path(source) if os.path.isdir(source) else cached_snapshot(source)
            reason = (folder and damage(folder)) or in_short(error)
            raise ValueError(f"{argument} is {source}, which cannot be loaded: {reason}") from error


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keeps progress bars and load reports off the user's screen, and puts back the caller's own settings."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def in_short(error: BaseException) -> str:
    """What a library's error says, in one line of at most 300 characters."""
    text = " ".join(str(error).split())
    if "ignore_mismatched_sizes" in text:
        # transformers has written the sizes to its log.
        return "its config.json and its weights are of different sizes"
    shown = text if len(text) <= _MOST_CHARACTERS else text[:_MOST_CHARACTERS].rsplit(" ", 1)[0] + " …"
    return shown if isinstance(error, (ValueError, OSError)) and shown else f"{type(error).__name__}: {shown}"


def damage(folder: Path) -> str | None:
    """What is wrong with a model folder, in one clause that names the file; None if nothing is found."""
    own_code = False
    for file in sorted(folder.glob("*.json")):
        try:
            value = json.loads(file.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            return f"{file.name} is not JSON: {error}"
        if file.name in _OBJECTS and not isinstance(value, dict):
            return f"{file.name} must hold a JSON object"
        own_code = own_code or (file.name == "config.json" and "auto_map" in value)
        if file.name.endswith(".index.json") and (missing := _missing_shards(folder, value)):
            return f"{file.name} names {missing[0]}, which is not there"
    if not any((folder / name).is_file() for name in _CONFIGS):
        return "it has no config.json"
    if weights := _damaged_weights(folder):
        return weights
    if own_code:
        return (
            "it may need code of its own, which is not run here; load it with transformers and trust_remote_code=True, "
            "and give the model to nabla_fast.generate"
        )
    return None


def check_config(source: str) -> None:
    """Raises ValueError for a number of layers that no model has, and that would keep transformers busy for ever."""
    from transformers import PreTrainedConfig

    # Not as a configuration: some make a list as long as the number of layers.
    values, _ = PreTrainedConfig.get_config_dict(source)
    for part in (values, *(value for value in values.values() if isinstance(value, dict))):
        for layers in map(part.get, _LAYERS):
            if isinstance(layers, int) and layers > _MOST_LAYERS:
                raise ValueError(f"its config.json asks for {layers} layers; {_MOST_LAYERS} are accepted")


def hub_source(name: str, argument: str) -> str:
    """What ``from_pretrained`` takes for a hub id: the id, or its folder in the cache where the hub does not answer.

    The hub is asked once. transformers would ask for file after file, and wait longer after each failure.

    Raises:
        FileNotFoundError: if the hub has no such model, or does not answer and the cache has none.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        HfApi().model_info(name, timeout=_HUB_SECONDS)
        return name
    except HFValidationError as error:
        raise FileNotFoundError(f"{argument} is {name!r}, which is neither a file, a folder nor a hub id") from error
    except RepositoryNotFoundError as error:
        reason: Exception = error
        problem = "the Hugging Face hub has no model of that name that you may read (hf auth login signs you in)"
    except Exception as error:
        reason = error
        problem = f"the Hugging Face hub cannot be asked for it ({type(error).__name__})"
    cached = cached_snapshot(name)
    if cached is None:
        raise FileNotFoundError(f"{argument} is {name}; there is no such folder here, and {problem}") from reason
    return str(cached)


def cached_snapshot(name: str) -> Path | None:
    """The folder that holds a hub model in the local cache; None if there is none."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    for config in _CONFIGS:
        try:
            file = try_to_load_from_cache(name, config)
        except HFValidationError:
            return None
        if isinstance(file, str):
            return Path(file).parent
    return None


def file_of(source: str, name: str, subfolder: str = "") -> Path | None:
    """A file of a folder or hub id, from the hub's copy here; None where there is none."""
    from transformers.utils import cached_file

    missing = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_gated_repo": False}
    found = cached_file(source, name, subfolder=subfolder, **missing)
    return None if found is None else Path(found)


def check_gguf(file: Path) -> None:
    """Raises ValueError unless a GGUF file's header can be that of a file of its size."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        header = stream.read(struct.calcsize(_GGUF_HEADER))
    if len(header) < struct.calcsize(_GGUF_HEADER) or not header.startswith(b"GGUF"):
        raise ValueError("it does not begin as a GGUF file does")
    *_, tensors, values = struct.unpack(_GGUF_HEADER, header)
    if tensors * _GGUF_TENSOR_BYTES + values * _GGUF_VALUE_BYTES > size:
        raise ValueError(f"its header promises {tensors} tensors and {values} values, more than its {size} bytes hold")


def _missing_shards(folder: Path, index: object) -> list[str]:
    shards = index.get("weight_map", {}) if isinstance(index, dict) else {}
    names = sorted(set(map(str, shards.values()))) if isinstance(shards, dict) else []
    return [name for name in names if not (folder / name).is_file()]


def _damaged_weights(folder: Path) -> str | None:
    from safetensors import SafetensorError, safe_open

    tensors = sorted(folder.glob("*.safetensors"))
    for file in tensors:
        try:
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            return f"{file.name} is no complete safetensors file: {error}"
    pickles = sorted(file for pattern in _PICKLES for file in folder.glob(pattern))
    if tensors or not pickles:
        return None if tensors else "it has no weights (*.safetensors)"
    for file in pickles:
        try:
            torch.load(file, map_location="meta", weights_only=True)
        except Exception:
            return f"{file.name} is damaged, or a pickle that would run code, which is not done; give safetensors"
    return None
