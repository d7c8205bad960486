"""Loads a model and its tokenizer from a path or hub id, for inference."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import tempfile
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from nabla_fast.models.checkpoint import check_config, check_gguf, hub_source, in_short, reading
from nabla_fast.models.placement import Place, placed
from nabla_fast.models.placement import choose_attention as choose_attention
from nabla_fast.models.placement import choose_device as choose_device
from nabla_fast.models.placement import choose_dtype as choose_dtype
from nabla_fast.models.process_checkpoint import Convention, recognised
from nabla_fast.models.steps import ProcessReward, require_aggregation

_ADAPTER_CONFIG = "adapter_config.json"
_WRAPPED = "base_model.model."  # what peft puts before a weight's name
_SHOWN = 3  # names of a long list


def load_language_model(
    path: str | os.PathLike[str],
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    attn_implementation: str = "auto",
    argument: str = "path",
) -> tuple[Any, Any]:
    """Loads a causal language model and its tokenizer.

    Args:
        path: a GGUF file, a folder written by ``save_pretrained``, or a hub id. A GGUF file is converted once and its
            converted copy kept in the cache folder (see ``converted_gguf``).
        device: "auto" (CUDA where there is one, else CPU) or anything ``torch.device`` takes.
        dtype: "auto" (bfloat16 on CUDA, float32 elsewhere), a torch dtype, or its name.
        attn_implementation: "auto" (flash_attention_2 where flash-attn is installed, the device is CUDA and the dtype
            is half; else sdpa, or eager for families without sdpa), or what transformers' ``from_pretrained`` takes:
            one of those three, ``flash_attention_3``, ``flex_attention`` and its like, a name registered with
            ``transformers.AttentionInterface``, or a kernel of the hub such as ``kernels-community/flash-attn3``, which
            the package kernels fetches.
        argument: what messages call ``path``.

    Returns:
        The model, in ``eval()`` and with ``requires_grad`` False throughout, and its tokenizer.

    Raises:
        FileNotFoundError: if ``path`` looks like a path and nothing is there, or is a hub id that neither the hub nor
            its local cache has.
        ValueError: if ``device``, ``dtype`` or ``attn_implementation`` is none of the above, the model does not run
            with that attention, or a file of the model is damaged or missing; pickles that would run code count as
            damaged.
        ImportError: if a package is not installed that ``attn_implementation`` needs, or gguf or accelerate, which a
            GGUF file needs.
    """
    place = placed(device, dtype, attn_implementation)
    source = _resolve(path, argument)
    from transformers import AutoModelForCausalLM

    with reading(argument, source):
        model, missing = _load(AutoModelForCausalLM, source, place)
        tokenizer = _load_tokenizer(source)
    if missing:
        raise ValueError(f"{argument} is {source}, which has no weights for {_listed(missing)}; give a language model")
    return model, tokenizer


def load_reward_model(
    path: str | os.PathLike[str],
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    attn_implementation: str = "auto",
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
        path: as for ``load_language_model``, or a folder that holds a peft adapter (``adapter_config.json``): the base
            model is then loaded, the adapter merged into it in float32, and the result cast to ``dtype``.
        device, dtype, attn_implementation: as for ``load_language_model``.
        base: the adapter's base model, where it is not what the adapter itself names.
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
    place = placed(device, dtype, attn_implementation)
    if step_aggregation is not None:
        require_aggregation(step_aggregation, "step_aggregation")
    source = _resolve(path, argument)
    from transformers import AutoModelForSequenceClassification

    adapter = (Path(source) / _ADAPTER_CONFIG).is_file()
    convention = None
    if adapter:
        _refuse_token_adapter(source, argument)
    else:
        with reading(argument, source):
            check_config(source)
            convention = recognised(source)
    if convention is not None:
        steps = {"aggregation": step_aggregation or "min", "insert_after": step_insert_after}
        return _load_process(source, convention, place, step_separator, steps, argument)
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
    if adapter:
        return _load_adapter(source, base, place, argument)
    _require_one_label(source, argument)
    with reading(argument, source):
        model, missing = _load(AutoModelForSequenceClassification, source, place, num_labels=1)
        tokenizer = _load_tokenizer(source)
    if missing:
        raise ValueError(
            f"{argument} is {source}, which has no weights for {_listed(missing)}; give a trained reward model (a "
            "sequence classifier with one label), not a language model"
        )
    return model, tokenizer


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
        raise ImportError(f'reading {file.name} needs {" and ".join(missing)}; run pip install "nabla_fast[demo]"')
    check_gguf(file)
    # gguf draws a progress bar of its own that transformers' switch does not reach.
    with _quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):
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


def _resolve(path: str | os.PathLike[str], argument: str) -> str:
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


def _load(auto_class: Any, source: str, place: Place, **options: Any) -> tuple[Any, set[str]]:
    """The model, ready for inference, and the names of the weights that the checkpoint does not hold."""
    check_config(source)
    options |= {"dtype": place.dtype, "output_loading_info": True, "trust_remote_code": False}
    attention = choose_attention(place.attention, place.device, place.dtype)
    with _quiet_transformers():
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
    return model.to(place.device).eval().requires_grad_(False), set(info["missing_keys"])


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


def _load_tokenizer(source: str) -> Any:
    from transformers import AutoTokenizer

    with _quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    # Where the files are missing, some families get a tokenizer that knows its special tokens alone.
    if not set(tokenizer.get_vocab().values()) - set(tokenizer.added_tokens_decoder):
        raise ValueError("its tokenizer has no vocabulary; tokenizer.json, or what stands for it, is missing")
    return tokenizer


def _load_adapter(folder: str, base: str | os.PathLike[str] | None, place: Place, argument: str) -> tuple[Any, Any]:
    from transformers import AutoModelForSequenceClassification

    try:
        from peft import PeftConfig, PeftModel, load_peft_weights
    except ImportError as error:
        raise ImportError(f'{folder} holds a peft adapter; run pip install "nabla_fast[demo]"') from error
    with reading(argument, folder):
        own = PeftConfig.from_pretrained(folder)
    named = own.base_model_name_or_path if base is None else base
    if not named:
        raise ValueError(f"{argument} is {folder}, whose {_ADAPTER_CONFIG} does not name a base model; add one")
    what = f"{argument}: the adapter's base model"
    source = _resolve(named, what)
    with reading(what, source):
        # Merged in float32 whatever the dtype: added to bfloat16 weights, a small update would round away.
        model, missing = _load(
            AutoModelForSequenceClassification, source, place._replace(dtype=torch.float32), num_labels=1
        )
    with reading(argument, folder), _quiet_transformers():
        adapted = PeftModel.from_pretrained(model, folder)
        # What the adapter's file lacks, peft only warns of. Loaded again, it says so in its result.
        missing -= {name.removeprefix(_WRAPPED) for name in load_peft_weights(folder, device="cpu")}
        missing |= set(adapted.load_adapter(folder, "default").missing_keys)
        merged = adapted.merge_and_unload()
    if missing:
        raise ValueError(f"{argument} is {folder}; neither it nor its base model {source} has {_listed(missing)}")
    with_tokenizer = folder if (Path(folder) / "tokenizer_config.json").is_file() else source
    with reading(argument, with_tokenizer):
        tokenizer = _load_tokenizer(with_tokenizer)
    return merged.to(place.dtype).eval().requires_grad_(False), tokenizer


def _refuse_token_adapter(folder: str, argument: str) -> None:
    with reading(argument, folder):
        config = json.loads((Path(folder) / _ADAPTER_CONFIG).read_bytes())
        task = config.get("task_type")
    if task == "TOKEN_CLS":
        raise ValueError(
            f"{argument} is {folder}, a peft adapter of a token classifier; merge it into its base model "
            "(merge_and_unload, save_pretrained) and give that folder"
        )


def _load_process(
    source: str, convention: Convention, place: Place, separator: str | None, steps: dict[str, Any], argument: str
) -> tuple[Any, Any]:
    chosen = convention.separator if separator is None else separator
    if chosen is None:
        raise ValueError(
            f"{argument} is {source}, a token classifier, and where it is to be read it does not say; give "
            "step_separator (--step-separator), what ended a step when it was trained: a line break is trl's default"
        )
    with reading(argument, source):
        model, missing = _load(convention.auto_class, source, place, **convention.options)
        tokenizer = _load_tokenizer(source)
    if missing:
        raise ValueError(f"{argument} is {source}, a process reward model without weights for {_listed(missing)}")
    if convention.chat_template is not None:
        tokenizer.chat_template = convention.chat_template
    return ProcessReward(model, chosen, **steps), tokenizer


def _require_one_label(source: str, argument: str) -> None:
    from transformers import AutoConfig

    with reading(argument, source):
        check_config(source)
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    labels = getattr(config, "num_labels", 1)
    architectures = getattr(config, "architectures", None) or []
    if labels != 1 and any("SequenceClassification" in name for name in architectures):
        raise ValueError(f"{argument} is {source}, a classifier with {labels} labels; a reward model has exactly one")


def _listed(names: set[str]) -> str:
    shown = sorted(names)
    return ", ".join(shown[:_SHOWN]) + (f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else "")


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
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
