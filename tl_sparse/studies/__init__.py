"""Studies: whole experiments that people run by name, and their reports."""

from tl_sparse.studies.frontier import Frontier as Frontier
from tl_sparse.studies.frontier import frontier as frontier
from tl_sparse.studies.interpretability import InterpretabilityResult as InterpretabilityResult
from tl_sparse.studies.interpretability import interpretability as interpretability

__all__ = ["Frontier", "InterpretabilityResult", "frontier", "interpretability"]
