"""The public names: where each of them lives. ``__init__.py`` imports them when they are used."""

from . import analyses as analyses
from . import bridges as bridges
from . import circuits as circuits
from . import data as data
from . import faithfulness as faithfulness
from . import ground_truth as ground_truth
from . import heads as heads
from . import nodes as nodes
from . import studies as studies
from . import tasks as tasks
from . import tracing as tracing
from .ablation import ActivationMeans as ActivationMeans
from .ablation import ablation_hooks as ablation_hooks
from .ablation import activation_means as activation_means
from .ablation import resample_sources as resample_sources
from .bridges import BridgedPair as BridgedPair
from .bridges import Bridges as Bridges
from .checkpoints.openai_models import openai_models as openai_models
from .circuits import Circuit as Circuit
from .circuits import PruningConfig as PruningConfig
from .circuits import PruningFailed as PruningFailed
from .circuits import prune as prune
from .circuits import prune_many as prune_many
from .config import ActivationDensity as ActivationDensity
from .config import SparseTransformerConfig as SparseTransformerConfig
from .faithfulness import FaithfulnessReport as FaithfulnessReport
from .faithfulness import evaluate as evaluate
from .faithfulness import faithful_prune as faithful_prune
from .model.cache import SparseActivationCache as SparseActivationCache
from .model.transformer import SparseTransformer as SparseTransformer
from .node import Node as Node
from .sites import NodeIndex as NodeIndex
from .sparsity.projection import SparsityConfig as SparsityConfig
from .sparsity.sparsify import sparsify as sparsify
from .sparsity.weight_masks import WeightMasks as WeightMasks
from .sparsity.weight_projector import WeightProjector as WeightProjector
from .training.config import TrainingConfig as TrainingConfig
from .training.trainer import Trainer as Trainer
from .training.trainer import TrainingResult as TrainingResult

__version__: str
