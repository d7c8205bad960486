"""Checks of a model when it is loaded, by running it on a few tokens.

Families of models differ in ways that their configurations do not say: what happens between token ids and the first
layer, whether padding, drafts and prefixes change a number, whether a layer passes gradients on. A wrong guess would
give wrong answers without a word. So each model is tried once, on eight tokens, in about ten forward passes: what it
computes from ids is compared with what we compute, and its gradient with a finite difference. It is tried again when
its configuration, modules or weights have changed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from nabla_fast.models import quantised_layers
from nabla_fast.models.fingerprint import fingerprint
from nabla_fast.models.numerics import bits_of, computed_in, gradient_fault, is_close, relative_error, slope

if TYPE_CHECKING:
    from nabla_fast.models.backbone import Backbone, Inputs

T = TypeVar("T")

PROBE_TOKENS = 8
_CAUSAL_LAYERS = {"full_attention", "sliding_attention"}
# Their frequencies depend on the longest position of a call, so a token's keys do too.
_LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}
_REACHES = ("window", "local", "chunk")


@dataclass(frozen=True)
class CacheSupport:
    """What a `Backbone` supports, and the reason where it does not support prefix caches in batches."""

    cache_kind: str
    supports_prefix_cache: bool
    windowed: bool
    needs_ids: bool
    plain_cache: bool
    reason: str | None
    tried: Tensor


_WARNED: WeakKeyDictionary[Any, set[str]] = WeakKeyDictionary()


def warn_once(model: Any, message: str) -> None:
    """Warns about ``model`` with this message, once."""
    told = _WARNED.setdefault(model, set())
    if message not in told:
        told.add(message)
        warnings.warn(message, stacklevel=5)


_FOUND: WeakKeyDictionary[Any, dict[str, tuple[int, Any]]] = WeakKeyDictionary()
_states: ContextVar[dict[int, int] | None] = ContextVar("states", default=None)


@contextmanager
def one_look() -> Iterator[None]:
    """A block of `remembered` questions: each model's fingerprint is taken once, and again after it was tried."""
    token = _states.set({})
    try:
        yield
    finally:
        _states.reset(token)


def remembered(model: Any, name: str, what: str, find: Callable[[], T]) -> T:
    """``find()``, or what it gave for this model before, if the model is as it was then.

    Raises:
        ValueError: if the model raises whatever it is when it is tried; the message begins with ``name``.
    """
    states = _states.get()
    state = fingerprint(model) if states is None or id(model) not in states else states[id(model)]
    found = _FOUND.setdefault(model, {})
    if what not in found or found[what][0] != state:
        try:
            inexact = computed_in(quantised_layers.computes_in(model))
            with torch.inference_mode(False), inexact, quantised_layers.exact(model):
                answer = find()
            # Of a model that has run: some note something in their first pass.
            state = fingerprint(model)
            found[what] = state, answer
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if str(error).startswith(name):
                raise
            raise ValueError(f"{name} cannot be used: a few token ids raise {_brief(error)}") from error
    if states is not None:
        states[id(model)] = state
    value: T = found[what][1]
    return value


