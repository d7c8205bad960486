"""GGUF files: converted once, and the copy kept in the cache folder."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import tempfile
from hashlib import sha256
from pathlib import Path

import torch

from nabla_fast.models.checkpoint import check_gguf, quiet_transformers


def cache_directory() -> Path:
    """Where converted models are kept: $NABLA_FAST_CACHE, else $XDG_CACHE_HOME/nabla_fast or ~/.cache/nabla_fast."""
    own = os.environ.get("NABLA_FAST_CACHE")
    if own:
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "nabla_fast"


def converted_gguf(path: str | os.PathLike[str]) -> Path:
    """The folder with the converted copy of a GGUF file (float32 safetensors and tokenizer), made if it is missing.

    The copy is keyed by the file's absolute path, size and modification time. It is written to a temporary folder
    and renamed when complete, so neither a killed nor a concurrent conversion leaves half a copy.

    Raises:
        ImportError: if gguf or accelerate is not installed and the copy has to be made.
    """
    file = Path(path).resolve()
    stat = file.stat()
    key = sha256(f"{file}\0{stat.st_size}\0{stat.st_mtime_ns}".encode()).hexdigest()[:16]
    target = cache_directory() / f"{file.stem}-{key}"
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
        copy = Path(scratch) / "copy"
        _convert_gguf(file, copy)
        try:
            copy.rename(target)
        except OSError:
            # Another process was quicker; its copy is as good as ours.
            if not target.is_dir():
                raise
    return target


def _convert_gguf(file: Path, target: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f'reading {file.name} needs {" and ".join(missing)}; run pip install "nabla_fast[gguf]"')
    check_gguf(file)
    # gguf draws a progress bar of its own that transformers' switch does not reach.
    with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):
        loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        # transformers refuses to save a model that is marked as quantised, though its weights no longer are.
        values = loaded.config.to_dict()
        values.pop("quantization_config", None)
        values.pop("_model_name_or_path", None)
        plain = AutoModelForCausalLM.from_config(type(loaded.config).from_dict(values), dtype=torch.float32)
        plain.load_state_dict(loaded.state_dict())
        plain.generation_config = loaded.generation_config
        plain.save_pretrained(target)
        tokenizer.save_pretrained(target)
