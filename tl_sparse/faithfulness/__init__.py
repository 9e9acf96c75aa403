"""Is a circuit faithful? Controls, nulls and metrics beside every circuit.

Sources: Gao et al. 2025 (arXiv 2511.13653), §3 and appendices; Drori 2026; the circuit literature's
metrics (see ``docs/faithfulness.md``).
"""

from tl_sparse.faithfulness.config import EvaluationConfig
from tl_sparse.faithfulness.evaluate import evaluate
from tl_sparse.faithfulness.faithful import faithful_prune
from tl_sparse.faithfulness.faithful_config import FaithfulConfig
from tl_sparse.faithfulness.inverse_pruning import Necessity, necessity
from tl_sparse.faithfulness.measure import CheckResult, Measure, NotMeasured
from tl_sparse.faithfulness.nulls import (
    arbitrary_map,
    constant_answer,
    label_swap,
    reinitialised,
    shuffled_weights,
)
from tl_sparse.faithfulness.registry import Check, Criterion
from tl_sparse.faithfulness.report import FaithfulnessReport
from tl_sparse.faithfulness.under_test import CircuitUnderTest, under_test
from tl_sparse.faithfulness.verdict import CriterionResult

__all__ = [
    "Check", "CheckResult", "CircuitUnderTest", "Criterion", "CriterionResult", "EvaluationConfig",
    "FaithfulConfig", "FaithfulnessReport", "Measure", "Necessity", "NotMeasured", "arbitrary_map",
    "constant_answer", "evaluate", "faithful_prune", "label_swap", "necessity", "reinitialised",
    "shuffled_weights", "under_test",
]  # fmt: skip
