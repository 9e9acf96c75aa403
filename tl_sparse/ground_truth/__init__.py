"""Models whose circuits are known: written by hand, compiled, or trained and measured."""

from tl_sparse.ground_truth.bystanders import bystanders
from tl_sparse.ground_truth.compiled_programs import compiled
from tl_sparse.ground_truth.component_edges import component_edges
from tl_sparse.ground_truth.false_circuits import FalseCircuit, false_circuits, ground_truth_models
from tl_sparse.ground_truth.ground_truth_model import GroundTruthModel, Recovery, recovery
from tl_sparse.ground_truth.known_heads import KnownHeads, known_heads
from tl_sparse.ground_truth.quote_closing import quote_closing

__all__ = [
    "FalseCircuit", "GroundTruthModel", "KnownHeads", "Recovery", "bystanders", "compiled",
    "component_edges", "false_circuits", "ground_truth_models", "known_heads", "quote_closing",
    "recovery",
]  # fmt: skip
