"""``WeightMasks`` on our model and on TransformerLens' own dense one."""

import pytest
import torch

from tests.sparsity.models import (
    BUDGETS,
    SIZES,
    nonzero,
    same,
    sparse_transformer,
    transformer_lens_model,
    weights,
)
from tl_sparse import SparseTransformer, SparseTransformerConfig, WeightMasks, WeightProjector
from tl_sparse.sparsity.matrices import weight_matrices

# ------------------------------------------------------------------------------------------------
# choosing weights


def test_top_k_keeps_the_budget_of_every_matrix_and_its_largest_weights(model):
    masks = WeightMasks.top_k(model, 1 / 4)
    assert masks.l0() == BUDGETS
    for matrix in weight_matrices(model):
        keep, size = masks.keep[matrix.name], matrix.parts[0].abs()
        assert keep.shape == size.shape
        assert size[keep].min() >= size[~keep].max()


def test_top_k_floors_hold_per_neuron_channel_and_token(model):
    masks = WeightMasks.top_k(model, 1 / 4, floor=4, embedding_density=1 / 2, embedding_floor=6)
    for layer in range(2):
        for name, dim in [("W_Q", 1), ("W_K", 1), ("W_V", 1), ("W_O", 2)]:
            assert masks.keep[f"blocks.{layer}.attn.{name}"].sum(dim).min() >= 4
        assert masks.keep[f"blocks.{layer}.mlp.W_in"].sum(0).min() >= 4
        assert masks.keep[f"blocks.{layer}.mlp.W_out"].sum(1).min() >= 4
    assert masks.keep["embed.W_E"].sum(1).min() >= 6
    assert masks.keep["unembed.W_U"].sum(0).min() >= 6
    assert masks.l0()["embed.W_E"] == 240
    assert masks.l0()["blocks.0.mlp.W_in"] == 256


def test_gated_mlps_are_sparse_in_their_gate_too():
    gated = transformer_lens_model(gated_mlp=True, act_fn="silu", normalization_type="RMS")
    masks = WeightMasks.top_k(gated, 1 / 4, floor=4)
    assert masks.l0()["blocks.1.mlp.W_gate"] == 256
    assert masks.keep["blocks.1.mlp.W_gate"].sum(0).min() >= 4


def test_top_k_refuses_a_density_outside_its_range_and_budgets_below_floors(model):
    with pytest.raises(ValueError, match=r"density=0.0 must lie in \(0, 1\]"):
        WeightMasks.top_k(model, 0.0)
    with pytest.raises(ValueError, match=r"density=1.5 must lie in \(0, 1\]"):
        WeightMasks.top_k(model, 1.5)
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.W_Q: density 0.05 keeps 12 of 256"):
        WeightMasks.top_k(model, 0.05, floor=4)


def test_of_is_the_pattern_that_a_model_has(model):
    WeightMasks.top_k(model, 1 / 4).project()
    masks = WeightMasks.of(model)
    assert masks.l0() == BUDGETS == nonzero(model)
    for name, (part,) in weights(model).items():
        assert torch.equal(masks.keep[name], part != 0)


# ------------------------------------------------------------------------------------------------
# training with masks


def test_fixed_masks_let_no_weight_come_back(model, tokens):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    masks = WeightMasks.top_k(model, 1 / 4)
    masks.attach(optimizer)
    for _ in range(3):
        model(tokens, return_type="loss").backward()
        optimizer.step()
    for name, keep in WeightMasks.of(model).keep.items():
        assert not (keep & ~masks.keep[name]).any()


# ------------------------------------------------------------------------------------------------
# experiments


def test_applied_masks_inside_and_restores_to_the_bit(model, tokens):
    before, plain = weights(model), model(tokens)
    masks = WeightMasks.top_k(model, 1 / 4)
    with masks.applied(model) as inside:
        assert inside is model
        assert nonzero(model) == BUDGETS
        for matrix in weight_matrices(model):
            keep, was = masks.keep[matrix.name], before[matrix.name][0]
            assert torch.equal(matrix.parts[0], torch.where(keep, was, 0.0))
        assert not torch.allclose(model(tokens), plain)
    assert same(before, weights(model))
    assert torch.equal(model(tokens), plain)


def test_applied_restores_after_an_exception(model):
    before = weights(model)
    with pytest.raises(KeyError, match="mine"), WeightMasks.top_k(model, 1 / 4).applied(model):
        raise KeyError("mine")
    assert same(before, weights(model))


def test_applied_masks_nest(model):
    before = weights(model)
    wide, narrow = WeightMasks.top_k(model, 1 / 4), WeightMasks.top_k(model, 1 / 8)
    with wide.applied(model):
        with narrow.applied(model):
            assert nonzero(model)["blocks.0.mlp.W_in"] == 128
        assert nonzero(model) == BUDGETS
    assert same(before, weights(model))


def test_caching_patching_and_gradients_work_inside(model, tokens):
    masks = WeightMasks.top_k(model, 1 / 4)
    outside, _ = model.run_with_cache(tokens)
    embedding = weights(model)["embed.W_E"][0] * masks.keep["embed.W_E"]
    with masks.applied(model):
        logits, cache = model.run_with_cache(tokens)
        assert torch.equal(cache["hook_embed"], embedding[tokens])
        assert not torch.allclose(logits, outside)
        name = "blocks.0.hook_resid_pre"
        swapped = cache[name].flip(0)
        patched = model.run_with_hooks(tokens, fwd_hooks=[(name, lambda *_, **__: swapped)])
        assert torch.allclose(patched, logits.flip(0), atol=1e-5)
        model(tokens, return_type="loss").backward()
    # gradients of masked weights are dense: attribution sees what a missing edge would do
    gradient = weight_matrices(model)[4].owners[0].grad
    assert float((gradient != 0).float().mean()) > 0.9


