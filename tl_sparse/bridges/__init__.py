"""Bridges between a dense and a sparse model's residual streams, and hybrids of the two."""

from tl_sparse.bridges.bridges import Bridges as Bridges
from tl_sparse.bridges.config import BridgesConfig as BridgesConfig
from tl_sparse.bridges.fit import FittedBridges as FittedBridges
from tl_sparse.bridges.fit import fit_bridges as fit_bridges
from tl_sparse.bridges.losses import BridgeLosses as BridgeLosses
from tl_sparse.bridges.pair import BridgedPair as BridgedPair
from tl_sparse.bridges.pair import HybridPath as HybridPath
from tl_sparse.bridges.pair import Streams as Streams
from tl_sparse.bridges.paths import PathTable as PathTable
from tl_sparse.bridges.paths import path_table as path_table
from tl_sparse.bridges.places import BridgeSite as BridgeSite
from tl_sparse.bridges.reconstruction import Reconstruction as Reconstruction
from tl_sparse.bridges.reconstruction import reconstruction as reconstruction
from tl_sparse.bridges.training import train_bridges as train_bridges
from tl_sparse.bridges.training_config import BridgeTrainingConfig as BridgeTrainingConfig
