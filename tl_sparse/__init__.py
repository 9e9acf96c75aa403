"""Weight-sparse transformers and their circuits, as a plugin to TransformerLens."""

from importlib.metadata import version

from tl_sparse import analyses as analyses
from tl_sparse import circuits as circuits
from tl_sparse import data as data
from tl_sparse import faithfulness as faithfulness
from tl_sparse import ground_truth as ground_truth
from tl_sparse import studies as studies
from tl_sparse import tasks as tasks
from tl_sparse.ablation import ActivationMeans as ActivationMeans
from tl_sparse.ablation import ablation_hooks as ablation_hooks
from tl_sparse.ablation import activation_means as activation_means
from tl_sparse.ablation import resample_sources as resample_sources
from tl_sparse.circuits import Circuit as Circuit
from tl_sparse.circuits import PruningConfig as PruningConfig
from tl_sparse.circuits import PruningFailed as PruningFailed
from tl_sparse.circuits import prune as prune
from tl_sparse.circuits import prune_many as prune_many
from tl_sparse.config import ActivationDensity as ActivationDensity
from tl_sparse.config import SparseTransformerConfig as SparseTransformerConfig
from tl_sparse.faithfulness import FaithfulnessReport as FaithfulnessReport
from tl_sparse.faithfulness import evaluate as evaluate
from tl_sparse.faithfulness import faithful_prune as faithful_prune
from tl_sparse.model.cache import SparseActivationCache as SparseActivationCache
from tl_sparse.model.transformer import SparseTransformer as SparseTransformer
from tl_sparse.sites import NodeIndex as NodeIndex
from tl_sparse.sparsity.projection import SparsityConfig as SparsityConfig
from tl_sparse.sparsity.sparsify import sparsify as sparsify
from tl_sparse.sparsity.weight_masks import WeightMasks as WeightMasks
from tl_sparse.sparsity.weight_projector import WeightProjector as WeightProjector
from tl_sparse.training.config import TrainingConfig as TrainingConfig
from tl_sparse.training.trainer import Trainer as Trainer
from tl_sparse.training.trainer import TrainingResult as TrainingResult

__version__ = version("tl-sparse")

__all__ = [
    "ActivationDensity",
    "ActivationMeans",
    "Circuit",
    "FaithfulnessReport",
    "NodeIndex",
    "PruningConfig",
    "PruningFailed",
    "SparseActivationCache",
    "SparseTransformer",
    "SparseTransformerConfig",
    "SparsityConfig",
    "Trainer",
    "TrainingConfig",
    "TrainingResult",
    "WeightMasks",
    "WeightProjector",
    "ablation_hooks",
    "activation_means",
    "analyses",
    "circuits",
    "data",
    "evaluate",
    "faithful_prune",
    "faithfulness",
    "ground_truth",
    "prune",
    "prune_many",
    "resample_sources",
    "sparsify",
    "studies",
    "tasks",
]
