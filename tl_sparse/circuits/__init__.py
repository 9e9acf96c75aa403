"""Circuits: learned node masks, pruning, edges, and the circuit object."""

from tl_sparse.circuits.baselines import circuit_from_ranking as circuit_from_ranking
from tl_sparse.circuits.baselines import rank_nodes as rank_nodes
from tl_sparse.circuits.calibration import Calibration as Calibration
from tl_sparse.circuits.circuit import Circuit as Circuit
from tl_sparse.circuits.compiled import CompiledCircuit as CompiledCircuit
from tl_sparse.circuits.edge_pruning import prune_edges as prune_edges
from tl_sparse.circuits.edge_result import EdgePruning as EdgePruning
from tl_sparse.circuits.edge_search import EdgePruningConfig as EdgePruningConfig
from tl_sparse.circuits.edges import circuit_edges as circuit_edges
from tl_sparse.circuits.edges import count_edges as count_edges
from tl_sparse.circuits.edges import random_edges as random_edges
from tl_sparse.circuits.frontier import Frontier as Frontier
from tl_sparse.circuits.frontier import frontier as frontier
from tl_sparse.circuits.hard_concrete import hard_concrete as hard_concrete
from tl_sparse.circuits.importance import NodeScores as NodeScores
from tl_sparse.circuits.importance import ablation_importance as ablation_importance
from tl_sparse.circuits.interpretability import InterpretabilityResult as InterpretabilityResult
from tl_sparse.circuits.interpretability import interpretability as interpretability
from tl_sparse.circuits.margins import answer_margins as answer_margins
from tl_sparse.circuits.masked import masked_losses as masked_losses
from tl_sparse.circuits.masked import masked_margins as masked_margins
from tl_sparse.circuits.node_masks import NodeMasks as NodeMasks
from tl_sparse.circuits.problem import PruningFailed as PruningFailed
from tl_sparse.circuits.pruning import prune as prune
from tl_sparse.circuits.pruning import prune_many as prune_many
from tl_sparse.circuits.pruning_config import PruningConfig as PruningConfig
from tl_sparse.circuits.search import search as search
from tl_sparse.circuits.search_result import SearchResult as SearchResult
from tl_sparse.circuits.search_study import SearchConfig as SearchConfig

__all__ = [
    "Calibration", "Circuit", "CompiledCircuit", "EdgePruning", "EdgePruningConfig", "Frontier",
    "InterpretabilityResult", "NodeMasks", "NodeScores", "PruningConfig", "PruningFailed",
    "SearchConfig", "SearchResult", "ablation_importance", "answer_margins", "circuit_edges",
    "circuit_from_ranking", "count_edges", "frontier", "hard_concrete", "interpretability",
    "masked_losses", "masked_margins", "prune", "prune_edges", "prune_many", "random_edges",
    "rank_nodes", "search",
]  # fmt: skip
