"""Is a circuit faithful? Controls, nulls and metrics beside every circuit.

Sources: Gao et al. 2025 (arXiv 2511.13653), §3 and appendices; Drori 2026; the circuit literature's
metrics (see ``docs/faithfulness.md``).
"""

from tl_sparse.faithfulness.config import EvaluationConfig as EvaluationConfig
from tl_sparse.faithfulness.evaluate import evaluate as evaluate
from tl_sparse.faithfulness.faithful import FaithfulConfig as FaithfulConfig
from tl_sparse.faithfulness.faithful import faithful_prune as faithful_prune
from tl_sparse.faithfulness.inverse_pruning import Necessity as Necessity
from tl_sparse.faithfulness.inverse_pruning import necessity as necessity
from tl_sparse.faithfulness.measure import CheckResult as CheckResult
from tl_sparse.faithfulness.measure import Measure as Measure
from tl_sparse.faithfulness.measure import NotMeasured as NotMeasured
from tl_sparse.faithfulness.nulls import arbitrary_map as arbitrary_map
from tl_sparse.faithfulness.nulls import constant_answer as constant_answer
from tl_sparse.faithfulness.nulls import label_swap as label_swap
from tl_sparse.faithfulness.nulls import reinitialised as reinitialised
from tl_sparse.faithfulness.nulls import shuffled_weights as shuffled_weights
from tl_sparse.faithfulness.registry import Check as Check
from tl_sparse.faithfulness.registry import Criterion as Criterion
from tl_sparse.faithfulness.report import FaithfulnessReport as FaithfulnessReport
from tl_sparse.faithfulness.under_test import CircuitUnderTest as CircuitUnderTest
from tl_sparse.faithfulness.under_test import under_test as under_test
from tl_sparse.faithfulness.verdict import CriterionResult as CriterionResult

__all__ = [
    "Check", "CheckResult", "CircuitUnderTest", "Criterion", "CriterionResult", "EvaluationConfig",
    "FaithfulConfig", "FaithfulnessReport", "Measure", "Necessity", "NotMeasured", "arbitrary_map",
    "constant_answer", "evaluate", "faithful_prune", "label_swap", "necessity", "reinitialised",
    "shuffled_weights", "under_test",
]  # fmt: skip
