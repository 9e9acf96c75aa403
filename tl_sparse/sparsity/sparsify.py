"""``sparsify``: a copy of a model with only its largest weights, to train on from there."""

from __future__ import annotations

import dataclasses

import torch

from tl_sparse.config import ActivationDensity
from tl_sparse.model.files import load_tensors
from tl_sparse.model.transformer import SparseTransformer
from tl_sparse.sparsity.matrices import weight_matrices
from tl_sparse.sparsity.projection import constant_sparsity, project_all
from tl_sparse.storage.finite import check_weights


def sparsify(
    model: SparseTransformer,
    density: float,
    floor: int = 4,
    embedding_density: float | None = None,
    embedding_floor: int = 0,
    sparse_biases: bool = False,
    activation_density: ActivationDensity | None = None,
) -> SparseTransformer:
    """A copy of a model that keeps the largest weights of every matrix, to train on from there.

    The budgets are those of :class:`~tl_sparse.SparsityConfig`, and a matrix has exactly as many
    nonzeros as its budget, or as it had, if those were fewer. To train on at that density from the
    first step, give the Trainer a SparsityConfig of the same density with ``anneal_start=0`` and
    ``anneal_end=0``: with its defaults density falls from 1 again. ``activation_density`` switches
    AbsTopK on as well; None leaves it as it is. The copy is in eval mode and has no hooks.

    Raises:
        ValueError: density outside (0, 1], a budget below its floors (the matrix is named), or NaN
            or infinite weights.
    """
    check_weights(model)
    rule = constant_sparsity(density, floor, embedding_density, embedding_floor, sparse_biases)
    config = model.config
    if activation_density is not None:
        config = dataclasses.replace(config, activation_density=activation_density)
    copy = SparseTransformer(config, model.tokenizer)
    load_tensors(copy, model.state_dict(), "the model")
    copy.to(model.cfg.device)
    with torch.no_grad():
        project_all(weight_matrices(copy, biases=sparse_biases), rule, 0, 1)
    return copy.eval()
