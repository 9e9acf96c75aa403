import math

import pytest
import torch
import torch.nn.functional as F

from tests.faithfulness.slow import fixed, loss, slow_logit_diffs
from tl_sparse.faithfulness.checks.redundancy import redundancy, smallest_of
from tl_sparse.faithfulness.nulls import label_swap
from tl_sparse.faithfulness.searches import search

QUICK = {"null_steps": 30, "search_pairs": 8, "search_target": 0.3, "rounds": 2}
FIRST = {(0, "attn_in", 0), (0, "attn_v", 1), (0, "attn_out", 1)}
SECOND = {(0, "attn_in", 5), (0, "attn_v", 6), (0, "attn_out", 6)}


@pytest.fixture
def doubled(planted):
    """The planted chain of three attention nodes, and a copy of it through other channels."""
    model, _ = planted(attn_only=True)
    attn = model.blocks[0].attn
    with torch.no_grad():
        model.embed.W_E[:, 5] = model.embed.W_E[:, 0]
        for block in model.blocks:
            block.attn.W_O[..., 5:7] = 0
        model.embed.W_E[:, 6] = 0
        attn.W_V[1, :, 2] = 0
        attn.W_V[1, 5, 2] = attn.W_V[0, 0, 1]
        attn.W_O[1, 2, :] = 0
        attn.W_O[1, 2, 6] = attn.W_O[0, 1, 1]
        model.unembed.W_U[6] = model.unembed.W_U[1]
        for layer in (0, 1):  # nobody else reads the two
            model.blocks[layer].attn.W_V[0, 5] = 0
    return model


def test_a_second_circuit_is_found_without_the_first_ones_nodes(doubled, marks, circuit_of, tested):
    test = tested(doubled, marks, circuit_of(doubled, marks, FIRST), **QUICK)
    found = redundancy(test)
    table = found.tables["rounds"]
    assert found.measure("rounds_survived").value == 1
    assert table["round"].tolist() == [1, 1, 2, 2]
    assert table["excluded"].tolist()[:2] == [3, 3]
    assert bool(table["found"][:2].any())
    assert not table["found"][2:].any()
    # the second chain does the task without the first one
    assert found.measure("excluded_loss").value < 0.3
    assert table["loss_without"][0] == pytest.approx(found.measure("excluded_loss").value)
    assert table["loss_without"][2] > 0.6


def test_a_chain_that_is_alone_has_no_substitute(chain, tested):
    test = tested(*chain, **QUICK)
    found = redundancy(test)
    assert found.measure("rounds_survived").value == 0
    assert found.tables["rounds"]["round"].tolist() == [1, 1]
    by_hand = slow_logit_diffs(
        test.model, test.batch, test.index, ~test.kept,
        fixed(test.index, test.values),
    )  # fmt: skip
    measure = found.measure("excluded_loss")
    assert measure.null_low <= measure.null <= measure.null_high < measure.low
    assert measure.value == pytest.approx(loss(by_hand), abs=1e-5)
    assert measure.examples.tolist() == pytest.approx(
        F.softplus(-torch.tensor(by_hand)).tolist(), abs=1e-4
    )


def test_the_smallest_circuit_of_a_round_is_excluded_next(chain, tested, marks):
    test = tested(*chain, **QUICK)
    results = search(test, [(marks, 0), (label_swap(marks), 0), (marks, 1)])
    sizes = [getattr(result, "n_nodes", math.inf) for result in results]
    assert smallest_of(test, results).n_nodes == min(sizes)
    assert smallest_of(test, results[1:2]) is None
