"""Weights changed inside a block come back, whatever else happens there, or one is told."""

import copy
import threading

import pytest
import torch

from tests.sparsity.models import nonzero, same, sparse_transformer, weights
from tl_sparse import WeightMasks
from tl_sparse.sparsity.matrices import weight_matrices
from tl_sparse.sparsity.temporary import WeightsLost, changed


def masked(before, masks):
    """The weights with masks applied, by plain arithmetic."""
    return {
        name: [torch.where(masks.keep[name], part, 0.0) for part in parts]
        for name, parts in before.items()
    }


def cast(values, dtype):
    return {name: [part.to(dtype) for part in parts] for name, parts in values.items()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_a_model_that_was_cast_inside_gets_its_weights_back_in_the_new_dtype(model, dtype):
    before, masks = weights(model), WeightMasks.top_k(model, 1 / 4)
    with masks.applied(model):
        model.to(dtype)
        assert same(weights(model), cast(masked(before, masks), dtype))
    assert next(model.parameters()).dtype == dtype
    assert same(weights(model), cast(before, dtype))


def test_blocks_may_end_in_another_order_than_they_began(model):
    before = weights(model)
    a, b, c = (WeightMasks.top_k(model, 1 / n) for n in (4, 8, 6))
    first, second, third = (masks.applied(model) for masks in (a, b, c))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert same(weights(model), masked(before, b))
    third.__enter__()
    assert same(weights(model), masked(masked(before, b), c))
    second.__exit__(None, None, None)
    assert same(weights(model), masked(before, c))
    third.__exit__(None, None, None)
    assert same(weights(model), before)
    with a.applied(model):  # nothing is left over
        assert same(weights(model), masked(before, a))
    assert same(weights(model), before)


def test_another_thread_is_refused_while_a_block_is_open():
    model = sparse_transformer()
    before, masks, found = weights(model), WeightMasks.top_k(model, 1 / 4), []

    def other():
        try:
            with WeightMasks.all_kept(model).applied(model):
                found.append("entered")
        except RuntimeError as error:
            found.append(str(error))

    def run():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    with masks.applied(model):
        run()
        assert same(weights(model), masked(before, masks))
    assert "another thread" in found[0]
    assert same(weights(model), before)
    run()
    assert found[1] == "entered"


def train(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(torch.arange(8)[None], return_type="loss").backward()
    optimizer.step()


def load(model):
    model.load_state_dict({name: x + 1.0 for name, x in model.state_dict().items()})


def assign(model):
    new = {name: x.clone() + 1.0 for name, x in model.state_dict().items()}
    model.load_state_dict(new, assign=True)


@pytest.mark.parametrize("change", [train, load, assign])
def test_what_else_changed_inside_is_told_and_the_weights_are_those_of_before(change):
    model = sparse_transformer()
    before = weights(model)
    with (
        pytest.raises(WeightsLost, match=r"blocks\.0\.mlp\.W_in.*changed inside .* are lost"),
        WeightMasks.top_k(model, 1 / 4).applied(model),
    ):
        change(model)
    assert same(weights(model), before)
    with WeightMasks.top_k(model, 1 / 4).applied(model):
        pass
    assert same(weights(model), before)


def test_an_error_inside_is_not_replaced_but_told_more():
    model = sparse_transformer()
    before = weights(model)

    def failing():
        train(model)
        raise KeyError("mine")

    with pytest.raises(KeyError) as caught, WeightMasks.top_k(model, 1 / 4).applied(model):
        failing()
    assert "changed inside a block" in caught.value.__notes__[0]
    assert same(weights(model), before)


def test_a_block_is_not_opened_on_weights_that_changed_since_the_one_around_it():
    model = sparse_transformer()
    before = weights(model)
    wide, narrow = WeightMasks.top_k(model, 1 / 4), WeightMasks.top_k(model, 1 / 8)
    entered = []

    def nested():
        train(model)
        with narrow.applied(model):
            entered.append(1)

    with pytest.raises(WeightsLost), wide.applied(model):
        nested()
    assert not entered  # it would have been neither the trained weights nor those of before
    assert same(weights(model), before)


def test_a_copy_made_inside_is_a_model_of_its_own(model):
    before, masks = weights(model), WeightMasks.top_k(model, 1 / 4)
    with masks.applied(model):
        twin = copy.deepcopy(model)
    assert same(weights(model), before)
    assert same(weights(twin), masked(before, masks))
    with WeightMasks.top_k(twin, 1 / 8).applied(twin):
        assert nonzero(twin)["blocks.0.mlp.W_in"] == 128
    assert same(weights(twin), masked(before, masks))


def test_nan_weights_are_put_back_too():
    model = sparse_transformer()
    with torch.no_grad():
        model.blocks[0].mlp.W_in[:3] = torch.nan
    kept = model.blocks[0].mlp.W_in.detach().clone()
    with WeightMasks.all_kept(model).without([("blocks.0.mlp.W_in", (0, 0))]).applied(model):
        assert float(model.blocks[0].mlp.W_in[0, 0].detach()) == 0.0
    assert torch.equal(model.blocks[0].mlp.W_in.isnan(), kept.isnan())


def test_edits_build_on_each_other_and_a_failing_one_changes_nothing(model):
    name = next(n for n, p in model.named_parameters() if p is weight_matrices(model)[0].owners[0])
    before = weights(model)

    def add(tensors):
        tensors[name].add_(1.0)

    def fail(tensors):
        tensors[name].zero_()
        raise OverflowError

    with changed(model, [name], add):
        once = weights(model)
        with changed(model, [name], add):
            assert not same(weights(model), once)
        assert same(weights(model), once)
        with pytest.raises(OverflowError), changed(model, [name], fail):
            pytest.fail("not reached")
        assert same(weights(model), once)
    assert same(weights(model), before)