def test_without_removes_a_single_edge(model, tokens):
    """Removing W_in[3, 17] changes neuron 17's input by x[3] W_in[3, 17] and no other neuron's."""
    pre = "blocks.0.mlp.hook_pre"
    masks = WeightMasks.all_kept(model).without([("blocks.0.mlp.W_in", (3, 17))])
    assert masks.l0()["blocks.0.mlp.W_in"] == 16 * 64 - 1
    weight = float(weights(model)["blocks.0.mlp.W_in"][0][3, 17])
    _, full = model.run_with_cache(tokens)
    with masks.applied(model):
        _, cut = model.run_with_cache(tokens)
    change = (full[pre] - cut[pre]).abs().amax((0, 1))
    assert change[17] > 0
    assert (change[torch.arange(64) != 17] < 1e-6).all()
    if isinstance(model, SparseTransformer):
        read = full["blocks.0.mlp.hook_act_in"][..., 3]
        assert torch.allclose((full[pre] - cut[pre])[..., 17], weight * read, atol=1e-6)


def test_without_leaves_the_masks_it_came_from(model):
    masks = WeightMasks.all_kept(model)
    masks.without([("embed.W_E", (0, 0)), ("blocks.0.attn.W_V", (2, 3, 1))])
    assert masks.l0()["embed.W_E"] == 480


def test_unknown_matrix_names_the_choices(model):
    with pytest.raises(ValueError, match=r"unknown matrix 'W_in'; choose from blocks\.0\.attn\.W"):
        WeightMasks.all_kept(model).without([("W_in", (0, 0))])


@pytest.mark.parametrize("index", [(16, 0), (0, 64), (-1, 0), (0,), (0, 0, 0)])
def test_an_index_outside_the_matrix_is_refused(model, index):
    with pytest.raises(ValueError, match=r"lies outside blocks\.0\.mlp\.W_in of shape \(16, 64\)"):
        WeightMasks.all_kept(model).without([("blocks.0.mlp.W_in", index)])


def test_another_model_is_refused_and_not_touched(model):
    other = sparse_transformer()
    before = weights(other)
    with (
        pytest.raises(ValueError, match="these masks belong to another model"),
        WeightMasks.top_k(model, 1 / 4).applied(other),
    ):
        pass
    assert same(before, weights(other))


def test_masks_of_a_model_that_was_moved_since_are_refused_instead_of_doing_nothing():
    model = sparse_transformer()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    masks = WeightMasks.top_k(model, 1 / 4)
    model.to(torch.float64)  # new storage, as a move to a GPU makes
    with pytest.raises(ValueError, match=r"moved or cast .* make them again"):
        masks.attach(optimizer)
    with pytest.raises(ValueError, match="moved or cast"), masks.applied(model):
        pass
    with pytest.raises(ValueError, match="moved or cast"):
        masks.project()


def test_concatenated_positions_have_masks_of_their_own():
    sizes = SIZES | {"positional_embedding_type": "concat", "d_pos": 4}
    model = SparseTransformer(SparseTransformerConfig(**sizes))
    masks = WeightMasks.top_k(model, 1 / 4)
    both = masks.l0()["blocks.0.mlp.W_in"] + masks.l0()["blocks.0.mlp.W_in_pos"]
    assert both == 20 * 64 // 4
    before = weights(model)
    cut = WeightMasks.all_kept(model).without([("blocks.0.mlp.W_in_pos", (1, 2))])
    with cut.applied(model):
        assert float(model.blocks[0].mlp.W_in_pos[1, 2].detach()) == 0.0
    assert same(before, weights(model))


def test_tied_embeddings_are_masked_once():
    model = sparse_transformer(tie_word_embeddings=True)
    masks = WeightMasks.top_k(model, 1 / 4)
    assert "unembed.W_U" not in masks.keep
    with masks.applied(model):
        assert int(model.W_U.count_nonzero()) == 120


def test_a_zeroed_weight_that_grows_largest_stays_zero(model):
    masks = WeightMasks.top_k(model, 1 / 4)
    matrix = next(m for m in masks.matrices if m.name == "blocks.0.mlp.W_in")
    place = tuple((~masks.keep[matrix.name]).nonzero()[0].tolist())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    handle = masks.attach(optimizer)
    with torch.no_grad():
        matrix.parts[0][place] = 100.0  # what an update could do
    optimizer.step()
    assert float(matrix.parts[0][place]) == 0.0
    handle.remove()


def test_masks_chosen_by_hand_hold_in_training_too(model):
    masks = WeightMasks.all_kept(model).without([("blocks.0.mlp.W_in", (3, 17))])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    masks.attach(optimizer)
    matrix = next(m for m in masks.matrices if m.name == "blocks.0.mlp.W_in")
    assert float(matrix.parts[0][3, 17]) == 0.0
    assert nonzero(model)["blocks.0.mlp.W_in"] == 16 * 64 - 1


def test_masks_of_a_trained_model_are_those_after_training_not_before(model, tokens):
    before = WeightMasks.top_k(model, 1 / 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-1)
    WeightProjector.top_k(model, 1 / 4).attach(optimizer)
    for _ in range(3):
        model(tokens, return_type="loss").backward()
        optimizer.step()
    trained, plain = WeightMasks.of(model), model(tokens)
    assert any(not torch.equal(trained.keep[name], mask) for name, mask in before.keep.items())
    with trained.applied(model):
        assert torch.equal(model(tokens), plain)
