"""TransformerLens' model surface, by topic: hooks, running, tokens, weights, files.

Every behavioural method is ours, so that a model behaves the same on each TransformerLens major;
the methods of ``HookedTransformer`` that would be wrong here are refused with the reason.
"""

from tl_sparse.surface.cache import SparseActivationCache as SparseActivationCache
from tl_sparse.surface.files import FileSurface as FileSurface
from tl_sparse.surface.generation import GenerationSurface as GenerationSurface
from tl_sparse.surface.hooks import HookSurface as HookSurface
from tl_sparse.surface.readout import StreamOnly as StreamOnly
from tl_sparse.surface.run import Output as Output
from tl_sparse.surface.run import RunSurface as RunSurface
from tl_sparse.surface.runtime import frozen_config as frozen_config
from tl_sparse.surface.runtime import runtime_config as runtime_config
from tl_sparse.surface.tokens import TokenSurface as TokenSurface
from tl_sparse.surface.weights import WeightSurface as WeightSurface

__all__ = [
    "FileSurface",
    "GenerationSurface",
    "HookSurface",
    "Output",
    "RunSurface",
    "SparseActivationCache",
    "StreamOnly",
    "TokenSurface",
    "WeightSurface",
    "frozen_config",
    "runtime_config",
]
