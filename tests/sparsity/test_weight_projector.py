"""``WeightProjector`` in training loops, on our model and on TransformerLens' own dense one."""

import pytest
import torch

from tests.sparsity.models import BUDGETS, nonzero, same, sparse_transformer, weights
from tl_sparse import SparsityConfig, WeightMasks, WeightProjector
from tl_sparse.compat import HAS_HOOKED_TRANSFORMER


def transformer_lens_train(model, tokens):
    """Two epochs of TransformerLens' own training loop, which makes its own optimizer."""
    if HAS_HOOKED_TRANSFORMER:
        from transformer_lens.train import HookedTransformerTrainConfig as Config
        from transformer_lens.train import train
    else:
        from transformer_lens.tools.training import TrainConfig as Config
        from transformer_lens.tools.training import train
    config = Config(num_epochs=2, batch_size=4, lr=1e-2, device="cpu", print_every=None)
    return train(model, config, [{"tokens": row} for row in tokens])


def test_l0_is_exact_after_every_step_of_a_users_own_loop(model, tokens):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    projector = WeightProjector.top_k(model, 1 / 4, floor=2)
    projector.attach(optimizer)
    assert nonzero(model) == BUDGETS  # at once
    losses = []
    for _ in range(4):
        loss = model(tokens, return_type="loss")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        assert nonzero(model) == BUDGETS
        assert projector.check() == BUDGETS
    assert losses[-1] < losses[0]


def test_attach_without_an_optimizer_follows_transformer_lens_own_train(model, tokens):
    projector = WeightProjector.top_k(model, 1 / 4, floor=2)
    before = weights(model)
    handle = projector.attach()
    transformer_lens_train(model, tokens)
    assert nonzero(model) == BUDGETS
    assert not same(before, weights(model))
    handle.remove()
    transformer_lens_train(model, tokens)
    assert nonzero(model)["blocks.0.mlp.W_in"] > 256


def test_attach_without_an_optimizer_leaves_other_models_alone(model, tokens):
    WeightProjector.top_k(model, 1 / 4).project()
    other = sparse_transformer()
    handle = WeightProjector.top_k(model, 1 / 8).attach()
    here = weights(model)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    other(tokens, return_type="loss").backward()
    optimizer.step()
    handle.remove()
    assert nonzero(other)["blocks.0.mlp.W_in"] == 16 * 64
    assert same(here, weights(model))


def test_a_removed_handle_projects_no_more(model, tokens):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    handle = WeightProjector.top_k(model, 1 / 4).attach(optimizer)
    handle.remove()
    model(tokens, return_type="loss").backward()
    optimizer.step()
    assert nonzero(model)["blocks.0.mlp.W_in"] > 3 * 256


def test_an_optimizer_without_the_weights_is_refused_and_nothing_is_touched(model):
    before = weights(model)
    stranger = torch.optim.SGD(sparse_transformer().parameters(), lr=0.1)
    with pytest.raises(ValueError, match="optimizer holds none of the masked weights"):
        WeightProjector.top_k(model, 1 / 4).attach(stranger)
    assert same(before, weights(model))


def test_its_rule_is_a_sparsity_config_without_annealing(model):
    rule = WeightProjector.top_k(model, 1 / 4, floor=2, embedding_density=1 / 2).rule
    expected = SparsityConfig(
        density=1 / 4, floor=2, embedding_density=1 / 2, anneal_start=0.0, anneal_end=0.0
    )
    assert rule == expected


def test_a_zeroed_weight_that_grows_largest_comes_back(model):
    projector, masks = WeightProjector.top_k(model, 1 / 4), WeightMasks.top_k(model, 1 / 4)
    matrix = next(m for m in projector.matrices if m.name == "blocks.0.mlp.W_in")
    place = tuple((~masks.keep[matrix.name]).nonzero()[0].tolist())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    handle = projector.attach(optimizer)
    assert float(matrix.parts[0][place]) == 0.0
    with torch.no_grad():
        matrix.parts[0][place] = 100.0  # what an update could do
    optimizer.step()
    assert float(matrix.parts[0][place]) == 100.0
    handle.remove()


def test_check_tells_whether_the_budgets_are_met(model):
    projector = WeightProjector.top_k(model, 1 / 4)
    with pytest.raises(ValueError, match="project before saving"):
        projector.check()
    projector.project()
    assert projector.check() == BUDGETS == nonzero(model)


def test_it_projects_to_what_masks_of_the_largest_keep(model):
    masks = WeightMasks.top_k(model, 1 / 4, floor=2)
    with masks.applied(model):
        expected = weights(model)
    WeightProjector.top_k(model, 1 / 4, floor=2).project()
    assert same(weights(model), expected)


def test_a_model_that_was_moved_since_is_refused_instead_of_doing_nothing():
    model = sparse_transformer()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    projector = WeightProjector.top_k(model, 1 / 4)
    model.to(torch.float64)  # new storage, as a move to a GPU makes
    with pytest.raises(ValueError, match=r"moved or cast .* make them again"):
        projector.attach(optimizer)
    with pytest.raises(ValueError, match="moved or cast"):
        projector.check()
