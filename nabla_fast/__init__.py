"""nabla_fast: ∇-Reasoner (arXiv 2603.04948) made fast. Test-time gradient descent on an answer's token logits."""

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nabla_fast import dto, ops
    from nabla_fast.config import NablaConfig, Sampling
    from nabla_fast.drop_in import NablaGenerateOutput, custom_generate
    from nabla_fast.dto import DTOResult
    from nabla_fast.generate import NablaOutput, generate
    from nabla_fast.models.steps import ProcessReward
    from nabla_fast.stats import Revision, SequenceStats, Stats

__version__ = "0.1.0"

__all__ = [
    "DTOResult",
    "NablaConfig",
    "NablaGenerateOutput",
    "NablaOutput",
    "ProcessReward",
    "Revision",
    "Sampling",
    "SequenceStats",
    "Stats",
    "clear_graphs",
    "custom_generate",
    "dto",
    "generate",
    "ops",
]

# torch and transformers take seconds to import, so a name is imported when it is first asked for.
_MODULE_OF = {
    "DTOResult": "dto",
    "NablaConfig": "config",
    "NablaGenerateOutput": "drop_in",
    "NablaOutput": "generate",
    "ProcessReward": "models.steps",
    "Revision": "stats",
    "Sampling": "config",
    "SequenceStats": "stats",
    "Stats": "stats",
    "clear_graphs": "models.kept",
    "custom_generate": "drop_in",
    "generate": "generate",
}


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
        globals()[name] = value
        return value
    if not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}") is not None:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        # Importing nabla_fast.generate sets the package's attribute of that name to the module; it is the function.
        super().__setattr__(
            name, getattr(value, name) if name == "generate" and isinstance(value, ModuleType) else value
        )


sys.modules[__name__].__class__ = _Package
