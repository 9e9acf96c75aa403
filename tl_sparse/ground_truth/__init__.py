"""Models written by hand, whose circuits are known by construction."""

from tl_sparse.ground_truth.compiled_programs import compiled
from tl_sparse.ground_truth.component_edges import component_edges
from tl_sparse.ground_truth.false_circuits import FalseCircuit, false_circuits, ground_truth_models
from tl_sparse.ground_truth.ground_truth_model import GroundTruthModel, Recovery, recovery
from tl_sparse.ground_truth.quote_closing import quote_closing

__all__ = [
    "FalseCircuit", "GroundTruthModel", "Recovery", "compiled", "component_edges", "false_circuits",
    "ground_truth_models", "quote_closing", "recovery",
]  # fmt: skip
