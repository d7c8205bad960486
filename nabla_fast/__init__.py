"""nabla_fast: ∇-Reasoner (arXiv 2603.04948) made fast. Test-time gradient descent on an answer's token logits."""

from nabla_fast import dto
from nabla_fast.config import NablaConfig, Sampling
from nabla_fast.drop_in import NablaGenerateOutput, custom_generate
from nabla_fast.dto import DTOResult
from nabla_fast.generate import NablaOutput, generate
from nabla_fast.stats import Revision, SequenceStats, Stats

__version__ = "0.1.0"

__all__ = [
    "DTOResult",
    "NablaConfig",
    "NablaGenerateOutput",
    "NablaOutput",
    "Revision",
    "Sampling",
    "SequenceStats",
    "Stats",
    "custom_generate",
    "dto",
    "generate",
]
