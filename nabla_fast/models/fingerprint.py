"""What tells a model from the same one after it has changed."""

from __future__ import annotations

from typing import Any

from nabla_fast.models.temporary import own_attribute


def fingerprint(model: Any) -> int:
    """What changes when the model's configuration, modules or weights do, or an adapter is chosen or switched off."""
    config = model.config
    parts: list[Any] = [config.to_json_string() if hasattr(config, "to_json_string") else repr(config)]
    tensors = list(model.parameters())
    for name, module in model.named_modules():
        parts.append((name, type(module), id(own_attribute(module, "forward")), len(module._forward_hooks)))
        parts += plain_values(module)
        # Others, rotary frequencies among them, are made anew by forward passes.
        kept = module._buffers.keys() - module._non_persistent_buffers_set
        tensors += [buffer for key in sorted(kept) if (buffer := module._buffers[key]) is not None]
    for tensor in tensors:
        version = -1 if tensor.is_inference() else tensor._version
        # Where weights are off-loaded, each pass leaves other placeholders.
        parts.append((0 if tensor.is_meta else id(tensor), tensor.dtype, tensor.device, version))
    return hash(tuple(parts))


def plain_values(owner: Any) -> list[tuple[str, str]]:
    """The numbers, switches and names that an object has, as they are outside of all blocks that change some."""
    # Another thread may exchange a forward meanwhile.
    own = [*getattr(owner, "__dict__", {}).items()]
    return [(name, repr(own_attribute(owner, name))) for name, value in own if value and _is_plain(value)]


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    if isinstance(value, (list, tuple, set)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))
