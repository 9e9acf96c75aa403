"""Circuits: learned node masks, pruning, edges, and the circuit object."""

from tl_sparse.circuits.baselines import circuit_from_ranking as circuit_from_ranking
from tl_sparse.circuits.baselines import rank_nodes as rank_nodes
from tl_sparse.circuits.by_hand import circuit_of_channels as circuit_of_channels
from tl_sparse.circuits.by_hand import circuit_of_heads as circuit_of_heads
from tl_sparse.circuits.by_hand import circuit_of_nodes as circuit_of_nodes
from tl_sparse.circuits.by_hand import head_nodes as head_nodes
from tl_sparse.circuits.calibration import Calibration as Calibration
from tl_sparse.circuits.circuit import Circuit as Circuit
from tl_sparse.circuits.compiled import CompiledCircuit as CompiledCircuit
from tl_sparse.circuits.compiled import compile_circuit as compile_circuit
from tl_sparse.circuits.edge_pruning import prune_edges as prune_edges
from tl_sparse.circuits.edge_search import EdgePruningConfig as EdgePruningConfig
from tl_sparse.circuits.edges import circuit_edges as circuit_edges
from tl_sparse.circuits.edges import count_edges as count_edges
from tl_sparse.circuits.edges import random_edges as random_edges
from tl_sparse.circuits.equations import circuit_equations as circuit_equations
from tl_sparse.circuits.hard_concrete import hard_concrete as hard_concrete
from tl_sparse.circuits.importance import NodeScores as NodeScores
from tl_sparse.circuits.importance import ablation_importance as ablation_importance
from tl_sparse.circuits.openai_payload import CircuitPayload as CircuitPayload
from tl_sparse.circuits.openai_payload import circuit_from_openai as circuit_from_openai
from tl_sparse.circuits.openai_payload import read_payload as read_payload
from tl_sparse.circuits.pruning import prune as prune
from tl_sparse.circuits.pruning import prune_many as prune_many
from tl_sparse.circuits.pruning_config import PruningConfig as PruningConfig
from tl_sparse.circuits.pruning_run import PruningFailed as PruningFailed
from tl_sparse.circuits.search import search as search
from tl_sparse.circuits.search_config import SearchConfig as SearchConfig
from tl_sparse.circuits.search_result import SearchResult as SearchResult

__all__ = [
    "Calibration",
    "Circuit",
    "CircuitPayload",
    "CompiledCircuit",
    "EdgePruningConfig",
    "NodeScores",
    "PruningConfig",
    "PruningFailed",
    "SearchConfig",
    "SearchResult",
    "ablation_importance",
    "circuit_edges",
    "circuit_equations",
    "circuit_from_openai",
    "circuit_from_ranking",
    "circuit_of_channels",
    "circuit_of_heads",
    "circuit_of_nodes",
    "compile_circuit",
    "count_edges",
    "hard_concrete",
    "head_nodes",
    "prune",
    "prune_edges",
    "prune_many",
    "random_edges",
    "rank_nodes",
    "read_payload",
    "search",
]  # fmt: skip
