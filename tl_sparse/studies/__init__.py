"""Studies: whole experiments that people run by name, and their reports."""

from tl_sparse.studies.frontier import Frontier, frontier
from tl_sparse.studies.interpretability import InterpretabilityResult, interpretability

__all__ = [
    "Frontier", "InterpretabilityResult", "frontier", "interpretability",
]  # fmt: skip
