"""Weight-sparse transformers and their circuits, as a plugin to TransformerLens."""

from importlib.metadata import version

from tl_sparse import (
    analyses,
    bridges,
    circuits,
    data,
    faithfulness,
    ground_truth,
    heads,
    nodes,
    studies,
    tasks,
)
from tl_sparse.ablation import ActivationMeans, ablation_hooks, activation_means, resample_sources
from tl_sparse.bridges import BridgedPair, Bridges
from tl_sparse.checkpoints.openai_models import openai_models
from tl_sparse.circuits import Circuit, PruningConfig, PruningFailed, prune, prune_many
from tl_sparse.config import ActivationDensity, SparseTransformerConfig
from tl_sparse.faithfulness import FaithfulnessReport, evaluate, faithful_prune
from tl_sparse.model.cache import SparseActivationCache
from tl_sparse.model.transformer import SparseTransformer
from tl_sparse.node import Node
from tl_sparse.sites import NodeIndex
from tl_sparse.sparsity.projection import SparsityConfig
from tl_sparse.sparsity.sparsify import sparsify
from tl_sparse.sparsity.weight_masks import WeightMasks
from tl_sparse.sparsity.weight_projector import WeightProjector
from tl_sparse.training.config import TrainingConfig
from tl_sparse.training.trainer import Trainer, TrainingResult

__version__ = version("tl-sparse")

__all__ = [
    "ActivationDensity", "ActivationMeans", "BridgedPair", "Bridges", "Circuit",
    "FaithfulnessReport", "Node", "NodeIndex", "PruningConfig", "PruningFailed",
    "SparseActivationCache", "SparseTransformer", "SparseTransformerConfig", "SparsityConfig",
    "Trainer", "TrainingConfig", "TrainingResult", "WeightMasks", "WeightProjector",
    "ablation_hooks", "activation_means", "analyses", "bridges", "circuits", "data", "evaluate",
    "faithful_prune", "faithfulness", "ground_truth", "heads", "nodes", "openai_models", "prune",
    "prune_many", "resample_sources", "sparsify", "studies", "tasks",
]  # fmt: skip
