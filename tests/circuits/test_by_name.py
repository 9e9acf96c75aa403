import pytest
import torch

import tl_sparse
from tl_sparse.ablation import activation_means
from tl_sparse.circuits import by_name, prune
from tl_sparse.data import bundled_text
from tl_sparse.model.transformer import SparseTransformer


@pytest.fixture(scope="module")
def sparse():
    return SparseTransformer.from_pretrained("python-sparse")


def test_a_task_is_found_by_name_or_taken_as_it_is(sparse):
    task = by_name.task_of("single_double_quote", sparse)
    assert (task.name, task.max_tokens) == ("single_double_quote", sparse.config.n_ctx)
    assert by_name.task_of(task, sparse) is task


def test_means_without_a_text_are_of_the_bundled_one_and_say_so(sparse):
    means = by_name.means_of(None, sparse)
    assert bundled_text.ORIGIN in repr(means)
    assert f"over {means.n_tokens:,} tokens" in repr(means)
    assert means.n_tokens > 20_000
    own = activation_means(sparse, bundled_text.bundled_text())
    assert torch.equal(means.values, own.values)
    assert own.origin == ""
    assert by_name.means_of(own, sparse) is own


def test_pruning_by_names_meets_the_same_refusals():
    with pytest.raises(FileNotFoundError, match="bundled models: python-bridged, python-dense"):
        prune("python-spars", "single_double_quote")
    with pytest.raises(ValueError, match="unknown task 'quotes': choose from"):
        prune("python-sparse", "quotes")
    with pytest.raises(ValueError, match="does not solve the task"):
        tl_sparse.prune("python-sparse", "class_init")
