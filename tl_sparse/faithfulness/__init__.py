"""Is a circuit faithful? Controls, nulls and metrics beside every circuit.

Sources: Gao et al. 2025 (arXiv 2511.13653), §3 and appendices; Drori 2026; the circuit literature's
metrics (see ``docs/faithfulness.md``).
"""

from tl_sparse.faithfulness.checks.nulls import arbitrary_map as arbitrary_map
from tl_sparse.faithfulness.checks.nulls import constant_answer as constant_answer
from tl_sparse.faithfulness.checks.nulls import label_swap as label_swap
from tl_sparse.faithfulness.checks.nulls import reinitialised as reinitialised
from tl_sparse.faithfulness.checks.nulls import shuffled_weights as shuffled_weights
from tl_sparse.faithfulness.config import EvaluationConfig as EvaluationConfig
from tl_sparse.faithfulness.evaluate import evaluate as evaluate
from tl_sparse.faithfulness.faithful import FaithfulConfig as FaithfulConfig
from tl_sparse.faithfulness.faithful import faithful_prune as faithful_prune
from tl_sparse.faithfulness.measure import Measure as Measure
from tl_sparse.faithfulness.measure import PartResult as PartResult
from tl_sparse.faithfulness.report import FaithfulnessReport as FaithfulnessReport
from tl_sparse.faithfulness.subject import Subject as Subject
from tl_sparse.faithfulness.subject import subject as subject
from tl_sparse.faithfulness.verdict import Check as Check
from tl_sparse.faithfulness.verdict import Thresholds as Thresholds

__all__ = [
    "Check", "EvaluationConfig", "FaithfulConfig", "FaithfulnessReport", "Measure",
    "PartResult", "Subject", "Thresholds", "arbitrary_map", "constant_answer", "evaluate",
    "faithful_prune", "label_swap", "reinitialised",
    "shuffled_weights", "subject",
]  # fmt: skip
