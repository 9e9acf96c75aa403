"""Circuits: learned node masks, pruning, edges, and the circuit object."""

from tl_sparse.checkpoints.openai_artifacts import train_curves
from tl_sparse.checkpoints.openai_payload import CircuitPayload, read_payload
from tl_sparse.circuits.baselines import circuit_from_ranking, rank_nodes
from tl_sparse.circuits.by_hand import (
    circuit_of_channels,
    circuit_of_heads,
    circuit_of_nodes,
    head_nodes,
)
from tl_sparse.circuits.calibration import Calibration
from tl_sparse.circuits.circuit import Circuit
from tl_sparse.circuits.compiled import CompiledCircuit, compile_circuit
from tl_sparse.circuits.edge_pruning import prune_edges
from tl_sparse.circuits.edge_search import EdgePruningConfig
from tl_sparse.circuits.edges import circuit_edges, count_edges, random_edges
from tl_sparse.circuits.equations import circuit_equations
from tl_sparse.circuits.export import NodeActivations, export_circuit, node_activations
from tl_sparse.circuits.hard_concrete import hard_concrete
from tl_sparse.circuits.importance import NodeScores, ablation_importance
from tl_sparse.circuits.neuronpedia import export_neuronpedia
from tl_sparse.circuits.on_page import page_circuit
from tl_sparse.circuits.openai_circuit import circuit_from_openai
from tl_sparse.circuits.openai_task import task_from_payload
from tl_sparse.circuits.pruning import prune, prune_many
from tl_sparse.circuits.pruning_config import PruningConfig
from tl_sparse.circuits.pruning_run import PruningFailed
from tl_sparse.circuits.search import search
from tl_sparse.circuits.search_config import SearchConfig
from tl_sparse.circuits.search_result import SearchResult

__all__ = [
    "Calibration", "Circuit", "CircuitPayload", "CompiledCircuit", "EdgePruningConfig",
    "NodeActivations", "NodeScores", "PruningConfig", "PruningFailed", "SearchConfig",
    "SearchResult", "ablation_importance", "circuit_edges", "circuit_equations",
    "circuit_from_openai", "circuit_from_ranking", "circuit_of_channels", "circuit_of_heads",
    "circuit_of_nodes", "compile_circuit", "count_edges", "export_circuit", "export_neuronpedia",
    "hard_concrete", "head_nodes", "node_activations", "page_circuit", "prune", "prune_edges",
    "prune_many", "random_edges", "rank_nodes", "read_payload", "search", "task_from_payload",
    "train_curves",
]  # fmt: skip
