"""Weights held as their nonzeros: the same model, in less memory."""

import copy
import pickle

import pytest
import torch

from tl_sparse.model.sparse_weights import SparseMatrix, held_sparsely
from tl_sparse.sparsity.matrices import weight_matrices
from tl_sparse.storage.fingerprint import fingerprint


@pytest.fixture
def pair(option, small_model):
    """A model and the same with sparse weights."""
    model = small_model(option, zeros=0.95)
    return model, copy.deepcopy(model).sparse_weights()


def test_logits_and_every_activation_are_the_same(pair, tokens):
    dense, sparse = pair
    assert held_sparsely(sparse)
    with torch.no_grad():
        expected, before = dense.run_with_cache(tokens)
        logits, after = sparse.run_with_cache(tokens)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert set(after) == set(before)
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, atol=1e-5, rtol=1e-5, msg=name)


def test_weights_read_as_they_were_and_come_back_to_the_bit(pair):
    dense, sparse = pair
    state = dense.state_dict()
    held = sparse.state_dict()
    assert set(held) == set(state)
    assert all(torch.equal(held[name], value) for name, value in state.items())
    assert torch.equal(sparse.W_Q, dense.W_Q)
    assert torch.equal(sparse.W_U, dense.W_U)
    assert fingerprint(sparse) == fingerprint(dense)
    sparse.dense_weights()
    assert not held_sparsely(sparse)
    assert [type(m) for m in sparse.modules()] == [type(m) for m in dense.modules()]
    again = sparse.state_dict()
    assert all(torch.equal(again[name], value) for name, value in state.items())
    assert {n for n, _ in sparse.named_parameters()} == {n for n, _ in dense.named_parameters()}


def test_hooks_change_it_as_they_change_the_dense_one(small_model, tokens):
    dense = small_model("together", zeros=0.95)
    sparse = copy.deepcopy(dense).sparse_weights()
    hooks = [("blocks.0.mlp.hook_post", lambda x, hook: x * 2)]
    hooks.append(("blocks.1.attn.hook_q", lambda x, hook: x.relu()))
    with torch.no_grad():
        found, expected = (m.run_with_hooks(tokens, fwd_hooks=hooks) for m in (sparse, dense))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_gradients_of_activations_are_the_same(small_model, tokens):
    grads = []
    for model in (
        small_model("plain", zeros=0.9),
        small_model("plain", zeros=0.9).sparse_weights(1.0),
    ):
        _, cache = model.run_with_cache(tokens, return_type="loss", incl_bwd=True)
        grads.append(cache["blocks.0.hook_mlp_out_grad"])
        assert float(grads[-1].abs().max()) > 0
    torch.testing.assert_close(grads[1], grads[0], atol=1e-6, rtol=1e-5)


def test_saved_and_loaded_it_is_the_dense_model(small_model, tokens, tmp_path):
    from tl_sparse import SparseTransformer

    dense = small_model("concat", zeros=0.95)
    expected = dense(tokens)
    copy.deepcopy(dense).sparse_weights().save_pretrained(tmp_path / "ours")
    assert torch.equal(SparseTransformer.from_pretrained(tmp_path / "ours")(tokens), expected)
    copy.deepcopy(dense).sparse_weights().to_openai(tmp_path / "theirs")
    assert torch.equal(
        SparseTransformer.from_openai(tmp_path / "theirs", tokenizer=False)(tokens), expected
    )
    held = SparseTransformer.from_openai(tmp_path / "theirs", tokenizer=False, sparse_weights=True)
    assert held_sparsely(held)
    torch.testing.assert_close(held(tokens), expected, atol=1e-5, rtol=1e-5)


def test_copied_pickled_cast_and_moved(small_model, tokens):
    model = small_model("together", zeros=0.95).sparse_weights()
    with torch.no_grad():
        expected = model(tokens)
        assert torch.equal(copy.deepcopy(model)(tokens), expected)
        assert torch.equal(pickle.loads(pickle.dumps(model))(tokens), expected)
        assert torch.equal(copy.deepcopy(model).to("cpu")(tokens), expected)
        wide = copy.deepcopy(model).to(torch.float64)
        assert wide(tokens).dtype == torch.float64
        torch.testing.assert_close(wide(tokens).float(), expected, atol=1e-4, rtol=1e-4)


def test_memory_is_a_tenth_at_one_percent():
    matrix = torch.randn(400, 500) * (torch.rand(400, 500) < 0.01)
    held = SparseMatrix.of(matrix)
    assert held.nonzeros == int(torch.count_nonzero(matrix))
    assert held.nbytes == 8 * held.nonzeros + 4 * 501 < 0.1 * 4 * matrix.numel()
    assert torch.equal(held.dense(), matrix)


def test_matrices_that_are_not_sparse_stay(small_model):
    model = small_model("plain", zeros=0.5)
    assert not held_sparsely(model.sparse_weights())
    with torch.no_grad():
        model.blocks[0].mlp.W_in.zero_()
    assert list(held_sparsely(model.sparse_weights())) == ["blocks.0.mlp.in"]
    assert list(held_sparsely(model.sparse_weights())) == ["blocks.0.mlp.in"]  # twice is once
    with pytest.raises(ValueError, match="from 0 to 1"):
        model.sparse_weights(2.0)


def test_what_changes_weights_is_refused(small_model):
    model = small_model("plain", zeros=0.95).sparse_weights()
    with pytest.raises(ValueError, match="cannot be made sparse in place"):
        weight_matrices(model)
    with pytest.raises(TypeError, match="dense_weights"):
        model.init_weights()
    with pytest.raises(RuntimeError, match="dense_weights"):
        model.load_state_dict(model.state_dict())


def test_counts_are_of_all_weights(small_model):
    dense = small_model("concat", zeros=0.95)
    sparse = copy.deepcopy(dense).sparse_weights()
    assert sparse.n_params_total == dense.n_params_total
    assert sparse.n_nonzero() == dense.n_nonzero()
    assert set(sparse.tl_parameters()) == set(dense.tl_parameters())
