"""Attention scores by pairs."""

import pytest

from tests.tracing.conftest import dictionaries, tl_model
from tests.tracing.explicit import Explicit


def score_of(model, prompt, layer, head, query, key) -> float:
    _, cache = model.run_with_cache(prompt)
    rotary = f"blocks.{layer}.attn.hook_rot_q" in cache
    names = [f"blocks.{layer}.attn.hook_{'rot_' * rotary}{x}" for x in "qk"]
    q, k = (cache[name][0].detach() for name in names)
    return float(q[query, head] @ k[key, head * k.shape[1] // q.shape[1]]) / 2  # d_head is 4


def test_pairs_and_marginals_sum_to_the_score(any_model, spliced, prompt) -> None:
    from tl_sparse.tracing import AttentionScore, Gate, trace, trace_qk

    splice = spliced(any_model)
    found = trace_qk(splice, prompt, 1, 2, query=4, key=1)
    score = score_of(any_model, prompt, 1, 2, 4, 1)
    assert found.score == pytest.approx(score, abs=1e-10)
    assert float(found.pairs.sum()) == pytest.approx(score, abs=1e-10)
    assert found.queries["marginal"].sum() == pytest.approx(score, abs=1e-10)
    assert found.keys["marginal"].sum() == pytest.approx(score, abs=1e-10)
    # biases are parts of both
    assert {"feature", "error", "bias", "position"} <= set(found.queries["kind"])
    # the marginals are what tracing the score from either side says of direct parents
    for side, table in (("query", found.queries), ("key", found.keys)):
        graph = trace(splice, prompt, AttentionScore(1, 2, 4, 1, side=side), Gate.off())
        edges = graph.edges[graph.edges["target"] == graph.root].set_index("source")["weight"]
        assert edges.to_dict() == pytest.approx(table.set_index("id")["marginal"].to_dict())


def test_pairs_are_those_worked_out_by_hand(any_model, spliced, prompt) -> None:
    from tl_sparse.tracing import trace_qk

    found = trace_qk(spliced(any_model), prompt, 1, 2, query=4, key=1)
    by_hand = Explicit(any_model, dictionaries(), prompt)
    parts = by_hand.normed("blocks.1.ln1", by_hand.residual(1), True)
    W_Q, W_K = (by_hand.weights[f"blocks.1.attn.W_{x}"][2].detach() for x in "QK")
    pairs = found.to_dataframe()
    features = pairs[~pairs["query"].str.contains("bias") & ~pairs["key"].str.contains("bias")]
    assert len(features) > 50
    for row in features.head(60).itertuples():
        expected = float((parts[row.query] @ W_Q) @ (parts[row.key] @ W_K)) / 2
        assert row.contribution == pytest.approx(expected, abs=1e-10)
        assert row.query.split("/")[1] == "4"
        assert row.key.split("/")[1] == "1"


@pytest.mark.parametrize("options", [
    {"positional_embedding_type": "rotary", "rotary_dim": 4}, {"n_key_value_heads": 2},
])  # fmt: skip
def test_rotary_and_grouped_keys(prompt, options) -> None:
    from tl_sparse.compat import HAS_HOOKED_TRANSFORMER
    from tl_sparse.tracing import Splice, trace_qk

    if not HAS_HOOKED_TRANSFORMER:
        pytest.skip("the native TransformerBridge is GPT-2 only")
    model = tl_model(**options)
    found = trace_qk(Splice(model, dictionaries()), prompt, 1, 3, query=5, key=2)
    score = score_of(model, prompt, 1, 3, 5, 2)
    assert found.score == pytest.approx(score, abs=1e-10)
    assert float(found.pairs.sum()) == pytest.approx(score, abs=1e-9)


def test_what_cannot_be_traced_is_refused(own_model, spliced, prompt) -> None:
    from tl_sparse.tracing import Freeze, trace_qk

    with pytest.raises(ValueError, match="strict"):
        trace_qk(spliced(own_model, freeze=Freeze.compat()), prompt, 0, 0)
    with pytest.raises(ValueError, match="layers 0 to 1"):
        trace_qk(spliced(own_model), prompt, 2, 0)
    with pytest.raises(ValueError, match="4 heads"):
        trace_qk(spliced(own_model), prompt, 1, 4)
    with pytest.raises(ValueError, match="after"):
        trace_qk(spliced(own_model), prompt, 1, 0, query=1, key=2)
