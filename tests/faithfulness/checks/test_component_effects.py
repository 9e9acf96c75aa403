import pandas as pd
import pytest
import torch

from tests.faithfulness.checks.test_node_values import uneven
from tests.faithfulness.test_attention import attending
from tl_sparse.ablation import ablation_hooks
from tl_sparse.faithfulness.checks.component_effects import (
    component_effects,
    component_intervals,
    opposite,
    pearson,
    single_effects,
    spearman,
)

__all__ = ["attending", "uneven"]


def logit_diff_of(test, row, hooks):
    batch = test.batch
    with torch.no_grad():
        tokens = batch.tokens[row : row + 1, : int(batch.last[row]) + 1]
        logits = test.model.run_with_hooks(tokens, fwd_hooks=hooks)[0, -1]
    return float(logits[batch.correct_token[row]] - logits[batch.incorrect_token[row]])


def test_effects_are_drops_of_the_margin_of_prompts_run_one_at_a_time(whole):
    found = single_effects(whole)
    assert found.n_pairs == len(whole.batch) // 2
    everything = torch.ones_like(whole.kept)
    for place, node in enumerate(torch.nonzero(whole.kept).flatten().tolist()):
        for start, drops in ((whole.kept, found.circuit), (everything, found.model)):
            less = start.clone()
            less[node] = False
            for row in (0, 5):
                before, after = (
                    logit_diff_of(whole, row, ablation_hooks(whole.index, keep, whole.values))
                    for keep in (start, less)
                )
                assert float(drops[place, row]) == pytest.approx(before - after, abs=1e-4)


def test_circuits_of_many_units_are_tested_on_fewer_pairs(whole, tested, chain, monkeypatch):
    import tl_sparse.faithfulness.checks.component_effects as module

    monkeypatch.setattr(module, "ROWS", 1)
    few = single_effects(tested(*chain[:2], chain[2], few_pairs=3))
    assert few.n_pairs == 3
    torch.testing.assert_close(few.circuit, single_effects(whole).circuit[:, :6], atol=1e-4, rtol=0)


def test_correlations_are_those_of_pandas():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(3, 9, generator=generator, dtype=torch.float64) for _ in range(2))
    y[0, :4] = 0.5
    for row in range(3):
        mine = pd.Series(x[row].numpy()), pd.Series(y[row].numpy())
        assert float(pearson(x, y)[row]) == pytest.approx(mine[0].corr(mine[1]))
        by_rank = mine[0].rank().corr(mine[1].rank())
        assert float(spearman(x, y)[row]) == pytest.approx(by_rank)


def test_constant_effects_have_no_correlation():
    x = torch.tensor([[1.0, 1.0, 1.0]])
    assert bool(pearson(x, torch.tensor([[1.0, 2.0, 3.0]])).isnan().all())


def test_only_effects_away_from_zero_can_be_opposite():
    x = torch.tensor([[0.1, 0.5], [0.1, 0.5], [-0.1, 0.5], [-0.4, -0.2], [-0.4, -0.2]])
    y = torch.tensor([[-0.3, -0.1], [0.1, 0.2], [-0.3, -0.1], [0.1, 0.2], [-0.1, 0.2]])
    assert opposite(x, y).tolist() == [1, 0, 0, 1, 0]


def test_intervals_hold_the_mean_and_shrink_to_it_where_pairs_agree():
    effects = torch.tensor([[1.0, 3.0] * 20, [0.0, 2.0, 5.0, 1.0] * 10])
    low, high = component_intervals(effects, 500, 0).T
    assert float(low[0]) == float(high[0]) == 2  # pairs are drawn whole
    assert float(low[1]) < 2 < float(high[1])


def test_nodes_whose_effect_the_rest_turns_round_are_found(planted, marks, circuit_of, tested):
    model, chain = planted()
    with torch.no_grad():  # removed nodes write the answer again, five times and the other way
        model.blocks[0].attn.W_O[0, 3, 1] = -20.0
        model.blocks[0].attn.W_V[0, :, 3] = 0
        model.blocks[0].attn.W_V[0, 0, 3] = 1.0
        model.unembed.W_U.neg_()
    circuit = circuit_of(model, marks, chain)
    found = component_effects(tested(model, marks, circuit))
    table = found.tables["effects"]
    flips = table[table["flipped"]]
    # what only the chain reads helps the model and hurts the circuit
    assert [0, "attn_out", 1] in flips[["layer", "site", "channel"]].values.tolist()
    assert found.measure("sign_flips").value == len(flips)
    assert ((flips["circuit_low"] > 0) == (flips["model_high"] < 0)).all()
    stays = table[(table["site"] == "attn_v")]
    assert not stays["flipped"].any()


def test_effects_of_the_chain_correlate_and_shuffled_ones_do_not(uneven):
    found = component_effects(uneven)
    measure = found.measure("effect_correlation", "pearson")
    table = found.tables["effects"]
    assert measure.value == pytest.approx(table["circuit"].corr(table["model"]), rel=1e-4)
    assert measure.null == pytest.approx(0, abs=0.2)
    assert measure.low <= measure.value <= measure.high