def _brief(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def probe_ids(model: Any, tokenizer: Any = None) -> Tensor:
    """Token ids (8,) from all over a model's vocabulary, none of them special."""
    weight = model.get_input_embeddings().weight
    size = len(weight) if tokenizer is None else min(len(weight), len(tokenizer))
    special = set(getattr(tokenizer, "all_special_ids", ()))
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        for name, value in vars(config).items():
            if name.endswith(("_token_id", "_token_index")):
                special.update(value if isinstance(value, (list, tuple)) else [value])
    usual = [i for i in range(min(size, 4096)) if i not in special] or [0]
    # Steps of the golden ratio fall evenly whatever the size.
    chosen: list[int] = []
    for n in range(1, 64):
        candidate = int(size * (0.61803398875 * n % 1))
        if candidate not in special and candidate not in chosen and len(chosen) < PROBE_TOKENS:
            chosen.append(candidate)
    while len(chosen) < PROBE_TOKENS:
        chosen.append(usual[len(chosen) % len(usual)])
    return torch.tensor(chosen, dtype=torch.long, device=weight.device)


def unwrapped(model: Any) -> tuple[Any, Any]:
    """A model as it is called, and the transformers model inside it if it is a peft adapter."""
    if not hasattr(model, "get_base_model"):
        return model, model
    base = model.get_base_model()
    return (model if isinstance(model, torch.nn.Module) else base), base


def dense_weight(model: Any, module: Any, name: str, what: str) -> Tensor:
    """The weight of a model's output head or input embeddings as numbers; a copy of what is quantised.

    Raises:
        ValueError: if the weight of ``module`` is missing, off-loaded, or quantised so that its numbers are not known.

    Warns:
        UserWarning: once per model, of the memory of a copy.
    """
    weight = getattr(module, "weight", None)
    if weight is not None and quantised_layers.is_plain(weight):
        if weight.is_meta:
            raise ValueError(
                f"{name}: its {what} is off-loaded, and it is read in every step; keep it on a device (device_map)"
            )
        if not type(module).__module__.startswith("bitsandbytes."):
            return weight.detach()
        # transformers ties a head to a table that is not quantised, and leaves the head's layer as it was.
        raise ValueError(
            f"{name}: its {what} is a {type(module).__name__} tied to a table that is not quantised, which "
            "bitsandbytes cannot run; leave it out of the quantisation (llm_int8_skip_modules)"
        )
    dtype = getattr(model, "dtype", torch.float32)
    copy: Tensor | None = None
    if weight is not None:
        copy = remembered(model, name, f"dense {what}", lambda: quantised_layers.dense(module, dtype))
    if copy is None:
        kind = f"is a {type(module).__name__}" + ("" if weight is None else f" of {type(weight).__name__}")
        raise ValueError(
            f"{name}: its {what} {kind}, which is no table of floating-point numbers; leave it out of the quantisation"
        )
    size = copy.numel() * copy.element_size() / 1e6
    kind = str(copy.dtype).removeprefix("torch.")
    warn_once(
        model,
        f"{name}: its {what} is quantised, and it is read as numbers in every step; a copy in {kind} takes "
        f"{size:.0f} MB besides. Leave it out of the quantisation to have it once",
    )
    return copy


def require_sound_layers(model: Any, name: str) -> None:
    """Raises ValueError unless the gradients of quantised linear layers are those of their products."""
    like = torch.empty(0, dtype=getattr(model, "dtype", None))

    def find() -> str | None:
        return quantised_layers.gradient_fault(model, like.dtype, bits_of(like))

    fault = remembered(model, name, "quantised layers", find)
    if fault is not None:
        raise ValueError(f"{name} cannot be used: {fault}; load it with another quantisation, or with none")


def require_eval(model: Any, name: str) -> None:
    """Raises ValueError for a model in training mode: dropout would make its gradients random."""
    if model.training:
        raise ValueError(f"{name} is in training mode; call .eval() on it first")


def leave_inference_mode(model: Any) -> None:
    """Replaces weights that were made in inference mode, which autograd cannot use, by copies."""
    copies: dict[int, Tensor] = {}
    with torch.inference_mode(False), torch.no_grad():
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is None or not tensor.is_inference():
                        continue
                    # Tied weights stay one.
                    if id(tensor) not in copies:
                        data = tensor.clone()
                        is_parameter = isinstance(tensor, torch.nn.Parameter)
                        copies[id(tensor)] = torch.nn.Parameter(data, requires_grad=False) if is_parameter else data
                    tensors[name] = copies[id(tensor)]


def examine_backbone(backbone: Backbone, ids: Tensor | None = None) -> CacheSupport:
    """Finds out what ``backbone`` supports, by comparing each way to run it with whole sequences.

    Raises:
        ValueError: if not even whole sequences of embeddings give what the model makes of token ids, or the gradient
            is not that of the forward pass.
    """
    from nabla_fast.models.backbone import embedded

    with torch.no_grad():
        inputs = embedded(backbone.embedding, probe_ids(backbone.model) if ids is None else ids)
        expected = backbone.whole(inputs, by_ids=True)
    probe = _read_as_ids(backbone, inputs, expected)
    config = backbone.model.config.get_text_config()
    reason, windowed, plain_cache = known_reason(config), has_windows(config), False
    if reason is None:
        reason = _attempt(probe.prefix)
        windowed = windowed or (reason is None and _attempt(probe.gaps) is not None)
    kind, supports_prefix_cache = "prefix" if reason is None else "whole", reason is None
    if reason is not None and "bidirectional" not in reason:
        backbone.cache_kind = "state"
        for plain_cache in (False, True):
            backbone.plain_cache = plain_cache
            steps = _attempt(probe.steps)
            if steps is None:
                # Beyond some length, no prefix has the keys that the whole sequence has.
                kind, supports_prefix_cache = "state", "rotary" not in reason and _attempt(probe.proceeds) is None
                break
        else:
            reason = f"{reason}; {steps}"
    return CacheSupport(kind, supports_prefix_cache, windowed, backbone.needs_ids, plain_cache, reason, expected)


def known_reason(config: Any) -> str | None:
    """Why suffixes behind a prefix would not give what whole sequences give, where a few tokens would not show it."""
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in (rope, *(part for part in rope.values() if isinstance(part, dict))):
        if parameters.get("rope_type") in _LENGTH_DEPENDENT_ROPE:
            return f"its rotary embeddings ({parameters['rope_type']}) depend on the length of the sequence"
    other = set(getattr(config, "layer_types", None) or ()) - _CAUSAL_LAYERS
    if other:
        return f"it has layers of type {', '.join(sorted(other))}"
    if getattr(config, "use_bidirectional_attention", False) or getattr(config, "is_causal", True) is False:
        return "its attention is bidirectional"
    return None


def has_windows(config: Any) -> bool:
    """Whether attention may reach back a fixed number of columns only."""
    layers = getattr(config, "layer_types", None)
    if layers:
        return "sliding_attention" in layers
    return bool(_windows(config)) or "local" in str(getattr(config, "attention_types", ""))


def window_is_known(config: Any) -> bool:
    """Whether all windows of a model's attention are ``sliding_window``, of all layers or those of that type."""
    by_type = bool(getattr(config, "layer_types", None))
    return bool(getattr(config, "sliding_window", None)) and (by_type or _windows(config) == ["sliding_window"])


def _windows(config: Any) -> list[str]:
    names = [name for name, value in vars(config).items() if value and any(word in name for word in _REACHES)]
    # Experts are "local" to a layer.
    return [name for name in names if "expert" not in name]


class _Probe:
    """Ways to run a backbone on eight tokens that all have to give the same hidden states and gradients.

    The gradients are of one loss over the last four hidden states. Tokens depend on earlier ones alone, so its gradient
    over whole sequences is that of any suffix as well.
    """

    def __init__(self, backbone: Backbone, inputs: Inputs, expected: Tensor) -> None:
        self.backbone, self.inputs, self.expected = backbone, inputs, expected
        self.weights = _weights(expected)
        self.weights[:4] = 0
        self.hidden = expected
        found = slope(self._loss, inputs.embeds, backbone.model)
        self.apart = relative_error(self.hidden, expected)
        self.sound = is_close(self.hidden, expected)
        self.fault = gradient_fault(self._loss, inputs.embeds, found=found) if self.sound else None
        self.gradient = found.gradient

    def _loss(self, embeds: Tensor) -> Tensor:
        hidden = self.backbone.whole(replace(self.inputs, embeds=embeds))
        if embeds.requires_grad:
            self.hidden = hidden.detach()
        return (hidden.to(self.weights.dtype) * self.weights).sum()

    def prefix(self) -> str | None:
        """Two prefixes of different lengths, and behind them suffixes of different lengths."""
        x = self.inputs
        _, self.states = self.backbone.extend([None, None], [x[:4], x[:2]])
        return self._compare("a batch of two behind their prefixes", self.states, [4, 2])

    def gaps(self) -> str | None:
        """A batch that has tried a draft that was wrong, so that columns within a sequence are masked."""
        from nabla_fast.models.decode_batch import DecodeBatch

        ids: list[int] = self.inputs.ids.tolist()
        batch = DecodeBatch(self.backbone, self.states)  # type: ignore[arg-type]
        batch.step([[ids[4], ids[0], ids[1]], ids[2:5]])
        batch.keep([1, 3])
        batch.step([[ids[5]], [ids[5]]])
        batch.keep([1, 1])
        pairs = [(batch.row_cache(row).hidden, self.expected[:6]) for row in (0, 1)]
        return _difference("a batch with wrong drafts", pairs)

    def steps(self) -> str | None:
        """One token at a time behind the cache that the model makes itself."""
        x = self.inputs
        (hidden,), (state,) = self.backbone.extend([None], [x[:4]])
        (next_hidden,), (behind,) = self.backbone.extend([state], [x[4:5]])
        (last,), _ = self.backbone.extend([behind], [x[5:6]])
        return _difference("its own cache", [(torch.cat([hidden, next_hidden, last]), self.expected[:6])])

    def proceeds(self) -> str | None:
        """Several tokens, or one, and their gradient behind that cache, which has to stay as it is."""
        x = self.inputs
        self.backbone.supports_prefix_cache = True
        _, states = self.backbone.extend([None, None, None], [x[:4], x[:2], x[:7]])
        first = self._compare("tokens behind its own cache", states, [4, 2, 7])
        return first or self._compare("tokens behind its own cache, once more,", states, [4, 2, 7])

    def _compare(self, what: str, states: Any, starts: list[int]) -> str | None:
        with torch.enable_grad():
            inputs = [self.inputs[start:].differentiable() for start in starts]
            hidden, _ = self.backbone(states, inputs)
            losses = [(h.to(self.weights.dtype) * self.weights[n:]).sum() for h, n in zip(hidden, starts, strict=True)]
            gradients = torch.autograd.grad(losses, [x.embeds for x in inputs])
        assert self.gradient is not None
        wanted = [self.gradient[start:] for start in starts]
        return _difference(what, [(h, self.expected[n:]) for h, n in zip(hidden, starts, strict=True)]) or _difference(
            f"the gradient of {what}", list(zip(gradients, wanted, strict=True))
        )


def _read_as_ids(backbone: Backbone, inputs: Inputs, expected: Tensor) -> _Probe:
    """A probe of embeddings that the model reads as it does token ids; says in backbone.needs_ids what that takes.

    Raises:
        ValueError: if it does not, or its gradient is not that of its forward pass.
    """
    found = ""
    for needs_ids in (False, True):
        backbone.needs_ids = needs_ids
        try:
            probe = _Probe(backbone, inputs, expected)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a model raises that cannot run so
            found = _brief(error)
            continue
        if probe.fault is not None:
            raise ValueError(f"{backbone.name} cannot be used: {probe.fault}")
        if probe.sound:
            return probe
        found = f"hidden states are {probe.apart:.2g} apart, relatively"
    raise ValueError(
        f"{backbone.name} makes something else of its input embeddings than of its token ids, so gradients would be "
        f"wrong; it cannot be used ({found})"
    )


def _attempt(try_it: Callable[[], str | None]) -> str | None:
    try:
        return try_it()
    except Exception as error:  # whatever a model raises that cannot run so
        return f"it does not run so ({_brief(error)})"


def _difference(what: str, pairs: list[tuple[Tensor, Tensor]]) -> str | None:
    for ours, theirs in pairs:
        if not is_close(ours, theirs):
            return f"{what} gives numbers that are {relative_error(ours, theirs):.2g} apart from whole sequences'"
    return None


def _weights(like: Tensor) -> Tensor:
    """What a loss weighs hidden states by: random, float32 or wider."""
    drawn = torch.randn(like.shape, generator=torch.Generator().manual_seed(1))
    return drawn.to(like.device, torch.promote_types(like.dtype, torch.float32))
