"""Changes to objects of a model, such as a layer's forward, that last for a block."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor

_lock = threading.Lock()
# What some block has changed for now: how many blocks want it so, in all threads, and how it is put back.
_changed: dict[tuple[str, int], tuple[int, Callable[[], Any]]] = {}


@contextmanager
def while_any(kind: str, items: Iterable[Any], change: Callable[[Any], Callable[[], Any] | None]) -> Iterator[None]:
    """Changes objects for this block: the first block makes a change, the last puts it back, also among threads.

    Args:
        kind: of the change. Two changes of different kinds to one object must not undo each other.
        change: makes the change and returns what puts it back, or None where there is nothing to change.
    """
    held = []
    try:
        with _lock:
            for item in items:
                key = kind, id(item)
                blocks, back = _changed[key] if key in _changed else (0, change(item))
                if back is not None:
                    _changed[key] = blocks + 1, back
                    held.append((key, item))  # while it is alive, nothing else has its id
        yield
    finally:
        with _lock:
            for key, _ in held:
                blocks, back = _changed.pop(key)
                if blocks > 1:
                    _changed[key] = blocks - 1, back
                else:
                    back()


@contextmanager
def frozen(parameters: Iterable[Tensor]) -> Iterator[None]:
    """No parameter of a model asks for a gradient, or activations would be kept for gradients nobody wants."""

    def freeze(parameter: Tensor) -> Callable[[], Any] | None:
        if not parameter.requires_grad:
            return None
        parameter.requires_grad_(False)
        return partial(parameter.requires_grad_, True)

    with while_any("frozen", parameters, freeze):
        yield


# Attributes that some block has set, by owner and name: what they were.
_own: dict[tuple[int, str], Any] = {}


def set_attribute(owner: Any, name: str, value: Any) -> Callable[[], Any]:
    """Sets an attribute of an instance or module, and returns what puts back the one before, also if there was none."""
    own = vars(owner).get(name)
    _own.setdefault((id(owner), name), own)

    def back() -> None:
        delattr(owner, name) if own is None else setattr(owner, name, own)
        _own.pop((id(owner), name), None)

    setattr(owner, name, value)
    return back


def own_attribute(owner: Any, name: str) -> Any:
    """An attribute of an instance as it is outside of all blocks, in whatever thread; None if it has none."""
    return _own.get((id(owner), name), vars(owner).get(name))
