"""``sparsify``: the largest weights of a dense model, to train on from there."""

import pytest
import torch

from tl_sparse import Trainer, TrainingConfig, compat
from tl_sparse.config import ActivationDensity
from tl_sparse.data import CorpusConfig, build_corpus
from tl_sparse.model.transformer import SparseTransformer
from tl_sparse.sparsity.matrices import weight_matrices
from tl_sparse.sparsity.projection import SparsityConfig, final_budget, l0
from tl_sparse.sparsity.sparsify import sparsify


def test_sparsify_keeps_exactly_the_largest_weights(option, small_model):
    dense = small_model(option)
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    sparse = sparsify(dense, 0.25, floor=0)
    rule = SparsityConfig(density=0.25, floor=0)
    matrices = weight_matrices(sparse)
    originals = {m.name: m for m in weight_matrices(dense)}
    assert l0(matrices) == {m.name: final_budget(m, rule) for m in matrices}
    for matrix in matrices:
        for part, full in zip(matrix.parts, originals[matrix.name].parts, strict=True):
            assert torch.equal(part[part != 0], full[part != 0])
        flat = torch.cat([part.abs().flatten() for part in originals[matrix.name].parts])
        kept = torch.cat([part.abs().flatten() for part in matrix.parts])
        assert kept[kept > 0].min() >= flat[kept == 0].max()
    touched = {id(owner) for matrix in matrices for owner in matrix.owners}
    for name, parameter in sparse.named_parameters():
        assert id(parameter) in touched or torch.equal(parameter, before[name])
    assert all(torch.equal(t, before[name]) for name, t in dense.state_dict().items())


def test_sparsify_takes_floors_densities_and_biases(small_model):
    dense = small_model()
    sparse = sparsify(
        dense, 0.25, floor=3, embedding_density=0.5, embedding_floor=2, sparse_biases=True
    )
    rule = SparsityConfig(
        density=0.25, floor=3, embedding_density=0.5, embedding_floor=2, sparse_biases=True
    )
    matrices = weight_matrices(sparse, biases=True)
    assert l0(matrices) == {m.name: final_budget(m, rule) for m in matrices}
    assert ((sparse.W_in != 0).sum(1) >= 3).all()
    assert ((sparse.W_E != 0).sum(1) >= 2).all()
    assert int((sparse.W_E != 0).sum()) == 30 * 16 // 2
    assert int((sparse.blocks[0].mlp.b_in != 0).sum()) == 12
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.W_Q: density 0\.1 keeps 25 of 256"):
        sparsify(dense, 0.1)


def test_sparsify_may_switch_abstopk_on(small_model, make_tokenizer, tokens):
    dense = small_model(tokenizer=make_tokenizer())
    dense.padding_side = "left"
    sparse = sparsify(dense, 0.5, activation_density=ActivationDensity.paper(0.5))
    _, cache = sparse.run_with_cache(tokens)
    assert ((cache["blocks.1.mlp.hook_post"] != 0).sum(-1) <= 12).all()
    assert sparse.tokenizer is dense.tokenizer
    assert sparse.padding_side == "left"
    assert dense.config.activation_density == ActivationDensity()


def test_a_converted_model_sparsifies_to_what_it_had_where_that_was_less(small_model):
    theirs = small_model("standard").to_transformer_lens()
    with torch.no_grad():
        compat.transformer_lens_weights(theirs)["pos_embed.W_pos"].zero_()
    sparse = sparsify(SparseTransformer.from_transformer_lens(theirs), 0.5)
    assert int((sparse.W_pos != 0).sum()) == 0
    assert int((sparse.W_in != 0).sum()) == 16 * 24


def test_training_goes_on_from_sparsified_weights_at_their_density(
    sixty_sources, tmp_path, small_model
):
    config = CorpusConfig(
        sources=(str(sixty_sources),), vocab_size=400, validation_share=0.3,
        near_duplicate_threshold=1.0,
    )  # fmt: skip
    corpus = build_corpus(config, tmp_path, progress=False)
    theirs = small_model(
        "standard", tokenizer=corpus.tokenizer, attn_only=True, d_mlp=None,
        d_vocab=len(corpus.tokenizer),
    ).to_transformer_lens()  # fmt: skip
    sparse = sparsify(SparseTransformer.from_transformer_lens(theirs), 0.25, floor=2)
    budgets, before = l0(weight_matrices(sparse)), sparse.W_Q.clone()
    rule = SparsityConfig(density=0.25, floor=2, anneal_start=0.0, anneal_end=0.0)
    recipe = TrainingConfig(
        steps=3, batch_size=4, lr=0.01, eval_every=3, eval_sequences=4, sparsity=rule
    )
    seen = []
    trainer = Trainer(sparse, corpus, recipe, progress=False)
    sparse.register_forward_pre_hook(lambda *_: seen.append(l0(weight_matrices(sparse))))
    trainer.train()
    assert len(seen) >= 3
    assert all(counts == budgets for counts in seen)
    assert l0(weight_matrices(sparse)) == budgets
    assert not torch.equal(sparse.W_Q, before)
    assert not [name for name in budgets if "mlp" in name]
