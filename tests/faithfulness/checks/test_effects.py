import pandas as pd
import pytest
import torch

from tl_sparse.ablation import ablation_hooks
from tl_sparse.faithfulness.checks.effects import (
    opposite,
    pearson,
    ranks,
    spearman,
    unit_effects,
    unit_intervals,
)


def logit_diff_of(subject, row, hooks):
    batch = subject.batch
    with torch.no_grad():
        tokens = batch.tokens[row : row + 1, : int(batch.last[row]) + 1]
        logits = subject.model.run_with_hooks(tokens, fwd_hooks=hooks)[0, -1]
    return float(logits[batch.correct_token[row]] - logits[batch.incorrect_token[row]])


def test_effects_are_drops_of_the_margin_of_prompts_run_one_at_a_time(whole):
    found = unit_effects(whole)
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


def test_circuits_of_many_units_are_tested_on_fewer_pairs(whole, subject_of, chain, monkeypatch):
    import tl_sparse.faithfulness.effects as module

    monkeypatch.setattr(module, "ROWS", 1)
    few = unit_effects(subject_of(*chain[:2], chain[2], few_pairs=3))
    assert few.n_pairs == 3
    torch.testing.assert_close(few.circuit, unit_effects(whole).circuit[:, :6], atol=1e-4, rtol=0)


def test_ranks_share_ties_as_pandas_does():
    x = torch.tensor([[3.0, 1.0, 3.0, 2.0], [0.0, 0.0, 0.0, 5.0]])
    expected = pd.DataFrame(x.numpy()).rank(axis=1).values - 1
    assert torch.equal(ranks(x), torch.tensor(expected))


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
    low, high = unit_intervals(effects, 500, 0).T
    assert float(low[0]) == float(high[0]) == 2  # pairs are drawn whole
    assert float(low[1]) < 2 < float(high[1])
