"""Analyses of models and circuits: binarisation, kurtosis, token losses, attacks.

Source: Gao et al. 2025 (arXiv 2511.13653), §3.2 and appendices C and F.
"""

from tl_sparse.analyses.attacks import Dilution, Distractor, dilution, distracted, distractor
from tl_sparse.analyses.binarise import Binarisation, BinariseConfig, binarise
from tl_sparse.analyses.correlation import TokenLossCorrelation, token_loss_correlation
from tl_sparse.analyses.kurtosis import ResidualKurtosis, residual_kurtosis
from tl_sparse.analyses.replacement import (
    ConstantNodes,
    LinearReplacement,
    constant_node_check,
    linear_replacement,
)
from tl_sparse.analyses.runs import token_losses
from tl_sparse.analyses.selections import ChangedSelections, changed_selections

__all__ = [
    "Binarisation", "BinariseConfig", "ChangedSelections", "ConstantNodes", "Dilution",
    "Distractor", "LinearReplacement", "ResidualKurtosis", "TokenLossCorrelation", "binarise",
    "changed_selections", "constant_node_check", "dilution", "distracted", "distractor",
    "linear_replacement", "residual_kurtosis", "token_loss_correlation", "token_losses",
]  # fmt: skip
