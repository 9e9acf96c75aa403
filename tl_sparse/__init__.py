"""Weight-sparse transformers and their circuits, as a plugin to TransformerLens."""

from importlib.metadata import version

from tl_sparse import analyses as analyses
from tl_sparse import circuits as circuits
from tl_sparse import data as data
from tl_sparse import faithfulness as faithfulness
from tl_sparse import openai as openai
from tl_sparse import planted as planted
from tl_sparse import tasks as tasks
from tl_sparse.ablation import ActivationMeans as ActivationMeans
from tl_sparse.ablation import ablation_hooks as ablation_hooks
from tl_sparse.ablation import activation_donors as activation_donors
from tl_sparse.ablation import activation_means as activation_means
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
from tl_sparse.model import SparseTransformer as SparseTransformer
from tl_sparse.recipes import TrainingConfig as TrainingConfig
from tl_sparse.sites import NodeIndex as NodeIndex
from tl_sparse.sparsity import SparsityConfig as SparsityConfig
from tl_sparse.surface import SparseActivationCache as SparseActivationCache
from tl_sparse.training import Trainer as Trainer
from tl_sparse.training import TrainingResult as TrainingResult
from tl_sparse.weight_masks import WeightMasks as WeightMasks

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
    "ablation_hooks",
    "activation_donors",
    "activation_means",
    "analyses",
    "circuits",
    "data",
    "evaluate",
    "faithful_prune",
    "faithfulness",
    "openai",
    "planted",
    "prune",
    "prune_many",
    "tasks",
]
