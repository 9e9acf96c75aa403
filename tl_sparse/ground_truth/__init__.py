"""Models written by hand, whose circuits are known by construction."""

from tl_sparse.ground_truth.compiled_programs import compiled as compiled
from tl_sparse.ground_truth.component_edges import component_edges as component_edges
from tl_sparse.ground_truth.false_circuits import FalseCircuit as FalseCircuit
from tl_sparse.ground_truth.false_circuits import false_circuits as false_circuits
from tl_sparse.ground_truth.false_circuits import ground_truth_models as ground_truth_models
from tl_sparse.ground_truth.ground_truth_model import GroundTruthModel as GroundTruthModel
from tl_sparse.ground_truth.ground_truth_model import Recovery as Recovery
from tl_sparse.ground_truth.ground_truth_model import recovery as recovery
from tl_sparse.ground_truth.quote_closing import quote_closing as quote_closing

__all__ = [
    "FalseCircuit", "GroundTruthModel", "Recovery", "compiled", "component_edges", "false_circuits",
    "ground_truth_models", "quote_closing", "recovery",
]  # fmt: skip
