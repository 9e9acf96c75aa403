import math
from dataclasses import replace

import pandas as pd
import pytest
import torch

from tl_sparse.ablation.logit_diff import task_logit_diffs
from tl_sparse.circuits import circuit_of_heads
from tl_sparse.faithfulness import EvaluationConfig, under_test
from tl_sparse.faithfulness.attention import (
    evened,
    head_patterns,
    js_distance,
    pattern_effects,
    patterns,
    used_heads,
)


@pytest.fixture
def attending(planted, marks, circuit_of, tested):
    """``attending(nodes)``: the chain and further nodes in a model whose heads attend unevenly."""

    def build(nodes=(), **config):
        model, chain = planted(**config)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for block in model.blocks:
                for weight in (block.attn.W_Q, block.attn.W_K):
                    weight += 0.4 * torch.randn(weight.shape, generator=generator)
                if config.get("use_attention_sinks"):
                    block.attn.sinks += 0.5
        return tested(model, marks, circuit_of(model, marks, {*chain, *nodes}))

    return build


def entropy(p):
    return -sum(x * math.log2(x) for x in p if x > 0)


def distance_by_hand(p, q):
    middle = [(x + y) / 2 for x, y in zip(p, q, strict=True)]
    return math.sqrt(max(0.0, entropy(middle) - (entropy(p) + entropy(q)) / 2))


def slow_patterns(test, layer, hooks):
    """Attention of a layer, one prompt at a time, cut to its length."""
    found, name = [], f"blocks.{layer}.attn.hook_pattern"

    def keep(x, hook=None):
        found.append(x[0].detach())
        return x

    for row in range(len(test.batch)):
        tokens = test.batch.tokens[row : row + 1, : int(test.batch.last[row]) + 1]
        with torch.no_grad():
            test.model.run_with_hooks(tokens, fwd_hooks=[*hooks, (name, keep)])
    return found


def test_distances_are_known_for_known_distributions():
    p = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.2, 0.3, 0.5]], dtype=torch.float64)
    q = torch.tensor([[0.0, 0.0, 1.0], [0.5, 0.5, 0.0], [0.1, 0.1, 0.8]], dtype=torch.float64)
    found = js_distance(p, q)
    assert found[0] == pytest.approx(1)
    assert found[1] == 0
    assert found[2] == pytest.approx(distance_by_hand([0.2, 0.3, 0.5], [0.1, 0.1, 0.8]))
    assert torch.allclose(js_distance(q, p), found)


def test_what_a_row_lacks_to_one_is_an_outcome_of_its_own():
    p, q = torch.tensor([[0.5, 0.0]]).double(), torch.tensor([[0.0, 0.25]]).double()
    assert js_distance(p, q) == pytest.approx(distance_by_hand([0.5, 0, 0.5], [0, 0.25, 0.75]))


def test_even_attention_gives_each_token_so_far_as_much():
    pattern = torch.tensor([[[1.0, 0.0, 0.0], [0.2, 0.8, 0.0], [0.3, 0.1, 0.2]]])
    expected = torch.tensor([[[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.2, 0.2, 0.2]]])
    torch.testing.assert_close(evened(pattern), expected)


def test_a_head_counts_as_used_by_any_of_its_nodes(attending):
    frame = used_heads(attending({(0, "attn_q", 5), (1, "attn_k", 1)}))
    assert frame[["layer", "head"]].values.tolist() == [[0, 0], [0, 1], [1, 0]]
    assert frame["keeps_q"].tolist() == [False, True, False]
    assert frame["keeps_k"].tolist() == [False, False, True]
    assert frame["keeps_v"].tolist() == [True, False, False]
    assert frame["keeps_z"].isna().all()


