"""Edges between heads scored by running the model, where the edges are known."""

import pytest
import torch

from tl_sparse.ground_truth import known_heads
from tl_sparse.heads import PromptPairs, dataset_of, edge_baseline
from tl_sparse.heads.edge_baselines import EDGE_METHODS
from tl_sparse.nodes import path_patch


@pytest.fixture(scope="module")
def known():
    """Compiled induction: one of 36 edges."""
    return known_heads("compiled induction", 3)


@pytest.fixture(scope="module")
def pairs(known):
    """Two prompts and their hard negatives."""
    return PromptPairs.from_dataset(dataset_of(known, 2))


@pytest.mark.parametrize("method", EDGE_METHODS)
def test_the_true_edge_comes_first(known, pairs, method):
    found = edge_baseline(known.model, pairs, method)
    judged = found.agreement(known.edges)
    assert len(judged.true) == 36
    assert judged.auc == 1
    best = found.to_dataframe().iloc[0]
    assert (best["source"], best["target"]) == tuple(f"L{at}H{head}" for at, head in known.heads)
    assert found.named == []
    assert found.method == method


def test_path_patching_is_one_run_an_edge(small_model, tokens):
    model = small_model("standard")
    pairs = PromptPairs.of(model, tokens, tokens.flip(0).clone(), [5, 6], [7, 8])
    found = edge_baseline(model, pairs, "path patching").scores
    assert bool(found[:, :4].isnan().all())
    alone = path_patch(
        model, pairs.clean, pairs.corrupted, "L0H1.z", [["L1H2.q", "L1H2.k", "L1H2.v"]],
        positions=None, attention="free",
    ).effects  # fmt: skip
    assert float(found[1, 6]) == pytest.approx(float(alone.mean().abs()), rel=1e-4)


def test_to_first_order_methods_agree_on_a_small_change(small_model, tokens):
    """Values alone, and a corrupted prompt that differs in the last word's embedding by little."""
    model = small_model("attn_only", normalization_type="none").double()
    with torch.no_grad():
        model.embed.W_E[9] = model.embed.W_E[8] + 1e-4 * torch.randn(16).double()
    clean = tokens.clone()
    clean[:, 3] = 8
    corrupted = clean.clone()
    corrupted[:, 3] = 9
    pairs = PromptPairs.of(model, clean, corrupted, [5, 6], [7, 8])
    whole = edge_baseline(model, pairs, "path patching").scores[:4, 4:]
    gradient, integrated = (
        edge_baseline(model, pairs, method).scores[:4, 4:] for method in ("EAP", "EAP-IG")
    )
    torch.testing.assert_close(gradient, integrated, rtol=1e-2, atol=1e-9)
    # the three inputs together move no further than three times the one that moves it most
    assert bool((whole <= 3.03 * gradient + 1e-9).all())


def test_what_cannot_be_scored_is_refused(known, pairs, small_model, tokens):
    with pytest.raises(ValueError, match="choose from path patching, EAP"):
        edge_baseline(known.model, pairs, "guess")
    model = small_model(n_layers=1)
    one = PromptPairs.of(model, tokens, tokens.flip(0).clone(), [5, 6], [7, 8])
    with pytest.raises(ValueError, match="in one layer"):
        edge_baseline(model, one, "EAP")
