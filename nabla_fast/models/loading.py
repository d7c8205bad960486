"""Loads a model and its tokenizer from a path or hub id, for inference."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from nabla_fast.models.adapters import adapter_config, find_adapter, load_adapter
from nabla_fast.models.checkpoint import check_config, file_of, reading
from nabla_fast.models.pretrained import choose_attention as choose_attention
from nabla_fast.models.pretrained import choose_device as choose_device
from nabla_fast.models.pretrained import choose_dtype as choose_dtype
from nabla_fast.models.pretrained import loaded, placed, resolve
from nabla_fast.models.steps import ProcessReward, require_aggregation

_VALUE_HEAD = "v_head.summary."
# Problem, line break, steps: Skywork's models have seen no roles.
_PLAIN_TEMPLATE = "{{ bos_token or '' }}{% for m in messages %}{{ m['content'] }}\n{% endfor %}"


def load_language_model(
    path: str | os.PathLike[str],
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    attn_implementation: str = "auto",
    quantization: Any = None,
    adapter: str | None = None,
    base: str | os.PathLike[str] | None = None,
    argument: str = "path",
) -> tuple[Any, Any]:
    """Loads a causal language model and its tokenizer.

    Args:
        path: a GGUF file, a folder written by ``save_pretrained``, or a hub id. A GGUF file is converted once and its
            converted copy kept in the cache folder (see ``converted_gguf``). A folder or hub id that holds a peft
            adapter (``adapter_config.json``) is loaded with its base model: the adapter is merged in float32, and the
            result cast to ``dtype``; beside a quantised base model it is left as it is.
        device: "auto" (CUDA where there is one, else CPU) or anything ``torch.device`` takes.
        dtype: "auto" (bfloat16 on CUDA and on CPUs with AVX512-BF16 or AMX, float32 elsewhere), a torch dtype, or its
            name.
        attn_implementation: "auto" (flash_attention_2 where flash-attn is installed, the device is CUDA and the dtype
            is half; else sdpa, or eager for families without sdpa), or what transformers' ``from_pretrained`` takes:
            one of those three, ``flash_attention_3``, ``flex_attention`` and its like, a name registered with
            ``transformers.AttentionInterface``, or a kernel of the hub such as ``kernels-community/flash-attn3``, which
            the package kernels fetches.
        quantization: of the linear layers, but for the output head: "int8" (torchao, weights alone), "bnb-8bit" or
            "bnb-4bit" (bitsandbytes), or a quantization config of transformers. None and "none" leave the checkpoint
            as it was saved, quantised or not.
        adapter: the sub-folder of ``path`` that holds the adapter, where there are several.
        base: the adapter's base model, where it is not what the adapter itself names.
        argument: what messages call ``path``.

    Returns:
        The model, in ``eval()`` and with ``requires_grad`` False throughout, and its tokenizer. It is a
        ``peft.PeftModel`` where an adapter was not merged.

    Raises:
        FileNotFoundError: if ``path`` looks like a path and nothing is there, or is a hub id that neither the hub nor
            its local cache has.
        ValueError: if ``device``, ``dtype``, ``attn_implementation`` or ``quantization`` is none of the above, the
            model does not run with that attention or is quantised already, there is no adapter of that name, or a file
            of the model is damaged or missing; pickles that would run code count as damaged.
        ImportError: if a package is not installed that ``attn_implementation`` or ``quantization`` needs, gguf or
            accelerate, which a GGUF file needs, or peft, which an adapter needs.
    """
    place = placed(device, dtype, attn_implementation, quantization)
    source = resolve(path, argument)
    from transformers import AutoModelForCausalLM

    folder = find_adapter(source, adapter, argument)
    if folder is not None:
        return load_adapter(folder, base, place, argument, language_model=True)
    return loaded(AutoModelForCausalLM, source, place, argument, "a language model")


def load_reward_model(
    path: str | os.PathLike[str],
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    attn_implementation: str = "auto",
    quantization: Any = None,
    adapter: str | None = None,
    base: str | os.PathLike[str] | None = None,
    step_separator: str | None = None,
    step_aggregation: str | None = None,
    step_insert_after: str | None = None,
    argument: str = "path",
) -> tuple[Any, Any]:
    """Loads a reward model and its tokenizer: a sequence classifier with one label, or a process reward model.

    A token classifier, Qwen's ``ForProcessRewardModel`` and a causal language model with a value head
    (``v_head.summary``) are process reward models; see `nabla_fast.ProcessReward`.

    Args:
        path, device, dtype, attn_implementation, quantization, adapter, base: as for ``load_language_model``.
        step_separator: what a process reward model is read at. None takes that of its kind: ``<extra_0>`` for Qwen's, a
            line break behind a value head; a token classifier has to be given one.
        step_aggregation: "min", "product", "last" or "mean" of the scores of the steps; None is "min".
        step_insert_after: what ends a step in the language model's words, where the separator is a token that has to be
            inserted; None inserts added tokens of the reward tokenizer after blank lines, and no others.
        argument: what messages call ``path``.

    Returns:
        The model, in ``eval()`` and with ``requires_grad`` False throughout, and its tokenizer. A process reward model
        is a `ProcessReward`. The tokenizer of one with a value head gets the chat template that these were trained
        with: the messages, a line break behind each.

    Raises:
        FileNotFoundError, ValueError, ImportError: as for ``load_language_model``; ValueError also if a sequence
            classifier has several labels or is given a separator or an aggregation, or a token classifier is given no
            separator; ImportError also if an adapter is given and peft is not installed.
    """
    place = placed(device, dtype, attn_implementation, quantization)
    if step_aggregation is not None:
        require_aggregation(step_aggregation, "step_aggregation")
    source = resolve(path, argument)
    from transformers import AutoConfig, AutoModelForSequenceClassification

    folder = find_adapter(source, adapter, argument)
    convention = None
    if folder is not None:
        adapter_config(folder, argument, language_model=False)
    else:
        with reading(argument, source):
            check_config(source)
            config = AutoConfig.from_pretrained(source, trust_remote_code=False)
            convention = recognised(source, config)
    if convention is not None:
        separator = convention.separator if step_separator is None else step_separator
        if separator is None:
            raise ValueError(
                f"{argument} is {source}, a token classifier, and where it is to be read it does not say; give "
                "step_separator (--step-separator), what ended a step when it was trained: a line break is trl's "
                "default"
            )
        wanted, options = "a trained process reward model", {"heads": ("score",), **convention.options}
        model, tokenizer = loaded(convention.auto_class, source, place, argument, wanted, **options)
        if convention.chat_template is not None:
            tokenizer.chat_template = convention.chat_template
        return ProcessReward(model, separator, step_aggregation or "min", step_insert_after), tokenizer
    given = {
        "step_separator": step_separator,
        "step_aggregation": step_aggregation,
        "step_insert_after": step_insert_after,
    }
    for name, value in given.items():
        if value is not None:
            raise ValueError(
                f"{name} is {value!r}, and {argument} is {source}, which is no process reward model of a known kind (a "
                "token classifier, ForProcessRewardModel or a value head v_head.summary); leave it out"
            )
    if folder is not None:
        return load_adapter(folder, base, place, argument, language_model=False)
    labels = getattr(config, "num_labels", 1)
    if labels != 1 and any("SequenceClassification" in name for name in getattr(config, "architectures", None) or []):
        raise ValueError(f"{argument} is {source}, a classifier with {labels} labels; a reward model has exactly one")
    wanted = "a trained reward model (a sequence classifier with one label), not a language model"
    return loaded(AutoModelForSequenceClassification, source, place, argument, wanted, num_labels=1)


@dataclass(frozen=True)
class Convention:
    """How a process reward model is stored, and read.

    There are three conventions, by their sources: trl's ``PRMTrainer`` (a token classifier, labels at the step
    separator), Qwen's ``Qwen2.5-Math-PRM`` (a head of two layers, read at ``<extra_0>``), and Skywork's
    ``Skywork-o1-Open-PRM`` (a value head on a causal language model, read at a line break, behind the plain problem).

    Attributes:
        auto_class: what loads it.
        options: of ``from_pretrained``.
        separator: what it is read at; None where the checkpoint does not say.
        chat_template: what it was trained with; None leaves its tokenizer's own.
    """

    auto_class: Any
    options: dict[str, Any] = field(default_factory=dict)
    separator: str | None = None
    chat_template: str | None = None


def recognised(source: str, config: Any) -> Convention | None:
    """The convention of a checkpoint; None if it is no process reward model of a kind that is known.

    Args:
        source: a folder or hub id.
        config: its configuration.
    """
    from transformers import AutoModelForTokenClassification

    kinds = " ".join(getattr(config, "architectures", None) or [])
    if "ForTokenClassification" in kinds:
        return Convention(AutoModelForTokenClassification)
    if "ForProcessRewardModel" in kinds:
        return Convention(two_layer_classifier(config), separator="<extra_0>")
    if "ForSequenceClassification" in kinds or not any(n.startswith(_VALUE_HEAD) for n in _weight_names(source)):
        return None
    options = {"num_labels": 1, "key_mapping": {f"^{_VALUE_HEAD}".replace(".", r"\."): "score."}}
    return Convention(AutoModelForTokenClassification, options, "\n", _PLAIN_TEMPLATE)


def two_layer_classifier(config: Any) -> Any:
    """The family's token classifier with a head of two layers and a ReLU between them, as Qwen's has it."""
    from transformers import MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING

    family: Any = MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING[type(config)]

    class TwoLayerClassifier(family):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            width = config.get_text_config().hidden_size
            self.score = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, config.num_labels))
            self.post_init()

    return TwoLayerClassifier


def _weight_names(source: str) -> list[str]:
    """Names of a checkpoint's weights; none if it has none that can be listed."""
    from safetensors import safe_open

    index = file_of(source, "model.safetensors.index.json") or file_of(source, "pytorch_model.bin.index.json")
    if index is not None:
        found = json.loads(index.read_bytes())
        return list(found.get("weight_map", {})) if isinstance(found, dict) else []
    weights = file_of(source, "model.safetensors")
    if weights is not None:
        with safe_open(weights, "pt") as tensors:
            return list(tensors.keys())
    pickled = file_of(source, "pytorch_model.bin")
    return [] if pickled is None else list(torch.load(pickled, map_location="meta", weights_only=True))
