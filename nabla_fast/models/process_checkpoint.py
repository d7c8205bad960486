"""How published process reward models are stored, and read.

Three conventions, by their sources: trl's ``PRMTrainer`` (a token classifier, labels at the step separator), Qwen's
``Qwen2.5-Math-PRM`` (a head of two layers, read at ``<extra_0>``), and Skywork's ``Skywork-o1-Open-PRM`` (a value head
on a causal language model, read at a line break, behind the plain problem).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

_VALUE_HEAD = "v_head.summary."
# Problem, line break, steps: Skywork's models have seen no roles.
_PLAIN_TEMPLATE = "{{ bos_token or '' }}{% for m in messages %}{{ m['content'] }}\n{% endfor %}"


@dataclass(frozen=True)
class Convention:
    """How a checkpoint is loaded and read.

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


def recognised(source: str) -> Convention | None:
    """The convention of a checkpoint; None if it is no process reward model of a kind that is known.

    Args:
        source: a folder or hub id.
    """
    from transformers import AutoConfig, AutoModelForTokenClassification

    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
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

    index = _file(source, "model.safetensors.index.json") or _file(source, "pytorch_model.bin.index.json")
    if index is not None:
        found = json.loads(index.read_bytes())
        return list(found.get("weight_map", {})) if isinstance(found, dict) else []
    weights = _file(source, "model.safetensors")
    if weights is not None:
        with safe_open(weights, "pt") as tensors:
            return list(tensors.keys())
    pickled = _file(source, "pytorch_model.bin")
    if pickled is None:
        return []
    import torch

    return list(torch.load(pickled, map_location="meta", weights_only=True))


def _file(source: str, name: str) -> Path | None:
    from transformers.utils import cached_file

    try:
        found = cached_file(source, name)
    except OSError:
        return None
    return None if found is None else Path(found)
