"""Circuits: learned node masks, pruning, edges, and the circuit object."""

from tl_sparse.circuits.circuit import Calibration as Calibration
from tl_sparse.circuits.circuit import Circuit as Circuit
from tl_sparse.circuits.compiled import CompiledCircuit as CompiledCircuit
from tl_sparse.circuits.edges import circuit_edges as circuit_edges
from tl_sparse.circuits.edges import count_edges as count_edges
from tl_sparse.circuits.edges import random_edges as random_edges
from tl_sparse.circuits.margins import answer_margins as answer_margins
from tl_sparse.circuits.node_masks import NodeMasks as NodeMasks
from tl_sparse.circuits.pruning import PruningConfig as PruningConfig
from tl_sparse.circuits.pruning import PruningFailed as PruningFailed
from tl_sparse.circuits.pruning import prune as prune

__all__ = [
    "Calibration", "Circuit", "NodeMasks", "PruningConfig", "PruningFailed", "answer_margins",
    "circuit_edges", "count_edges", "prune", "random_edges",
]  # fmt: skip
