"""Models by name."""

import pytest
import torch

from tl_sparse.circuits import prune
from tl_sparse.model.by_name import model_of
from tl_sparse.model.transformer import SparseTransformer


def test_a_bundled_model_a_folder_and_a_released_model_are_found(container, monkeypatch):
    base, root, _ = container
    monkeypatch.setenv("TL_SPARSE_OPENAI_URL", base)
    assert isinstance(model_of("python-sparse"), SparseTransformer)
    by_name = model_of("csp_yolo2")
    assert torch.equal(by_name.W_E, model_of(str(root / "models" / "csp_yolo2")).W_E)
    with pytest.raises(FileNotFoundError, match="bundled models: python-bridged"):
        model_of("frobnicate")


def test_pruning_takes_a_released_model_by_name(container, monkeypatch):
    base, _, _ = container
    monkeypatch.setenv("TL_SPARSE_OPENAI_URL", base)
    with pytest.raises(ValueError, match="unknown task 'quotes': choose from"):
        prune("csp_yolo2", "quotes")