@pytest.mark.parametrize("sinks", [False, True])
def test_distances_are_those_of_prompts_run_one_at_a_time(attending, sinks):
    whole = attending({(0, "attn_q", 1), (0, "attn_k", 1)}, use_attention_sinks=sinks)
    found = head_patterns(whole)
    (layer, head), *_ = found.heads[["layer", "head"]].values.tolist()
    circuit = slow_patterns(whole, layer, whole.circuit.hooks())
    model = slow_patterns(whole, layer, [])
    for row, (mine, theirs) in enumerate(zip(circuit, model, strict=True)):
        by_query, even = [], []
        for query in range(mine.shape[1]):
            p, q = (x[head, query, : query + 1].tolist() for x in (mine, theirs))
            rest = max(0.0, 1 - sum(q))
            by_query.append(distance_by_hand([*p, max(0.0, 1 - sum(p))], [*q, rest]))
            even.append(distance_by_hand([*[sum(q) / len(q)] * len(q), rest], [*q, rest]))
        # roots of what is nearly zero
        assert float(found.js[0, row]) == pytest.approx(sum(by_query) / len(by_query), abs=1e-3)
        assert float(found.js_last[0, row]) == pytest.approx(by_query[-1], abs=1e-3)
        assert float(found.uniform[0, row]) == pytest.approx(sum(even) / len(even), abs=1e-3)
        assert float(found.uniform_last[0, row]) == pytest.approx(even[-1], abs=1e-3)
    assert float(found.js.mean()) > 0.02


def test_effects_of_patterns_are_what_small_steps_away_from_even_attention_give(attending):
    whole = attending({(0, "attn_q", 1), (0, "attn_k", 1)})
    full = patterns(whole, [0], ())
    found = pattern_effects(whole, full)[0]
    for head, query in ((0, 2), (0, 4), (1, 3)):
        step = 1e-2 * (full[0][:, head, query] - evened(full[0][:, head])[:, query]).float()

        def nudge(x, hook=None, *, sign, step=step, at=(head, query)):
            x = x.clone()
            x[:, at[0], at[1]] += sign * step
            return x

        up, down = (
            task_logit_diffs(
                whole.model, whole.batch,
                [*whole.circuit.hooks(),
                 ("blocks.0.attn.hook_pattern", lambda x, hook=None, s=s: nudge(x, sign=s))],
            ).detach()
            for s in (1, -1)
        )  # fmt: skip
        torch.testing.assert_close(
            found[:, head, query], ((up - down) / 2e-2).abs().double(), atol=2e-3, rtol=2e-2
        )
    assert float(found[:, 0].max()) > 0.01


def test_where_no_kept_node_reads_a_head_its_pattern_is_worth_nothing(attending):
    whole = attending()
    found = pattern_effects(whole, patterns(whole, [1], ()))
    assert float(found[1].max()) < 1e-6


def test_a_head_without_queries_and_keys_attends_evenly(attending):
    whole = attending()
    found = head_patterns(whole)
    torch.testing.assert_close(found.js, found.uniform, atol=1e-3, rtol=0)
    assert float(found.js.mean()) > 0.02


def test_a_circuit_of_everything_attends_as_the_model_does(attending):
    whole = attending()
    kept = torch.ones_like(whole.circuit.kept)
    found = head_patterns(replace(whole, circuit=replace(whole.circuit, kept=kept)))
    assert len(found.heads) == 4
    assert float(found.js.max()) == 0


def test_heads_of_a_dense_model_keep_what_is_no_node(dense_planted, marks, random_tokens):
    model, _ = dense_planted
    heads = circuit_of_heads(model, "marked", [(0, 0), (1, 3)], random_tokens)
    found = head_patterns(under_test(model, heads, marks, EvaluationConfig(pairs=4)))
    assert found.heads[["layer", "head"]].values.tolist() == [[0, 0], [1, 3]]
    assert found.heads["keeps_z"].all()
    assert found.heads["keeps_q"].isna().all()
    assert isinstance(found.heads["keeps_q"].dtype, pd.BooleanDtype)
    assert float(found.js[0].max()) < 1e-3  # nothing before the first layer was removed
    assert found.missing == ()
