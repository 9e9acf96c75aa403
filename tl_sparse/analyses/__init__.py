"""Analyses of models and circuits: binarisation, kurtosis, token losses, attacks.

Source: Gao et al. 2025 (arXiv 2511.13653), §3.2 and appendices C and F.
"""

from tl_sparse.analyses.attacks import Dilution as Dilution
from tl_sparse.analyses.attacks import Distractor as Distractor
from tl_sparse.analyses.attacks import dilution as dilution
from tl_sparse.analyses.attacks import distracted as distracted
from tl_sparse.analyses.attacks import distractor as distractor
from tl_sparse.analyses.binarise import Binarisation as Binarisation
from tl_sparse.analyses.binarise import BinariseConfig as BinariseConfig
from tl_sparse.analyses.binarise import binarise as binarise
from tl_sparse.analyses.correlation import TokenLossCorrelation as TokenLossCorrelation
from tl_sparse.analyses.correlation import token_loss_correlation as token_loss_correlation
from tl_sparse.analyses.kurtosis import ResidualKurtosis as ResidualKurtosis
from tl_sparse.analyses.kurtosis import residual_kurtosis as residual_kurtosis
from tl_sparse.analyses.replacement import ConstantNodes as ConstantNodes
from tl_sparse.analyses.replacement import LinearReplacement as LinearReplacement
from tl_sparse.analyses.replacement import constant_node_check as constant_node_check
from tl_sparse.analyses.replacement import linear_replacement as linear_replacement
from tl_sparse.analyses.runs import token_losses as token_losses

__all__ = [
    "Binarisation",
    "BinariseConfig",
    "ConstantNodes",
    "Dilution",
    "Distractor",
    "LinearReplacement",
    "ResidualKurtosis",
    "TokenLossCorrelation",
    "binarise",
    "constant_node_check",
    "dilution",
    "distracted",
    "distractor",
    "linear_replacement",
    "residual_kurtosis",
    "token_loss_correlation",
    "token_losses",
]  # fmt: skip
